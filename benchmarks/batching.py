"""Several answers at once against one after the other: total tokens per second, for reading prompts and for writing.

All streams have the same length, so this is the most that a server can gain from batches.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from common import Row, arguments, interleave, publish, ratio, workspace
from sources import SHAPES, make_source

import frankenmoe as fm
from frankenmoe.evaluate.parents import stock_model
from frankenmoe.moe.linear import prepare_kernels

STREAMS = (2, 4, 8)
PROMPT = {"smoke": 8, "small": 64, "full": 64}  # tokens
TOKENS = {"smoke": 2, "small": 12, "full": 24}  # written by each stream
EXPERTS = 4


def main() -> None:
    options = arguments("Answers at once against one after the other.", name="batching", more=_more)
    with workspace(options.work) as work, torch.inference_mode():
        rows = []
        for name, model in models(options, work):
            prepare_kernels(model)
            rows += race(name, model, options)
            del model
        publish("batching", rows, options=options, work=work)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, action="append", help="measure these models, not random ones")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")


def models(options: argparse.Namespace, work: Path) -> Any:
    """(name, model) of each kind; a model is made when it is asked for."""
    torch.set_num_threads(options.threads)
    if options.model:
        for path in options.model:
            dense = (path / "config.json").is_file() and not (path / "frankenmoe.json").is_file()
            yield path.name, stock_model(path, dtype=None) if dense else fm.load(path).model
        return
    for dtype in ("bfloat16", "float32"):
        sources = [
            make_source(work / f"{dtype}-{seed}", SHAPES[options.scale], dtype=dtype, seed=seed)
            for seed in range(EXPERTS)
        ]
        yield f"dense {dtype}", stock_model(sources[0], dtype=None)
        recipe = work / f"{dtype}.yml"
        experts = [{"source_model": str(source)} for source in sources]
        plain = {"base_model": str(sources[0]), "gate_mode": "random", "dtype": dtype, "experts_per_token": 2}
        recipe.write_text(yaml.safe_dump(plain | {"experts": experts}))
        yield f"{EXPERTS} experts {dtype}", fm.load(recipe).model
        built = work / f"built-{dtype}"
        fm.build(recipe, built)
        yield f"{EXPERTS} experts, built, {dtype}", fm.load(built).model


def race(name: str, model: Any, options: argparse.Namespace) -> list[Row]:
    """Ratios of total tokens per second of one model."""
    contestants: dict[str, Callable[[], tuple[float, float]]] = {}
    for count in STREAMS:
        generator = torch.Generator().manual_seed(count)
        ids = torch.randint(3, model.config.vocab_size, (count, PROMPT[options.scale]), generator=generator)
        contestants[f"{count} at once"] = partial(run, model, [ids], options.scale)
        contestants[f"{count} one by one"] = partial(run, model, ids[:, None], options.scale)
    for contestant in contestants.values():
        contestant()
    found = interleave(contestants, rounds=options.rounds)
    rows = []
    for at, what in enumerate(("reading", "writing")):
        rates = {contestant: [run[at] for run in runs] for contestant, runs in found.items()}
        for count in STREAMS:
            names = [f"{count} at once", f"{count} one by one"]
            gain = ratio(rates, names[0], to=names[1])
            rows.append(Row(f"{name}: {what} {count} at once", gain, "x", None, {one: rates[one] for one in names}))
    return rows


def run(model: Any, batches: Sequence[torch.Tensor], scale: str) -> tuple[float, float]:
    """Reads and continues every batch [B, T], one after the other: tokens per second of reading and of writing."""
    reading = writing = 0.0
    read = sum(batch.numel() for batch in batches)
    written = sum(len(batch) for batch in batches) * TOKENS[scale]
    for batch in batches:
        begun = time.perf_counter()
        out = model(input_ids=batch, use_cache=True, logits_to_keep=1)
        reading += time.perf_counter() - begun
        begun = time.perf_counter()
        for _ in range(TOKENS[scale]):
            best = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=best, past_key_values=out.past_key_values, use_cache=True)
        writing += time.perf_counter() - begun
    return read / reading, written / writing


if __name__ == "__main__":
    main()
