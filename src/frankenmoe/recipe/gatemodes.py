"""The gate modes: one row per mode, with its description in a model card."""

from collections.abc import Mapping
from types import MappingProxyType

# mergekit-moe's, from prompts
_PROMPTED = {
    "hidden": "from the base's states before each layer, at the last token of every prompt",
    "hidden_avg": "from the base's states before each layer, averaged over every prompt",
    "hidden_last": "from the base's states before each layer, at the last token of every prompt",
    "cheap_embed": "from the embeddings of the prompts' tokens",
}
_RANDOM = {"random": "at random", "uniform_random": "at random"}
# fitted to data or prompts; gates/closed.py and gates/fit.py have a function for each
_FITTED = {
    "centroid": "in closed form at the routers' own inputs, to the mean of each expert's text",
    "lda": "in closed form at the routers' own inputs, by linear discriminant analysis of the experts' texts",
    "ridge": "in closed form at the routers' own inputs, by ridge regression on the experts' texts",
    "logistic": "at the routers' own inputs, by logistic regression on the experts' texts",
    "regret": "at the routers' own inputs, to what every expert would lose on each token of the experts' texts",
}

# those of the mixture that the experts are of
KEPT = "kept"

GATE_MODES: Mapping[str, str] = MappingProxyType(
    _PROMPTED | _RANDOM | {KEPT: "as they are in the mixture that the experts are of"} | _FITTED
)
PROMPT_MODES, RANDOM_MODES, FIT_MODES = frozenset(_PROMPTED), frozenset(_RANDOM), frozenset(_FITTED)
# these send each expert's text to it, so an even load is not what they are for
DOMAIN_MODES = PROMPT_MODES | FIT_MODES
# the modes that measured best on such text, see benchmarks/routers.py
FROM_PROMPTS, FROM_DATA = "logistic", "regret"
