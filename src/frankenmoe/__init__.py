"""Mixture-of-experts models out of dense checkpoints; names load on first use, so that importing is cheap."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from frankenmoe.registering import register

__version__ = "0.1.0"

register()

if TYPE_CHECKING:
    from frankenmoe.after.run import verify_after
    from frankenmoe.artifact.folder import Artifact
    from frankenmoe.backbone.run import heal
    from frankenmoe.build.adopt import adopt
    from frankenmoe.build.extraction import extract
    from frankenmoe.build.lora import extract_lora
    from frankenmoe.build.proof import verify
    from frankenmoe.build.run import build
    from frankenmoe.errors import FrankenMoEError
    from frankenmoe.export.run import export_gguf
    from frankenmoe.gates.run import add_expert, fit
    from frankenmoe.moe.load import MoE
    from frankenmoe.planning.make import plan
    from frankenmoe.planning.plan import Plan
    from frankenmoe.recipe import Recipe
    from frankenmoe.smaller.run import prune, remove_expert
    from frankenmoe.subject import Subject, load
    from frankenmoe.subject import open_subject as open

_HOMES = {
    "Artifact": "frankenmoe.artifact.folder",
    "FrankenMoEError": "frankenmoe.errors",
    "MoE": "frankenmoe.moe.load",
    "Plan": "frankenmoe.planning",
    "Recipe": "frankenmoe.recipe",
    "Subject": "frankenmoe.subject",
    "add_expert": "frankenmoe.gates.run",
    "adopt": "frankenmoe.build.adopt",
    "build": "frankenmoe.build.run",
    "export_gguf": "frankenmoe.export.run",
    "extract": "frankenmoe.build.extraction",
    "extract_lora": "frankenmoe.build.lora",
    "fit": "frankenmoe.gates.run",
    "heal": "frankenmoe.backbone.run",
    "load": "frankenmoe.subject",
    "open": "frankenmoe.subject",
    "plan": "frankenmoe.planning",
    "prune": "frankenmoe.smaller.run",
    "remove_expert": "frankenmoe.smaller.run",
    "verify": "frankenmoe.build.proof",
    "verify_after": "frankenmoe.after.run",
}

# where the name in its module is another, since `open` there is Python's own
_NAMES = {"open": "open_subject"}

__all__ = [
    "Artifact",
    "FrankenMoEError",
    "MoE",
    "Plan",
    "Recipe",
    "Subject",
    "add_expert",
    "adopt",
    "build",
    "export_gguf",
    "extract",
    "extract_lora",
    "fit",
    "heal",
    "load",
    "open",
    "plan",
    "prune",
    "remove_expert",
    "verify",
    "verify_after",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'frankenmoe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), _NAMES.get(name, name))
