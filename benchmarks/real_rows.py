"""The rows of benchmarks/real.py: each function measures one group of them on a bed of parents.

A row whose command or recipe key does not exist here, or refuses, is kept without a value and with the reason.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from common import MB, Row, log, measure
from real_bed import MERGES, SHARED, Bed, Losses, dense, folder_for, nats

import frankenmoe as fm
from frankenmoe.errors import FrankenMoEError
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
LIMIT = 400 * MB


def dense_merges(bed: Bed) -> Iterator[Row]:
    """The parents, and their dense merges."""
    base, own = bed.mean(bed.base), bed.mean(bed.own)
    yield _row("base: held-out loss", statistics.fmean(base.values()), "nats", by=base)
    yield _row("parents, own text: held-out loss", statistics.fmean(own.values()), "nats", by=own)
    for method in MERGES:
        yield _kept(bed, f"dense, {method}", bed.dense_merge(method))
    yield _row("best dense merge: held-out loss", *_mean(bed, bed.best_merge()[1]), note=bed.best_merge()[0])


def backbones(bed: Bed) -> Iterator[Row]:
    """Own expert forced, by backbone; no healing."""
    best: list[Row] = []
    for name, backbone in BACKBONES.items():
        with _measured(f"forced, {name}") as rows:
            moe = fm.load(_with_data(bed, backbone))
            rows.append(_kept(bed, f"forced, {name}", bed.forced(moe)))
        yield from rows
        best += [row for row in rows if row.value is not None]
    yield _best("forced, best backbone", best, 95.0)


def healed(bed: Bed) -> Iterator[Row]:
    """Own expert forced, after `heal` on 6k tokens per expert."""
    best: list[Row] = []
    for name in ("base", "average", "task arithmetic 0.7", "regmean", "auto"):
        with _measured(f"healed, {name}") as rows, _healed(bed, BACKBONES[name]) as artifact:
            rows.append(_kept(bed, f"healed, {name}", bed.forced(fm.load(artifact))))
        yield from rows
        best += [row for row in rows if row.value is not None]
    yield _best("healed, best backbone", best, 98.0)


def eight(bed: Bed) -> Iterator[Row]:
    """All parents there are, healed, own expert forced; the best dense merge beside it."""
    count = len(bed.domains)
    method, losses = bed.best_merge()
    yield _kept(bed, f"{count} parents, dense, {method}", losses)
    for name in ("average", "task arithmetic 0.7", "auto"):
        with _measured(f"{count} parents, forced, {name}") as rows:
            moe = fm.load(_with_data(bed, BACKBONES[name]))
            rows.append(_kept(bed, f"{count} parents, forced, {name}", bed.forced(moe)))
        yield from rows
    with _measured(f"{count} parents, healed") as rows, _healed(bed, "auto") as artifact:
        rows.append(_kept(bed, f"{count} parents, healed", bed.forced(fm.load(artifact)), least=95.0))
    yield from rows


def routers(bed: Bed) -> Iterator[Row]:
    """Top-2 with routers that were not trained, and the best of them against the best dense merge."""
    prompts, data = bed.prompts(), bed.data(bed.scale.fit)
    given = {domain: {"data": files} for domain, files in data.items()}
    contestants: dict[str, Callable[[], fm.Recipe]] = {
        "random, base": lambda: bed.recipe(gate_mode="random", backbone="base"),
        "mergekit hidden, base": lambda: bed.recipe(prompts, gate_mode="hidden", backbone="base"),
        "logistic from prompts, base": lambda: bed.recipe(prompts, gate_mode="logistic", backbone="base"),
        "logistic from prompts, average": lambda: bed.recipe(prompts, gate_mode="logistic", backbone="average"),
        "regret, average": lambda: bed.recipe(given, gate_mode="regret", backbone="average", **_fit(bed)),
        "regret, auto": lambda: bed.recipe(given, gate_mode="regret", backbone="auto", **_fit(bed)),
    }
    for name, make in contestants.items():
        with _measured(f"top-2, {name}") as rows:
            rows.append(_kept(bed, f"top-2, {name}", bed.losses(fm.load(make()).model)))
        yield from rows


def product(bed: Bed) -> Iterator[Row]:
    """What a user gets: `backbone: auto`, healed, `regret`, top-2; then 100 steps of routers and norms."""
    with _measured("top-2, healed, fitted") as rows, _healed(bed, "auto") as artifact:
        fm.fit(artifact, data=bed.data(bed.scale.fit), method="regret", tokens=bed.scale.fit)
        rows += _verdict(bed, "top-2, healed, fitted", artifact)
        rows += _trained(bed, artifact)
    yield from rows
    if any(row.value is None for row in rows):  # healing is not here: the same without it
        with _measured("top-2, fitted") as rows, folder_for(bed, "fitted") as out:
            keys = _fit(bed) | {"gate_mode": "regret", "backbone": _best_plain(bed)}
            given = {domain: {"data": files} for domain, files in bed.data(bed.scale.fit).items()}
            fm.build(bed.recipe(given, **keys), out, virtual=True)
            rows += _verdict(bed, "top-2, fitted", out)
            rows += _trained(bed, out)
        yield from rows


def lora(bed: Bed) -> Iterator[Row]:
    """Parents that are LoRA adapters: what is kept, and the speed of the virtual form."""
    base = bed.parents.base
    experts = {
        domain: {"source_model": f"{base}+{folder}"}
        for domain, folder in bed.parents.folders.items()
        if (folder / "adapter_config.json").is_file()
    }
    for name in ("base", "average", "auto"):
        with _measured(f"LoRA parents, forced, {name}") as rows:
            keys = {"backbone": BACKBONES[name]}
            data = bed.data(bed.scale.heal) if name in MEASURED else {}
            given = {domain: row | ({"data": data[domain]} if data else {}) for domain, row in experts.items()}
            moe = fm.load(bed.recipe(given, **keys))
            rows.append(_kept(bed, f"LoRA parents, forced, {name}", bed.forced(moe), least=95.0))
            if name == "average":
                speeds = {"MoE": _speed(moe.model), "base": _speed(dense(base, bed.parents.dtype))}
                for what in ("read", "write"):
                    shares = [speeds["MoE"][what] / speeds["base"][what]]
                    rows.append(_row(f"LoRA parents, virtual: {what}, of base's speed", shares[0], "x"))
        yield from rows


def extracted(bed: Bed, rank: int = 32) -> Iterator[Row]:
    """Every parent as a LoRA of rank 32 of its difference: what it keeps, its size, the memory of the extraction."""
    with _measured(f"extracted rank {rank}: kept by each parent itself") as rows, folder_for(bed, "loras") as root:
        losses: Losses = {}
        size, peaks = 0, []
        for domain, folder in bed.parents.folders.items():
            out = root / domain
            root.mkdir(parents=True, exist_ok=True)
            command = [*FRANKENMOE, "extract-lora", str(folder), str(out), "--base", str(bed.parents.base)]
            peaks.append(_run([*command, "--rank", str(rank)]).anon)
            losses |= bed.losses(dense(out, bed.parents.dtype, base=bed.parents.base), (domain,))
            size += sum(file.stat().st_size for file in out.glob("*.safetensors"))
        whole = (bed.parents.base / "model.safetensors").stat().st_size
        rows.append(_kept(bed, f"extracted rank {rank}: kept by each parent itself", losses))
        rows.append(_row(f"extracted rank {rank}: all adapters, of the base's size", 100 * size / whole, "%"))
        rows.append(_row("extraction: anonymous memory", max(peaks) / MB, "MB", limit=LIMIT / MB))
    yield from rows
    with _measured(f"as_adapter rank {rank}: memory over base + adapters") as rows:
        experts = {domain: {"as_adapter": {"rank": rank}} for domain in bed.domains}
        moe = fm.load(bed.recipe(experts, backbone="average"))
        rows.append(_kept(bed, f"as_adapter rank {rank}, forced, average", bed.forced(moe)))
        held = sum({each.data_ptr(): each.numel() * each.element_size() for each in moe.model.parameters()}.values())
        rows.append(_row(f"as_adapter rank {rank}: weights held, of the base's", held / whole, "x"))
    yield from rows


def fit_cost(bed: Bed) -> Iterator[Row]:
    """Forward passes over the text that fitting takes, and memory above the loaded model."""
    count = len(bed.domains)
    file = bed.work / "fit.yml"
    given = {domain: {"data": files} for domain, files in bed.data(bed.scale.fit).items()}
    recipe = bed.recipe(given, gate_mode="random", backbone="average", **_fit(bed))
    file.write_text(yaml.safe_dump(recipe.to_dict(), allow_unicode=True))
    script = str(Path(__file__).with_name("real_once.py"))
    before = measure([sys.executable, script, "load", str(file), str(bed.work / "none")])
    for method, limit in (("logistic", 2.5), ("regret", 2.5 + count / 3)):
        with _measured(f"fit {method}: forward passes") as rows, folder_for(bed, "fit-cost") as out:
            run = measure([sys.executable, script, method, str(file), str(out)])
            facts = json.loads(run.stdout.splitlines()[-1])
            rows.append(_row(f"fit {method}: forward passes", facts["passes"], "x", limit=limit, by=facts))
            above = (run.anon - before.anon) / MB
            rows.append(_row(f"fit {method}: memory above the model", above, "MB", limit=1000.0))
            rows.append(_row(f"fit {method}: time", run.seconds, "s"))
        yield from rows


def memory(bed: Bed) -> Iterator[Row]:
    """Anonymous memory of building an MoE with a merged backbone, by method."""
    for name in ("average", "task arithmetic 0.7", "ties 0.5"):
        with _measured(f"build, {name}: anonymous memory") as rows, folder_for(bed, "built") as out:
            file = bed.work / "build.yml"
            file.write_text(yaml.safe_dump(bed.recipe(backbone=BACKBONES[name]).to_dict(), allow_unicode=True))
            run = _run([*FRANKENMOE, "build", str(file), str(out)])
            rows.append(_row(f"build, {name}: anonymous memory", run.anon / MB, "MB", limit=LIMIT / MB))
        yield from rows


ROWS: Mapping[str, Callable[[Bed], Iterator[Row]]] = {
    "dense": dense_merges,
    "backbones": backbones,
    "healed": healed,
    "routers": routers,
    "product": product,
    "eight": eight,
    "lora": lora,
    "extracted": extracted,
    "fit-cost": fit_cost,
    "memory": memory,
}


# ---- parts of rows ---------------------------------------------------------------------------------------------------


def _row(
    what: str,
    value: float | None,
    unit: str,
    *,
    limit: float | None = None,
    least: float | None = None,
    by: Mapping[str, float] | None = None,
    note: str = "",
) -> Row:
    samples = {name: [number] for name, number in (by or {}).items()}
    return Row(what, value, unit, limit, samples, at_least=least, note=note)


def _kept(bed: Bed, what: str, losses: Losses, *, least: float | None = None) -> Row:
    """The share of the parents' advantage that is kept: mean over domains, with every domain's own."""
    shares = bed.kept(losses)
    row = _row(what, shares.pop("mean"), "%", least=least, by=shares)
    log(f"    {what}: {row.value:.1f} %  " + ", ".join(f"{name} {share:.0f}" for name, share in shares.items()))
    return row


def _mean(bed: Bed, losses: Losses) -> tuple[float, str]:
    return statistics.fmean(bed.mean(losses).values()), "nats"


def _best(what: str, rows: list[Row], least: float) -> Row:
    if not rows:
        return _row(what, None, "%", least=least, note="none was measured")
    row = max(rows, key=lambda each: each.value or 0.0)
    return Row(what, row.value, "%", None, row.samples, at_least=least, note=row.what)


@contextmanager
def _measured(what: str) -> Iterator[list[Row]]:
    """Rows to be filled; after an error, a row `what` without a value that tells the reason."""
    rows: list[Row] = []
    begun = time.perf_counter()
    try:
        yield rows
    except (
        FrankenMoEError,
        NotMeasuredError,
        RuntimeError,
        ImportError,
        AttributeError,
        TypeError,
        ValueError,
    ) as error:
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[-1 if isinstance(error, RuntimeError) else 0][:300]}"
        log(f"    {what}: not measured ({reason})")
        rows.append(_row(what, None, "%", note=f"not measured: {reason}"))
    log(f"    {what}: {time.perf_counter() - begun:.0f} s")


class NotMeasuredError(Exception):
    """Something that a row needs is not here."""


# an absent feature shows as one of these
_REASONS = (
    *(FrankenMoEError, NotMeasuredError, RuntimeError),
    *(ImportError, AttributeError, TypeError, ValueError),
)


def _fit(bed: Bed) -> dict[str, Any]:
    return {"fit": {"tokens": bed.scale.fit}}


def _with_data(bed: Bed, backbone: Any) -> fm.Recipe:
    """A recipe with this backbone; with the experts' text where the backbone is measured on it."""
    if backbone not in MEASURED:
        return bed.recipe(backbone=backbone)
    given = {domain: {"data": files} for domain, files in bed.data(bed.scale.heal).items()}
    return bed.recipe(given, backbone=backbone)


