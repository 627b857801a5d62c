"""The rows of benchmarks/real.py: each function measures one group of them on a bed of parents.

A row whose command or recipe key does not exist here, or refuses, is kept without a value and with the reason.
"""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from common import Row
from real_bed import MERGES, SHARED, Bed, Losses, nats
from real_parts import NotMeasuredError, attempted, best_row, command, kept_row, make_row

import frankenmoe as fm
from frankenmoe.moe.dense import quiet_transformers

BACKBONES: Mapping[str, Any] = {
    "base": "base",
    "average": "average",
    "task arithmetic 0.7": {"method": "task_arithmetic", "lambda": 0.7},
    "task arithmetic 1.0": {"method": "task_arithmetic", "lambda": 1.0},
    "ties 0.5": {"method": "ties", "density": 0.5},
    "regmean": "regmean",
    "auto": "auto",
}
MEASURED = ("regmean", "auto")  # these read the experts' text
FRANKENMOE = (sys.executable, "-m", "frankenmoe.cli")
QUESTIONS = {"arc_challenge": "question", "truthfulqa": "question", "mmlu": "question"}


def dense_merges(bed: Bed) -> Iterator[Row]:
    """The parents, and their dense merges."""
    base, own = bed.mean(bed.base), bed.mean(bed.own)
    yield make_row("base: held-out loss", statistics.fmean(base.values()), "nats", by=base)
    yield make_row("parents, own text: held-out loss", statistics.fmean(own.values()), "nats", by=own)
    for method in MERGES:
        yield kept_row(bed, f"dense, {method}", bed.dense_merge(method))
    yield make_row("best dense merge: held-out loss", *_mean(bed, bed.best_merge()[1]), note=bed.best_merge()[0])


def backbones(bed: Bed) -> Iterator[Row]:
    """Own expert forced, by backbone; no healing."""
    best: list[Row] = []
    for name in BACKBONES:
        with attempted(f"forced, {name}") as rows:
            rows.append(kept_row(bed, f"forced, {name}", _forced(bed, name)))
        yield from rows
        best += [row for row in rows if row.value is not None]
    yield best_row("forced, best backbone", best, 95.0)


def healed(bed: Bed) -> Iterator[Row]:
    """Own expert forced, after `heal`."""
    with attempted("healed, auto") as rows:
        rows.append(kept_row(bed, "healed, auto", _healed_losses(bed), least=98.0))
    yield from rows


def eight(bed: Bed) -> Iterator[Row]:
    """All parents there are, healed, own expert forced; the best dense merge beside it."""
    count = len(bed.domains)
    method, losses = bed.best_merge()
    yield kept_row(bed, f"{count} parents, dense, {method}", losses)
    for name in ("average", "task arithmetic 0.7", "auto"):
        with attempted(f"{count} parents, forced, {name}") as rows:
            rows.append(kept_row(bed, f"{count} parents, forced, {name}", _forced(bed, name)))
        yield from rows
    with attempted(f"{count} parents, healed") as rows:
        rows.append(kept_row(bed, f"{count} parents, healed", _healed_losses(bed), least=95.0))
    yield from rows


def routers(bed: Bed) -> Iterator[Row]:
    """Top-2 with routers that were not trained, and the best of them against the best dense merge."""
    prompts, given = bed.prompts(), bed.with_texts()
    contestants: dict[str, Callable[[], fm.Recipe]] = {
        "random, base": lambda: bed.recipe(gate_mode="random", backbone="base"),
        "mergekit hidden, base": lambda: bed.recipe(prompts, gate_mode="hidden", backbone="base"),
        "logistic from prompts, base": lambda: bed.recipe(prompts, gate_mode="logistic", backbone="base"),
        "logistic from prompts, average": lambda: bed.recipe(prompts, gate_mode="logistic", backbone="average"),
        "regret, average": lambda: bed.recipe(given, gate_mode="regret", backbone="average", **fit_keys(bed)),
        "regret, auto": lambda: bed.recipe(given, gate_mode="regret", backbone="auto", **fit_keys(bed)),
    }
    for name, make in contestants.items():
        with attempted(f"top-2, {name}") as rows:
            losses = bed.known(f"top-2 {name}", partial(_routed, bed, make))
            rows.append(kept_row(bed, f"top-2, {name}", losses))
        yield from rows


