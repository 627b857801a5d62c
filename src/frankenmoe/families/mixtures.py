"""The config.json of a finished mixture -> that of a dense model with its backbone and one of its experts.

The way back from `families/config.py`. A setting that the tables cannot express is a problem in words.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from frankenmoe.families.config import NORMALIZES, unsupported
from frankenmoe.families.dense import FAMILIES
from frankenmoe.families.formats import FORMATS
from frankenmoe.families.nemotron import dense_kinds
from frankenmoe.families.rotary import written_rope
from frankenmoe.families.spec import MAY_BE_NULL, Config, Family, MoEFormat, RouterRule

WIDTH = "intermediate_size"
MOST = 100_000  # experts, since tables are expanded per expert
# spellings of the number of experts; transformers 5 may save another one than the format's own code reads
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
SHARED_SIZES = frozenset({"shared", "shared_or_null", "shared_ffn"})
# what only training reads, and fields of one class that are names for others
HARMLESS = frozenset(
    {
        *COUNTS,
        *("router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise", "output_router_logits", "auto_map"),
    }
)


@dataclass(frozen=True, slots=True)
class DenseView:
    """How the config of a format is read as that of the dense `family` with the same tensors.

    `defaults` are those of the format's config class where they are not the family's, and of settings that the family
    lacks. `width` is the family's field for the width of an FFN, `fixed` has its other fields. `derived` computes
    fields of the family, `ignored` names fields that change nothing. `alike` gives, for a constant of the format,
    other values that mean the same.
    """

    family: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    width: str = WIDTH
    fixed: Mapping[str, Any] = field(default_factory=dict)
    derived: Mapping[str, Callable[[Config], Any]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    alike: Mapping[str, Callable[[Config], Any]] = field(default_factory=dict)


def _rotated(config: Config) -> list[int] | None:
    """1 for every layer that rotates, from Granite's list of rotary bases."""
    bases = config.get("layer_rope_theta")
    return None if bases is None else [int(bool(base)) for base in bases]


def _usual_attention(config: Config) -> float | None:
    """Granite's attention multiplier; None where it is what other attention divides by."""
    found = config.get("attention_multiplier", 1.0)
    return None if found == _head_dim(config) ** -0.5 else found


def _head_dim(config: Config) -> int:
    """The head size of a class that has no other default for it."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


VIEWS: Mapping[str, DenseView] = {
    "mixtral": DenseView("mistral", {"rms_norm_eps": 1e-5, "sliding_window": None, "rope_theta": 1e6}),
    "granitemoe": DenseView("granite"),
    "granitemoeshared": DenseView("granite", {"shared_intermediate_size": 0}),
    "deepseek": DenseView("llama", {"first_k_dense_replace": 0, "moe_layer_freq": 1, NORMALIZES: False}),
    "qwen2_moe": DenseView(
        "qwen2", {"num_key_value_heads": 16, NORMALIZES: False, "shared_expert_intermediate_size": 5632}
    ),
    "qwen3_moe": DenseView("qwen3", {"num_key_value_heads": 4, NORMALIZES: False}, derived={"head_dim": _head_dim}),
    "flex_olmo": DenseView(
        "olmo2", {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 5e5, NORMALIZES: False}
    ),
    "ernie4_5_moe": DenseView(
        "ernie4_5",
        {"num_key_value_heads": 4, "moe_layer_start_index": 1, "moe_num_shared_experts": 2},
        ignored=frozenset({"moe_capacity", "moe_use_aux_free"}),
        alike={"moe_layer_end_index": lambda config: config["num_hidden_layers"] - 1},
    ),
    "glm4_moe": DenseView(
        "glm",
        {
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
        derived={"head_dim": _head_dim},
        ignored=frozenset({"num_nextn_predict_layers"}),  # further layers that only guess ahead
    ),
    "nemotron_h": DenseView(
        "nemotron_h",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 7688,
            "moe_shared_expert_intermediate_size": 7688,
        },
        derived={"layers_block_type": dense_kinds},
    ),
    "lfm2_moe": DenseView("lfm2", {"num_dense_layers": 2}, fixed={"block_auto_adjust_ff_dim": False}),
    "qwen3_5_moe": DenseView("qwen3_5_text", {"num_key_value_heads": 2, "shared_expert_intermediate_size": 512}),
    "granitemoe_swa": DenseView(
        "smollm3",
        {
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "sliding_window": 128,
            "rope_theta": 1e4,
        },
        derived={"no_rope_layers": _rotated, "attention_multiplier": _usual_attention},
    ),
    "granitemoehybrid": DenseView("granitemoehybrid", width="shared_intermediate_size", fixed={"num_local_experts": 0}),
    "cohere2_moe": DenseView(
        "cohere2",
        ignored=frozenset(
            {
                "shared_expert_combination_strategy",
                "prefix_dense_sliding_window_pattern",
                "prefix_dense_intermediate_size",
            }
        ),
    ),
}
# formats whose models are no dense model with other FFNs -> why, to follow the model's name
UNLIKE_DENSE: Mapping[str, str] = {
    "gemma4": (
        "has in every layer a dense FFN beside its experts, with norms of both, where a dense Gemma 4 has only an FFN"
    ),
    "qwen3_vl_moe": "is a mixture beside a part that reads pictures, and frankenmoe takes only mixtures of text apart",
}


@dataclass(frozen=True, slots=True)
class MixtureConfig:
    """What the config.json of a mixture says.

    `dense` is the config of a dense model of `family` with its backbone and one expert, `shared_ffn` the width of the
    shared expert (0: it has none), `rule` how gates become weights. `problems` are clauses that follow its name.
    """

    fmt: MoEFormat
    family: Family
    dense: Mapping[str, Any]
    experts: int
    top_k: int
    shared_ffn: int
    rule: RouterRule
    problems: tuple[str, ...]


def format_of(config: Config) -> MoEFormat | None:
    """The format of a mixture's config; None for a dense model, and for a mixture of a format that is not known."""
    kind = str(config.get("model_type"))
    fmt = next((fmt for fmt in FORMATS.values() if fmt.model_type == kind), None)
    # dense models of Granite's hybrids and of Gemma 4 have the class of the mixtures
    dense = fmt is not None and kind in FAMILIES and not FAMILIES[kind].read(config, "own_experts")
    return None if dense else fmt


