"""Raiden's own shape on a small machine: 16 x 3.43B as a virtual MoE, as GGUF files, and in llama.cpp.

Makes the parent, 6.9 GB of random weights in the shape of a 3.43B Llama, and three recipes over it: 16 times the same,
16 adapters, 16 noisy copies. Every step is kept as a file under --runs, so that a killed run goes on where it stopped;
a file that is too large to keep is removed after its step. Knows nothing of quality: random weights have none.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from common import MB, RESULTS, SCALES, Row, Run, discarded, interleave, log, measure, publish, ratio
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from export import QUANTIZER
from frankenmoe.checkpoint.cast import encode
from frankenmoe.checkpoint.header import header_bytes
from frankenmoe.moe.written import write_adapter

EXPERTS, RANK, NOISE = 16, 8, 0.01
THREADS = 2
ONCE = Path(__file__).parent / "raiden_once.py"
SPARE = 10**9  # bytes of disk left free
LARGEST = 8 * 10**9  # bytes of memory that anything of ours may take
BITS = 5.5  # per weight, of the largest type
FILE_TYPE = {"q4_0": 2, "q5_0": 8}  # llama.cpp's numbers
KINDS = ("identical", "adapters", "noisy")
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """The size of the parent, and the tokens that are generated."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    vocab: int
    tokens: int

    @property
    def ffns(self) -> int:
        """Weights in all FFNs of one parent."""
        return 3 * self.layers * self.hidden * self.ffn

    @property
    def rest(self) -> int:
        """Weights outside the FFNs."""
        return 2 * self.vocab * self.hidden + 4 * self.layers * self.hidden**2


SHAPES = {
    "smoke": Shape(hidden=64, ffn=128, layers=2, heads=4, vocab=512, tokens=6),
    "small": Shape(hidden=512, ffn=1408, layers=6, heads=8, vocab=4096, tokens=12),
    "full": Shape(hidden=3200, ffn=8640, layers=26, heads=32, vocab=32000, tokens=24),
}


def main() -> None:
    options = _options()
    shape, runs = SHAPES[options.scale], options.runs / options.scale
    runs.mkdir(parents=True, exist_ok=True)
    check_disk(shape, runs)
    prepare(shape, runs)
    steps: dict[str, Callable[[], Any]] = {f"plan-{kind}": partial(plan, runs / f"{kind}.yml") for kind in KINDS}
    steps |= {f"virtual-{kind}": partial(virtual, runs, kind) for kind in KINDS}
    steps["decoding"] = partial(decoding, runs, shape, rounds=options.rounds)
    steps |= {f"{kind}-{name}": partial(export, runs, kind, name) for kind in KINDS for name in FILE_TYPE}
    steps |= {f"llama.cpp-{name}": partial(peer, runs, name) for name in FILE_TYPE}
    found = {name: kept(runs / f"{name}.json", step) for name, step in steps.items()}
    publish("raiden", table(found, shape), options=options, work=runs)
    log(f"the parent stays in {runs}; remove that folder to start over")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Raiden's shape, 16 x 3.43B: needs 34 GB of free disk at full scale.")
    parser.add_argument("--scale", choices=SCALES, default="small", help="only full counts (default: small)")
    parser.add_argument("--rounds", type=int, default=3, help="times each model generates (default: 3)")
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "frankenmoe-raiden")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/raiden-SCALE.json)")
    options = parser.parse_args()
    options.out = options.out or RESULTS / f"raiden-{options.scale}.json"
    return options


def check_disk(shape: Shape, runs: Path) -> None:
    """Ends with a sentence if the disk cannot hold the parent and the largest file beside it."""
    parent = runs / "parent"
    largest = int((EXPERTS * shape.ffns + shape.rest) * BITS / 8)
    need = largest + SPARE + (0 if parent.exists() else 2 * (shape.ffns + shape.rest))
    free = shutil.disk_usage(runs).free
    log(f"needs {need / 1e9:.1f} GB of disk in {runs}, where {free / 1e9:.1f} GB are free")
    if free < need:
        sys.exit(f"{runs} has {free / 1e9:.1f} GB free, expected {need / 1e9:.1f} GB; choose another disk with --runs")


