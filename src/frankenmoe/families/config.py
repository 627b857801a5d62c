"""The config.json of an MoE, made from that of its base; and what stands in the way."""

from typing import Any

from frankenmoe.families.known import NEUTRAL, is_known, is_neutral
from frankenmoe.families.rotary import rope
from frankenmoe.families.spec import FULL, MAY_BE_NULL, Config, Family, MoEFormat, RouterRule
from frankenmoe.families.wrapped import outer_config

NORMALIZES = "norm_topk_prob"
BALANCE = "router_aux_loss_coef"
# fields that dense and MoE configs spell the same
COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_dropout",
    "attention_bias",
    "sliding_window",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def unsupported(fmt: MoEFormat, family: Family, config: Config) -> list[str]:
    """A clause for every setting in a dense config that a format cannot represent, to follow the model's name."""
    found = []
    for name, (_, why) in NEUTRAL.items():
        if is_neutral(family, config, name):
            continue
        if name not in fmt.holds:
            found.append(f"has {name} {family.read(config, name)}, which {fmt.title} does not support: {why}")
        elif not family.has(name):
            found.append(
                f"has {name} {family.read(config, name)}, which transformers does not read in {family.model_type} "
                "models (delete it from config.json)"
            )
    found += _rotary_problems(fmt, family, config)
    dims = family.dims(config)
    if not fmt.free_heads and dims.head_dim * dims.heads != dims.hidden:
        found.append(f"has head_dim {dims.head_dim}, {fmt.title} requires hidden size / heads")
    if fmt.turned and dims.hidden in (dims.ffn, 2 * dims.ffn):
        found.append(
            f"has FFNs of {dims.ffn} rows for a hidden size of {dims.hidden}, and transformers cannot tell rows from "
            f"columns in {fmt.title} experts of these sizes"
        )
    found += [
        f"has {name} {value!r:.60}, a setting that the table of {family.model_type} does not know and that may change "
        "what the model computes (delete it from config.json if it does not)"
        for name, value in config.items()
        if not is_known(family, name, value)
    ]
    return found


def _rotary_problems(fmt: MoEFormat, family: Family, config: Config) -> list[str]:
    if not fmt.rotates:
        return []
    rotary, found = rope(family, config), []
    by_kind = family.rope_by_kind is not None or any(isinstance(value, dict) for value in rotary.values())
    if by_kind and not fmt.rope_by_kind:
        found.append(f"has rotary settings per layer type, but {fmt.title} has one for all layers")
    if family.rope_by_kind:
        return found
    if fmt.ropes is not None and rotary["rope_type"] not in fmt.ropes:
        found.append(f"has rope scaling {rotary['rope_type']!r}, {fmt.title} supports {', '.join(fmt.ropes)}")
    if "partial_rotary_factor" in rotary and not fmt.partial_rotary:
        found.append(
            f"rotates {rotary['partial_rotary_factor']} of each head (partial_rotary_factor), {fmt.title} whole heads"
        )
    return found


def _rotary_fields(fmt: MoEFormat, family: Family, config: Config) -> dict[str, Any]:
    """Rotary settings in the spellings of transformers 4 and 5; by kind of layer there is only that of 5."""
    if not fmt.rotates:
        return {}
    if family.rope_by_kind:
        return {"rope_parameters": family.rope_by_kind(family.filled(config))}
    rotary = rope(family, config)
    scaling = {key: value for key, value in rotary.items() if key != "rope_theta"}
    if fmt.two_word_rope:
        scaling = {"type": rotary["rope_type"], "factor": rotary.get("factor")}
    found = {
        "rope_theta": rotary["rope_theta"],
        "rope_scaling": None if rotary["rope_type"] == "default" else scaling,
        "rope_parameters": rotary,
    }
    partial = rotary.get("partial_rotary_factor")
    return found if partial is None else found | {"partial_rotary_factor": partial}


def moe_config(
    fmt: MoEFormat,
    family: Family,
    config: Config,
    *,
    experts: int,
    experts_per_token: int,
    shared_ffn: int,
    dtype: str,
    rule: RouterRule | None = None,
    by_domain: bool = False,
    outer: Config | None = None,
) -> dict[str, Any]:
    """config.json of the MoE: fields copied from the base, or its family's defaults, then the format's own fields.

    Rotary settings and dtype are written in the spellings of transformers 4 and 5. Without `rope_theta`, transformers 4
    would take the *format's* default. `dtype` is a torch name such as `bfloat16`. `shared_ffn` is the width of the
    shared expert, 0 for none. `rule` is the format's, if not given. `by_domain`: the routers send each domain to its
    own expert, so the loss for an even load is off in other programs' training. `outer` is the config of the model
    that the base is nested in, for a format that is nested too.
    """
    dims = family.dims(config)
    quantities = {
        "experts": experts,
        "experts_per_token": experts_per_token,
        "shared": shared_ffn // dims.ffn,
        "shared_or_null": shared_ffn // dims.ffn or None,
        "ffn": dims.ffn,
        "shared_ffn": shared_ffn or fmt.inert_shared_ffn or 0,
    }
    copied = {key: family.read(config, key) for key in COPIED}
    if "sliding_window" not in fmt.holds:
        copied["sliding_window"] = None  # it is as long as the context
    # transformers 5.23 rejects null where it expects a number or a truth value, so what the family lacks is left out
    copied = {key: value for key, value in copied.items() if value is not None or key in MAY_BE_NULL}
    own = {
        key: family.read(config, plain) if isinstance(plain, str) else plain(family, config)
        for key, plain in fmt.fields.items()
    }
    idle = fmt.idle_layers(family, config)
    if idle:
        own["layer_types"] = [*own["layer_types"], *[FULL] * idle]
    made = {
        "architectures": [fmt.architecture],
        "model_type": fmt.model_type,
        **copied,
        "num_hidden_layers": dims.layers + idle,
        "num_key_value_heads": dims.kv_heads,
        "head_dim": dims.head_dim,
        **_rotary_fields(fmt, family, config),
        **own,
        **fmt.constants,
        **({NORMALIZES: (rule or fmt.router).normalizes} if NORMALIZES in fmt.constants else {}),
        **({BALANCE: 0.0} if by_domain and fmt.balances else {}),
        **{key: quantities[quantity] for key, quantity in fmt.counted.items()},
        "output_router_logits": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    return outer_config(fmt.inside, made, outer) if fmt.inside and outer else made
