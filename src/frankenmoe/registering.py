"""Makes transformers' Auto classes know virtual artifacts, without importing transformers.

That import takes seconds. So the classes in `auto.py` are registered right after somebody else has imported
transformers' own tables of classes.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TABLES = {
    "transformers.models.auto.configuration_auto": "register_config",
    "transformers.models.auto.modeling_auto": "register_model",
}


class _Finder:
    """Finds the tables as Python does, and has them extended once they are there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in TABLES else None
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _then_register(spec.loader.exec_module)  # type: ignore[method-assign, assignment]
        return spec


def _then_register(run: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def run_and_register(module: ModuleType) -> None:
        run(module)
        _register(module)

    return run_and_register


def _register(module: ModuleType) -> None:
    getattr(import_module("frankenmoe.auto"), TABLES[module.__name__])(module)


def register() -> None:
    """Extends the tables that are imported already, and the others when they are."""
    for name in TABLES:
        if name in sys.modules:
            _register(sys.modules[name])
    sys.meta_path.insert(0, _Finder())
