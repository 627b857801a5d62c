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
from frankenmoe.moe.adapter import LoraLinear
from frankenmoe.moe.block import MoEBlock

SHAPES = {
    "smoke": Shape(hidden=32, ffn=64, layers=2, vocab=64),
    "small": Shape(hidden=512, ffn=1408, layers=4, vocab=4096),
    "full": Shape(hidden=1024, ffn=2816, layers=4, vocab=32000),
}
PREFILL, CONTEXT, STEPS = 512, 32, 16
DECODE_ROUNDS = 3  # for each of prefill: it takes a tenth of the time, and neighbours on the memory disturb it more
RANK = 16
LONG, COUNTS = 2048, (4, 16, 64)
PEERS = ("eager", "grouped_mm", "batched_mm")
# form, what it stands for, the most that its prefill and decode may take against the dense parent
DENSE_ROWS = (("identical", "16 identical", 1 / 0.95), ("adapters", "16 adapters", 1 / 0.85))
# the dense parent with frankenmoe's own products, and as transformers runs it
PARENTS = (("dense", "dense"), ("stock dense", "stock dense"))
# what, form, the most it may take against stock's best
STOCK_ROWS = (("prefill", "distinct", 1 / 4), ("decode", "distinct", 1 / 1.7), ("decode", "int8", 1 / 2.5))
FLOOR_ROWS = {"prefill": 1.6, "decode": 1.3}
Model = Any
Timer = Callable[[Model], float]


def main() -> None:
    options = arguments("Prefill and decode against the dense parent and stock transformers.", name="experts")
    shape = SHAPES[options.scale]
    with workspace(options.work) as work, torch.inference_mode():
        models = make_models(work, shape)
        rows = [row for threads in (1, 2) for row in measured(models, threads, rounds=options.rounds)]
        rows += [logit_error(models), adapter_memory(models)]
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
    models["int8"] = fm.load(files["distinct"], int8=True).model
    models["int8 identical"] = fm.load(files["identical"], int8=True).model
    one = write(work / "dense.yml", sources[0], [parent], experts_per_token=1)
    models["dense"] = fm.load(one).model
    models["stock dense"] = AutoModelForCausalLM.from_pretrained(sources[0], dtype="auto")
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


def write(file: Path, base: Path, experts: list[Mapping[str, str]], **keys: int) -> Path:
    recipe = {"base_model": str(base), "gate_mode": "random", "experts": list(experts)} | keys
    file.write_text(yaml.safe_dump(recipe))
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


def experts_alone(model: Model) -> float:
    """Median seconds of one token through the MoE blocks alone, each with a hidden state of its own."""
    blocks = [module for module in model.modules() if isinstance(module, MoEBlock)]
    sweep(blocks)
    times = []
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        states = [torch.randn(1, 1, model.config.hidden_size, generator=draw).to(model.dtype) for _ in blocks]
        begun = time.perf_counter()
        for block, state in zip(blocks, states, strict=True):
            block(state)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def sweep(blocks: list[MoEBlock]) -> None:
    """Reads all experts once: whoever is timed next finds their pages as mapped as the one after it does."""
    for block in blocks:
        for weight in block.experts.parameters():
            torch.sum(weight.view(torch.float32))


def multiply(model: Model) -> float:
    """Seconds that this machine's float32 product takes for the numbers a prefill multiplies in its linear layers."""
    width, config = 2048, model.config
    ffn = 3 * config.hidden_size * config.intermediate_size * 2  # top-2
    attention = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".self_attn." in name
    )
    wanted = PREFILL * (ffn * config.num_hidden_layers + attention)
    left, right = torch.ones(width, width), torch.ones(width, width)
    begun = time.perf_counter()
    torch.mm(left, right)
    return (time.perf_counter() - begun) * wanted / width**3


def read(model: Model) -> float:
    """Seconds for reading the 16-bit weights of two experts of every layer once, in the fastest way torch has."""
    blocks = [module for module in model.modules() if isinstance(module, MoEBlock)]
    sweep(blocks)
    times = []
    for step in range(STEPS):
        chosen = [block.experts[(step + offset) % len(block.experts)] for block in blocks for offset in (0, 8)]
        weights = [parameter.view(torch.float32) for expert in chosen for parameter in expert.parameters()]
        begun = time.perf_counter()
        for weight in weights:
            torch.sum(weight)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def measured(models: Mapping[str, Model], threads: int, *, rounds: int) -> list[Row]:
    """All rows at a number of threads. batched_mm copies every token's experts, which at prefill fits no memory."""
    torch.set_num_threads(threads)
    rows = []
    for what, timer in (("prefill", prefill), ("decode", decode)):
        log(f"{what}, {threads} thread{'s' * (threads > 1)}")
        turns: dict[str, Callable[[], float]] = {
            name: partial(timer, model)
            for name, model in models.items()
            if (what, name) not in (("prefill", "batched_mm"), ("prefill", "int8")) and name != "int8 identical"
        }
        ours = models["distinct"]
        if what == "prefill":
            turns["floor"] = partial(multiply, ours)
        else:
            turns |= {"experts alone": partial(experts_alone, ours), "floor": partial(read, ours)}
        for turn in turns.values():
            turn()
        samples = interleave(turns, rounds=rounds if what == "prefill" else DECODE_ROUNDS * rounds)
        best = min((name for name in PEERS if name in samples), key=lambda name: statistics.median(samples[name]))
        title = f"{what}, {threads} thr."

        def row(words: str, form: str, *, to: str, limit: float, title: str = title, samples: Any = samples) -> Row:
            return Row(f"{title}: {words}", ratio(samples, form, to=to), "x", limit, samples)

        for form, words, limit in DENSE_ROWS:
            rows += [row(f"{words} against {name}", form, to=parent, limit=limit) for parent, name in PARENTS]
        for which, form, limit in STOCK_ROWS:
            if which == what:
                rows.append(row(f"16 {form} against stock's best", form, to=best, limit=limit))
        measure = "distinct" if what == "prefill" else "experts alone"
        floor = "16 distinct against float32 products" if what == "prefill" else "experts alone against reading them"
        rows.append(row(floor, measure, to="floor", limit=FLOOR_ROWS[what]))
    return rows


def logit_error(models: Mapping[str, Model]) -> Row:
    """How far int8 moves logits, of their length, where no router can choose otherwise: identical experts."""
    ids = torch.arange(PREFILL)[None] % models["identical"].config.vocab_size
    exact, found = (models[name](input_ids=ids).logits.float() for name in ("identical", "int8 identical"))
    error = ((found - exact).norm() / exact.norm()).item()
    return Row("int8: error of the logits", 100 * error, "%", 5.0, {"share": [error]})


def adapter_memory(models: Mapping[str, Model]) -> Row:
    """Bytes of the distinct tensors of 16 adapters on one parent, against those of the parent and the adapters."""
    size = {name: stored(models[name]) for name in ("adapters", "dense")}
    loras = sum(part.a.nbytes + part.b.nbytes for part in models["adapters"].modules() if isinstance(part, LoraLinear))
    value = size["adapters"] / (size["dense"] + loras)
    return Row("16 adapters: memory against dense and adapters", value, "x", 1.05, {"bytes": [size["adapters"]]})


def stored(model: Model) -> float:
    found = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in model.parameters()}
    return float(sum(found.values()))


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