def kept(file: Path, step: Callable[[], Any]) -> Any:
    """What a step found, from its file if an earlier run has done it."""
    if not file.exists():
        log(file.stem)
        partial_file = file.with_suffix(".partial")
        partial_file.write_text(json.dumps(step()))
        partial_file.replace(file)
    return json.loads(file.read_text())


def prepare(shape: Shape, runs: Path) -> None:
    """The parent, 16 adapters, and the recipes over them; only what is not there yet."""
    parent = runs / "parent"
    if not parent.exists():
        log("making the parent")
        making = runs / "parent.partial"
        shutil.rmtree(making, ignore_errors=True)
        make_parent(making, shape)
        making.rename(parent)
    for number in range(EXPERTS):
        folder = runs / f"adapter-{number}"
        if not (folder / "adapter_config.json").exists():  # which is written last
            folder.mkdir(exist_ok=True)
            write_adapter(folder, adapter(shape, seed=number), base=str(parent))
    entries: dict[str, list[dict[str, Any]]] = {
        "identical": [{} for _ in range(EXPERTS)],
        "adapters": [{"adapter": str(runs / f"adapter-{number}")} for number in range(EXPERTS)],
        "noisy": [{"noise_relative": NOISE} for _ in range(EXPERTS)],
        "two": [{} for _ in range(2)],
    }
    for kind, experts in entries.items():
        recipe = {
            "name": kind,
            "base_model": str(parent),
            "gate_mode": "random",
            "dtype": "bfloat16",
            "experts_per_token": 2,
            "experts": [{"source_model": str(parent)} | each for each in experts],
        }
        (runs / f"{kind}.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def make_parent(folder: Path, shape: Shape) -> None:
    """Random bfloat16 weights, one tensor at a time, so that making it takes less memory than running it."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocab,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        sizes = {name: tuple(each.shape) for name, each in LlamaForCausalLM(config).state_dict().items()}
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header_bytes([(name, "BF16", size) for name, size in sizes.items()], metadata={"format": "pt"}))
        for name, size in sizes.items():
            numbers = random.standard_normal(int(np.prod(size)), dtype=np.float32) * np.float32(0.02)
            file.write(encode(np.ones_like(numbers) if name.endswith("norm.weight") else numbers, dtype="BF16").data)
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    words.train_from_iterator([Path(__file__).read_text()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def adapter(shape: Shape, *, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A random LoRA on every FFN."""
    random = torch.Generator().manual_seed(seed)
    sides = {"gate_proj": (shape.hidden, shape.ffn), "up_proj": (shape.hidden, shape.ffn)}
    sides["down_proj"] = (shape.ffn, shape.hidden)
    return {
        f"model.layers.{layer}.mlp.{name}": (
            torch.randn(RANK, inputs, generator=random).bfloat16() * 0.02,
            torch.randn(outputs, RANK, generator=random).bfloat16() * 0.02,
        )
        for layer in range(shape.layers)
        for name, (inputs, outputs) in sides.items()
    }


def ours(*words: object) -> list[str]:
    return [sys.executable, "-m", "frankenmoe", *map(str, words)]


def facts(run: Run, **more: Any) -> Facts:
    """What a process took; `memory` is what it had at most, mapped files included."""
    return {"seconds": run.seconds, "anon": run.anon, "memory": run.anon + run.file, **more}


def plan(recipe: Path) -> Facts:
    return facts(measure(ours("plan", recipe)))


def virtual(runs: Path, kind: str) -> Facts:
    """The virtual artifact, which stays."""
    out = runs / kind
    shutil.rmtree(out, ignore_errors=True)
    run = measure(ours("build", runs / f"{kind}.yml", out, "--virtual", "--allow-identical"))
    return facts(run, bytes=sum(file.stat().st_size for file in out.rglob("*") if file.is_file()))


def decoding(runs: Path, shape: Shape, *, rounds: int) -> Facts:
    """The dense parent, here and in stock transformers, and the virtual MoEs that fit into its memory, in turns."""
    folders = {"stock": "parent", "dense": "parent", "identical": "identical", "adapters": "adapters"}
    turns = {
        name: partial(once, name if folder == "parent" else "virtual", runs / folder, shape.tokens)
        for name, folder in folders.items()
    }
    return interleave(turns, rounds=rounds)


def once(loader: str, folder: Path, tokens: int) -> Facts:
    return dict(json.loads(measure([sys.executable, str(ONCE), loader, str(folder), str(tokens)]).stdout))


def export(runs: Path, kind: str, name: str) -> Facts:
    """A GGUF file from the virtual artifact, synced, and a few words of it in llama.cpp. The file is removed."""
    folder = runs / "gguf"
    shutil.rmtree(folder, ignore_errors=True)
    with discarded(folder):
        file = folder / "moe.gguf"
        words = ours("export", "--types", name, "--threads", THREADS, "--allow-random", "--no-check", runs / kind, file)
        made = measure(["sh", "-c", 'f=$1; shift; "$@" && sync -f "$f"', "sh", str(file), *words])
        talked = measure(ours("chat", file, "--prompt", "The", "--max-new-tokens", 4, "--json"))
        return facts(made, bytes=file.stat().st_size, chat=facts(talked))


def peer(runs: Path, name: str) -> Facts:
    """llama.cpp's own quantizer on a file of two experts: all 16 in bfloat16 would be 72 GB."""
    folder = runs / "peer"
    shutil.rmtree(folder, ignore_errors=True)
    with discarded(folder):
        source, out = folder / "source.gguf", folder / "out.gguf"
        measure(ours("export", "--types", "bf16", "--allow-random", "--no-check", runs / "two.yml", source))
        words = [sys.executable, "-c", QUANTIZER, str(FILE_TYPE[name]), str(THREADS), str(source), str(out)]
        made = measure(["sh", "-c", 'f=$1; shift; "$@" && sync -f "$f"', "sh", str(out), *words])
        return facts(made, bytes=out.stat().st_size)


def table(found: Mapping[str, Any], shape: Shape) -> list[Row]:
    rows, largest = [], []
    for kind in KINDS:
        planned, made = found[f"plan-{kind}"], found[f"virtual-{kind}"]
        rows.append(Row(f"{kind}: plan", planned["seconds"], "s", None, {}))
        rows.append(Row(f"{kind}: virtual artifact", made["seconds"], "s", None, {}))
        rows.append(Row(f"{kind}: its size", made["bytes"] / MB, "MB", None, {}))
        largest += [planned["memory"], made["memory"]]
    tokens = {name: [each["token"] for each in runs] for name, runs in found["decoding"].items()}
    for name, runs in found["decoding"].items():
        for key, what in (("load", "loading"), ("first", "first token")):
            seconds = [each[key] for each in runs]
            rows.append(Row(f"{name}: {what}", statistics.median(seconds), "s", None, {name: seconds}))
        rows.append(Row(f"{name}: memory", max(each["peak"] for each in runs) / MB, "MB", None, {}))
        if name not in ("stock", "dense"):
            largest += [each["peak"] for each in runs]
    for name, least in (("identical", 0.95), ("adapters", 0.85)):
        speed = 1 / ratio(tokens, name, to="dense")
        rows.append(Row(f"{name}: tokens/s over the dense parent's", speed, "x", None, tokens, at_least=least))
    rows.append(Row("dense: tokens/s over stock transformers'", 1 / ratio(tokens, "dense", to="stock"), "x", None, {}))
    for name in FILE_TYPE:
        theirs = found[f"llama.cpp-{name}"]
        for kind in KINDS:
            made = found[f"{kind}-{name}"]
            largest.append(made["memory"])
            share = (made["seconds"] / made["bytes"]) / (theirs["seconds"] / theirs["bytes"])
            limit = 1.15 if kind == "noisy" else None
            rows.append(Row(f"{kind}: {name}", made["seconds"], "s", None, {}))
            rows.append(Row(f"{kind}: {name}, over llama.cpp's, a byte", share, "x", limit, {}))
            rows.append(Row(f"{kind}: {name}, memory of export", made["memory"] / MB, "MB", None, {}))
            rows.append(Row(f"{kind}: {name}, chat in llama.cpp", made["chat"]["seconds"], "s", None, {}))
            rows.append(Row(f"{kind}: {name}, its memory", made["chat"]["memory"] / MB, "MB", None, {}))
        rows.append(Row(f"llama.cpp's quantizer, {name}: memory", theirs["memory"] / MB, "MB", None, {}))
    return [*rows, Row("most memory of anything but llama.cpp", max(largest) / MB, "MB", LARGEST / MB, {})]


if __name__ == "__main__":
    main()
