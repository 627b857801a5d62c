"""What transformers must agree with before a plan is built: its sources, its tensors, its tokenizer.

A target can be written as JSON for another process, and has a key, since the answer depends on small files and versions
only. Does not import transformers.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from frankenmoe.artifact.reports import versions
from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.gates.cached import digest_of
from frankenmoe.planning import Plan
from frankenmoe.planning.sources import first_of_folders
from frankenmoe.planning.vocabulary import VOCAB

VERSION = 1  # increase it when the checks of build/agreement.py change
READERS = ("tokenizers", "sentencepiece", "tiktoken")  # packages that decide how a tokenizer is read
WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"})
HASHED = 2**26  # bytes; a larger file beside the weights is no tokenizer


@dataclass(frozen=True)
class Target:
    """`sources` are folders, each with the config that stands in the place of its own, or None.

    `tensors` maps names to (safetensors type, shape), `rows` are those of the embedding. Without a `config`, no class
    of transformers will load the result as it is: it is virtual, or for llama.cpp alone.
    """

    base: Path
    sources: tuple[tuple[Path, Mapping[str, Any] | None], ...]
    small_files: tuple[Path, ...]
    config: Mapping[str, Any] | None
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    rows: int
    trust_remote_code: bool

    def to_json(self) -> str:
        """The target as JSON text."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "Target":
        """The target that `to_json` wrote."""
        found = json.loads(text)
        found["base"] = Path(found["base"])
        found["small_files"] = tuple(map(Path, found["small_files"]))
        found["sources"] = tuple((Path(folder), config) for folder, config in found["sources"])
        found["tensors"] = {name: (dtype, tuple(shape)) for name, (dtype, shape) in found["tensors"].items()}
        return cls(**{each.name: found[each.name] for each in fields(cls)})

    def key(self) -> str | None:
        """Identifies the answer; None if it may depend on more: code of a source, or a transformers in development."""
        now = {**versions(), **{name: _version(name) for name in READERS}}
        if self.trust_remote_code or any("dev" in str(found) for found in now.values()):
            return None
        configs = [(sha256(folder / "config.json"), config) for folder, config in self.sources]
        facts = (self.config, {name: list(found) for name, found in self.tensors.items()}, self.rows)
        copied = [file.name for file in self.small_files]
        return digest_of(VERSION, now, configs, _small(self.base), copied, *facts)


def target_of(plan: Plan, *, virtual: bool = False) -> Target:
    """The target of a plan's built form, or of its virtual one, which transformers need not load as it is."""
    loads = not virtual and plan.fmt is not None and plan.fmt.loads_in_transformers
    return Target(
        base=plan.base.folder,
        sources=tuple(
            (source.folder, source.config if source.part else None) for source in first_of_folders(plan.sources)
        ),
        small_files=plan.small_files,
        config=plan.config if loads else None,
        tensors=planned(plan) if loads else {},
        rows=int(plan.base.config[VOCAB]),
        trust_remote_code=plan.trust_remote_code,
    )


def planned(plan: Plan) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (safetensors dtype, shape) of every tensor of the built form."""
    wanted = {write.name: (write.dtype, write.shape) for write in plan.writes}
    return wanted | {name: (plan.dtype, shape) for name, shape in plan.routers.items()}


def _small(folder: Path) -> list[tuple[str, int, str]]:
    """(name, bytes, SHA-256) of all files of a folder but weights: transformers finds tokenizers under many names."""
    files = (file for file in folder.iterdir() if file.suffix not in WEIGHTS and file.is_file())
    sized = sorted((file.name, file.stat().st_size) for file in files)
    return [(name, size, sha256(folder / name) if size <= HASHED else "") for name, size in sized]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
