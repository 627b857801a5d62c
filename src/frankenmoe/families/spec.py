"""What family and format tables are made of, and how sizes are read out of a config; knows no family by name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]


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
    """One row of a family's table: `name` may hold `{layer}`; `when` names a config field that must be true."""

    name: str
    shape: tuple[str, ...]
    when: str | None = None

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name


@dataclass(frozen=True, slots=True)
class Family:
    """A dense family: the names and shapes of its tensors and the defaults of its config class.

    `ffn` rows are an expert when they come from an expert's source. `window_switch` names the field without which
    `sliding_window` means nothing.
    """

    model_type: str
    backbone: tuple[TensorSpec, ...]
    ffn: tuple[TensorSpec, ...]
    defaults: Mapping[str, Any]
    window_switch: str | None = None

    def value(self, config: Config, field_name: str) -> Any:
        """A config field (an explicit null counts), or the default that the family's own config class would use."""
        if field_name == "sliding_window" and self.window_switch and not config.get(self.window_switch):
            return None
        return config[field_name] if field_name in config else self.defaults.get(field_name)

    def dims(self, config: Config) -> Dims:
        """Sizes from a config.json; KeyError names a field that is neither there nor defaulted."""
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
        """Name -> shape of every tensor the rows stand for in this config, layer by layer."""
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
    """A config field whose other values a format has no words for."""

    field: str
    allowed: tuple[Any, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Note:
    """What another program makes of a format, for `plan` to warn of.

    `rope` is the rotary type that it is about (None: any); `renormalizing` where it only matters if the weights of the
    chosen experts are made to sum to one, which they do by themselves where all are chosen.
    """

    text: str
    rope: str | None = None
    renormalizing: bool = False


@dataclass(frozen=True, slots=True)
class MoEFormat:
    """A MoE checkpoint format: where experts, routers and the shared expert are written, and its config.

    `expert` and `shared` map the dense suffix of an FFN matrix to its name in the format, with `{layer}` and
    `{expert}` to fill in. `constants` go into config.json as they are; `counted` maps a config field to a quantity:
    `experts`, `experts_per_token`, `shared_experts`, `ffn` or `shared_ffn`.
    `renormalizes_top1` is False where the format's own code leaves the weight of a single chosen expert as it is.
    `rounds_weights` where transformers rounds the top-k weights to the model's dtype.
    `inert_shared_ffn` is the width of the all-zero shared expert written where the format demands one and the recipe
    has none. `added` are tensors the format wants that a family may not have, written as zeros. `two_word_rope` where
    the format's own code takes a `rope_scaling` of `type` and `factor` and nothing else.
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
