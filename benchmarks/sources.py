"""Dense Llamas with random weights, and recipes over them, for benchmarks; knows nothing of what is measured."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

EXPERTS = 16
logging.disable_progress_bar()


@dataclass(frozen=True)
class Shape:
    """The size of one dense source."""

    hidden: int
    ffn: int
    layers: int
    vocab: int


# Of the full shape one source has 317 million parameters and 16 experts make 3.43 billion: 6.9 GB in bfloat16.
SHAPES = {
    "smoke": Shape(hidden=32, ffn=64, layers=2, vocab=64),
    "small": Shape(hidden=512, ffn=1408, layers=8, vocab=4096),
    "full": Shape(hidden=1024, ffn=2816, layers=24, vocab=4096),
}


def make_source(folder: Path, shape: Shape, *, dtype: str, seed: int = 0) -> Path:
    """A random Llama of `dtype` (torch's name of it) with a tokenizer, as save_pretrained writes it."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 16,
        vocab_size=shape.vocab,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM._from_config(config).save_pretrained(folder)
    # nobody here reads text, but mergekit-moe wants a tokenizer
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def write_recipe(file: Path, sources: list[Path]) -> Path:
    """Sixteen experts, taking turns over `sources`, with random gates, in keys that mergekit-moe knows too."""
    experts = [{"source_model": str(sources[number % len(sources)])} for number in range(EXPERTS)]
    recipe: dict[str, Any] = {
        "base_model": str(sources[0]),
        "gate_mode": "random",
        "dtype": "bfloat16",
        "experts_per_token": 2,
        "experts": experts,
    }
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file