@contextmanager
def _healed(bed: Bed, backbone: Any) -> Iterator[Path]:
    """A healed artifact of the parents. Its routers are random."""
    with folder_for(bed, "healed") as out:
        file = bed.work / "heal.yml"
        given = {domain: {"data": files} for domain, files in bed.data(bed.scale.heal).items()}
        recipe = bed.recipe(given, backbone=backbone)
        file.write_text(yaml.safe_dump(recipe.to_dict(), allow_unicode=True))
        _run([*FRANKENMOE, "heal", str(file), str(out)])
        yield out


def _run(command: list[str]) -> Any:
    """A command of frankenmoe's; NotMeasuredError with its message where it refuses or does not exist."""
    try:
        return measure(command)
    except RuntimeError as error:
        said = [line for line in str(error).splitlines() if line.strip()]
        raise NotMeasuredError(" ".join(said[-2:])) from error


def _best_plain(bed: Bed) -> Any:
    """The best backbone that needs no text, by own expert forced."""
    found = {}
    for name in ("average", "task arithmetic 0.7"):
        with _measured(name) as rows:
            losses = bed.forced(fm.load(bed.recipe(backbone=BACKBONES[name])))
            rows.append(_kept(bed, name, losses))
            found[name] = rows[0].value
    return BACKBONES[max(found, key=lambda name: found[name])]


