"""What an audit's pass over text costs on top of the plain forward, in time and memory, in one process, by turns."""

import gc
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import MB, REPOSITORY, Row, arguments, interleave, publish, ratio, status, workspace
from sources import SHAPES, Shape, make_source, write_recipe

import frankenmoe as fm
from frankenmoe.audit.collect import batches, collect

PLAIN, AUDIT = "plain forward", "audit"
BLOCK = 256
MORE = 8  # times the text, for memory
MOST_TIME, MOST_MEMORY = 1.1, 1.05
REAL = REPOSITORY.parent / "shared" / "models"
DOMAINS = ("shakespeare", "math", "french", "python")
# tokens of a turn; the random shape of "full" is the benchmarks' small one: 8 layers, hidden 512, 16 experts
TOKENS = {"smoke": 512, "small": 512, "full": 1024}
RANDOM = {"smoke": SHAPES["smoke"], "small": Shape(256, 704, 4, 4096), "full": SHAPES["small"]}


def main() -> None:
    options = arguments("Audit an MoE, and run it over the same tokens without looking.", name="audit")
    tokens = TOKENS[options.scale]
    with workspace(options.work) as work:
        rows = []
        for what, recipe in recipes(work, RANDOM[options.scale]).items():
            moe = fm.load(recipe, dtype="float32")
            rows += rows_of(what, moe, tokens=tokens, rounds=options.rounds)
            del moe
            gc.collect()
        publish("audit", rows, options=options, work=work)


def recipes(work: Path, shape: Shape) -> dict[str, Path]:
    """The MoEs to audit: 16 random experts, and the real-text parents where they are."""
    sources = [make_source(work / f"source-{seed}", shape, dtype="bfloat16", seed=seed) for seed in range(2)]
    found = {"random, 16 experts": write_recipe(work / "random.yml", sources)}
    if REAL.is_dir():
        file = work / "real.yml"
        experts = "".join(f"  - source_model: {REAL / f'expert-{domain}'}\n" for domain in DOMAINS)
        file.write_text(f"base_model: {REAL / 'base'}\ngate_mode: random\nexperts:\n{experts}")
        found["real text, 4 experts"] = file
    return found


def rows_of(what: str, moe: Any, *, tokens: int, rounds: int) -> list[Row]:
    """Time against the plain forward, and peak memory for MORE times the text against once the text."""
    turns = {PLAIN: partial(seconds, plain, moe, tokens), AUDIT: partial(seconds, audited, moe, tokens)}
    for turn in turns.values():
        turn()
    times = interleave(turns, rounds=rounds)
    memory = interleave(
        {
            "once": partial(peak, moe, tokens),
            f"{MORE} times": partial(peak, moe, MORE * tokens),
        },
        rounds=max(1, rounds // 3) if tokens > TOKENS["smoke"] else rounds,
    )
    grown = statistics.median(memory[f"{MORE} times"]) / statistics.median(memory["once"])
    return [
        Row(f"{what}: time of a pass", ratio(times, AUDIT, to=PLAIN), "x", MOST_TIME, times),
        Row(f"{what}: memory, {MORE} times the text", grown, "x", MOST_MEMORY, memory),
    ]


def text(tokens: int, vocabulary: int) -> Iterator[list[int]]:
    """Random token ids in blocks, made as they are asked for."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(tokens // BLOCK):
        yield torch.randint(2, vocabulary, (BLOCK,), generator=generator).tolist()


@torch.inference_mode()
def plain(moe: Any, tokens: int) -> None:
    decoder = moe.model.get_decoder()
    for batch in batches(text(tokens, moe.model.config.vocab_size), limit=tokens):
        decoder(input_ids=torch.tensor(batch), use_cache=False)


def audited(moe: Any, tokens: int) -> None:
    collect(moe, {"text": text(tokens, moe.model.config.vocab_size)}, limit=tokens)


def seconds(run: Any, moe: Any, tokens: int) -> float:
    begun = time.perf_counter()
    run(moe, tokens)
    return time.perf_counter() - begun


def peak(moe: Any, tokens: int) -> float:
    """The kernel's own peak of this process in MB, counted anew for one audit."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    audited(moe, tokens)
    return status("self")["VmHWM"] / MB


if __name__ == "__main__":
    main()
