"""What the project's web pages share: the files in assets/, marks of experts as data, JSON inside HTML."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from frankenmoe.palette import mark

SHARED = "frankenmoe"
EXPORT = re.compile(r"^export (?=const|class|function)", re.M)
IMPORT = re.compile(r'^import .* from "\./[\w.]+";\n', re.M)


def assets(package: str) -> dict[str, bytes]:
    """Name -> content of every file in the assets of a package."""
    return {each.name: each.read_bytes() for each in (files(package) / "assets").iterdir()}


def inlined(package: str, kind: str) -> str:
    """The shared `base` and a package's `page` file of one kind (css, js) as one text for a page that loads nothing.

    The names that base.js exports are then names of the same script, so imports are left out.
    """
    base, own = (assets(where)[f"{name}.{kind}"].decode() for where, name in ((SHARED, "base"), (package, "page")))
    return EXPORT.sub("", base) + IMPORT.sub("", own)


def marks(count: int) -> list[dict[str, str]]:
    """The marks of the first `count` experts, as the scripts of a page take them."""
    return [asdict(mark(expert)) for expert in range(count)]


def json_in_html(data: Mapping[str, Any]) -> str:
    """JSON for a script element: "</script>" in a text must not end it."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