def _verdict(bed: Bed, what: str, artifact: Path) -> Iterator[Row]:
    """Kept by domain, against the best dense merge, and on general text."""
    model = fm.load(artifact).model
    losses = bed.losses(model)
    row = _kept(bed, what, losses, least=93.0)
    yield row
    yield _row(f"{what}: worst domain", min(value for (value,) in row.samples.values()), "%", least=85.0)
    method, merge = bed.best_merge()
    gains = bed.against(losses, merge)
    lowest = min(gains.values(), key=lambda each: each.low)
    bounds = {f"{domain} {end}": getattr(each, end) for domain, each in gains.items() for end in ("low", "high")}
    note = f"lower bound of the worst domain's interval, against {method}"
    yield _row(f"{what}: below the best dense merge", lowest.low, "nats", least=0.0, by=bounds, note=note)
    general = _general(bed)
    ours, base = sum(nats(model, general)), sum(nats(dense(bed.parents.base, bed.parents.dtype), general))
    yield _row(f"{what}: general text, over the base's loss", 100 * (ours / base - 1), "%", limit=1.0)


def _trained(bed: Bed, artifact: Path) -> Iterator[Row]:
    """100 steps of training of routers and norms on top."""
    from frankenmoe.train.run import train

    steps = 100 if bed.scale.held_out > 512 else 2
    with _measured("trained 100 steps: routers, norms") as rows, folder_for(bed, "trained") as out:
        data = {domain: [str(bed.parents.texts[domain] / f"{domain}.train.txt")] for domain in bed.domains}
        done = train(artifact, out, data=data, what="routers,norms", steps=steps, keep_anyway=True)
        losses = bed.losses(fm.load(done.artifact).model)
        rows.append(_kept(bed, "trained 100 steps: routers, norms", losses, least=98.0))
    yield from rows


def _general(bed: Bed) -> list[Any]:
    """Questions of public tests, in English, that nothing here was tuned on."""
    folder = SHARED / "data" / "leaderboard"
    if not folder.is_dir():
        raise NotMeasuredError(f"{folder} is absent")
    questions = []
    for name, key in QUESTIONS.items():
        file = next(file for part in ("test", "validation") for file in sorted((folder / name).glob(f"{part}*.jsonl")))
        lines = file.read_text().splitlines()
        questions += [json.loads(line)[key] for line in lines[:: max(1, len(lines) // 400)]]
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(0)).tolist()
    return bed.read("\n\n".join(questions[index] for index in order), bed.scale.general)


@torch.no_grad()
def _speed(model: Any, tokens: int = 24) -> dict[str, float]:
    """Tokens per second: reading 1,024 at once, and writing one after another; the better of two."""
    ids = torch.randint(1000, 40_000, (4, 256), generator=torch.Generator().manual_seed(0))
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
