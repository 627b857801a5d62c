"""Checks that an artifact matches its recipe: names, shapes, finite values, bytes of the sources, model class.

Changes nothing. Imports torch last, and only for the model class and the tokenizer of a built artifact.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from frankenmoe.artifact.folder import Artifact, check_no_stray, small_hashes
from frankenmoe.build.target import planned, target_of
from frankenmoe.checkpoint.bounds import surely_fits
from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.checkpoint.reader import map_bytes, open_checkpoint
from frankenmoe.checkpoint.tensors import FLOATS, TensorRef, TensorWrite
from frankenmoe.checkpoint.values import blocks, check_finite
from frankenmoe.counted import counted
from frankenmoe.errors import ArtifactError
from frankenmoe.planning import Plan
from frankenmoe.planning.recall import facts
from frankenmoe.progress import SILENT, Progress
from frankenmoe.subject import Subject, open_subject
from frankenmoe.system import read_ahead

DAMAGED = "the folder was changed or damaged after the build; build it again"
SAMPLE = 2**16  # bytes compared of each copied tensor if sampled
Listener = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Check:
    """A passed check: what was checked, and how much of it."""

    what: str
    found: str


def verify(what: Subject | Artifact | str | Path, *, progress: Progress = SILENT) -> tuple[Check, ...]:
    """Checks every byte of an artifact against its sources.

    Returns the passed checks. Raises ArtifactError or NumericsError for the first failure, PlanError for a recipe.
    """
    subject = open_subject(what)
    artifact, made = subject.need_artifact(hint="give an artifact's folder"), subject.plan
    for key, value in facts(made).items():
        if artifact.record.get(key) != value:
            raise ArtifactError(
                f"the record of {artifact.folder} has {key} {artifact.record.get(key)!r:.60}, but its recipe gives "
                f"{value!r:.60}",
                hint="the record was edited; build the artifact again",
            )
    files = (*made.source_files, *made.deciding_files)
    checks = [Check("sources", f"{counted(len(files), 'file')} unchanged"), _small_files(artifact)]
    if artifact.form == "virtual":
        progress.start("comparing", sum(file.stat().st_size for file in made.source_files), "B")
        return (*checks, _hashes(artifact, made, progress.advance), *prove_routers(made, artifact.folder))
    progress.start("comparing", sum(write.nbytes for write in made.writes), "B")
    return (
        *checks,
        *prove_routers(made, artifact.folder),
        *prove_body(made, artifact.folder, on_bytes=progress.advance),
        *prove_agreement(made, artifact.folder),
    )


def _small_files(artifact: Artifact) -> Check:
    """Compares the artifact's configs, index and tokenizer with their recorded SHA-256."""
    recorded, found = artifact.record["files"], small_hashes(artifact.folder)
    for name, was in recorded.items():
        if found.get(name) != was:
            raise ArtifactError(
                f"{artifact.folder / name} {'was edited' if name in found else 'was removed'} after the build",
                hint="restore the file, or build the artifact again",
            )
    if artifact.form == "built":
        check_no_stray(artifact.folder)
    return Check("files", f"{counted(len(recorded), 'small file')} unchanged")


def prove_body(plan: Plan, folder: Path, *, on_bytes: Listener, sampled: bool = False) -> tuple[Check, ...]:
    """Compares the built weights with the plan and the sources.

    `sampled` compares one block per tensor, and the config with the planned one, on which transformers was asked ahead.
    """
    checkpoint = open_checkpoint(folder)
    tensors = checkpoint.tensors
    _compare_headers(plan, tensors)
    checks = [Check("headers", f"{counted(len(tensors), 'tensor')} with the planned names, shapes and types")]
    if sampled:
        _compare_config(plan, checkpoint.config, folder)
        _read_ahead(tensors.values())
    wanted = _sampled_once(plan.writes, tensors) if sampled else plan.writes
    compared = sum(_compare_bytes(write, tensors[write.name], sampled=sampled, on_bytes=on_bytes) for write in wanted)
    extent = "one block of each tensor, " if sampled else "every byte, "
    return (*checks, Check("values", f"{extent}{compared:,} bytes, finite and equal to the sources"))


def prove_agreement(plan: Plan, folder: Path) -> tuple[Check, ...]:
    """Compares the built folder with transformers: the tensors of its class, the ids that it gives to hard texts.

    Imports torch and transformers. No checks if no class loads the format; none of texts if the base has no tokenizer.
    """
    from frankenmoe.build.agreement import compare_class
    from frankenmoe.build.tokens import compared_texts

    target = target_of(plan)
    if target.config is None:
        return ()
    found = {name: (ref.dtype, ref.shape) for name, ref in open_checkpoint(folder).tensors.items()}
    checks = (Check("class", compare_class(folder, found, where="the folder", hint=DAMAGED)),)
    count = compared_texts(target, folder)
    return (
        checks if count is None else (*checks, Check("tokenizer", f"the base's ids for {counted(count, 'hard text')}"))
    )


