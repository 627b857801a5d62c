"""Names and fields that the tables of MoE formats share."""

from collections.abc import Callable, Mapping

from frankenmoe.families.rows import LAYER
from frankenmoe.families.spec import Config, Family, Note

FFN_SUFFIXES = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
GATE_UP, DOWN = FFN_SUFFIXES[:2], FFN_SUFFIXES[2:]
W132 = ("w1.weight", "w3.weight", "w2.weight")
BIASES_IN_VLLM = Note("vLLM's code for this format lacks attention biases", setting="attention_bias")
TIED_IN_VLLM = Note(
    "vLLM 0.32 uses the embeddings as the head of this format, though this model has its own", tied=False
)
# rows in a shared expert of zeros: the narrowest that llama.cpp's quantizers take
INERT_FFN = 32


def alone(prefix: str, names: tuple[str, ...] = FFN_SUFFIXES) -> Mapping[str, tuple[str, ...]]:
    """A tensor for each matrix of an FFN; `names` are those of gate, up and down."""
    return {prefix + name: (suffix,) for name, suffix in zip(names, FFN_SUFFIXES, strict=True)}


def _attention_multiplier(family: Family, config: Config) -> float:
    """Granite's, or what other attention divides by: the root of the head size."""
    found = family.read(config, "attention_multiplier")
    return float(family.dims(config).head_dim ** -0.5 if found is None else found)


def _multiplier(name: str) -> Callable[[Family, Config], float]:
    """Granite's multiplier of that name, or 1."""
    return lambda family, config: float(family.read(config, name) or 1.0)


# the names that every format but Mixtral's gives to gates and experts
GATE = LAYER + "mlp.gate.weight"
EXPERT = alone(LAYER + "mlp.experts.{expert}.")
COUNTED = {"num_experts": "experts", "num_experts_per_tok": "experts_per_token"}
GRANITE = LAYER + "block_sparse_moe."
GRANITE_EXPERTS = {GRANITE + "input_linear.weight": GATE_UP, GRANITE + "output_linear.weight": DOWN}
GRANITE_SHARED = {
    LAYER + "shared_mlp.input_linear.weight": GATE_UP,
    LAYER + "shared_mlp.output_linear.weight": DOWN,
}
LOCAL_COUNTED = {"num_local_experts": "experts", "num_experts_per_tok": "experts_per_token"}
GRANITE_FIELDS: Mapping[str, str | Callable[[Family, Config], float]] = {
    "attention_multiplier": _attention_multiplier
} | {name: _multiplier(name) for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling")}
GRANITE_HOLDS = frozenset(GRANITE_FIELDS) | {"attention_bias"}
