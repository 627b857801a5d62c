"""llama.cpp's architectures, block types, file types and their mixes, as tables.

Source: src/llama-quant.cpp and src/models of llama.cpp b11549 (MIT licence, the ggml authors; see NOTICE).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

MAX_EXPERTS = 1024  # llama.cpp's LLAMA_MAX_EXPERTS
WIDE_BLOCK = 256  # weights in a K-quant block

# type -> (weights in a block, bytes of a block)
BLOCKS: Mapping[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
# used where the row length is not a multiple of a K-quant's block
FALLBACK: Mapping[str, str] = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True, slots=True)
class FileType:
    """A file type: its name, the type of most tensors, its number in `general.file_type`."""

    name: str
    base: str
    number: int

    @property
    def quantized(self) -> bool:
        return BLOCKS[self.base][0] > 1


FILE_TYPES: Mapping[str, FileType] = {
    kind.name: kind
    for kind in (
        FileType("f32", "F32", 0),
        FileType("f16", "F16", 1),
        FileType("bf16", "BF16", 32),
        FileType("q8_0", "Q8_0", 7),
        FileType("q6_k", "Q6_K", 18),
        FileType("q5_k_m", "Q5_K", 17),
        FileType("q5_k_s", "Q5_K", 16),
        FileType("q5_1", "Q5_1", 9),
        FileType("q5_0", "Q5_0", 8),
        FileType("q4_k_m", "Q4_K", 15),
        FileType("q4_k_s", "Q4_K", 14),
        FileType("q4_1", "Q4_1", 3),
        FileType("q4_0", "Q4_0", 2),
    )
}
# the file type to use where K-quants do not fit the shape
PLAIN: Mapping[str, str] = {"q4_k_m": "q4_0", "q4_k_s": "q4_0", "q5_k_m": "q5_0", "q5_k_s": "q5_0", "q6_k": "q8_0"}


@dataclass(frozen=True, slots=True)
class Arch:
    """An architecture of llama.cpp and how it computes an MoE.

    `normalizes`: top-k weights are renormalised to sum 1. `shared`: the kinds of shared expert it has, of "none",
    "plain" (always added) and "gated" (times a sigmoid). `interleaved`: rotary pairs are adjacent, so rows of q and k
    are permuted. `own_head`: the head cannot be tied. `free_heads`: heads times head size may differ from the hidden
    size. `o_bias`: the output of attention may have a bias. `multipliers`: it has Granite's.
    """

    name: str
    normalizes: bool
    shared: tuple[str, ...]
    interleaved: bool
    qk_norm: bool = False
    qkv_bias: bool = False
    own_head: bool = False
    free_heads: bool = True
    o_bias: bool = False
    multipliers: bool = False


# tried in this order
ARCHS = (
    Arch("llama", normalizes=True, shared=("none",), interleaved=True, qkv_bias=True),
    Arch("qwen3moe", normalizes=True, shared=("none",), interleaved=False, qk_norm=True),
    Arch("granitemoe", normalizes=True, shared=("none", "plain"), interleaved=True, qkv_bias=True, o_bias=True,
         multipliers=True),
    Arch("qwen2moe", normalizes=False, shared=("gated",), interleaved=False, qkv_bias=True, own_head=True,
         free_heads=False),
    Arch("deepseek", normalizes=False, shared=("plain",), interleaved=True, own_head=True, free_heads=False),
)  # fmt: skip

# dense tensor name -> name in the GGUF file
NAMES: Mapping[str, str] = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
} | {
    f"model.layers.{{layer}}.{ours}": f"blk.{{layer}}.{theirs}"
    for ours, theirs in {
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "ffn_norm.weight",
        "self_attn.q_proj.weight": "attn_q.weight",
        "self_attn.k_proj.weight": "attn_k.weight",
        "self_attn.v_proj.weight": "attn_v.weight",
        "self_attn.o_proj.weight": "attn_output.weight",
        "self_attn.q_proj.bias": "attn_q.bias",
        "self_attn.k_proj.bias": "attn_k.bias",
        "self_attn.v_proj.bias": "attn_v.bias",
        "self_attn.o_proj.bias": "attn_output.bias",
        "self_attn.q_norm.weight": "attn_q_norm.weight",
        "self_attn.k_norm.weight": "attn_k_norm.weight",
    }.items()
}
ROUTER = "blk.{layer}.ffn_gate_inp.weight"
SHARED_ROUTER = "blk.{layer}.ffn_gate_inp_shexp.weight"
EXPERTS: Mapping[str, str] = {
    f"{which}_proj.weight": f"blk.{{layer}}.ffn_{which}_exps.weight" for which in ("gate", "up", "down")
}
SHARED_EXPERT: Mapping[str, str] = {
    f"{which}_proj.weight": f"blk.{{layer}}.ffn_{which}_shexp.weight" for which in ("gate", "up", "down")
}


def generic_name(name: str) -> tuple[int, str]:
    """(3, "model.layers.{layer}.x") for model.layers.3.x; (-1, name) for a tensor outside the layers."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    return (int(match[1]), f"model.layers.{{layer}}.{match[2]}") if match else (-1, name)


