"""One expert of an artifact as a dense checkpoint again: the MoE's backbone with that expert's FFN in every layer."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from frankenmoe.artifact import Artifact, open_artifact, partial_folder, refuse_occupied, write_json
from frankenmoe.checkpoint.reader import open_checkpoint
from frankenmoe.checkpoint.tensors import TensorRef, TensorWrite
from frankenmoe.checkpoint.writer import free_bytes, write_atomic, write_shard
from frankenmoe.errors import ArtifactError
from frankenmoe.families import FAMILIES, FORMATS
from frankenmoe.planning import ExpertNode
from frankenmoe.planning.files import TOKENIZER_FILES
from frankenmoe.planning.recall import plan_of
from frankenmoe.progress import SILENT, Progress
from frankenmoe.suggest import did_you_mean


def extract(folder: str | Path, out: str | Path, *, expert: str, progress: Progress = SILENT) -> Path:
    """Writes a dense checkpoint that stock transformers loads into `out`, whole or not at all.

    `expert` is a name, "group/leaf" for a nested one, or a number counted from 0. A built artifact is enough by itself,
    a virtual one needs its sources. Adapters, noise and residual scale of the expert are folded in.
    """
    artifact = open_artifact(Path(folder))
    out = Path(os.path.realpath(out))
    refuse_occupied(out)
    writes, small = _from_built(artifact, expert) if artifact.form == "built" else _from_plan(artifact, expert)
    need = sum(write.nbytes for write in writes)
    partial = partial_folder(out)
    if partial.exists():
        raise ArtifactError(f"{partial} is in the way", hint="it is left from a run that was killed: remove it")
    partial.mkdir(parents=True)
    try:
        if need > free_bytes(partial):
            raise ArtifactError(
                f"{out.parent} has {free_bytes(partial):,} bytes free, the dense model needs {need:,}",
                hint="choose a folder on another disk",
            )
        progress.start("writing", need, "B")
        write_shard(
            partial / "model.safetensors", writes, metadata={"format": "pt"}, on_bytes=progress.advance, scanned=set()
        )
        write_json(partial / "config.json", _config(artifact))
        for file in small:
            write_atomic(partial / file.name, file.read_bytes())
        if out.is_dir():
            out.rmdir()
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _config(artifact: Artifact) -> dict[str, object]:
    """The base's own config, with the type that the weights have now."""
    base, dtype = dict(artifact.record["base_config"]), artifact.record["dtype"]
    return {**base, "dtype": dtype, "torch_dtype": dtype}


def _from_plan(artifact: Artifact, expert: str) -> tuple[list[TensorWrite], list[Path]]:
    made = plan_of(artifact)
    named = dict(_leaves(made.nodes, ""))
    node = named[_name(expert, list(named), artifact)]
    ffn = [node.folded(layer, suffix) for layer, row in enumerate(node.ffn) for suffix in row]
    return [*made.backbone, *ffn], list(made.small_files)


def _leaves(nodes: tuple[ExpertNode, ...], prefix: str) -> Iterator[tuple[str, ExpertNode]]:
    for node in nodes:
        if node.children:
            yield from _leaves(node.children, f"{prefix}{node.name}/")
        else:
            yield prefix + node.name, node


def _from_built(artifact: Artifact, expert: str) -> tuple[list[TensorWrite], list[Path]]:
    record, fmt = artifact.record, FORMATS[artifact.record["format"]]
    tensors = open_checkpoint(artifact.folder).tensors
    family = FAMILIES[record["base_config"]["model_type"]]
    index = record["experts"].index(_name(expert, record["experts"], artifact))
    take = _taker(artifact, tensors)
    backbone = [take(name, name) for name in family.shapes(family.backbone, record["base_config"])]
    ffn = [
        take(template.format(layer=layer, expert=index), f"model.layers.{layer}.mlp.{suffix}")
        for layer in range(family.dims(record["base_config"]).layers)
        for suffix, template in fmt.expert.items()
    ]
    small = [file for name in TOKENIZER_FILES if (file := artifact.folder / name).is_file()]
    return [*backbone, *ffn], small


def _taker(artifact: Artifact, tensors: dict[str, TensorRef]) -> Callable[[str, str], TensorWrite]:
    def take(stored: str, name: str) -> TensorWrite:
        if stored not in tensors:
            raise ArtifactError(f"{artifact.folder} has lost its tensor {stored}", hint="build the artifact again")
        ref = tensors[stored]
        return TensorWrite(name, ref.dtype, ref.shape, (ref,))

    return take


def _name(expert: str, names: list[str], artifact: Artifact) -> str:
    if expert in names:
        return expert
    if expert.isdecimal() and int(expert) < len(names):
        return names[int(expert)]
    raise ArtifactError(f"{artifact.folder} has no expert {expert!r}", hint=did_you_mean(expert, names))
