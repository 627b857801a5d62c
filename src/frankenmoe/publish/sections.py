"""The sections of a card about how the model was made and how to use it, as Markdown.

A section without evidence returns the reason. Every number comes from the plan, the record or a report.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from frankenmoe.artifact.record import BACKBONE, BODY_STAGES, HEAL
from frankenmoe.artifact.reports import ExportReport, FileCheck, FitReport, TrainingReport
from frankenmoe.counted import counted
from frankenmoe.families.runtimes import in_vllm, source_type
from frankenmoe.planning.bill import billions
from frankenmoe.publish.facts import ExpertRow, Facts
from frankenmoe.publish.markdown import code, fenced, plain, sentence, table
from frankenmoe.publish.reports import Evidence
from frankenmoe.recipe import PROMPT_MODES, RANDOM_MODES
from frankenmoe.recipe.backbone import AVERAGE, BASE, GROUPS
from frankenmoe.recipe.gatemodes import DOMAIN_MODES, GATE_MODES
from frankenmoe.recipe.sections import SECTIONS

GIB = 2**30
LOCAL = "folder/of/this/repository"


@dataclass(frozen=True)
class Missing:
    """The reason why a section is left out, and the command that would fill it."""

    reason: str


def merged(facts: Facts, evidence: Evidence) -> str | Missing:
    """A row per expert."""
    if facts.adopted is not None:
        return _adopted(facts, facts.adopted)
    rows = [*_expert_rows(facts.experts), *_expert_rows(facts.shared, shared=True)]
    head = ("expert", "made of", "prompts", "data")
    return (
        f"{table(head, rows)}\n\nAn expert is the FFN of one parent, layer by layer. What surrounds the experts "
        f"(embeddings, attention, norms, head) {_backbone(facts)}.{_measured(facts)}{_healed(facts)}"
    )


def _adopted(facts: Facts, origin: Mapping[str, Any]) -> str:
    """Where a mixture that another program made comes from, as far as it is known, and a row per expert."""
    known = {row["name"]: row["made_from"] for row in origin.get("experts", ()) if row.get("made_from")}
    rows = [
        (f"{index} {plain(row.name)}", code(facts.names.short(known[row.name])) if row.name in known else "not known")
        for index, row in enumerate(facts.experts)
    ]
    rows += [(f"shared: {plain(row.name)}", "not known") for row in facts.shared]
    saved = f", and its files were saved by {plain(str(origin['saved_by']))}" if origin.get("saved_by") else ""
    paired = " The experts were matched with those of a recipe by content." if known else ""
    return (
        f"{table(('expert', 'made from'), rows)}\n\nAnother program made or trained this mixture{saved}; frankenmoe "
        f"adopted it. Its experts and what surrounds them are its own.{paired}"
    )


def _measured(facts: Facts) -> str:
    """What was tried for the backbone and what each gave; empty if it was not measured."""
    tried = [row for stage in facts.stages if stage.get("stage") == BACKBONE for row in stage.get("tried", ())]
    if not tried:
        return ""
    best = sorted((row for row in tried if not row.get("given_up")), key=lambda row: row["mean"])
    given_up = [plain(row["backbone"]) for row in tried if row.get("given_up")]
    rows = ", ".join(f"{plain(row['backbone'])} {row['mean']:.4f}" for row in best)
    rest = f" Far behind after a quarter of that text: {'; '.join(given_up)}." if given_up else ""
    return (
        " It was chosen by the loss on held-out text of the experts, with each text's own expert in every layer (nats "
        f"per token): {rows}.{rest}"
    )


def _healed(facts: Facts) -> str:
    """Which experts were refitted to the backbone, and what that gave; empty if none was."""
    rows = [stage for stage in facts.stages if stage.get("stage") == HEAL and stage.get("kept")]
    return "".join(
        f" The down projections of {', '.join(map(plain, row['kept']))} were then refitted to that backbone in closed "
        "form. Mean loss on text held out from the refit, own expert forced: {before:.4f} nats per token before, "
        "{after:.4f} after, {parent:.4f} of the parents.".format(**row["held_out_loss"])
        for row in rows
    )


def _backbone(facts: Facts) -> str:
    """Where the backbone comes from, in words; a group of tensors at a time if the recipe names groups."""
    base = f"is that of {code(facts.names.short(facts.base))}"
    methods = facts.backbone
    if set(methods.values()) <= {BASE}:
        return base
    if set(methods.values()) == {AVERAGE}:
        return "is the average of all parents'"
    if len(set(methods.values())) == 1:
        return f"is a merge of all parents' ({plain(methods[GROUPS[0]])})"
    parts = (f"{group} {'the same model' if how == BASE else plain(how)}" for group, how in methods.items())
    return f"is made group by group, from {code(facts.names.short(facts.base))} and all parents: {', '.join(parts)}"


def _expert_rows(experts: Sequence[ExpertRow], *, shared: bool = False) -> Iterator[tuple[str, ...]]:
    for index, row in enumerate(experts):
        data = ", ".join(map(code, row.data)) or "-"
        label = f"shared: {plain(row.name)}" if shared else f"{index} {plain(row.name)}"
        made_of = plain(row.made_of) if " " in row.made_of else code(row.made_of)
        yield label, made_of, str(row.prompts or "-"), data


def bill(facts: Facts, evidence: Evidence) -> str | Missing:
    """Parameters and bytes, and why they are fewer than those of all parents together."""
    if facts.plan is None:
        return Missing(f"the bill needs the sources' headers, and {facts.lost}")
    made, count = facts.plan, facts.plan.experts
    costs = made.bill
    dense = costs.shared + costs.per_expert
    rows = [
        ("parameters", f"{costs.total:,} ({billions(costs.total)})"),
        ("active per token", f"{costs.active:,} ({billions(costs.active)})"),
        ("layers x experts, per token", f"{len(made.expert_layers)} x {count}, {made.recipe.experts_per_token}"),
        *([] if costs.built is None else [("weights on disk", f"{gib(costs.built)} as {made.dtype_name}")]),
        ("memory for the weights", f"{_in_memory(costs.memory_built)}{gib(costs.memory_virtual)} virtual"),
        ("KV cache", f"{costs.kv_per_token / 2**10:.1f} KiB per token (16 bit)"),
    ]
    used = made.recipe.experts_per_token
    return (
        f"{table(('', ''), rows)}\n\n{counted(count, 'model')} of {billions(dense)} would be "
        f"{billions(count * dense)}. This one is {billions(costs.total)}, since it has everything but the FFNs only "
        f"once. A token uses {used} of {counted(count, 'expert')} in each layer and so computes like a dense model of "
        f"{billions(costs.active)}, not of {billions(used * dense)}; but all parameters must be in memory, as the next "
        "token may need any of them."
    )


def _in_memory(built: int | None) -> str:
    return "" if built is None else f"{gib(built)} built, "


def routers(facts: Facts, evidence: Evidence) -> str | Missing:
    """How the gates were first set, then every stage that changed them."""
    training = evidence.get(TrainingReport)
    first, *later = [stage for stage in facts.stages if stage.get("stage") not in BODY_STAGES] or ({},)
    lines = [_began(facts, first)]
    for stage in later:
        name = stage.get("stage")
        if name == "fit":
            lines.append(_fitted("They were fitted again", stage["fit"]))
        elif name == "add-expert":
            lines.append("An expert was added, and its row of the gates was fitted without the other experts' text.")
        elif name in ("remove-expert", "prune"):
            lines.append(_taken_out(stage))
        elif name == "train" and training is None:
            lines.append("They were then trained together with the experts.")
    if training:
        before = training.mean_held_out_loss.before
        lines.append(
            f"Then {plain(', '.join(training.what))} were trained, {counted(training.steps, 'step')}. Mean loss on "
            f"text held out from {plain(', '.join(training.data))}: {before:.4f} nats per token before, "
            f"{training.kept:.4f} in the state that was kept (step {training.best_step})."
        )
    return " ".join(lines)


def _taken_out(stage: Mapping[str, Any]) -> str:
    """Which experts went, and what became of the gates."""
    names, method = plain(", ".join(stage["removed"])), stage["gates"]
    gates = (
        "the other rows stayed" if method == "kept" else f"the gates were fitted again without their text ({method})"
    )
    return f"Then the experts {names} were taken out, and {gates}."


def _began(facts: Facts, stage: Mapping[str, Any]) -> str:
    if stage.get("fit"):
        return _fitted("The gates of every layer were fitted", stage["fit"])
    mode = code(f"gate_mode: {facts.gate_mode}")
    return f"The gates of every layer were first set {GATE_MODES.get(facts.gate_mode, f'with {mode}')} ({mode})."


def _fitted(start: str, entry: Mapping[str, Any]) -> str:
    """A fit as the artifact's record keeps it: method, text by expert, mean held-out losses."""
    fit = FitReport.model_validate(entry)
    tokens = sum(text.tokens for text in fit.text.values())
    before = f"{fit.before:.4f} nats per token before, " if fit.before is not None else ""
    return (
        f"{start} {GATE_MODES.get(fit.method, plain(fit.method))} ({code(fit.method)}), on "
        f"{counted(tokens, 'token')} for {counted(len(fit.text), 'expert')}. On text held out from the fit the mean "
        f"loss is {before}{fit.after:.4f} nats per token with these routers and {fit.own_expert:.4f} where every text "
        "goes to its own expert."
    )


