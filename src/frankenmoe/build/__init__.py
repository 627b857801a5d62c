"""Plan to bytes: the body of an artifact, its proof, and dense checkpoints out of it.

`frankenmoe.build` is both this package and the function that users call: Python binds a package to its parent's
attribute when any file of it is imported, so the package itself can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Calls `frankenmoe.build.run.build`."""
        from frankenmoe.build.run import build

        return build(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
