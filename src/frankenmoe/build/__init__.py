"""Subject -> artifact: writes and verifies it. Also extracts dense checkpoints.

`frankenmoe.build` names both this package and the function that users call, because Python binds a package to an
attribute of its parent at import. So the package itself is callable.
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