def fitted(bed: Bed) -> Iterator[Row]:
    """What a user gets: `backbone: auto`, healed, `regret`, top-2, all from the same text.

    The fitted artifact and the losses are kept, so that a killed run continues.
    """
    with attempted("top-2, healed, fitted") as rows:
        rows += _verdict(bed, "top-2, healed, fitted", _fitted(bed))
    yield from rows


def product(bed: Bed) -> Iterator[Row]:
    """The same; then 100 steps of training."""
    yield from fitted(bed)
    yield from _trained(bed)


def lora(bed: Bed) -> Iterator[Row]:
    """Parents that are LoRA adapters: what is kept, and the speed of the virtual form."""
    base = bed.parents.base
    experts = {
        domain: {"source_model": f"{base}+{folder}"}
        for domain, folder in bed.parents.folders.items()
        if (folder / "adapter_config.json").is_file()
    }
    for name in ("base", "average", "auto"):
        with attempted(f"LoRA parents, forced, {name}") as rows:
            keys = {"backbone": BACKBONES[name]}
            texts = bed.with_texts() if name in MEASURED else {}
            given = {domain: row | texts.get(domain, {}) for domain, row in experts.items()}
            recipe = bed.recipe(given, **keys)
            losses = bed.known(f"forced {name}", partial(_own_experts, bed, recipe))
            rows.append(kept_row(bed, f"LoRA parents, forced, {name}", losses, least=95.0))
            if name == "average":
                moe = bed.load(recipe)
                speeds = {"MoE": _speed(moe.model), "base": _speed(bed.dense(base))}
                for what in ("read", "write"):
                    shares = [speeds["MoE"][what] / speeds["base"][what]]
                    rows.append(make_row(f"LoRA parents, virtual: {what}, of base's speed", shares[0], "x"))
        yield from rows


ROWS: Mapping[str, Callable[[Bed], Iterator[Row]]] = {
    "dense": dense_merges,
    "backbones": backbones,
    "healed": healed,
    "routers": routers,
    "fitted": fitted,
    "product": product,
    "eight": eight,
    "lora": lora,
}


# ---- parts of rows ---------------------------------------------------------------------------------------------------


def _mean(bed: Bed, losses: Losses) -> tuple[float, str]:
    return statistics.fmean(bed.mean(losses).values()), "nats"


def fit_keys(bed: Bed) -> dict[str, Any]:
    return {"fit": {"tokens": bed.scale.fit}}


def _with_data(bed: Bed, backbone: Any) -> fm.Recipe:
    """A recipe with this backbone; with the experts' text where the backbone is measured on it."""
    if backbone not in MEASURED:
        return bed.recipe(backbone=backbone)
    return bed.recipe(bed.with_texts(), backbone=backbone)


def _forced(bed: Bed, name: str) -> Losses:
    """Own expert forced, with a backbone of BACKBONES."""
    return bed.known(f"forced {name}", partial(_own_experts, bed, _with_data(bed, BACKBONES[name])))


def _own_experts(bed: Bed, recipe: fm.Recipe) -> Losses:
    return bed.forced(bed.load(recipe))


def _routed(bed: Bed, make: Callable[[], fm.Recipe]) -> Losses:
    return bed.losses(bed.load(make()).model)


def _healed_losses(bed: Bed) -> Losses:
    """The same with `backbone: auto`, after healing."""
    return bed.known("healed auto", lambda: bed.forced(bed.load(_healed(bed))))


def _healed(bed: Bed) -> Path:
    """A healed artifact of the parents with `backbone: auto`, made once. Its routers are random."""
    out = bed.kept_in / "healed-auto"
    if not out.exists():
        file = bed.kept_in / "heal.yml"
        file.parent.mkdir(parents=True, exist_ok=True)
        recipe = bed.recipe(bed.with_texts(), backbone="auto")
        file.write_text(yaml.safe_dump(recipe.to_dict(), allow_unicode=True))
        options = ["--tokens", str(bed.scale.heal), "--device", bed.device]
        command([*FRANKENMOE, "heal", str(file), str(out), *options])
    return out


