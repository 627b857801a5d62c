"""The types of family and format tables, and how sizes are read from a config."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]

# fields in which null is a value of its own; elsewhere it means the default, as if the field were absent
MAY_BE_NULL = frozenset(
    {"sliding_window", "bos_token_id", "eos_token_id", "pad_token_id", "num_key_value_heads", "head_dim"}
)


@dataclass(frozen=True, slots=True)
class Dims:
    """The sizes of a decoder, in units of one number: layers, widths, heads, vocabulary."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def size(self, symbol: str) -> int:
        """The number a shape symbol stands for: a field, or `query` and `kv` (all heads side by side)."""
        derived = {"query": self.heads * self.head_dim, "kv": self.kv_heads * self.head_dim}
        return derived[symbol] if symbol in derived else int(getattr(self, symbol))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a family: `name` may contain `{layer}`; with `when`, only where that config field is true."""

    name: str
    shape: tuple[str, ...]
    when: str | None = None

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name


@dataclass(frozen=True, slots=True)
class Family:
    """A dense family: the names and shapes of its tensors and the defaults of its config class.

    `ffn` rows become an expert. `sliding_window` counts only where the field named by `window_switch` is true.
    """

    model_type: str
    backbone: tuple[TensorSpec, ...]
    ffn: tuple[TensorSpec, ...]
    defaults: Mapping[str, Any]
    window_switch: str | None = None

    def value(self, config: Config, field_name: str) -> Any:
        """A config field, or the default of the family's own config class; None if the family has no such field."""
        if field_name == "sliding_window" and self.window_switch and not config.get(self.window_switch):
            return None
        if config.get(field_name) is None and not (field_name in config and field_name in MAY_BE_NULL):
            return self.defaults.get(field_name)
        return config[field_name]

    def dims(self, config: Config) -> Dims:
        """Sizes from a config.json; KeyError names a field that is missing and has no default."""
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return Dims(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            ffn=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(self.value(config, "num_key_value_heads") or heads),
            head_dim=int(self.value(config, "head_dim") or hidden // heads),
            vocab=int(config["vocab_size"]),
        )

    def shapes(self, rows: tuple[TensorSpec, ...], config: Config) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that the rows describe in this config, layer by layer."""
        return dict(self._expand(rows, config))

    def _expand(self, rows: tuple[TensorSpec, ...], config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
        dims = self.dims(config)
        flags = {"untied": not self.value(config, "tie_word_embeddings")}
        present = [row for row in rows if row.when is None or flags.get(row.when, bool(self.value(config, row.when)))]
        for row in (row for row in present if not row.per_layer):
            yield row.name, tuple(map(dims.size, row.shape))
        for layer in range(dims.layers):
            for row in (row for row in present if row.per_layer):
                yield row.name.format(layer=layer), tuple(map(dims.size, row.shape))


@dataclass(frozen=True, slots=True)
class Rule:
    """A config field and the values of it that a format supports, with the reason."""

    field: str
    allowed: tuple[Any, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Note:
    """What another program does wrong with a format; `plan` shows it as a warning.

    `rope` limits it to one rotary type. `renormalizing` limits it to MoEs that renormalise top-k weights to sum 1,
    which changes nothing where every expert is chosen.
    """

    text: str
    rope: str | None = None
    renormalizing: bool = False


@dataclass(frozen=True, slots=True)
class MoEFormat:
    """A MoE checkpoint format: where experts, routers and the shared expert are written, and its config.

    `expert` and `shared` map the dense suffix of an FFN matrix to its name in the format, with `{layer}` and `{expert}`
    as placeholders. `constants` go into config.json unchanged. `counted` maps a config field to a quantity: `experts`,
    `experts_per_token`, `shared_experts`, `ffn` or `shared_ffn`.
    `renormalizes_top1` is False where the format's code does not renormalise the weight of a single chosen expert.
    `rounds_weights` is True where transformers rounds top-k weights to the model's dtype.
    `inert_shared_ffn` is the width of the all-zero shared expert for formats that require one. `added` tensors are
    written as zeros where the family lacks them. `two_word_rope`: the format's code reads only `type` and `factor` of
    `rope_scaling`.
    """

    name: str
    title: str
    model_type: str
    architecture: str
    families: tuple[str, ...]
    gate: str
    expert: Mapping[str, str]
    constants: Mapping[str, Any]
    counted: Mapping[str, str]
    max_shared: int = 0
    shared: Mapping[str, str] = field(default_factory=dict)
    shared_gate: str | None = None
    inert_shared_ffn: int | None = None
    added: tuple[TensorSpec, ...] = ()
    rules: tuple[Rule, ...] = ()
    renormalizes_top1: bool = True
    rounds_weights: bool = True
    loads_in_transformers: bool = True
    two_word_rope: bool = False
    notes: tuple[Note, ...] = ()
