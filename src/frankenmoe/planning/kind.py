"""What a path names: a recipe, an artifact, a GGUF file, a mixture or a dense model. Does not import torch."""

from pathlib import Path
from typing import Literal

from frankenmoe.artifact.folder import RECORD
from frankenmoe.planning.adopting import is_mixture

Kind = Literal["recipe", "artifact", "gguf", "mixture", "dense"]


def kind_of(what: str | Path) -> Kind:
    """What a path names.

    A missing file ending in .yml or .yaml is a recipe. A folder without a record is dense, unless its config.json is
    that of a mixture in a known format. That is opened as the recipe that means it; `adopt` makes an artifact of it.
    """
    path = Path(what)
    if path.suffix == ".gguf" and not path.is_dir():
        return "gguf"
    if path.is_file() or (path.suffix in (".yml", ".yaml") and not path.is_dir()):
        return "recipe"
    if (path / RECORD).is_file():
        return "artifact"
    return "mixture" if is_mixture(path) else "dense"
