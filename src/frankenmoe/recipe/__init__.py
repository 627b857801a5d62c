"""A recipe file: which keys it may have, what they mean, and what is wrong with it."""

from frankenmoe.recipe.expert import Expert
from frankenmoe.recipe.gatemodes import DOMAIN_MODES, FIT_MODES, PROMPT_MODES, RANDOM_MODES
from frankenmoe.recipe.model import IGNORED_KEYS, Recipe, schema
from frankenmoe.recipe.sourcename import SourceName

__all__ = [
    "DOMAIN_MODES",
    "FIT_MODES",
    "IGNORED_KEYS",
    "PROMPT_MODES",
    "RANDOM_MODES",
    "Expert",
    "Recipe",
    "SourceName",
    "schema",
]
