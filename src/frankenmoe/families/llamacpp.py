"""llama.cpp's block types, file types and their mixes, as tables.

Source: src/llama-quant.cpp of llama.cpp b11549 (MIT licence, the ggml authors; see NOTICE).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

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
# parts of the names of matrices that are never quantized
KEPT = ("_norm.weight", "ffn_gate_inp.weight", "per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight")
# matrices whose numbers, or those they multiply, are too small for float16 in Gemma 3: blocks have float16 scales
WIDE = ("attn_v.weight", "attn_output.weight")
# the file type to use where K-quants do not fit the shape
PLAIN: Mapping[str, str] = {"q4_k_m": "q4_0", "q4_k_s": "q4_0", "q5_k_m": "q5_0", "q5_k_s": "q5_0", "q6_k": "q8_0"}


@dataclass(frozen=True, slots=True)
class MixFacts:
    """The model facts on which the mix of types depends. `valued` are the layers with attention, if not all.

    `wide`: the family's numbers need the range of float32, which BF16 has.
    """

    layers: int
    experts: int
    tied: bool
    is_70b: bool = False
    imatrix: bool = False
    wide: bool = False
    valued: tuple[int, ...] = ()


def tensor_type(name: str, shape: tuple[int, ...], kind: FileType, facts: MixFacts) -> str:
    """The type that llama.cpp's quantizer gives a tensor in a file of this kind. `shape` has columns last.

    Norms, biases, routers and convolutions stay F32. Rows that fit no block fall back as in `tensor_type_fallback`,
    finally to F16.
    """
    if not any(size > 1 for size in shape[:-1]):  # ggml drops leading ones and never quantizes a vector
        return "F32"
    if not name.endswith("weight") or any(part in name for part in KEPT):
        return "F32"
    if facts.wide and name.endswith(WIDE):
        return "F32" if kind.base in ("F32", "F16") else "BF16"
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
    match = re.match(r"blk\.(\d+)\.(attn_v|attn_qkv|attn_k|attn_output|ffn_down)", name)
    if match is None:
        return kind.base
    layer, part = int(match[1]), match[2]
    if part == "attn_output":
        return "Q5_K" if facts.experts == 8 and kind.name in ("q4_k_m", "q4_k_s") else kind.base
    if part in ("attn_k", "attn_v", "attn_qkv") and facts.experts == 8:
        return "Q8_0"
    if part in ("attn_v", "attn_qkv"):
        place = facts.valued.index(layer) if layer in facts.valued else layer
        found = _more(kind, place, len(facts.valued) or facts.layers, small=place < 4)
        return "Q5_K" if facts.is_70b and found == "Q4_K" else found
    if part == "ffn_down":
        early = layer < facts.layers // 8
        if facts.imatrix and early and kind.name in ("q4_0", "q5_0"):
            return {"q4_0": "Q4_1", "q5_0": "Q5_1"}[kind.name]
        return _more(kind, layer, facts.layers, small=early)
    return kind.base


def _more(kind: FileType, layer: int, layers: int, *, small: bool) -> str:
    """Q6_K in about half of the layers of q4_k_m and q5_k_m; Q5_K in the first layers of q4_k_s (`small`)."""
    eighth = layers // 8
    if kind.name in ("q4_k_m", "q5_k_m"):
        more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
        return "Q6_K" if more else kind.base
    return "Q5_K" if kind.name == "q4_k_s" and small else kind.base


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of one row; `columns` must be a multiple of the type's block."""
    block, size = BLOCKS[kind]
    return columns // block * size
