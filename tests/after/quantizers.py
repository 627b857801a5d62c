"""Quantizers written by hand, each in the format of its own program."""

import json
from collections.abc import Sequence

import torch

Tensors = dict[str, torch.Tensor]
# the quantiles of a normal distribution in bitsandbytes' order
NEGATIVE = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004)
POSITIVE = (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
NF4 = torch.tensor([*NEGATIVE, 0.0, *POSITIVE])
BLOCK = 64


def _linears(tensors: Tensors, skipped: Sequence[str] = ()) -> list[str]:
    """Attention and experts, without gates, embeddings and head."""
    inside = [name for name in tensors if ".self_attn." in name or ".experts." in name]
    return [name for name in inside if not any(part in name for part in skipped)]


def nf4(tensors: Tensors, skipped: Sequence[str] = (), *, nested: bool = False) -> dict[str, object]:
    """As bitsandbytes 0.50 saves 4-bit weights."""
    for name in _linears(tensors, skipped):
        weight = tensors.pop(name)
        blocks = weight.reshape(-1, BLOCK)
        most = blocks.abs().amax(1)
        codes = ((blocks / most[:, None])[..., None] - NF4).abs().argmin(-1).flatten().to(torch.uint8)
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float32", "shape": list(weight.shape)}
        tensors[name] = (codes[0::2] << 4 | codes[1::2])[:, None]
        tensors[f"{name}.quant_map"] = NF4.clone()
        if nested:
            levels, offset = torch.linspace(-1, 1, 256), most.mean()
            outer = torch.stack([part.abs().max() for part in (most - offset).split(256)])
            shares = (most - offset) / outer.repeat_interleave(256)[: len(most)]
            tensors[f"{name}.absmax"] = (shares[:, None] - levels).abs().argmin(-1).to(torch.uint8)
            tensors[f"{name}.nested_absmax"], tensors[f"{name}.nested_quant_map"] = outer, levels
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        else:
            tensors[f"{name}.absmax"] = most
        raw = json.dumps(state).encode()
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(raw), dtype=torch.uint8)
    return {"quant_method": "bitsandbytes", "load_in_4bit": True}


def nested_nf4(tensors: Tensors) -> dict[str, object]:
    """With the largest magnitudes quantized too."""
    return nf4(tensors, nested=True)


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers along the last axis in words of 32 bits, lowest bits first."""
    each = 32 // bits
    words = codes.long().reshape(*codes.shape[:-1], -1, each)
    found = (words << (torch.arange(each) * bits)).sum(-1)
    return torch.where(found >= 2**31, found - 2**32, found).to(torch.int32)


def gptq(tensors: Tensors, *, bits: int = 4, group: int = 32) -> dict[str, object]:
    """As the first GPTQ format: [in / 8, out] words, zeros less one, no error feedback."""
    for name in _linears(tensors):
        weight, stem = tensors.pop(name), name.removesuffix("weight")
        grouped = weight.reshape(len(weight), -1, group)
        low, high = grouped.amin(-1), grouped.amax(-1)
        scale = (high - low) / (2**bits - 1)
        zero = (-low / scale).round().clamp(0, 2**bits - 1)
        codes = (grouped / scale[..., None]).round() + zero[..., None]
        codes = codes.clamp(0, 2**bits - 1).reshape(weight.shape)
        tensors[f"{stem}qweight"] = _packed(codes, bits).T.contiguous()
        tensors[f"{stem}qzeros"] = _packed((zero - 1).long().T.contiguous() & (2**bits - 1), bits)
        tensors[f"{stem}scales"] = scale.T.contiguous().half()
        tensors[f"{stem}g_idx"] = (torch.arange(weight.shape[1]) // group).int()
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False}


def compressed(tensors: Tensors, *, bits: int = 4, group: int = 32) -> dict[str, object]:
    """As compressed-tensors' pack-quantized, symmetric."""
    for name in _linears(tensors):
        weight = tensors.pop(name)
        grouped = weight.reshape(len(weight), -1, group)
        scale = grouped.abs().amax(-1) * 2 / (2**bits - 1)
        half = 2 ** (bits - 1)
        codes = (grouped / scale[..., None]).round().clamp(-half, half - 1) + half
        tensors[f"{name}_packed"] = _packed(codes.reshape(weight.shape), bits)
        tensors[f"{name}_scale"] = scale
        tensors[f"{name}_shape"] = torch.tensor(weight.shape)
    weights = {"num_bits": bits, "group_size": group, "symmetric": True, "type": "int"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def fp8(tensors: Tensors, *, block: int = 128) -> dict[str, object]:
    """As transformers' fine-grained FP8."""
    for name in _linears(tensors):
        weight = tensors[name]
        rows, columns = (size // block for size in weight.shape)
        blocks = weight.reshape(rows, block, columns, block)
        scale = blocks.abs().amax((1, 3)) / 448
        tensors[name] = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    return {"quant_method": "fp8", "weight_block_size": [block, block]}
