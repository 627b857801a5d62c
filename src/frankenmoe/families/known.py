"""Which fields of a dense config.json are known: those that tables read, and those that change nothing here.

A field that is not known may change what the model computes, so a model with one is not built.
"""

import math
from collections.abc import Mapping
from typing import Any

from frankenmoe.families.spec import FULL, Config, Family

# lists of layers that are all alike
SAME = (None, (), (FULL,))
# plain settings that change what a model computes -> (the values under which they do not, what others would need)
NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "attention_bias": ((False, None), "its attention does not have all four biases"),
    "qkv_bias": ((False, None), "its attention does not have biases of q, k and v"),
    "mlp_bias": ((False, None), "its experts have no bias"),
    "sliding_window": ((None,), "other runtimes disagree on its sliding window"),
    "layer_types": (SAME, "all its layers are alike"),
    "no_rope_layers": ((None, (), (1,)), "it rotates in every layer"),
    "embedding_multiplier": ((1, None), "it does not scale embeddings"),
    "residual_multiplier": ((1, None), "it does not scale what layers add"),
    "attention_multiplier": ((None,), "its attention scores are divided by the root of the head size"),
    "logits_scaling": ((1, None), "it does not scale logits"),
    "use_qk_norm": ((False, None), "its attention has no norms of q and k"),
    "use_post_norm": ((False, None), "it has no norms after attention and experts"),
    "use_double_wide_mlp": ((False, None), "all its experts have one width"),
    "per_layer_config": ((None,), "only layers with full attention have sizes of their own"),
    "own_experts": ((0, None), "it is a mixture of experts already"),
    "time_step_limit": ((None,), "it does not limit time steps"),
    "use_bidirectional_attention": ((False, None), "its attention is causal"),
    "is_causal": ((True, None), "its attention is causal"),
}
# sizes and settings that every family has, read by name
READ = frozenset(
    {
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window",
        "partial_rotary_factor", "layer_types", "attention_bias", "mlp_bias", "dtype", "torch_dtype",
        "quantization_config", "compression_config",
    }
)  # fmt: skip
# what only training, generation, other programs or the saving of files read
HARMLESS = frozenset(
    {
        "architectures", "auto_map", "use_cache", "transformers_version", "pretraining_tp", "max_window_layers",
        "is_llama_config", "rope_interleaved", "tokenizer_class", "prefix", "task_specific_params", "finetuning_task",
        "id2label", "label2id", "num_labels", "problem_type", "return_dict", "return_dict_in_generate",
        "attn_implementation", "use_flash_attn", "gradient_checkpointing", "chunk_size_feed_forward", "torchscript",
        "use_bfloat16", "pruned_heads", "is_decoder", "sep_token_id", "decoder_start_token_id", "special_tokens",
        "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k",
        "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "max_length",
        "min_length", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "forced_bos_token_id",
        "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens", "tie_encoder_decoder", "name_or_path", "model_max_length", "padding_side",
        "truncation_side", "bos_token", "eos_token", "pad_token", "unk_token", "license", "ms_path", "cutoff_len",
        "max_sequence_length", "min_p", "max_new_tokens",
    }
)  # fmt: skip
HARMLESS_PARTS = ("_token_id", "dropout", "_pdrop", "unsloth", "_version", "initializer", "neftune", "transformers.js")


def is_neutral(family: Family, config: Config, name: str) -> bool:
    """Whether a plain setting has a value under which it changes nothing."""
    value = family.read(config, name)
    if name == "sliding_window" and value is not None:  # one as long as the context hides nothing
        return bool(value >= (family.read(config, "max_position_embeddings") or math.inf))
    return (tuple(sorted(set(value))) if isinstance(value, list) else value) in NEUTRAL[name][0]


def is_known(family: Family, name: str, value: Any) -> bool:
    """Whether a config field is read by the family's table, changes nothing, or is switched off."""
    if name in family.fixed:
        return value is None or value == family.fixed[name]
    if value is None or value is False or value in ({}, []):
        return True
    named = (reading for reading in family.reads.values() if isinstance(reading, str))
    return (
        name in READ
        or name in NEUTRAL  # their values are examined
        or name in HARMLESS
        or name in family.defaults
        or name in family.fields
        or name == family.window_switch
        or name in named
        or name.startswith("_")
        or any(part in name for part in HARMLESS_PARTS)
    )