def gguf_name(name: str) -> str | None:
    """The GGUF name of a dense backbone tensor; None if llama.cpp has no such tensor."""
    layer, generic = generic_name(name)
    return NAMES[generic].format(layer=layer) if generic in NAMES else None


@dataclass(frozen=True, slots=True)
class MixFacts:
    """The model facts on which the mix of types depends."""

    layers: int
    experts: int
    tied: bool
    is_70b: bool = False
    imatrix: bool = False


def tensor_type(name: str, shape: tuple[int, ...], kind: FileType, facts: MixFacts) -> str:
    """The type that llama.cpp's quantizer gives a tensor in a file of this kind. `shape` has columns last.

    Norms, biases and routers stay F32. Rows that fit no block fall back as in `tensor_type_fallback`, finally to F16.
    """
    if not any(size > 1 for size in shape[:-1]):  # ggml drops leading ones and never quantizes a vector
        return "F32"
    if not name.endswith("weight") or "_norm.weight" in name or "ffn_gate_inp.weight" in name:
        return "F32"
    if not kind.quantized:
        return kind.base
    wanted = _wanted(name, shape, kind, facts)
    if shape[-1] % BLOCKS[wanted][0]:
        wanted = FALLBACK.get(wanted, "F16")
    return wanted if shape[-1] % BLOCKS[wanted][0] == 0 else "F16"


def _wanted(name: str, shape: tuple[int, ...], kind: FileType, facts: MixFacts) -> str:
    """The type of a tensor before any fallback."""
    if name == "output.weight" or (facts.tied and name == "token_embd.weight"):
        return "Q8_0" if shape[-1] % BLOCKS[kind.base][0] or kind.base == "Q8_0" else "Q6_K"
    match = re.match(r"blk\.(\d+)\.(attn_v|attn_k|attn_output|ffn_down)", name)
    if match is None:
        return kind.base
    layer, part = int(match[1]), match[2]
    if part == "attn_output":
        return "Q5_K" if facts.experts == 8 and kind.name in ("q4_k_m", "q4_k_s") else kind.base
    if part in ("attn_k", "attn_v") and facts.experts == 8:
        return "Q8_0"
    if part == "attn_v":
        found = _more(kind, layer, facts, small=layer < 4)
        return "Q5_K" if facts.is_70b and found == "Q4_K" else found
    if part == "ffn_down":
        early = layer < facts.layers // 8
        if facts.imatrix and early and kind.name in ("q4_0", "q5_0"):
            return {"q4_0": "Q4_1", "q5_0": "Q5_1"}[kind.name]
        return _more(kind, layer, facts, small=early)
    return kind.base


def _more(kind: FileType, layer: int, facts: MixFacts, *, small: bool) -> str:
    """Q6_K in about half of the layers of q4_k_m and q5_k_m; Q5_K in the first layers of q4_k_s (`small`)."""
    eighth = facts.layers // 8
    if kind.name in ("q4_k_m", "q5_k_m"):
        more = layer < eighth or layer >= 7 * facts.layers // 8 or (layer - eighth) % 3 == 2
        return "Q6_K" if more else kind.base
    return "Q5_K" if kind.name == "q4_k_s" and small else kind.base


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of one row; `columns` must be a multiple of the type's block."""
    block, size = BLOCKS[kind]
    return columns // block * size
