"""Prefill and decode on a GPU against stock transformers on the same card and against what the card can do at most."""

import json
import statistics
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from common import Row, arguments, interleave, log, measure, publish, workspace
from sources import Shape

ONCE = Path(__file__).parent / "gpu_once.py"
# full is the shape of recipes/raiden-16x3.43b.yml: 72 GB in bfloat16
SHAPES = {
    "smoke": Shape(hidden=32, ffn=64, layers=2, vocab=64),
    "small": Shape(hidden=1600, ffn=4320, layers=8, vocab=32000),
    "full": Shape(hidden=3200, ffn=8640, layers=26, vocab=32000),
}
EXPERTS, TOP_K, RANK = 16, 2, 16
PREFILL, CONTEXT = 512, 32
LARGE = {"smoke": (2, 64), "small": (8, 2048), "full": (8, 2048)}  # texts and tokens of each
OURS = ("distinct", "adapters")
STOCK = ("grouped_mm", "batched_mm", "eager")
# kind of work: what a row calls it
WORDS = {
    "decode": "a token",
    "layers": "a token, blocks as graph",
    "prefill": f"{PREFILL} tokens",
    "large": "many tokens",
}
# bytes and bf16 operations a second of an H200 by its data sheet: 2.28 ms a token, 14.8 ms for 512, 92k tokens a second
H200 = {"bytes": 4.8e12, "operations": 9.89e14}
Samples = Mapping[str, list[float]]


def main() -> None:
    options = arguments("MoEs on a GPU against stock transformers and the card's limits.", name="gpu")
    if options.scale != "smoke" and not torch.cuda.is_available():
        log(f"benchmarks/gpu.py at scale {options.scale} needs a CUDA GPU, found none; --scale smoke runs on a CPU")
        raise SystemExit(2)
    with workspace(options.work) as work:
        turns = {form: partial(once, form, options.scale) for form in ("floors", "dense", *OURS, *STOCK)}
        publish("gpu", table(interleave(turns, rounds=options.rounds), options.scale), options=options, work=work)


def once(form: str, scale: str) -> dict[str, float]:
    """What gpu_once.py measures in a process of its own, seconds by kind of work; says what it could not."""
    found, failed = json.loads(measure([sys.executable, str(ONCE), form, scale]).stdout.splitlines()[-1])
    for kind, why in failed.items():
        log(f"    {kind} is not measured: {why}")
    return dict(found)


def table(found: Mapping[str, list[dict[str, float]]], scale: str) -> list[Row]:
    """For each kind of work: the floors, our two forms, stock's best, and what matters of them as ratios."""
    card = {key: statistics.median(each[key] for each in found["floors"]) for key in H200}
    rows = [
        Row("memory read by this card", card["bytes"] / 1e9, "GB/s", None, _of(found, "floors", "bytes")),
        Row(
            "bf16 products by this card", card["operations"] / 1e12, "TFLOP/s", None, _of(found, "floors", "operations")
        ),
    ]
    for kind, words in WORDS.items():
        samples = {form: [each[kind] for each in found[form] if kind in each] for form in ("dense", *OURS, *STOCK)}
        samples = {form: values for form, values in samples.items() if values}
        tokens = LARGE[scale][0] * LARGE[scale][1] if kind == "large" else None
        stock = [form for form in STOCK if form in samples]
        best = min(stock, key=lambda form: statistics.median(samples[form]), default="none")
        line = partial(_row, samples=samples, tokens=tokens)
        if scale == "full":
            rows.append(line(f"{words}: floor of an H200", floor(kind, scale, H200)))
        rows += [
            line(f"{words}: floor of this card", floor(kind, scale, card)),
            line(f"{words}: 16 distinct", _median(samples, "distinct")),
            line(f"{words}: stock's best ({best})", _median(samples, best)),
            line(f"{words}: 16 adapters", _median(samples, "adapters")),
            line(f"{words}: dense parent", _median(samples, "dense")),
            Row(f"{words}: distinct against stock", _ratio(samples, "distinct", best), "x", 1.0, samples),
            Row(f"{words}: adapters against dense", _ratio(samples, "adapters", "dense"), "x", 1 / 0.85, samples),
        ]
    return rows


def weights(form: str, scale: str) -> int:
    """Bytes of a form's large weights in bf16: without norms, gates and adapters."""
    shape, experts = SHAPES[scale], 1 if form in ("dense", "adapters") else EXPERTS
    layer = 4 * shape.hidden**2 + experts * 3 * shape.hidden * shape.ffn
    return 2 * (shape.layers * layer + 2 * shape.hidden * shape.vocab)


def floor(kind: str, scale: str, card: Mapping[str, float]) -> float:
    """Seconds that 16 distinct experts take at least: reading the weights of all experts that are reached once, or all
    products at full speed, whichever is longer; without attention's scores, and with the head for one token."""
    shape, tokens = SHAPES[scale], {"prefill": PREFILL, "large": LARGE[scale][0] * LARGE[scale][1]}.get(kind, 1)
    expert = 3 * shape.hidden * shape.ffn
    attention, head = 4 * shape.hidden**2, shape.hidden * shape.vocab
    if kind == "layers":
        attention = head = 0
    reached = min(EXPERTS, TOP_K * tokens)
    weights = shape.layers * (attention + reached * expert) + head
    products = tokens * shape.layers * (attention + TOP_K * expert) + head
    return max(2 * weights / card["bytes"], 2 * products / card["operations"])


def _row(what: str, value: float | None, *, samples: Samples, tokens: int | None) -> Row:
    """Milliseconds, or thousands of tokens a second where so many tokens were read at once."""
    if tokens is None:
        return Row(what, None if value is None else 1e3 * value, "ms", None, samples)
    return Row(what, None if value is None else tokens / value / 1e3, "k tok/s", None, samples)


def _median(samples: Samples, form: str) -> float | None:
    return statistics.median(samples[form]) if form in samples else None


def _ratio(samples: Samples, form: str, to: str) -> float | None:
    ours, theirs = _median(samples, form), _median(samples, to)
    return None if ours is None or theirs is None else ours / theirs


def _of(found: Mapping[str, list[dict[str, float]]], form: str, key: str) -> Samples:
    return {form: [each[key] for each in found[form]]}


if __name__ == "__main__":
    main()
