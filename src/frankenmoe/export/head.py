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
from frankenmoe.export.tokenizer import Vocabulary
from frankenmoe.families import rope
from frankenmoe.families.llamacpp import FileType
from frankenmoe.planning.gguf import ALIGNMENT, GgufLayout, multipliers, nbytes
from frankenmoe.planning.parts import Parts

QUANTIZATION_VERSION = 2
YARN = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}


def head_bytes(
    model: Parts, layout: GgufLayout, vocabulary: Vocabulary, kind: FileType, types: Mapping[str, str]
) -> bytes:
    """The head of a file of this kind, up to its first tensor."""
    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(None, layout.arch.name)
    _general(writer, model, layout, kind)
    _architecture(writer, model, layout)
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
    dims = model.stock[1].dims(model.config)
    if (layout.hidden, layout.ffn) != (dims.hidden, dims.ffn):
        writer.add_array("frankenmoe.padded_from", [dims.hidden, dims.ffn])


def _size_label(layout: GgufLayout) -> str:
    """Such as 16x3.4B: the number of experts, and the parameters of a dense model with one of them."""
    total = layout.weights
    experts = sum(part.numel for tensor in layout.tensors if "_exps." in tensor.name for part in tensor.parts)
    each = experts // layout.facts.experts
    return str(gguf.size_label(total, total - experts, each, layout.facts.experts))


def _architecture(writer: gguf.GGUFWriter, model: Parts, layout: GgufLayout) -> None:
    """Sizes, rotary settings, and the keys of each architecture. Without `expert_used_count` llama.cpp aborts."""
    dims, name = model.stock[1].dims(model.config), layout.arch.name
    writer.add_vocab_size(dims.vocab)
    writer.add_context_length(int(model.stock[1].value(model.config, "max_position_embeddings")))
    writer.add_embedding_length(layout.hidden)
    writer.add_block_count(dims.layers)
    writer.add_feed_forward_length(layout.ffn)
    writer.add_head_count(dims.heads)
    writer.add_head_count_kv(dims.kv_heads)
    writer.add_key_length(dims.head_dim)
    writer.add_value_length(dims.head_dim)
    writer.add_layer_norm_rms_eps(layout.eps)
    writer.add_expert_count(len(model.nodes))
    writer.add_expert_used_count(model.top_k)
    writer.add_rope_dimension_count(dims.head_dim)
    _rotary(writer, rope(model.stock[1], model.config), model.config, head=f"{name}.rope.scaling")
    if name in ("qwen2moe", "qwen3moe", "deepseek"):
        writer.add_expert_feed_forward_length(layout.ffn)
    if name in ("qwen2moe", "granitemoe") and model.shared:
        writer.add_expert_shared_feed_forward_length(layout.shared_ffn)
    if layout.arch.multipliers:
        given = multipliers(model)
        writer.add_logit_scale(given.get("logits_scaling", 1.0))
        writer.add_residual_scale(given.get("residual_multiplier", 1.0))
        writer.add_embedding_scale(given.get("embedding_multiplier", 1.0))
        writer.add_attention_scale(given.get("attention_multiplier", dims.head_dim**-0.5))
    if name == "deepseek":
        writer.add_leading_dense_block_count(0)
        writer.add_expert_shared_count(1)
        writer.add_expert_weights_scale(1.0)


def _rotary(writer: gguf.GGUFWriter, rotary: Mapping[str, Any], config: Mapping[str, Any], *, head: str) -> None:
    writer.add_rope_freq_base(float(rotary["rope_theta"]))
    kind = rotary["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rotary["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        before = rotary.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_factor(float(rotary.get("factor") or config["max_position_embeddings"] / before))
        writer.add_rope_scaling_orig_ctx_len(int(before))
        for ours, theirs in YARN.items():
            if rotary.get(ours) is not None:
                writer.add_float32(f"{head}.{theirs}", float(rotary[ours]))


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
