"""Artifact -> a dense checkpoint of one expert: the MoE's backbone with that expert's FFN in every layer."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from frankenmoe.artifact.folder import Artifact, become, check_disk, growing, refuse_occupied, write_json
from frankenmoe.checkpoint.jsonfile import small_bytes
from frankenmoe.checkpoint.tensors import DTYPES, TensorWrite
from frankenmoe.checkpoint.weights import SINGLE
from frankenmoe.checkpoint.writer import write_atomic, write_shard
from frankenmoe.families import text_name
from frankenmoe.planning.files import TOKENIZER_FILES
from frankenmoe.planning.names import expert_called, named_experts
from frankenmoe.planning.parts import Parts
from frankenmoe.progress import SILENT, Progress
from frankenmoe.subject import Subject, open_subject


def extract(
    what: Subject | Artifact | str | Path, out: str | Path, *, expert: str, progress: Progress = SILENT
) -> Path:
    """Writes a dense checkpoint for stock transformers to `out`, completely or not at all.

    `expert` is a name, "group/leaf" if nested, or a number from 0. A virtual artifact needs its sources. Adapters,
    noise and residual scale of the expert are folded into the weights.
    """
    subject = open_subject(what)
    out = Path(os.path.realpath(out))
    refuse_occupied(out)
    parts = subject.parts
    writes = _writes(parts, expert, parts.folder if subject.built else Path(subject.origin))
    small = [file for name in TOKENIZER_FILES if (file := parts.folder / name).is_file()]
    need = sum(write.nbytes for write in writes)
    digest = hashlib.sha256(repr(writes).encode()).hexdigest()
    with growing(out, digest=f"{digest}/extract") as partial:
        check_disk(partial, need=need, hint="choose a folder on another disk")
        progress.start("writing", need, "B")
        write_shard(partial / SINGLE, writes, metadata={"format": "pt"}, on_bytes=progress.advance, scanned=set())
        write_json(partial / "config.json", _config(parts, writes[-1].dtype))
        for file in small:
            write_atomic(partial / file.name, small_bytes(file))
        become(partial, out)
    return out


def _config(parts: Parts, dtype: str) -> dict[str, object]:
    """The config of the base, with the dtype of the written weights."""
    name = DTYPES[dtype].name
    return {**parts.config, "dtype": name, "torch_dtype": name}


def _writes(parts: Parts, expert: str, folder: Path) -> list[TensorWrite]:
    """The backbone and one expert's FFNs with adapters folded in, under the names that files of its family have."""
    named = {name: node for name, _, node in named_experts(parts.nodes) if not node.children}
    node = named[expert_called(expert, list(named), where=folder)]
    writes = [*parts.backbone, *(node.folded(layer, suffix) for layer, row in node.ffn.items() for suffix in row)]
    stored = {inside: outside for outside, inside in parts.family.prefixes.items()} if parts.family else {}
    return [replace(write, name=text_name(write.name, stored)) for write in writes]
