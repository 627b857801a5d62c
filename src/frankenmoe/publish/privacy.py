"""Takes the names of this machine's folders out of what is published; changes nothing on disk.

Only folders that the artifact's record names, and the user's home, are looked for: a prompt or a passage that happens
to speak of paths is evidence and stays as it is.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from frankenmoe.artifact import RECORD, Artifact

RECIPE_FOLDER = "recipe-folder"


def local_names(artifact: Artifact) -> dict[str, str]:
    """Absolute folder -> what stands for it in public, the longest first."""
    record = artifact.record
    found = {str(Path(source["file"]).parent): Path(source["file"]).parent.name for source in record["sources"]}
    found |= {
        str(record["recipe_folder"]): RECIPE_FOLDER,
        str(artifact.folder.resolve()): artifact.folder.resolve().name,
        str(artifact.folder.resolve().parent): artifact.folder.resolve().parent.name,
        str(Path.home()): "~",
    }
    return {folder: found[folder] for folder in sorted(found, key=len, reverse=True) if folder.strip("/")}


def as_published(file: Path, *, path: str, names: Mapping[str, str]) -> str | bytes:
    """What to send for a file: its path, or its bytes under public names where it speaks of folders in `names`."""
    if not (path.startswith("reports/") or path in (RECORD, "recipe.yml", "README.md")) or file.suffix not in READERS:
        return str(file)
    raw = file.read_bytes()
    try:
        value = READERS[file.suffix](raw.decode())
    except (ValueError, yaml.YAMLError):
        return str(file)
    changed = without_folders(value, names)
    return str(file) if changed == value else WRITERS[file.suffix](changed).encode()


def without_folders(value: Any, names: Mapping[str, str]) -> Any:
    """Text or plain data with every folder of `names` replaced, where it is a whole name or the start of a path."""
    if not names:
        return value
    match value:
        case str():
            pattern = "|".join(map(re.escape, names))
            return re.sub(rf"(?<![\w./-])(?:{pattern})(?![\w.-])", lambda match: names[match[0]], value)
        case list():
            return [without_folders(item, names) for item in value]
        case dict():
            return {key: without_folders(item, names) for key, item in value.items()}
    return value


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


READERS: Mapping[str, Callable[[str], Any]] = {".json": json.loads, ".yml": yaml.safe_load, ".html": str, ".md": str}
WRITERS: Mapping[str, Callable[[Any], str]] = {".json": _as_json, ".yml": _as_yaml, ".html": str, ".md": str}
