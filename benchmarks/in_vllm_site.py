"""Runs at the start of every Python in vLLM's environment, as its sitecustomize.py: makes torchvision importable there.

torchvision's package is for torch with CUDA. Without that its operators do not load, and two of them must be known when
it is imported. vLLM's models that read pictures import it for functions that need no operator.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

OPERATORS = [f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms")]
KEPT = []  # a library that is collected takes its operators along


class Before:
    """Declares the operators just before torchvision is imported; finds no module itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            KEPT.append(torch.library.Library("torchvision", "FRAGMENT"))
            for schema in OPERATORS:
                KEPT[0].define(schema)
        return None


sys.meta_path.insert(0, Before())
