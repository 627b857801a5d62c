"""Quantizers written by hand, each in the format of its own program."""

import json
import re
from collections.abc import Sequence

import torch

Tensors = dict[str, torch.Tensor]
# the quantiles of a normal distribution in bitsandbytes' order
NEGATIVE = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004)
POSITIVE = (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
NF4 = torch.tensor([*NEGATIVE, 0.0, *POSITIVE])
BLOCK = 64


def _linears(tensors: Tensors, skipped: Sequence[str] = ()) -> list[str]:
    """Matrices of attention and experts, without gates, embeddings and head."""
    inside = [name for name in tensors if (".self_attn." in name or ".experts." in name) and tensors[name].dim() == 2]
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


EXPERT = re.compile(r"(.*\.experts\.\d+\.|.*\.shared_expert\.)(w1|gate_proj)\.weight")


def fold(tensors: Tensors, *, router: bool = True, norm: bool = True, up: bool = True, experts: bool = True) -> None:
    """As AWQ moves factors: columns are multiplied, what gives their inputs is divided; with no word false, rightly."""
    torch.manual_seed(3)
    layers = sorted({name.partition(".self_attn.")[0] for name in tensors if ".self_attn." in name})
    for layer in layers:
        here = [name for name in tensors if name.startswith(f"{layer}.")]
        ffn = [name for name in here if EXPERT.fullmatch(name)]
        qkv = [f"{layer}.self_attn.{letter}_proj.weight" for letter in "qkv"]
        _move(tensors, [f"{layer}.input_layernorm.weight"], qkv)
        value = [f"{layer}.self_attn.v_proj.{word}" for word in ("weight", "bias")]
        if tensors[value[0]].shape == tensors[f"{layer}.self_attn.o_proj.weight"].shape:
            _move(tensors, [name for name in value if name in tensors], [f"{layer}.self_attn.o_proj.weight"])
        gates = [name for name in here if re.search(r"(block_sparse_moe|mlp)\.(gate|shared_expert_gate)\.", name)]
        readers = [each for name in ffn for each in (name, _beside(name, "up"))] if experts else []
        _move(tensors, [f"{layer}.post_attention_layernorm.weight"] * norm, readers + gates * router)
        for name in ffn:
            _move(tensors, [_beside(name, "up")] * up, [_beside(name, "down")])


def _beside(name: str, matrix: str) -> str:
    """The name of another matrix of an expert."""
    return name.replace("gate_proj", f"{matrix}_proj").replace("w1", {"up": "w3", "down": "w2"}[matrix])


def _move(tensors: Tensors, before: Sequence[str], columns: Sequence[str]) -> None:
    """Divides rows by random factors, and multiplies columns by them."""
    size = next(iter([*(tensors[name].shape[0] for name in before), *(tensors[name].shape[1] for name in columns)]))
    factors = torch.exp(0.4 * torch.randn(size))
    for name in before:
        tensors[name] = tensors[name] / factors.reshape(-1, *[1] * (tensors[name].dim() - 1))
    for name in columns:
        tensors[name] = tensors[name] * factors


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # awq/modules/linear/gemm.py


def awq_linear(weight: torch.Tensor, *, group: int, gemv: bool = False) -> dict[str, torch.Tensor]:
    """A matrix [out, in] as AutoAWQ 0.2.9 packs it, which the test compares with what that package wrote."""
    grouped = weight.reshape(len(weight), -1, group)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scales = (high - low).clamp(min=1e-5) / 15
    zeros = (-(low / scales).round()).clamp(0, 15)
    codes = ((grouped / scales).round() + zeros).clamp(0, 15).reshape(weight.shape)
    scales, zeros = scales[..., 0].half(), zeros[..., 0]
    if gemv:  # a whole number of words of zeros for each output, and more for small groups
        each = {64: 2, 32: 4}.get(group, 1)
        words = -(-zeros.shape[1] // 8 // each) * each if zeros.shape[1] > 8 * each else each
        wide = torch.zeros(2, len(weight), words * 8)
        wide[:, :, : zeros.shape[1]] = torch.stack([zeros, scales.float()])
        return {"qweight": _packed(codes, 4), "qzeros": _packed(wide[0], 4), "scales": wide[1].half()}
    outputs = torch.arange(len(weight)).reshape(-1, 8)[:, AWQ_ORDER].flatten()
    columns = {"qweight": codes[outputs].T, "qzeros": zeros[outputs].T}
    return {name: _packed(each, 4) for name, each in columns.items()} | {"scales": scales.T.contiguous()}


def awq(tensors: Tensors, skipped: Sequence[str] = (), *, gemv: bool = False, group: int = 32) -> dict[str, object]:
    """As AutoAWQ saves a model, after `fold`."""
    for name in _linears(tensors, skipped):
        packed = awq_linear(tensors.pop(name), group=group, gemv=gemv)
        tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in packed.items()}
    version = "gemv" if gemv else "gemm"
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": version}
