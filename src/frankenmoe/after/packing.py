"""How quantizers store the matrices of a folder: bitsandbytes, GPTQ, AWQ, compressed-tensors, FP8. No torch.

A folder says its method in `quantization_config`.
Shape suffixes: R rows (out), C columns (in), N elements, G groups.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from frankenmoe.after.matrix import Matrix, Stored, in_blocks, plain, to_grid, to_levels, two_axes
from frankenmoe.after.settings import (
    AGAIN,
    Settings,
    group_size,
    kept_modules,
    number,
    sizes,
    weight_rules,
    whole_number,
    written_settings,
)
from frankenmoe.checkpoint.cast import Floats, decode
from frankenmoe.checkpoint.reader import map_bytes
from frankenmoe.checkpoint.tensors import DTYPES, FLOATS, TensorRef
from frankenmoe.errors import SourceError

Tensors = Mapping[str, TensorRef]
Find = Callable[[str], Matrix | None]
"""Name of a weight -> its numbers; None if the folder has no such tensor."""

FLOAT8 = {"F8_E4M3": (4, 3), "F8_E5M2": (5, 2)}  # bits of exponent and mantissa
# formats of compressed-tensors in which a number is an integer or an 8-bit float times a scale
CT_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output each four bits of a word hold, lowest bits first
LOADED = "load it with transformers (dequantize) and save it again, then compare that folder"


@dataclass(frozen=True)
class Packing:
    """The matrices of a folder. `method` is None where nothing is quantized.

    `folds`: the method may have multiplied columns, and divided what gives their inputs. `kept` says whether the
    folder's config leaves a module as it was.
    """

    find: Find
    method: str | None = None
    folds: bool = False
    kept: Callable[[str], bool] = lambda name: False


def packing(tensors: Tensors, config: Settings, *, where: str) -> Packing:
    """How the tensors of a folder are stored. SourceError for a method that cannot be read."""
    settings = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(settings, Mapping):
        return Packing(lambda name: _float(tensors, name, where))
    method = str(settings.get("quant_method", "compressed-tensors" if "config_groups" in settings else None))
    if method not in METHODS:
        raise SourceError(
            f"{where} is quantized by {method}, and `verify` reads {', '.join(METHODS)}",
            hint=LOADED,
        )
    with _whole(where, method):
        find = METHODS[method](tensors, settings, where)

    def found(name: str) -> Matrix | None:
        with _whole(where, method):
            matrix = find(name)
        return (
            _float(tensors, name, where)
            if matrix is None
            else replace(matrix, rows=partial(_rows, matrix, where, method))
        )

    return Packing(found, method, method in FOLDING, kept_modules(settings, where=where))


def _rows(matrix: Matrix, where: str, method: str, start: int, stop: int) -> Floats:
    with _whole(where, method):
        return matrix.rows(start, stop)


@contextmanager
def _whole(where: str, method: str) -> Iterator[None]:
    """SourceError for settings and tensors that do not belong together."""
    try:
        yield
    except KeyError as error:
        raise SourceError(f"{where} is quantized by {method}, but has no {error}", hint=AGAIN) from error
    except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise SourceError(
            f"{where} is quantized by {method}, but the shapes or types of its tensors do not fit together", hint=AGAIN
        ) from error


def _float(tensors: Tensors, name: str, where: str) -> Matrix | None:
    ref = tensors.get(name)
    if ref is not None and ref.dtype not in FLOATS:
        raise SourceError(
            f"{where} holds {name} as {ref.dtype}, and its config.json does not say what these numbers stand for",
            hint=LOADED,
        )
    return plain(ref) if ref else None


def _array(ref: TensorRef) -> NDArray[Any]:
    """A small tensor, or a mapped one of integers, in its own type."""
    raw = map_bytes(ref)
    if ref.dtype in FLOATS:
        return decode(raw, dtype=ref.dtype).reshape(ref.shape)
    if ref.dtype in FLOAT8:
        return raw.reshape(ref.shape)
    return raw.view(np.dtype(DTYPES[ref.dtype].name)).reshape(ref.shape)


def _bitsandbytes(tensors: Tensors, settings: Settings, where: str) -> Find:
    """4 bits: numbers of 16 levels times the largest of their block. 8 bits: rows times theirs over 127."""
    states = {name.partition(".quant_state.")[0]: ref for name, ref in tensors.items() if ".quant_state." in name}

    def find(name: str) -> Matrix | None:
        ref = tensors.get(name)
        if name in states:
            place = f"{states[name].name} of {where}"
            return _four_bits(tensors, name, written_settings(map_bytes(states[name]).tobytes(), where=place), place)
        scale = tensors.get(f"{name.removesuffix('weight')}SCB")
        if ref is None or ref.dtype != "I8" or scale is None:
            return None
        scale_R = decode(map_bytes(scale), dtype=scale.dtype) / np.float32(127)
        return Matrix(
            name,
            two_axes(ref.shape),
            Stored("int8", to_grid(8, None, symmetric=True)),
            lambda start, stop: _array(ref)[start:stop].astype(np.float32) * scale_R[start:stop, None],
        )

    return find


def _four_bits(tensors: Tensors, name: str, state: Settings, where: str) -> Matrix:
    levels = _array(tensors[f"{name}.quant_map"]).astype(np.float32)
    most = _array(tensors[f"{name}.absmax"])
    if f"{name}.nested_absmax" in tensors:  # the largest magnitudes are quantized too
        outer = _array(tensors[f"{name}.nested_absmax"])
        inner = _array(tensors[f"{name}.nested_quant_map"])[most]
        together = whole_number(state, "nested_blocksize", where=where)
        offset = np.float32(number(state, "nested_offset", where=where))
        most = inner * np.repeat(outer, together)[: most.size] + offset
    block, shape = whole_number(state, "blocksize", where=where), two_axes(sizes(state, "shape", where=where))

    def rows(start: int, stop: int) -> Floats:
        first, last = start * shape[1], stop * shape[1]
        codes = map_bytes(tensors[name])[first // 2 : -(-last // 2)]
        both = np.stack([codes >> 4, codes & 15], axis=1).ravel()[first % 2 :][: last - first]
        found: Floats = (levels[both] * most[np.arange(first, last) // block]).astype(np.float32)
        return found.reshape(stop - start, -1)

    return Matrix(name, shape, Stored(str(state.get("quant_type")), in_blocks(levels, block)), rows)


def _gptq(tensors: Tensors, settings: Settings, where: str) -> Find:
    """Integers packed along the inputs, a scale and a zero for every group of inputs."""
    bits = whole_number(settings, "bits", where=where, most=32)
    shift = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1  # the first format stored zeros less one
    if 32 % bits:
        raise SourceError(f"{where} has GPTQ weights of {bits} bits, expected 2, 4 or 8", hint=LOADED)

    def find(name: str) -> Matrix | None:
        stem = name.removesuffix("weight")
        ref = tensors.get(f"{stem}qweight")
        if ref is None:
            return None
        columns, out = ref.shape[0] * 32 // bits, ref.shape[1]
        scales_GR = _array(tensors[f"{stem}scales"])
        zeros_GR = _unpacked(_array(tensors[f"{stem}qzeros"]), bits)[:, :out] + shift & 2**bits - 1
        found = tensors.get(f"{stem}g_idx")
        group = columns // len(scales_GR)
        groups_C = _array(found) if found else np.arange(columns) // group

        def rows(start: int, stop: int) -> Floats:
            codes_RC = _unpacked(_array(ref)[:, start:stop].T, bits)
            both = (scales_GR[:, start:stop].T[:, groups_C], zeros_GR[:, start:stop].T[:, groups_C])
            return np.asarray((codes_RC - both[1]) * both[0], np.float32)

        grid = to_grid(bits, group, symmetric=bool(settings.get("sym", True)))
        return Matrix(name, (out, columns), Stored(f"gptq int{bits}", grid), rows)

    return find


def _awq(tensors: Tensors, settings: Settings, where: str) -> Find:
    """Integers of 4 bits, a scale and a zero for every group of inputs.

    Source: awq/modules/linear/gemm.py and gemv.py of AutoAWQ 0.2.9 (MIT licence). `gemm` packs eight outputs of an
    input into a word, in the order AWQ_ORDER; `gemv` packs eight inputs of an output, in their own order.
    """
    bits, group = whole_number(settings, "bits", where=where), group_size(settings, where=where, default=128)
    version = str(settings.get("version") or settings.get("format", "gemm")).lower()
    if bits != 4 or version not in ("gemm", "gemv"):
        raise SourceError(
            f"{where} has AWQ weights of {bits} bits in the layout {version!r}, expected 4 bits in gemm or gemv",
            hint=LOADED,
        )

    def find(name: str) -> Matrix | None:
        stem = name.removesuffix("weight")
        ref = tensors.get(f"{stem}qweight")
        if ref is None:
            return None
        scales, zeros = _array(tensors[f"{stem}scales"]), _array(tensors[f"{stem}qzeros"])
        if version == "gemm":
            shape = (ref.shape[1] * 8, ref.shape[0])
            scales_RG, zeros_RG = scales.T, _unpacked(zeros, bits, AWQ_ORDER).T
        else:
            shape = (ref.shape[0], ref.shape[1] * 8)
            scales_RG, zeros_RG = scales, _unpacked(zeros, bits)
        groups_C = np.arange(shape[1]) // (group or shape[1])
        wanted = _awq_width(int(groups_C[-1]) + 1, group, version)
        for part, found_RG in (("scales", scales_RG), ("qzeros", zeros_RG)):
            if found_RG.shape != (shape[0], wanted):
                raise SourceError(
                    f"{where} is quantized by awq, but {stem}{part} has {' x '.join(map(str, found_RG.shape))} "
                    f"numbers, expected {shape[0]} x {wanted} for a group_size of {settings.get('group_size', 128)}",
                    hint=AGAIN,
                )

        def rows(start: int, stop: int) -> Floats:
            if version == "gemm":
                words = _array(ref)[:, start // 8 : -(-stop // 8)]
                codes_RC = _unpacked(words, bits, AWQ_ORDER).T[start % 8 :][: stop - start]
            else:
                codes_RC = _unpacked(_array(ref)[start:stop], bits)
            apart_RC = codes_RC - zeros_RG[start:stop][:, groups_C]
            return np.asarray(apart_RC * scales_RG[start:stop][:, groups_C], np.float32)

        return Matrix(name, shape, Stored("awq int4", to_grid(bits, group, symmetric=False)), rows)

    return find


def _awq_width(groups: int, group: int | None, version: str) -> int:
    """How many scales a row has: `gemv` fills up whole words of eight zeros, and more words for small groups."""
    if version == "gemm":
        return groups
    words = {64: 2, 32: 4}.get(group or 0, 1)
    return -(-groups // (8 * words)) * 8 * words


def _unpacked(words: NDArray[Any], bits: int, order: Sequence[int] | None = None) -> NDArray[Any]:
    """The integers in the 32-bit words of every row, lowest bits first, or each at its place of `order`."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    if order is not None:
        shifts = shifts[np.argsort(order)]
    found = (words.astype(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    return found.reshape(*words.shape[:-1], -1).astype(np.int32)


def _compressed_tensors(tensors: Tensors, settings: Settings, where: str) -> Find:
    """Integers or 8-bit floats, packed or not, times a scale for all, a row or a group."""
    if settings.get("format") not in CT_FORMATS:
        raise SourceError(
            f"{where} has compressed-tensors' format {settings.get('format')}, expected one of {', '.join(CT_FORMATS)}",
            hint=LOADED,
        )
    rule = weight_rules(settings, where=where)[0]
    bits = whole_number(rule, "num_bits", where=where, most=32)
    grid = to_grid(bits, group_size(rule, where=where), symmetric=bool(rule.get("symmetric", True)))

    def find(name: str) -> Matrix | None:
        scale = tensors.get(f"{name}_scale")
        packed, ref = tensors.get(f"{name}_packed"), tensors.get(name)
        if scale is None or (packed is None and (ref is None or ref.dtype in FLOATS)):
            return None
        zero = tensors.get(f"{name}_zero_point")
        if packed is None:
            assert ref is not None
            return _scaled(ref, _array(scale), _array(zero) if zero else None, Stored(f"int{bits}", grid))
        rows, columns = map(int, _array(tensors[f"{name}_shape"]))
        zeros_RG = None if zero is None else _unpacked(_array(zero).T, bits).T[:rows] - 2 ** (bits - 1)
        scale_RG = _array(scale)
        order = tensors.get(f"{name}_g_idx")
        groups_C = _array(order) if order else np.arange(columns) // (columns // scale_RG.shape[1])

        def numbers(start: int, stop: int) -> Floats:
            codes_RC = _unpacked(_array(packed)[start:stop], bits)[:, :columns] - 2 ** (bits - 1)
            if zeros_RG is not None:
                codes_RC = codes_RC - zeros_RG[start:stop][:, groups_C]
            return np.asarray(codes_RC * scale_RG[start:stop][:, groups_C], np.float32)

        return Matrix(name, (rows, columns), Stored(f"int{bits}", grid), numbers)

    return find


def _scaled(ref: TensorRef, scale: Floats, zero: NDArray[Any] | None, stored: Stored) -> Matrix:
    """8-bit numbers times a scale: one for all, or one for every block of rows and columns."""
    shape = two_axes(ref.shape)
    levels = float8(ref.dtype) if ref.dtype in FLOAT8 else None
    scale = scale.reshape(-1, scale.shape[-1]) if scale.ndim > 1 else scale.reshape(-1, 1)
    rows_each, columns_each = -(-shape[0] // len(scale)), -(-shape[1] // scale.shape[1])
    columns = np.arange(shape[1]) // columns_each

    def rows(start: int, stop: int) -> Floats:
        codes_RC = _array(ref).reshape(shape)[start:stop]
        numbers = codes_RC.astype(np.float32) if levels is None else levels[codes_RC]
        here = np.arange(start, stop) // rows_each
        if zero is not None:
            numbers = numbers - zero.reshape(scale.shape)[here][:, columns].astype(np.float32)
        return np.asarray(numbers * scale[here][:, columns], np.float32)

    if levels is None:
        return Matrix(ref.name, shape, stored, rows)
    most = float(np.nanmax(levels))
    return Matrix(ref.name, shape, Stored(ref.dtype, _to_float8(levels, most)), rows)


def _to_float8(levels: Floats, most: float) -> Callable[[Floats], Floats]:
    nearest = to_levels(levels)

    def rounded(rows_RC: Floats) -> Floats:
        scale = float(np.abs(rows_RC).max()) / most or 1.0
        return np.asarray(nearest(rows_RC / scale) * scale, np.float32)

    return rounded


def float8(dtype: str) -> Floats:
    """The number of each of the 256 codes of an 8-bit float; NaN for those that are no finite number."""
    exponent_bits, mantissa_bits = FLOAT8[dtype]
    codes = np.arange(256)
    sign = np.where(codes & 128, -1.0, 1.0)
    exponent = codes >> mantissa_bits & (2**exponent_bits - 1)
    mantissa = (codes & (2**mantissa_bits - 1)) / 2**mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1
    found = sign * np.where(exponent, (1 + mantissa) * 2.0 ** (exponent - bias), mantissa * 2.0 ** (1 - bias))
    # e5m2 has infinities like other floats, e4m3fn has one code for NaN
    broken = (exponent == 31) if dtype == "F8_E5M2" else (codes & 127) == 127
    return np.where(broken, np.nan, found).astype(np.float32)


def _fp8(tensors: Tensors, settings: Settings, where: str) -> Find:
    """8-bit floats in blocks of rows and columns, as DeepSeek writes them."""
    block = sizes(settings, "weight_block_size", where=where, count=2) if settings.get("weight_block_size") else None

    def find(name: str) -> Matrix | None:
        ref, scale = tensors.get(name), tensors.get(f"{name}_scale_inv")
        if ref is None or ref.dtype not in FLOAT8:
            return None
        numbers = np.ones(1, np.float32) if scale is None else _array(scale)
        if block and any(size % part for size, part in zip(ref.shape[-2:], block, strict=True)):
            raise SourceError(
                f"{where} has {name} of {list(ref.shape)}, which blocks of {list(block)} do not fit", hint=LOADED
            )
        return _scaled(ref, numbers, None, Stored(ref.dtype, lambda rows_RC: rows_RC))

    return find


METHODS: Mapping[str, Callable[[Tensors, Settings, str], Find]] = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
}
# llm-compressor writes its AWQ and its SmoothQuant as compressed-tensors
FOLDING = ("awq", "compressed-tensors")