def files(facts: Facts, evidence: Evidence) -> str | Missing:
    """A row per GGUF file, with its difference from the unquantized model if that was measured."""
    exported = evidence.get(ExportReport)
    if exported is None or not exported.files:
        return Missing("no GGUF files were made; `frankenmoe export` makes them")
    rows = [
        (
            code(file.name),
            plain(file.type),
            gigabytes(file.bytes),
            f"{file.bits_per_weight:.2f}",
            *_checked(file.check or FileCheck()),
        )
        for file in exported.files
    ]
    head = ("file", "type", "size", "bits per weight", "KL", "same best token", "perplexity", "tokens/s")
    text = table(head, rows)
    if any(file.check and file.check.kl is not None for file in exported.files):
        text += (
            "\n\nKL is the mean divergence in nats of llama.cpp's next-token distribution from that of the unquantized "
            "model, perplexity is a factor, tokens/s are those of the machine that made the files."
        )
    notes = dict.fromkeys(note for file in exported.files for note in file.notes)
    return text + "".join(f"\n\n{sentence(note[0].upper() + note[1:])}." for note in notes)


def _checked(check: FileCheck) -> Iterator[str]:
    formats = {"kl": ".1e", "top1": ".1%", "perplexity_ratio": ".4f", "tokens_per_second": ".1f"}
    for key, form in formats.items():
        value = getattr(check, key)
        yield "-" if value is None else format(value, form)


