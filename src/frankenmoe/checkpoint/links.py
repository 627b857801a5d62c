"""Links inside a folder that somebody else may have made: they must not lead to other files of this machine."""

import os
from pathlib import Path

from frankenmoe.checkpoint.hub import hub_cache
from frankenmoe.errors import SourceError

WEIGHTS = ".safetensors"
TEMPLATES = "additional_chat_templates"  # a folder that transformers reads with a tokenizer
ADAPTERS = "adapters"  # a folder of an artifact, with one in it for every adapter
SNAPSHOTS, BLOBS = "snapshots", "blobs"
MODEL = "models--"  # how the hub's cache begins the name of a model's folder


def check_links(folder: Path, *, parts: str | None = None) -> tuple[str, ...]:
    """Raises SourceError for a file that is a link out of `folder`, because such files are read, copied and published.

    The same goes for the folders in it that are read: that of chat templates, and `parts` with all folders in it.
    Links to the blobs of the hub's cache are allowed, as it stores every file that way, and so are links between files
    of weights, which may be on another disk: the sentences returned name these. Broken links are not judged here.
    """
    real, notes = Path(os.path.realpath(folder)), []
    places = _places(folder, parts)
    entries = (entry for place in places for entry in os.scandir(place))
    for entry in sorted(entries, key=lambda entry: entry.path):
        read = os.path.isfile(entry.path) or Path(entry.path) in places
        if not entry.is_symlink() or not read:  # which takes loops, too
            continue
        target = Path(os.path.realpath(entry.path))
        if target.is_relative_to(real) or _is_blob(target, real):
            continue
        if not (entry.name.endswith(WEIGHTS) and target.name.endswith(WEIGHTS)):
            raise SourceError(
                f"{entry.path} is a link to {target}, outside its folder",
                hint="if you trust the folder, put there what it links to: a build would copy that",
            )
        notes.append(f"{entry.path} is a link to {target}, outside its folder")
    return tuple(notes)


def _places(folder: Path, parts: str | None) -> set[Path]:
    """The folder and the folders in it that are read."""
    place = folder / parts if parts else None
    inner = place.iterdir() if place is not None and place.is_dir() else ()
    return {folder, *(each for each in (folder / TEMPLATES, place, *inner) if each is not None and each.is_dir())}


def _is_blob(target: Path, folder: Path) -> bool:
    """Whether a file is in the blobs of the same model in the hub's cache, or in those of any model in a cache.

    The cache need not be the one of today: it may be on another disk, or the folder may be inside a snapshot.
    """
    if folder.parent.name == SNAPSHOTS and target.parent == folder.parent.parent / BLOBS:
        return True
    if target.parent.name != BLOBS:
        return False
    return target.parents[1].name.startswith(MODEL) or target.is_relative_to(os.path.realpath(hub_cache()))