def _sampled_once(writes: Iterable[TensorWrite], tensors: Mapping[str, TensorRef]) -> Iterator[TensorWrite]:
    """The writes; one that computes the same as an earlier one becomes a copy of that one's result."""
    first: dict[object, TensorRef] = {}
    for write in writes:
        found = first.setdefault((write.inputs, write.steps, write.dtype, write.shape), tensors[write.name])
        again = not write.is_copy and found is not tensors[write.name]
        yield replace(write, inputs=(found,), steps=()) if again else write


def prove_sources(plan: Plan, progress: Progress = SILENT) -> None:
    """Checks that all values that a virtual MoE will read are finite and fit the stored type."""
    progress.start("checking", plan.bill.memory_virtual, "B")
    leaves = [leaf for node in (*plan.nodes, *plan.shared) for leaf in node.leaves()]
    ffn = (write for leaf in leaves for row in leaf.ffn.values() for write in row.values())
    for write in dict.fromkeys((*plan.backbone, *ffn)):
        if write.steps and surely_fits(write):
            progress.advance(write.nbytes)
            continue
        for block in blocks(write):
            progress.advance(block.size)
    for lora in (lora for leaf in leaves for row in leaf.loras.values() for lora in row.values()):
        check_finite(lora.a)
        check_finite(lora.b)


def prove_routers(plan: Plan, folder: Path) -> tuple[Check, ...]:
    """Checks that every gate exists, has the planned shape and is finite. Later stages may have changed its values."""
    routers = open_artifact_routers(folder)
    if {name: ref.shape for name, ref in routers.items()} != dict(plan.routers):
        odd = sorted(set(routers) ^ set(plan.routers)) or [
            name for name in routers if routers[name].shape != plan.routers[name]
        ]
        raise ArtifactError(
            f"the routers file of {folder} does not match its recipe: expected "
            f"{counted(len(plan.routers), 'gate')}, found {len(routers)}; the first difference is {odd[0]}",
            hint=DAMAGED,
        )
    for ref in routers.values():
        if ref.dtype not in FLOATS:
            raise ArtifactError(f"router {ref.name} is stored as {ref.dtype}, expected floats", hint=DAMAGED)
        check_finite(ref)
    return (Check("routers", f"{counted(len(routers), 'gate')} of the planned shape, all finite"),)


def open_artifact_routers(folder: Path) -> dict[str, TensorRef]:
    """The routers of a folder that may be unfinished."""
    return Artifact(folder, {}).routers


def _hashes(artifact: Artifact, made: Plan, on_bytes: Listener) -> Check:
    for file, was in zip(made.source_files, artifact.record["sources"], strict=True):
        if sha256(file, on_bytes=on_bytes) != was["sha256"]:
            raise ArtifactError(
                f"{file} has another SHA-256 than recorded in {artifact.folder}",
                hint="a source has changed; restore it, or build the artifact again",
            )
    return Check("values", f"every byte of {counted(len(made.source_files), 'source file')}, by SHA-256")


def _compare_headers(plan: Plan, tensors: Mapping[str, TensorRef]) -> None:
    wanted = planned(plan)
    found = {name: (ref.dtype, ref.shape) for name, ref in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ArtifactError(
                f"tensor {name} should be {wanted.get(name, 'absent')}, found {found.get(name, 'nothing')}",
                hint=DAMAGED,
            )


def _compare_config(plan: Plan, config: Mapping[str, object], folder: Path) -> None:
    if config != json.loads(json.dumps(plan.config)):
        raise ArtifactError(f"{folder / 'config.json'} is not the planned config", hint=DAMAGED)


def _read_ahead(tensors: Iterable[TensorRef]) -> None:
    """Requests all samples at once: they were written past the page cache, so each read would wait for the disk."""
    by_file: dict[Path, list[TensorRef]] = {}
    for ref in tensors:
        by_file.setdefault(ref.file, []).append(ref)
    for file, refs in by_file.items():
        with file.open("rb") as opened:
            for ref in refs:
                read_ahead(opened.fileno(), ref.start, min(SAMPLE, ref.nbytes))


def _compare_bytes(write: TensorWrite, ref: TensorRef, *, sampled: bool, on_bytes: Listener) -> int:
    """Computes a write again and compares it with the file, block by block. Returns the number of bytes compared."""
    done = 0
    for wanted in _blocks(write, sampled=sampled):
        found = map_bytes(ref)[done : done + wanted.size]
        if not np.array_equal(found, wanted):
            at = done + int(np.argmax(found != wanted))
            raise ArtifactError(
                f"tensor {write.name} in {ref.file} differs from its source at byte {at} of {write.nbytes}",
                hint=DAMAGED,
            )
        done += wanted.size
        on_bytes(wanted.size)
    return done


def _blocks(write: TensorWrite, *, sampled: bool) -> Iterator[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    if not sampled:
        return blocks(write)
    if write.copied is not None:
        return iter([map_bytes(write.copied)[:SAMPLE]])
    return islice(blocks(write), 1)