def usage(facts: Facts, evidence: Evidence, *, model: str) -> str | Missing:
    """How to run the model, in every program that can load it."""
    parts = []
    loader = "AutoModelForImageTextToText" if facts.fmt and facts.fmt.inside else "AutoModelForCausalLM"
    if facts.built and facts.fmt and facts.fmt.loads_in_transformers:
        parts.append(
            f"transformers:\n\n```python\nfrom transformers import {loader}, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{model}")\n'
            f'model = {loader}.from_pretrained("{model}", dtype="auto", device_map="auto")\n'
            'ids = tokenizer("Once upon a time", return_tensors="pt").to(model.device)\n'
            "print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0]))\n```"
        )
        if facts.fmt.balances and facts.gate_mode in DOMAIN_MODES:
            parts.append(
                "To fine-tune it, leave `router_aux_loss_coef` at 0, as in its `config.json`. It is the weight of a "
                "loss for an even load of the experts, which trainers such as TRL add. These routers send each domain "
                "to its own expert, and an even load would undo that."
            )
    parts.append(
        "frankenmoe, which shows the experts of every token:\n\n"
        f'```sh\nfrankenmoe chat {LOCAL} --prompt "Once upon a time" --trace\n```'
    )
    if not facts.built:
        parts.append(
            "This is a virtual artifact: recipe, hashes and routers. It needs the models it is made of at the places "
            "its recipe names, and runs straight from them; `frankenmoe build` makes a checkpoint of it that other "
            "programs load."
        )
        if (facts.artifact.folder / "config.json").is_file():
            parts.append(
                "Where frankenmoe is installed, transformers runs it too:\n\n```python\nimport frankenmoe\n"
                "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
                f'tokenizer = AutoTokenizer.from_pretrained("{model}")\n'
                f'model = AutoModelForCausalLM.from_pretrained("{model}")\n```\n\n'
                "Programs that do not import frankenmoe need `trust_remote_code=True`. This runs this repository's "
                "`modeling_frankenmoe.py`, which imports frankenmoe."
            )
    exported = evidence.get(ExportReport)
    if exported and exported.files:
        file = shlex.quote(" ".join(exported.files[0].name.split()))
        parts.append("llama.cpp:\n\n" + fenced(f'llama-cli -m {file} -p "Once upon a time" -n 100', "sh"))
    family = facts.plan.base.family if facts.plan else None  # unknown where the sources are gone
    kind = source_type(family, facts.fmt) if family and facts.fmt else ""
    known = in_vllm(kind, facts.fmt.name) if facts.built and facts.fmt else None
    if known is not None and known.runs:
        parts.append(f"vLLM serves this format ({known.how}; not run for this card):\n\n```sh\nvllm serve {model}\n```")
    return "\n\n".join(parts)


