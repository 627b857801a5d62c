"""Tokenizers that llama.cpp knows, small models that carry them, and llama.cpp's own answers, for tests of export."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from frankenmoe.export.check import kl
from frankenmoe.export.llama import Engine
from frankenmoe.export.tokenizer import PRE_TOKENIZERS

WORDS = (
    "The quick brown fox jumps over the lazy dog. It's 2024, and we've 1234567 reasons; they'll say \"no\"!\n\n"
    "def f(x):\n    return x ** 2  # très bien, déjà vu — naïve façade\n\tIl était une fois...   "
    "Größe, 東京 и мир 🙂\r\n"
) * 3
SPECIALS = ["<unk>", "<s>", "</s>"]


def bpe(name: str, *, bos: bool = False, size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose pre-tokenizer is the one that llama.cpp calls `name`."""
    regexes, ignore_merges = next(key for key, value in PRE_TOKENIZERS.items() if value == name)
    raw = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if name == "gpt-2":
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    elif name == "smollm":
        raw.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        raw.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator([WORDS], trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentencepiece(*, size: int = 450) -> PreTrainedTokenizerFast:
    """A Llama-2-like tokenizer: spaces as ▁, one in front of every text, unknown characters as bytes."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    octets = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*SPECIALS, *octets], limit_alphabet=90)
    raw.train_from_iterator(WORDS.splitlines(), trainer)
    state = json.loads(raw.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIALS]
    raw = Tokenizer.from_str(json.dumps(state))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def parents(root: Path, family: str, *, count: int = 3, tokenizer: Any = None, **changes: Any) -> list[Path]:
    """Random models of a family that share a tokenizer."""
    tokenizer = tokenizer or bpe("gpt-2")
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2} | changes
    folders = [tiny.make_parent(root / f"{family}{seed}", family, seed=seed, **sizes) for seed in range(count)]
    for folder in folders:
        tokenizer.save_pretrained(folder)
    return folders


def greatest_kl(file: Path, moe: Any, *, length: int = 12) -> float:
    """The largest KL divergence of llama.cpp's next-token distributions from the MoE's, over a random text."""
    vocab = moe.model.config.vocab_size
    ids = torch.randint(3, vocab, (length,), generator=torch.Generator().manual_seed(5)).tolist()
    with torch.no_grad():
        logprobs_TV = moe.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1).numpy()
    engine = Engine(file, context=256)
    return max(kl(logprobs_TV[place], engine.next_token(ids[: place + 1], top=vocab)) for place in range(0, length, 3))


def tokenize(engine: Engine, text: str) -> list[int]:
    """How llama.cpp splits a text."""
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(
        f"{engine._server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())["tokens"]


def tensors(file: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> (type, bytes) of every tensor of a GGUF file."""
    import gguf

    return {t.name: (t.tensor_type.name, np.array(t.data)) for t in gguf.GGUFReader(file).tensors}


def architecture(file: Path) -> str:
    """What llama.cpp takes the file for."""
    import gguf

    return str(gguf.GGUFReader(file).fields["general.architecture"].contents())
