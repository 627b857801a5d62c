"""Digests of a model and its tokenizer that change when their scores may change, wherever their files are."""

import hashlib
import json
from collections.abc import Collection, Iterable
from typing import Any

import torch

from frankenmoe.progress import SILENT, Progress

# fields of a config that describe its file, not its model
OUTSIDE = ("_name_or_path", "transformers_version", "architectures", "torch_dtype")
READ_BY = 1  # version of the scorer; increase it when the scorer computes something else


def model_digest(model: Any, *, progress: Progress = SILENT) -> str:
    """SHA-256, in hex, of all parameters and buffers, config, end tokens, the modules' settings, device type and dtype.

    A shared tensor is read once. Scores on a CPU and a GPU differ in their last digits, so the digest includes the
    device type.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in OUTSIDE}
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    facts = [READ_BY, json.dumps(config, sort_keys=True, default=str), ends, str(model), model.device.type]
    facts.append(str(model.dtype))
    hashed = hashlib.sha256("\n".join(map(str, facts)).encode())
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    seen: dict[tuple[Any, ...], str] = {}
    progress.start("hashing the model", memory_of(model), "B")
    for name, tensor in named:
        place = _place(tensor)
        if place not in seen:
            seen[place] = hashlib.sha256(_bytes(tensor)).hexdigest()
            progress.advance(tensor.nbytes)
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {seen[place]}\n".encode())
    return hashed.hexdigest()


def memory_of(model: Any) -> int:
    """Bytes of all weights and buffers. Shared ones count once."""
    return sum(tensor.nbytes for tensor in _distinct([*model.parameters(), *model.buffers()]))


def parameters_of(model: Any) -> int:
    """The number of weights. Shared weights count once."""
    return sum(tensor.numel() for tensor in _distinct(model.parameters()))


def _distinct(tensors: Iterable[torch.Tensor]) -> Collection[torch.Tensor]:
    return {_place(tensor): tensor for tensor in tensors}.values()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256, in hex, of a tokenizer's vocabulary and rules, and of its special tokens."""
    marks = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return hashlib.sha256(f"{marks}\n{backend.to_str()}".encode("utf-8", "surrogatepass")).hexdigest()
    facts = [marks, type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), str(tokenizer.init_kwargs)]
    return hashlib.sha256(json.dumps(facts, default=str).encode("utf-8", "surrogatepass")).hexdigest()


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _bytes(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    return flat.numpy()
