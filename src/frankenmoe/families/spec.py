"""The types of family and format tables, and how sizes and settings are read from a config.

Three languages meet in the tables. *Dense* names and fields are a family's own. *Plain* ones are those of Llama, with
Granite's multipliers: every family is translated into them. A format translates plain ones into its own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from frankenmoe.checkpoint.tensors import Permute, Scale, Shift

Config = Mapping[str, Any]
Reading = Callable[[Config], Any] | str
Change = Scale | Shift | Permute

# fields in which null is a value of its own; elsewhere it means the default, as if the field were absent
MAY_BE_NULL = frozenset(
    {"sliding_window", "bos_token_id", "eos_token_id", "pad_token_id", "num_key_value_heads", "head_dim"}
)
FULL, SLIDING = "full_attention", "sliding_attention"
# full attention with one matrix for keys and values
ONE_FOR_BOTH = "full_attention, keys as values"
ATTENTION_KINDS = (FULL, SLIDING, ONE_FOR_BOTH, "attention")


@dataclass(frozen=True, slots=True)
class Dims:
    """The sizes of a decoder, in units of one number: layers, widths, heads, vocabulary, and a family's `more`.

    `kinds` has the kind of every layer where layers differ (attention, convolution ...); else it is empty.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    more: Mapping[str, int] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()

    def size(self, symbol: str) -> int:
        """The number a shape symbol stands for.

        A field, `query` and `kv` (all heads side by side), a number, or several of these such as `query+kv+kv`.
        """
        if "+" in symbol:
            return sum(map(self.size, symbol.split("+")))
        if symbol.isdecimal():
            return int(symbol)
        derived = {"query": self.heads * self.head_dim, "kv": self.kv_heads * self.head_dim, **self.more}
        return derived[symbol] if symbol in derived else int(getattr(self, symbol))

    def shape(self, symbols: tuple[str, ...]) -> tuple[int, ...]:
        """The numbers that shape symbols stand for."""
        return tuple(map(self.size, symbols))

    @property
    def cached(self) -> int:
        """The numbers of a token's keys in all layers that cache them; as many again are its values."""
        layers = sum(kind in ATTENTION_KINDS for kind in self.kinds) if self.kinds else self.layers
        return self.more.get("cached", layers * self.kv_heads * self.head_dim)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor: `name` may contain `{layer}`; with `when`, only where that config field is true.

    With `kinds`, only in layers of these kinds. A tensor that a format adds has the value `fill`, which may follow from
    the config, or the numbers of the plain tensor `like` times `fill`. `dtype` is its safetensors type where that is
    not the MoE's.
    """

    name: str
    shape: tuple[str, ...]
    when: str | None = None
    kinds: tuple[str, ...] = ()
    fill: float | Callable[[Config], float] = 0.0
    like: str | None = None
    dtype: str | None = None

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name


@dataclass(frozen=True, slots=True)
class Piece:
    """A plain tensor that is a part of a dense one: `rows` (a size symbol) of it, after the rows of earlier pieces."""

    name: str
    rows: str


@dataclass(frozen=True, slots=True)
class Family:
    """A dense family: the names and shapes of its tensors and the defaults of its config class.

    `ffn` rows become an expert; `mlp` is the name of their module. `pieces` tells which plain tensors a dense one
    holds, if not the one of the same name. `changes` are the steps from a dense number to the plain one, by plain name.
    A change may follow from the config.
    `reads` gives plain config fields that the family spells otherwise or derives; with `layer_types` among them, layers
    are of these kinds, or of those of `kinds`, if that has finer ones. `sizes` gives its own shape symbols; `cached`
    among them is the number that `Dims` has. `rope_by_kind` gives rotary settings by kind of layer. `fields` are
    further config fields that are known and change nothing here.
    `fixed` are fields that its class does not read, with the only value that agrees with what the class computes.
    `sliding_window` counts only where the field named by `window_switch` is true. `interleaved`: rotary pairs are
    adjacent rows of q and k, not half a head apart. `plain_mlp`: the class of an `mlp` that computes exactly
    down(act(gate x) * up x), or down(act(up x)) where its rows have no gate. `opaque` names classes whose code reads
    the weights of its linear layers itself, `unadapted` those of their linear layers that PEFT refuses to adapt.
    `prefixes`: what names in its files begin with -> what they begin with in its class, as everywhere here.
    `wide_range`: its changes give numbers that float16 is too narrow for.
    """

    model_type: str
    backbone: tuple[TensorSpec, ...]
    ffn: tuple[TensorSpec, ...]
    defaults: Mapping[str, Any]
    window_switch: str | None = None
    mlp: str = "mlp"
    pieces: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    changes: Mapping[str, tuple[Change | Callable[[Config], Change], ...]] = field(default_factory=dict)
    reads: Mapping[str, Reading] = field(default_factory=dict)
    sizes: Callable[[Config], Mapping[str, int]] | None = None
    fields: frozenset[str] = frozenset()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rope_names: Mapping[str, str] = field(default_factory=dict)
    rope_by_kind: Callable[[Config], Mapping[str, Mapping[str, Any]]] | None = None
    interleaved: bool = False
    plain_mlp: str | None = None
    opaque: tuple[str, ...] = ()
    unadapted: tuple[str, ...] = ()
    prefixes: Mapping[str, str] = field(default_factory=dict)
    wide_range: bool = False

    @property
    def down(self) -> tuple[str, ...]:
        """The suffixes of the FFN tensors that write to the residual stream."""
        names = [row.name for row in self.ffn]
        plain = {name: [piece.name for piece in self.pieces.get(name, ())] or [name] for name in names}
        return tuple(name.split(".")[-2] for name in names if any(".down_proj." in each for each in plain[name]))

    @property
    def linears(self) -> tuple[str, ...]:
        """The modules of its FFN that have a matrix: gate and up, or up alone, and down."""
        # rows of several kinds of layers have the same names
        return tuple(dict.fromkeys(row.name.split(".")[-2] for row in self.ffn if len(row.shape) > 1))

    @property
    def in_every_layer(self) -> bool:
        """Whether every layer has an FFN."""
        kinds, all_kinds = ({kind for row in rows for kind in row.kinds} for rows in (self.ffn, self.backbone))
        return not kinds or all_kinds <= kinds

    def has(self, setting: str) -> bool:
        """Whether its class reads a plain setting, or the table derives it."""
        return (
            setting in self.defaults
            or setting in self.reads
            or (setting == "sliding_window" and bool(self.window_switch))
        )

    def value(self, config: Config, field_name: str) -> Any:
        """A config field, or the default of the family's own config class; None if the family has no such field."""
        if field_name == "sliding_window" and self.window_switch and not config.get(self.window_switch):
            return None
        if config.get(field_name) is None and not (field_name in config and field_name in MAY_BE_NULL):
            return self.defaults.get(field_name)
        return config[field_name]

    def read(self, config: Config, field_name: str) -> Any:
        """A plain config field, as `reads` translates it."""
        reading = self.reads.get(field_name, field_name)
        return self.value(config, reading) if isinstance(reading, str) else reading(self.filled(config))

    def filled(self, config: Config) -> dict[str, Any]:
        """The config with the family's defaults in place of absent fields, and of null where that means absent."""
        return {key: self.value(config, key) for key in {**self.defaults, **config}}

    def dims(self, config: Config) -> Dims:
        """Sizes from a config.json; KeyError names a field that is missing and has no default."""
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return Dims(
            layers=int(self.read(config, "num_hidden_layers")),
            hidden=hidden,
            ffn=int(self.read(config, "intermediate_size")),
            heads=heads,
            kv_heads=int(self.value(config, "num_key_value_heads") or heads),
            head_dim=int(self.value(config, "head_dim") or hidden // heads),
            vocab=int(config["vocab_size"]),
            more=self.sizes(self.filled(config)) if self.sizes else {},
            kinds=tuple(self.read(config, kinds)) if (kinds := self._kinds) else (),
        )

    @property
    def _kinds(self) -> str | None:
        return next((name for name in ("kinds", "layer_types") if name in self.reads), None)

    def shapes(self, rows: tuple[TensorSpec, ...], config: Config) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that the rows describe in this config, layer by layer."""
        dims = self.dims(config)
        return {name: dims.shape(row.shape) for name, row in self.expand(rows, config)}

    def layered(self, config: Config) -> dict[int, dict[str, tuple[str, tuple[int, ...]]]]:
        """Layer -> suffix of an FFN tensor -> (its name, its shape). Layers without an FFN are left out."""
        found: dict[int, dict[str, tuple[str, tuple[int, ...]]]] = {}
        for name, shape in self.shapes(self.ffn, config).items():
            layer, _, suffix = name.partition(f".{self.mlp}.")
            found.setdefault(int(layer.rpartition(".")[2]), {})[suffix] = (name, shape)
        return found

    def expand(self, rows: tuple[TensorSpec, ...], config: Config) -> Iterator[tuple[str, TensorSpec]]:
        """(name, row) of every tensor that the rows describe in this config, layer by layer."""
        dims = self.dims(config)
        flags = {"untied": not self.read(config, "tie_word_embeddings")}
        present = [row for row in rows if row.when is None or flags.get(row.when, bool(self.value(config, row.when)))]
        for row in (row for row in present if not row.per_layer):
            yield row.name, row
        for layer in range(dims.layers):
            for row in (row for row in present if row.per_layer):
                if not row.kinds or dims.kinds[layer] in row.kinds:
                    yield row.name.format(layer=layer), row


@dataclass(frozen=True, slots=True)
class Note:
    """What another program does wrong with a format; `plan` shows it as a warning.

    `rope` limits it to one rotary type. `renormalizing` limits it to MoEs that renormalise top-k weights to sum 1,
    which changes nothing where every expert is chosen. `free_heads` limits it to models whose heads times head size is
    not the hidden size, `setting` to models with a plain setting that changes something, `tied` to models whose head
    is tied to the embeddings, or is not.
    """

    text: str
    rope: str | None = None
    renormalizing: bool = False
    free_heads: bool = False
    setting: str | None = None
    tied: bool | None = None


@dataclass(frozen=True, slots=True)
class RouterRule:
    """How a format turns a gate's scores into weights.

    The top k by `score` ("softmax" over all experts, or "sigmoid" of each) are divided by their sum plus `epsilon`.
    `normalizes` is False where the weights stay as they are, which a finished mixture may ask for.
    `renormalizes_top1` is False where the format's code does not renormalise the weight of a single chosen expert.
    `rounds_weights` is True where transformers rounds the weights to the model's dtype. A correction bias of the choice
    is written as zeros, and scaling factors as 1, so neither appears here. `wide`: the scores are computed in float32
    from the hidden states on.
    """

    score: str = "softmax"
    epsilon: float = 0.0
    normalizes: bool = True
    renormalizes_top1: bool = True
    rounds_weights: bool = True
    wide: bool = False

    def renormalizes(self, top_k: int) -> bool:
        """Whether the weights of `top_k` chosen experts are scaled to sum to one."""
        return self.normalizes and (top_k > 1 or self.renormalizes_top1)


SOFTMAX = RouterRule(rounds_weights=False)
"""Mixtral's rule, which also holds for MoEs that fit no format."""


@dataclass(frozen=True, slots=True)
class Inside:
    """The place of a format's language model in an outer model, which otherwise passes through from the base.

    `wrapper` is the model type of such bases (families/wrapped.py). `text` and `tower` are the model types of the two
    nested configs. `root` is what names in the language model begin with, in the place of `model.`.
    """

    wrapper: str
    text: str
    tower: str
    root: str


@dataclass(frozen=True, slots=True)
class MoEFormat:
    """A MoE checkpoint format: where experts, routers and the shared expert are written, and its config.

    `expert` and `shared` map a name in the format to the plain FFN matrices that the tensor stacks along its rows. A
    name without `{expert}` holds all experts, along a first axis. `constants` go into config.json unchanged. `counted`
    maps a config field to a quantity: `experts`, `experts_per_token`, `ffn`, `shared_ffn`, `shared` (a number) or
    `shared_or_null`.
    `fields` maps a config field to a plain one, or to what computes it from the family and its config.
    `holds` names the plain settings in `NEUTRAL` that the format can express; with others a model cannot be built.
    `inert_shared_ffn` is the width of the all-zero shared expert for formats that require one; it may be 0. `added`
    tensors are written where the family lacks them. `two_word_rope`: the format's code reads only `type` and `factor`
    of `rope_scaling`. `ropes` are the rotary types it has; None for all of transformers'. `rotates` is False where no
    layer does. `rope_by_kind`: it has rotary settings for each kind of layer. `ends_in_full`: its last layer always has
    full attention, so behind any other a layer follows that changes nothing. `partial_rotary`: it can rotate a part of
    each head. `on_request`: only where the recipe names it. `inside`: its language model is in another model, which the
    base has too. `turned`: stacked experts are stored with rows and columns exchanged.
    `balances`: its class in transformers reads `router_aux_loss_coef`, the weight of a loss for an even load.
    `no_gguf`: why llama.cpp cannot run it, where that is known or not checked.
    """

    name: str
    title: str
    model_type: str
    architecture: str
    families: tuple[str, ...]
    gate: str
    expert: Mapping[str, tuple[str, ...]]
    constants: Mapping[str, Any]
    counted: Mapping[str, str]
    fields: Mapping[str, str | Callable[[Family, Config], Any]] = field(default_factory=dict)
    holds: frozenset[str] = frozenset()
    max_shared: int = 0
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shared_gate: str | None = None
    inert_shared_ffn: int | None = None
    added: tuple[TensorSpec, ...] = ()
    router: RouterRule = RouterRule()
    loads_in_transformers: bool = True
    on_request: bool = False
    two_word_rope: bool = False
    ropes: tuple[str, ...] | None = None
    rotates: bool = True
    rope_by_kind: bool = False
    ends_in_full: bool = False
    partial_rotary: bool = False
    free_heads: bool = True
    interleaved: bool = False
    inside: Inside | None = None
    turned: bool = False
    balances: bool = True
    no_gguf: str | None = None
    notes: tuple[Note, ...] = ()

    def named(self, plain: str) -> str:
        """The name in a checkpoint of a backbone tensor with a plain name."""
        within = self.inside is not None and plain.startswith("model.")
        return f"{self.inside.root}{plain.removeprefix('model.')}" if self.inside and within else plain

    def takes(self, family: Family, wrapper: str | None) -> bool:
        """Whether it can have models of a family, which may be nested in a model of the type `wrapper`."""
        return family.model_type in self.families and (self.inside is None or self.inside.wrapper == wrapper)

    @property
    def counts_shared(self) -> bool:
        """Whether its config counts shared experts of the others' width, and does not give a width."""
        return not {"shared", "shared_or_null"}.isdisjoint(self.counted.values())

    def idle_layers(self, family: Family, config: Config) -> int:
        """How many layers that change nothing follow the last one."""
        return int(self.ends_in_full and family.read(config, "layer_types")[-1] != FULL)
