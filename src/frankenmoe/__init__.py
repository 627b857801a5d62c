"""Mixture-of-experts models out of dense checkpoints; names load on first use, so that importing is cheap."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from frankenmoe.artifact import Artifact
    from frankenmoe.building import build
    from frankenmoe.errors import FrankenMoEError
    from frankenmoe.exporting import export_gguf
    from frankenmoe.extracting import extract
    from frankenmoe.fitting import add_expert, fit
    from frankenmoe.loading import load
    from frankenmoe.moe.load import MoE
    from frankenmoe.planning import Plan, plan
    from frankenmoe.prove import verify
    from frankenmoe.recipe import Recipe

_HOMES = {
    "Artifact": "frankenmoe.artifact",
    "FrankenMoEError": "frankenmoe.errors",
    "MoE": "frankenmoe.moe.load",
    "Plan": "frankenmoe.planning",
    "Recipe": "frankenmoe.recipe",
    "add_expert": "frankenmoe.fitting",
    "build": "frankenmoe.building",
    "export_gguf": "frankenmoe.exporting",
    "extract": "frankenmoe.extracting",
    "fit": "frankenmoe.fitting",
    "load": "frankenmoe.loading",
    "plan": "frankenmoe.planning",
    "verify": "frankenmoe.prove",
}

__all__ = [
    "Artifact",
    "FrankenMoEError",
    "MoE",
    "Plan",
    "Recipe",
    "add_expert",
    "build",
    "export_gguf",
    "extract",
    "fit",
    "load",
    "plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'frankenmoe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
