"""Trains a small Llama base and one expert per domain of text, in about a minute.

The experts start from the base and train only their FFNs, as FlexOlmo does for experts that share a backbone. An FFN
merge keeps the base's backbone and the experts' FFNs, so it keeps everything that these experts learnt.

Shapes: N rows in a batch, S tokens in a row, T tokens in a text, V vocabulary.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from frankenmoe import system
from frankenmoe.demo.text import DOMAINS, generate
from frankenmoe.errors import ArtifactError
from frankenmoe.progress import SILENT, Progress

BASE = "base"
PARENTS = (BASE, *DOMAINS)

_VERSION = 1  # increase it when the training below changes, so that cached parents are trained again
_MARKER = "frankenmoe-demo.sha256"
_BOS, _EOS = "<s>", "</s>"
_CARD = """---
license: apache-2.0
---
# {name}

A toy of `frankenmoe demo`: {story}.
"""


@dataclass(frozen=True)
class Settings:
    """Size and training of the parents. The defaults take about 75 CPU seconds for all five."""

    vocabulary: int = 768
    hidden: int = 128
    ffn: int = 352
    layers: int = 4
    heads: int = 4
    characters: int = 300_000  # of text per domain
    rows: int = 16
    row_tokens: int = 128
    base_steps: int = 150  # stops before convergence, so that the experts still have something to learn
    expert_steps: int = 50
    base_rate: float = 3e-3
    expert_rate: float = 1.4e-3  # with a higher rate the experts forget the other domains


DEFAULTS = Settings()


def make_parents(
    folder: Path, *, progress: Progress = SILENT, seed: int = 0, settings: Settings = DEFAULTS
) -> dict[str, Path]:
    """Trains `base` and an expert per domain into subfolders of `folder`. Returns each folder, base first.

    Each is an ordinary bf16 Llama checkpoint with tokenizer and card. A parent that already exists with the same seed,
    settings and text is kept. A killed run loses only the parent that it was training. `progress`
    receives a stage "training PARENT" for each parent and one advance per step.
    ArtifactError if a folder has a parent's name and was not made by this function.
    """
    folders = {parent: folder / parent for parent in PARENTS}
    for path in folders.values():
        _refuse_foreign(path)
    texts = {domain: generate(domain, seed=seed, characters=settings.characters) for domain in DOMAINS}

    base = folders[BASE]
    digest = _base_digest(texts, seed=seed, settings=settings)
    if not _is_finished(base, digest=digest):
        progress.start(f"training {BASE}", settings.base_steps, "steps")
        model, tokenizer = _train_base(texts, seed=seed, settings=settings, progress=progress)
        _write(base, model=model, tokenizer=tokenizer, digest=digest, story="a base trained on every kind of text")
    for domain, text in texts.items():
        expert = folders[domain]
        digest = _expert_digest(domain, base=base)
        if not _is_finished(expert, digest=digest):
            progress.start(f"training {domain}", settings.expert_steps, "steps")
            model, tokenizer = _train_expert(base, text=text, seed=seed, settings=settings, progress=progress)
            _write(expert, model=model, tokenizer=tokenizer, digest=digest, story=f"its base, FFNs trained on {domain}")
    return folders


# ---- the parents -----------------------------------------------------------------------------------------------------


def _train_base(texts: Mapping[str, str], *, seed: int, settings: Settings, progress: Progress) -> tuple[Any, Any]:
    tokenizer = _train_tokenizer(texts.values(), vocabulary=settings.vocabulary)
    model = _new_model(tokenizer, seed=seed, settings=settings)
    batches = _batches(tokenizer, list(texts.values()), seed=seed, settings=settings)
    _train(model, batches, steps=settings.base_steps, rate=settings.base_rate, progress=progress)
    return model, tokenizer


def _train_expert(base: Path, *, text: str, seed: int, settings: Settings, progress: Progress) -> tuple[Any, Any]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    # from the bf16 file, so that frozen tensors are written back byte for byte
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    batches = _batches(tokenizer, [text], seed=seed, settings=settings)
    _train(model, batches, steps=settings.expert_steps, rate=settings.expert_rate, progress=progress)
    return model, tokenizer


def _train_tokenizer(texts: Iterable[str], *, vocabulary: int) -> Any:
    """Byte-level BPE with one token per digit, so that sums can be learnt. Every text begins with the BOS token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_BOS, _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, tokenizer.token_to_id(_BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_BOS, eos_token=_EOS)


def _new_model(tokenizer: Any, *, seed: int, settings: Settings) -> Any:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.ffn,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads // 2,
        max_position_embeddings=4 * settings.row_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


# ---- training --------------------------------------------------------------------------------------------------------


def _batches(tokenizer: Any, texts: Sequence[str], *, seed: int, settings: Settings) -> Iterator[Tensor]:
    """Yields ids_NS without end. A row is BOS and a random stretch of one of `texts`; the texts take turns."""
    streams = [torch.tensor(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    generator = torch.Generator().manual_seed(seed)
    stretch = settings.row_tokens - 1
    head_N1 = torch.full((settings.rows, 1), tokenizer.bos_token_id)
    while True:
        rows = []
        for row in range(settings.rows):
            stream_T = streams[row % len(streams)]
            start = int(torch.randint(len(stream_T) - stretch, (), generator=generator))
            rows.append(stream_T[start : start + stretch])
        yield torch.cat([head_N1, torch.stack(rows)], dim=1)


def _train(model: Any, batches: Iterator[Tensor], *, steps: int, rate: float, progress: Progress) -> None:
    """AdamW on the trainable parameters. The rate rises over the first tenth of the steps, then falls to 0."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps), 1.0)
    )
    for ids_NS in islice(batches, steps):
        logits_NSV = model(input_ids=ids_NS, use_cache=False).logits
        loss = functional.cross_entropy(logits_NSV[:, :-1].flatten(0, 1), ids_NS[:, 1:].flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.advance(1)


# ---- the cache -------------------------------------------------------------------------------------------------------


def _base_digest(texts: Mapping[str, str], *, seed: int, settings: Settings) -> str:
    facts = {"version": _VERSION, "seed": seed, "settings": asdict(settings), "texts": texts}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _expert_digest(domain: str, *, base: Path) -> str:
    """Depends on the base's bytes too, so that an expert of another base is not reused."""
    marker, weights = (base / _MARKER).read_bytes(), (base / "model.safetensors").read_bytes()
    return hashlib.sha256(domain.encode() + marker + weights).hexdigest()


def _is_finished(path: Path, *, digest: str) -> bool:
    return path.exists() and (path / _MARKER).read_text(encoding="utf-8") == digest


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not (path / _MARKER).is_file():
        raise ArtifactError(
            f"{path} is for one of the demo's parents: expected nothing or a folder with {_MARKER}, found neither",
            hint="choose another folder, or move this one away",
        )


def _write(path: Path, *, model: Any, tokenizer: Any, digest: str, story: str) -> None:
    """Writes the checkpoint completely or not at all. Replaces an outdated one at `path`."""
    unfinished, stale = path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.stale")
    for leftover in (unfinished, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / "README.md").write_bytes(_CARD.format(name=path.name, story=story).encode())
    (unfinished / _MARKER).write_text(digest, encoding="utf-8")
    system.sync_all(unfinished)
    if path.exists():
        path.rename(stale)
    unfinished.rename(path)
    shutil.rmtree(stale, ignore_errors=True)
