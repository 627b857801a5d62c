"""Prefill and decode of MoEs against their dense parent and against stock transformers, in one process, interleaved."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from common import Row, arguments, interleave, log, publish, ratio, workspace
from peft import LoraConfig, get_peft_model
from sources import Shape, make_source
from transformers import AutoModelForCausalLM

import frankenmoe as fm

SHAPES = {
    "smoke": Shape(hidden=32, ffn=64, layers=2, vocab=64),
    "small": Shape(hidden=512, ffn=1408, layers=4, vocab=4096),
    "full": Shape(hidden=1024, ffn=2816, layers=4, vocab=32000),
}
PREFILL, CONTEXT, STEPS = 512, 32, 16
RANK = 16
LONG, COUNTS = 2048, (4, 16, 64)
PEERS = ("eager", "grouped_mm", "batched_mm")
# form, what it stands for, the most that its prefill and decode may take against the dense parent
DENSE_ROWS = (
    ("identical", "16 identical against dense", 1 / 0.95),
    ("adapters", "16 adapters against dense", 1 / 0.85),
)
STOCK_ROWS = (("prefill", 1 / 4), ("decode", 1 / 1.7))
Model = Any
Timer = Callable[[Model], float]


def main() -> None:
    options = arguments("Prefill and decode against the dense parent and stock transformers.", name="experts")
    shape = SHAPES[options.scale]
    with workspace(options.work) as work, torch.inference_mode():
        models = make_models(work, shape)
        rows = [row for threads in (1, 2) for row in measured(models, threads, rounds=options.rounds)]
        del models
        rows += growth(work, shape, rounds=options.rounds)
        publish("experts", rows, options=options, work=work)


def make_models(work: Path, shape: Shape) -> dict[str, Model]:
    """The dense parent, our MoEs over it and over sixteen sources, and the latter in stock transformers."""
    sources = [make_source(work / f"source-{seed}", shape, dtype="bfloat16", seed=seed) for seed in range(16)]
    adapters = [make_adapter(work / f"adapter-{seed}", sources[0], seed=seed) for seed in range(16)]
    parent = {"source_model": str(sources[0])}
    forms = {
        "identical": [parent] * 16,
        "adapters": [parent | {"adapter": str(adapter)} for adapter in adapters],
        "distinct": [{"source_model": str(source)} for source in sources],
    }
    files = {form: write(work / f"{form}.yml", sources[0], experts) for form, experts in forms.items()}
    models = {form: fm.load(file).model for form, file in files.items()}
    models["dense"] = AutoModelForCausalLM.from_pretrained(sources[0], dtype="auto")
    fm.build(files["distinct"], work / "built")
    for peer in PEERS:
        models[peer] = AutoModelForCausalLM.from_pretrained(work / "built", dtype="auto", experts_implementation=peer)
    return models


def make_adapter(folder: Path, source: Path, *, seed: int) -> Path:
    """A random LoRA on the FFN of `source`, as PEFT saves it."""
    torch.manual_seed(seed)
    projections = ["gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=projections, init_lora_weights="gaussian")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(source, dtype="auto"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.bfloat16().save_pretrained(folder)
    return folder


def write(file: Path, base: Path, experts: list[Mapping[str, str]]) -> Path:
    file.write_text(yaml.safe_dump({"base_model": str(base), "gate_mode": "random", "experts": list(experts)}))
    return file


def prefill(model: Model, tokens: int = PREFILL) -> float:
    """Seconds for one forward of `tokens` tokens."""
    ids = torch.arange(tokens)[None] % model.config.vocab_size
    begun = time.perf_counter()
    model(input_ids=ids, logits_to_keep=1)
    return time.perf_counter() - begun


def decode(model: Model) -> float:
    """Median seconds for one more token behind a short context."""
    vocabulary = model.config.vocab_size
    cache = model(input_ids=torch.arange(CONTEXT)[None] % vocabulary, use_cache=True).past_key_values
    times = []
    for step in range(STEPS):
        begun = time.perf_counter()
        model(input_ids=torch.tensor([[step % vocabulary]]), past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def measured(models: Mapping[str, Model], threads: int, *, rounds: int) -> list[Row]:
    """All rows at a number of threads. batched_mm copies every token's experts, which at prefill fits no memory."""
    torch.set_num_threads(threads)
    rows = []
    for what, timer in (("prefill", prefill), ("decode", decode)):
        log(f"{what}, {threads} thread{'s' * (threads > 1)}")
        turns = {
            name: partial(timer, model) for name, model in models.items() if (what, name) != ("prefill", "batched_mm")
        }
        for turn in turns.values():
            turn()
        samples = interleave(turns, rounds=rounds)
        best = min((name for name in PEERS if name in samples), key=lambda name: statistics.median(samples[name]))
        title = f"{what}, {threads} thr."
        for form, words, limit in DENSE_ROWS:
            rows.append(Row(f"{title}: {words}", ratio(samples, form, to="dense"), "x", limit, samples))
        limit = dict(STOCK_ROWS)[what]
        rows.append(
            Row(
                f"{title}: 16 distinct against stock's best",
                ratio(samples, "distinct", to=best),
                "x",
                limit,
                samples,
            )
        )
    return rows


def growth(work: Path, shape: Shape, *, rounds: int) -> list[Row]:
    """Prefill of a long text with more experts at the same top-k, against the fewest."""
    torch.set_num_threads(2)
    sources = [work / f"source-{seed}" for seed in range(16)]
    turns: dict[str, Callable[[], float]] = {}
    for count in COUNTS:
        # beyond 16 sources, noise makes experts of their own
        experts = [
            {"source_model": str(sources[number % 16])} | ({"noise_relative": 0.01} if number >= 16 else {})
            for number in range(count)
        ]
        model = fm.load(write(work / f"{count}.yml", sources[0], experts)).model
        turns[str(count)] = partial(prefill, model, LONG)
        turns[str(count)]()
    samples = interleave(turns, rounds=rounds)
    first = str(COUNTS[0])
    return [
        Row(
            f"prefill of {LONG}: {count} experts against {first}",
            ratio(samples, str(count), to=first),
            "x",
            1.15,
            samples,
        )
        for count in COUNTS[1:]
    ]


if __name__ == "__main__":
    main()
