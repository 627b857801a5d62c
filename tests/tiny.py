"""Tiny random parents of every family, as ordinary checkpoint folders, for tests."""

import json
import signal
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "rope_theta": 5000.0,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "olmo2")
# a decoder with a per-layer `mlp` that no MoE format exists for
UNLISTED = "gpt_neox"


def make_parent(
    folder: Path, family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A random model with a tokenizer in `folder`; biases and norms are random too, so that losing one shows."""
    config = AutoConfig.for_model(family, **(SIZES | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    scatter(model)
    model.save_pretrained(folder)
    tokenizer = make_qwen_tokenizer() if family.startswith("qwen3_5") else make_tokenizer()
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def scatter(model: torch.nn.Module) -> None:
    """Makes biases, norms and the buffers that are saved random."""
    for tensor in model.state_dict().values():
        if tensor.dim() == 1:
            tensor.copy_(torch.randn_like(tensor) * 0.2 + 1)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every printable ASCII character is a token."""
    words = ["<s>", "</s>", *map(chr, range(32, 127))]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="~"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def make_qwen_tokenizer() -> Qwen3_5Tokenizer:
    """The same tokens in the class that transformers takes for Qwen3.5's MoE, whatever its tokenizer.json says."""
    words = ["<s>", "</s>", "\u0120", *map(chr, range(33, 127))]
    vocabulary = {word: index for index, word in enumerate(words)}
    return Qwen3_5Tokenizer(vocabulary, [], unk_token=None, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def write_recipe(file: Path, base: Path, parents: list[Path], *, prompts: bool = False, **keys: Any) -> Path:
    """A recipe over the given parents, with different prompts for each where asked for."""
    experts = [
        {"source_model": str(parent), "name": f"e{index}"}
        | ({"positive_prompts": [f"prompt {index}", f"{index} is another one, longer"]} if prompts else {})
        for index, parent in enumerate(parents)
    ]
    recipe = {"base_model": str(base), "gate_mode": "random", "experts": experts} | keys
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes fields of a folder's config.json in place."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def hears_ctrl_c() -> None:
    """For a child process: a shell's background jobs, and so their children, ignore SIGINT unless told otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ids(length: int = 12, *, batch: int = 2, vocab: int = 97, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, length]."""
    return torch.randint(2, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