def read_mixture(fmt: MoEFormat, config: Config) -> MixtureConfig:
    """Reads the config of a mixture. Raises KeyError for a missing size, TypeError for one that is no number."""
    view = VIEWS[fmt.name]
    family = FAMILIES[view.family]
    given = {**view.defaults, **{key: value for key, value in config.items() if value is not None}}
    rotary = written_rope(config)
    if "rope_theta" in view.defaults and config.get("rope_theta") is None and rotary.get("rope_theta") is not None:
        given.pop("rope_theta")  # the class's own, which the config's other spelling overrides
    given |= {key: compute(given) for key, compute in view.derived.items()}
    ffn = _number(fmt, given, "ffn") if "ffn" in fmt.counted.values() else int(given[WIDTH])
    computed = {key for key, plain in fmt.fields.items() if callable(plain)}
    consumed = HARMLESS | view.ignored | computed | fmt.constants.keys() | fmt.counted.keys()
    dense = {
        key: value
        for key, value in {**dict.fromkeys(config), **given}.items()
        if (value is not None or key in MAY_BE_NULL) and (key not in consumed or _reads(family, key))
    }
    dense |= {"model_type": family.model_type, view.width: ffn, **view.fixed}
    for key in ("architectures", NORMALIZES):
        dense.pop(key, None)
    return MixtureConfig(
        fmt=fmt,
        family=family,
        dense=dense,
        experts=_number(fmt, given, "experts"),
        top_k=_number(fmt, given, "experts_per_token"),
        shared_ffn=_shared_ffn(fmt, given, ffn),
        rule=rule_in(fmt, given),
        problems=tuple(_problems(fmt, view, family, given, dense)),
    )


def rule_in(fmt: MoEFormat, config: Config) -> RouterRule:
    """How gates become weights, by the config of a mixture."""
    given = config.get(NORMALIZES) if NORMALIZES in fmt.constants else None
    return fmt.router if given is None else replace(fmt.router, normalizes=bool(given))


def of_width(fmt: MoEFormat, config: Config, ffn: int) -> dict[str, Any]:
    """The config of a dense model that `read_mixture` gave, with FFNs of another width: those of the shared expert."""
    return {**config, VIEWS[fmt.name].width: ffn}


def _reads(family: Family, key: str) -> bool:
    """Whether the dense family has a field of that name."""
    return key in family.defaults or key == family.window_switch


def _count(fmt: MoEFormat, config: Config, quantity: str) -> Any:
    own = next(key for key, name in fmt.counted.items() if name == quantity)
    others = COUNTS if quantity == "experts" else ()
    return next((config[key] for key in (own, *others) if config.get(key) is not None), None)


def _number(fmt: MoEFormat, config: Config, quantity: str) -> int:
    found = _count(fmt, config, quantity)
    if found is None:
        raise KeyError(next(key for key, name in fmt.counted.items() if name == quantity))
    if type(found) is not int or not 1 <= found <= MOST:
        raise TypeError(f"{quantity} {found!r:.40}")
    return found


def _shared_ffn(fmt: MoEFormat, config: Config, ffn: int) -> int:
    """The width of the shared expert; where the config counts shared experts, they are one FFN side by side."""
    for key, quantity in fmt.counted.items():
        if quantity in SHARED_SIZES:
            found = int(config.get(key) or 0)
            return found if quantity == "shared_ffn" else found * ffn
    return 0


def _problems(fmt: MoEFormat, view: DenseView, family: Family, given: Config, dense: Config) -> Iterator[str]:
    """A clause for every setting that the tables of format and family do not express."""
    skipped = {NORMALIZES, "auto_map", "router_jitter_noise", family.window_switch}
    for key, constant in fmt.constants.items():
        found = given.get(key, constant)
        same = (constant, view.alike[key](given)) if key in view.alike else (constant,)
        if key not in skipped and found not in same:
            yield f"has {key} {found!r:.60}, and frankenmoe knows {fmt.title} only with {constant!r}"
    for key, plain in fmt.fields.items():
        if callable(plain) and given.get(key) is not None and not _reads(family, key):
            want = plain(family, dense)
            if given[key] != want:
                yield f"has {key} {given[key]!r:.60}, and frankenmoe knows {fmt.title} only with {want!r:.60}"
    yield from unsupported(fmt, family, dense)