def _fitted(bed: Bed) -> Path:
    """The healed artifact with fitted routers, made once. Beside the first, since its paths are relative."""
    out = bed.kept_in / "fitted"
    if not out.exists():
        partial = out.with_name("fitting")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(_healed(bed), partial)
        fm.fit(partial, data=bed.data(), method="regret", tokens=bed.scale.heal, device=bed.device)
        partial.rename(out)
    return out


def _verdict(bed: Bed, what: str, artifact: Path) -> Iterator[Row]:
    """Kept by domain, against the best dense merge, and on general text."""
    losses = bed.known(what, lambda: bed.losses(bed.load(artifact).model))
    row = kept_row(bed, what, losses, least=93.0)
    yield row
    yield make_row(f"{what}: worst domain", min(value for (value,) in row.samples.values()), "%", least=85.0)
    method, merge = bed.best_merge()
    gains = bed.against(losses, merge)
    lowest = min(gains.values(), key=lambda each: each.low)
    bounds = {f"{domain} {end}": getattr(each, end) for domain, each in gains.items() for end in ("low", "high")}
    note = f"lower bound of the worst domain's interval, against {method}"
    yield make_row(f"{what}: below the best dense merge", lowest.low, "nats", least=0.0, by=bounds, note=note)
    ours = sum(_on_general(bed, what, lambda: bed.load(artifact).model))
    base = sum(_on_general(bed, "base", lambda: bed.dense(bed.parents.base)))
    yield make_row(f"{what}: general text, over the base's loss", 100 * (ours / base - 1), "%", limit=1.0)


def _on_general(bed: Bed, what: str, model: Callable[[], Any]) -> list[float]:
    """Nats per block of general text."""
    return bed.known(f"general {what}", lambda: {"general": nats(model(), _general(bed))})["general"]


def _trained(bed: Bed) -> Iterator[Row]:
    """100 steps of training of routers and norms on top, kept even if the guard would not keep them."""
    from frankenmoe.recipe.train import TrainSettings
    from frankenmoe.train.run import train

    out = bed.kept_in / "trained"
    with attempted("trained 100 steps: routers, norms") as rows:
        if not out.exists():
            steps = 100 if bed.scale.held_out > 512 else 2
            settings = TrainSettings.model_validate({"what": "routers,norms", "steps": steps})
            train(_fitted(bed), out, data=bed.data(), settings=settings, keep_anyway=True, device=bed.device)
        losses = bed.known("trained", lambda: bed.losses(bed.load(out).model))
        rows.append(kept_row(bed, "trained 100 steps: routers, norms", losses, least=98.0))
    yield from rows


def _general(bed: Bed) -> list[Any]:
    """Questions of public tests, in English, that nothing here was tuned on."""
    folder = SHARED / "data" / "leaderboard"
    if not folder.is_dir():
        raise NotMeasuredError(f"{folder} is absent")
    questions = []
    for name, key in QUESTIONS.items():
        file = next(file for part in ("test", "validation") for file in sorted((folder / name).glob(f"{part}*.jsonl")))
        lines = [line for line in file.read_text().split("\n") if line]  # splitlines() would cut at U+2028
        questions += [json.loads(line)[key] for line in lines[:: max(1, len(lines) // 400)]]
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(0)).tolist()
    return bed.read("\n\n".join(questions[index] for index in order), bed.scale.general)


@torch.no_grad()
def _speed(model: Any, tokens: int = 24) -> dict[str, float]:
    """Tokens per second: reading 1,024 at once, and writing one after another; the better of two."""
    ids = torch.randint(1000, 40_000, (4, 256), generator=torch.Generator().manual_seed(0)).to(model.device)
    read, write = [], []
    with quiet_transformers():
        for _ in range(2):
            begun = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            read.append(ids.numel() / (time.perf_counter() - begun))
            begun = time.perf_counter()
            model.generate(ids[:1, :8], max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            write.append(tokens / (time.perf_counter() - begun))
    return {"read": max(read), "write": max(write)}
