"""Heals every expert of a plan into the folder of an unfinished artifact; a killed run keeps the experts it has done.

Shape suffixes: I inputs, O outputs of a down projection, R rank.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from frankenmoe.artifact.healing import HealedPart, HealReport
from frankenmoe.artifact.reports import versions
from frankenmoe.backbone.expert import HealedExpert, cost, heal_expert
from frankenmoe.backbone.heal import RIDGES
from frankenmoe.checkpoint.header import read_header
from frankenmoe.checkpoint.links import ADAPTERS
from frankenmoe.checkpoint.tensors import LowRank, Noise, Scale, TensorRef, TensorWrite
from frankenmoe.checkpoint.values import materialize, values
from frankenmoe.checkpoint.writer import write_atomic, write_shard
from frankenmoe.counted import counted
from frankenmoe.data.blocks import joined_spans
from frankenmoe.data.given import Texts
from frankenmoe.errors import PlanError, RecipeError
from frankenmoe.gates.texts import OwnText, read_texts
from frankenmoe.moe.dense import load_tokenizer, torch_dtype
from frankenmoe.moe.load import residual_scale
from frankenmoe.moe.processes import is_main, once
from frankenmoe.moe.written import Terms, adapter_names, source_path, write_adapter
from frankenmoe.planning import ExpertNode, Plan
from frankenmoe.planning.fitting import HELD_OUT_DATA
from frankenmoe.planning.healing import down_suffix
from frankenmoe.planning.names import named_experts
from frankenmoe.planning.trained import TRAINED, trained_name
from frankenmoe.progress import Progress
from frankenmoe.recipe.moved import moved_recipe
from frankenmoe.recipe.sections import HealSettings
from frankenmoe.suggest import did_you_mean

REPORT = "heal.json"
SCAFFOLD = "healing"  # the finished experts of a run that has not ended
LEAST = 8  # blocks of text, two of which are held out
SHARE, ENOUGH = 0.3, 24  # held out is this share of the blocks, or so many if that is less, but at least a tenth
NO_DATA = "it has no data"


@dataclass(frozen=True)
class Patient:
    """A leaf, its name ("group/leaf" if nested), and its text; or the reason why it is not healed."""

    name: str
    leaf: ExpertNode
    text: OwnText | None
    reason: str = ""


def patients_of(plan: Plan, settings: HealSettings, *, data: Texts) -> tuple[Patient, ...]:
    """Every routed leaf of a plan. `data` replaces the recipe's data of the experts that it names.

    Raises PlanError if no expert can be healed, SourceError for text that cannot be read or is too short.
    """
    tokenizer = load_tokenizer(plan.base.folder)
    entries = {name: expert for name, _, expert in named_experts(plan.recipe.experts)}
    for name in data:
        if name not in entries:
            raise RecipeError(
                f"data is given for {name!r}, but there is no expert {name!r}", hint=did_you_mean(name, entries)
            )
    found = []
    for name, _, node in named_experts(plan.nodes):
        if node.children:
            continue
        reason = _reason(node) or ("" if name in data or entries[name].data else NO_DATA)
        found.append(Patient(name, node, None if reason else _text(plan, tokenizer, name, settings, data), reason))
    if not any(patient.text for patient in found):
        raise PlanError(
            f"no expert of {plan.recipe.origin} can be healed: {found[0].name}, for example, because {found[0].reason}",
            hint="give each expert text of its own: data in the recipe, or --data EXPERT=FILE"
            if found[0].reason == NO_DATA
            else "leave healing out",
        )
    return tuple(found)


def _reason(leaf: ExpertNode) -> str:
    """Why an expert cannot be healed; "" if it can."""
    if any(isinstance(step, Noise) for row in leaf.ffn.values() for write in row.values() for step in write.steps):
        return "its weights have noise, which healing would remove"
    if any(down_suffix(leaf, layer) is None for layer in leaf.ffn):
        return f"none of {', '.join(next(iter(leaf.ffn.values())))} is a known down projection"
    return ""


def _text(plan: Plan, tokenizer: Any, name: str, settings: HealSettings, data: Texts) -> OwnText:
    given = {name: data[name]} if name in data else None
    (text,) = (
        text
        for text in read_texts(
            plan, tokenizer, tokens=settings.tokens, length=settings.block, data=given, folder=Path.cwd(), only=name
        )
        if not text.negative
    )
    blocks = len(text.kept) + len(text.held)
    if blocks < LEAST:
        raise PlanError(
            f"the data of expert {name!r} has {counted(blocks, 'block')} of {counted(settings.block, 'token')}, "
            f"expected at least {LEAST} to heal from",
            hint="give more text or a smaller block; from 10,000 tokens on it pays",
        )
    return ending(text)


def ending(text: OwnText) -> OwnText:
    """The same text with its end held out. What fits hold out is not kept either.

    Blocks between kept ones would not do. They belong to the same documents, so a change that helps only in these
    documents would look good.
    """
    blocks = sorted((*text.kept, *text.held), key=lambda block: block.span)
    start = len(blocks) - max(round(len(blocks) * HELD_OUT_DATA), min(round(len(blocks) * SHARE), ENOUGH))
    fits_hold = {block.span for block in text.held}
    own = tuple(block for block in blocks[:start] if block.span not in fits_hold)
    return replace(text, kept=own, held=tuple(blocks[start:]))


def heal_all(
    plan: Plan,
    patients: Sequence[Patient],
    settings: HealSettings,
    partial: Path,
    *,
    out: Path,
    device: torch.device,
    dtype: str | None,
    progress: Progress,
) -> tuple[dict[str, Any], HealReport] | None:
    """Writes healed experts into `partial`, which will become `out`; returns the recipe that names them, and a report.

    One parent is in memory at a time. Experts that an earlier run with this folder has finished are not healed again.
    The processes of a launcher share the work on each expert; only the first one writes, the others get None.
    """
    scaffold = partial / SCAFFOLD
    tried = [patient for patient in patients if patient.text]
    progress.start("healing", sum(_cost(patient) for patient in tried), "tokens")
    for patient in tried:
        if once((scaffold / f"{_stem(patient)}.json").exists):
            progress.advance(_cost(patient))
        else:
            progress.note(patient.name)
            _heal_one(plan, patient, settings, scaffold, device=device, dtype=dtype, progress=progress)
    progress.note("")
    return _written(plan, patients, settings, partial, out=out) if is_main() else None


def _written(
    plan: Plan, patients: Sequence[Patient], settings: HealSettings, partial: Path, *, out: Path
) -> tuple[dict[str, Any], HealReport]:
    """Writes what is kept, and the report, from what is in the scaffold."""
    scaffold = partial / SCAFFOLD
    parts = [
        HealedPart.model_validate(json.loads((scaffold / f"{_stem(patient)}.json").read_bytes()))
        if patient.text
        else HealedPart(name=patient.name, kept=False, reason=patient.reason)
        for patient in patients
    ]
    table, size = _write_kept(plan, patients, parts, partial, out=out)
    shutil.rmtree(scaffold)
    report = HealReport(
        settings=settings.to_dict(),
        data={patient.name: list(patient.text.origin) for patient in patients if patient.text},
        experts=tuple(parts),
        bytes=size,
        recipe_digest=plan.recipe.digest,
        versions=versions(),
    )
    report.write(partial / REPORT)
    return table, report


def _cost(patient: Patient) -> int:
    assert patient.text is not None
    return cost(patient.text.kept, patient.text.held)


def _stem(patient: Patient) -> str:
    return "-".join(map(str, patient.leaf.path))


def _heal_one(
    plan: Plan,
    patient: Patient,
    settings: HealSettings,
    scaffold: Path,
    *,
    device: torch.device,
    dtype: str | None,
    progress: Progress,
) -> None:
    """Heals one expert and writes its tensors, then its row of the report, into `scaffold`."""
    text = patient.text
    assert text is not None
    healed = heal_expert(
        plan,
        patient.leaf,
        kept=text.kept,
        held=text.held,
        ridges=(settings.ridge,) if settings.ridge else RIDGES,
        rank=settings.rank,
        device=device,
        dtype=dtype,
        on_tokens=progress.advance,
    )
    if not is_main():
        return
    part = HealedPart(
        name=patient.name,
        kept=healed.step > 0,
        tokens=sum(len(block.ids) for block in text.kept),
        block=len(text.held[0].ids),
        spans=tuple(joined_spans(text.kept)),
        held_out_tokens=sum(block.targets for block in text.held),
        step=healed.step,
        parent=healed.parent,
        before=healed.before,
        after=healed.after,
        noise=healed.noise,
        ridges=tuple(change.ridge for change in healed.changes if change.left < 1),
        left=tuple(change.left for change in healed.changes),
    )
    scaffold.mkdir(exist_ok=True)
    file = scaffold / _stem(patient)
    if part.kept:
        tensors = dict(_tensors(plan, patient.leaf, healed))
        write_atomic(file.with_suffix(".safetensors"), save(tensors, metadata={"format": "pt"}))
    write_atomic(file.with_suffix(".json"), part.model_dump_json().encode())


def _tensors(plan: Plan, leaf: ExpertNode, healed: HealedExpert) -> Iterator[tuple[str, torch.Tensor]]:
    """What replaces or changes the down projections: whole tensors under their names in the file, or adapters.

    The plan applies a leaf's residual scale, and its own adapter, to what is stored.
    """
    for layer, change in zip(leaf.ffn, healed.changes, strict=True):
        suffix = down_suffix(leaf, layer)
        assert suffix is not None
        write = leaf.ffn[layer][suffix]
        factor = healed.step / residual_scale(write)
        if change.factors is not None:
            b_OR, a_RI = (each.cpu() for each in change.factors)
            if change.whole_OI.shape != write.shape:  # stored as [I, O]
                b_OR, a_RI = a_RI.T, b_OR.T
            name = write.name.removesuffix(".weight")
            yield f"{name}/a", a_RI.contiguous()
            yield f"{name}/b", (b_OR * factor).contiguous()
        elif change.left < 1 and healed.step:
            stored = _as_stored(write)
            whole = (change.whole_OI if change.whole_OI.shape == write.shape else change.whole_OI.T).cpu()
            changed = (stored + factor * whole).to(torch_dtype(plan.dtype)).contiguous()
            yield trained_name(leaf.path, write.name), changed


def _as_stored(write: TensorWrite) -> torch.Tensor:
    """A leaf's matrix before its residual scale, in float32."""
    steps = tuple(step for step in write.steps if not isinstance(step, Scale))
    plain = TensorWrite(write.name, "F32", write.shape, write.inputs, steps)
    return torch.from_numpy(materialize(plain)).view(torch.float32).view(write.shape)