def licences(facts: Facts, evidence: Evidence) -> str | Missing:
    """A row per source, then what follows from them."""
    if facts.plan is None:
        return Missing(f"the sources' licences are in their folders, and {facts.lost}")
    rows = [(code(source), plain(found or "none declared")) for source, found in facts.licences.by_source]
    text = table(("source", "licence"), rows)
    findings = [f"{sentence(finding[0].upper() + finding[1:])}." for finding in facts.licences.findings]
    if not findings and facts.licences.chosen:
        findings = [f"All sources are under {plain(facts.licences.chosen)}, and so is this model."]
    if facts.licences.chosen is None:
        findings.append("So this card declares no licence; the author must choose one.")
    return text + "".join(f"\n\n{finding}" for finding in findings)


def primer(facts: Facts, evidence: Evidence) -> str | Missing:
    """What a mixture of experts is, with this model's own numbers."""
    experts, used = len(facts.experts), facts.artifact.record.get("experts_per_token")
    nested = any(row.made_of.startswith("a mixture of its own") for row in facts.experts)
    return "\n\n".join(
        (
            f"A sparse mixture of experts has, in place of the one FFN of each layer, several experts: here {experts}. "
            "An expert may be an FFN, a more complex network, or a mixture itself"
            f"{' (as some are here)' if nested else ' (none is here)'}. A router, one matrix of learned numbers, gives "
            f"every expert a score for every token. The token goes to the experts with the best scores (here {used}), "
            "and their outputs are added up, weighted by the scores.",
            "Left to itself, a router under training comes to favour the same few experts, which then learn the most. "
            "An auxiliary loss (`aux_loss` in transformers) evens that out, and a capacity limits how many tokens one "
            "expert may process; what is over it passes by. Mixtures overfit more easily than dense models when they "
            "are fine-tuned.",
            "In a mixture merged from finished models, the routers were not trained together with the experts. How "
            "these routers were made is described above.",
        )
    )


def recipe(facts: Facts, evidence: Evidence) -> str | Missing:
    """The recipe without local paths."""
    said = {key: value for key, value in facts.recipe.items() if key not in SECTIONS}
    public = facts.names.rewriter.value(said)
    text = yaml.safe_dump(public, sort_keys=False, allow_unicode=True, width=100)
    name = plain(" ".join(facts.name.split()))
    return f"<details>\n<summary>{name}.yml</summary>\n\n{fenced(text.strip(), 'yaml')}\n\n</details>"


def prompted(facts: Facts) -> bool:
    """Whether the routers were set from prompts and never fitted or trained."""
    return facts.gate_mode in PROMPT_MODES and not any(stage.get("stage") in ("fit", "train") for stage in facts.stages)


def left_to_chance(facts: Facts) -> bool:
    """Whether the routers are random and were never fitted or trained."""
    return facts.gate_mode in RANDOM_MODES and not any(stage.get("stage") in ("fit", "train") for stage in facts.stages)


def gigabytes(count: int) -> str:
    """A file's size in MB or GB, powers of ten."""
    return f"{count / 1e9:.2f} GB" if count >= 10**8 else f"{count / 1e6:.2f} MB"


def gib(count: int) -> str:
    """Bytes in GiB, or in MiB for small numbers."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"
