"""The head of a GGUF file: metadata, vocabulary, and the names, types and places of tensors.

The gguf package writes it.
"""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from frankenmoe import __version__
from frankenmoe.checkpoint.gguffile import VALUES
from frankenmoe.export.tokenizer import Vocabulary
from frankenmoe.families.llamacpp import FileType
from frankenmoe.planning.gguf import ALIGNMENT, GgufLayout, nbytes
from frankenmoe.planning.parts import Parts

QUANTIZATION_VERSION = 2


def head_bytes(
    model: Parts, layout: GgufLayout, vocabulary: Vocabulary, kind: FileType, types: Mapping[str, str]
) -> bytes:
    """The head of a file of this kind, up to its first tensor."""
    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(None, layout.arch.name)
    _general(writer, model, layout, kind)
    for key, value in layout.metadata.items():
        _add(writer, key, value)
    write_vocabulary(writer, vocabulary)
    for tensor in layout.tensors:
        number = gguf.GGMLQuantizationType[types[tensor.name]]
        size = nbytes(tensor.shape, types[tensor.name])
        # with a float type gguf keeps the shape; with bytes it would divide it by the block size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=number)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "head"
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        raw = file.read_bytes()
    return raw + b"\0" * (-len(raw) % ALIGNMENT)


def _general(writer: gguf.GGUFWriter, model: Parts, layout: GgufLayout, kind: FileType) -> None:
    about = model.about
    writer.add_type("model")
    writer.add_name(model.name)
    writer.add_file_type(kind.number)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_size_label(_size_label(layout))
    writer.add_tags(["merge", "moe", "frankenmoe"])
    if about.get("licence"):
        writer.add_license(about["licence"])
    writer.add_string("frankenmoe.version", __version__)
    writer.add_array("frankenmoe.experts", [node.name for node in model.nodes])
    if about.get("recipe_digest"):
        writer.add_string("frankenmoe.recipe_digest", about["recipe_digest"])
    if layout.facts.wide:
        writer.add_string(VALUES, "bf16")
    dims = model.stock[1].dims(model.config)
    if (layout.hidden, layout.ffn) != (dims.hidden, dims.ffn):
        writer.add_array("frankenmoe.padded_from", [dims.hidden, dims.ffn])


def _size_label(layout: GgufLayout) -> str:
    """Such as 16x3.4B: the number of experts, and the parameters of a dense model with one of them."""
    total = layout.weights
    experts = sum(part.numel for tensor in layout.tensors if "_exps." in tensor.name for part in tensor.parts)
    each = experts // layout.facts.experts
    return str(gguf.size_label(total, total - experts, each, layout.facts.experts))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds metadata in the type that llama.cpp expects of a value."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Adds the keys `tokenizer.*`."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for name, index in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)