def _write_kept(
    plan: Plan, patients: Sequence[Patient], parts: Sequence[HealedPart], partial: Path, *, out: Path
) -> tuple[dict[str, Any], int]:
    """Writes the kept tensors beside those that the recipe's `trained` file holds; the recipe, and the bytes."""
    kept = [patient for patient, part in zip(patients, parts, strict=True) if part.kept]
    whole: dict[str, TensorRef] = {ref.name: ref for ref in plan.trained}
    adapters: dict[tuple[int, ...], dict[str, TensorRef]] = {}
    for patient in kept:
        refs = dict(read_header((partial / SCAFFOLD / _stem(patient)).with_suffix(".safetensors")))
        if any(name.endswith("/a") for name in refs):
            adapters[patient.leaf.path] = refs
        else:
            whole.update(refs)
    names = adapter_names(plan, list(adapters))
    leaves = {patient.leaf.path: patient.leaf for patient in kept}
    for path, refs in adapters.items():
        terms = _terms(leaves[path], refs)
        write_adapter(partial / ADAPTERS / names[path], terms, base=source_path(plan, path))
    if whole:
        writes = [TensorWrite(name, ref.dtype, ref.shape, (ref,)) for name, ref in sorted(whole.items())]
        write_shard(
            partial / TRAINED, writes, metadata={"format": "pt"}, on_bytes=lambda size: None, scanned=set[TensorRef]()
        )
    table = moved_recipe(plan.recipe, out=out, adapters={path: f"{ADAPTERS}/{name}" for path, name in names.items()})
    table.pop("trained", None)
    if whole:
        table["trained"] = TRAINED
    sizes = [ref.nbytes for name, ref in whole.items() if name not in {old.name for old in plan.trained}]
    return table, sum(sizes) + sum(ref.nbytes for refs in adapters.values() for ref in refs.values())


def _terms(leaf: ExpertNode, refs: Mapping[str, TensorRef]) -> Terms:
    """An expert's adapter with the changes beside its own terms, as A and B with scale 1."""
    own = {
        leaf.ffn[layer][suffix].name.removesuffix(".weight"): lora
        for layer, loras in leaf.loras.items()
        for suffix, lora in loras.items()
    }
    found: Terms = {name: _pair(lora) for name, lora in own.items()}
    for key in refs:
        name, _, letter = key.rpartition("/")
        if letter == "a":
            a_RI, b_OR = _values(refs[key]), _values(refs[f"{name}/b"])
            if name in found:
                a_RI, b_OR = torch.cat([found[name][0], a_RI]), torch.cat([found[name][1], b_OR], dim=1)
            found[name] = (a_RI, b_OR)
    return found


def _pair(lora: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    return _values(lora.a), _values(lora.b) * lora.scale


def _values(ref: TensorRef) -> torch.Tensor:
    return torch.from_numpy(values(ref))
