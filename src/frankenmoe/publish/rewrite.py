"""Files of an artifact with every path in their fields passed through a function. Changes no file.

Fields are those of records, recipes, reports, configs and the metadata of safetensors files.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from frankenmoe.artifact.folder import RECORD
from frankenmoe.checkpoint.header import PREFIX, raw_header, read_header
from frankenmoe.checkpoint.jsonfile import small_bytes
from frankenmoe.checkpoint.weights import INDEX
from frankenmoe.errors import FrankenMoEError, SourceError
from frankenmoe.recipe.sourcename import SourceName, parse_source

RECIPE = "recipe.yml"
REPORT = re.compile(r"(reports/.*|training\.json|(gguf/)?export\.json)")
TEXT_SUFFIXES = frozenset({".html", ".md", ".txt", ".jsonl", ".csv", ".svg"})
SOURCE_KEYS = frozenset({"base_model", "source_model"})
PATH_KEYS = frozenset(
    {
        *("file", "files", "recipe_folder", "from", "made_from", "data", "adapter", "routers", "trained", "path"),
        *("origin", "texts", "data_dir", "imatrix"),
    }
)
# of configs and tokenizers, which other programs wrote
CONFIG_KEY = re.compile(r".*(name_or_path|_file|_path|_dir)")
# files whose keys are tokens or tensors
VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "added_tokens.json", INDEX})
LARGE = 2**26  # bytes; larger files are not read into memory
HERE = "recipe_folder_from_here"

OnText = Callable[[str], str]


@dataclass(frozen=True)
class Rewriter:
    """`on_path` gets every field that holds a path, `on_text` all other text. `folder` is the recipe's."""

    folder: Path
    on_path: OnText
    on_text: OnText

    def file(self, file: Path, *, path: str) -> "bytes | Spliced | None":
        """The new bytes of the file at `path` in an artifact; None if nothing in it changes."""
        if file.suffix == ".safetensors":
            return self._safetensors(file)
        if path.endswith(".md") or (file.suffix in TEXT_SUFFIXES and REPORT.fullmatch(path)):
            text = file.read_text(encoding="utf-8", errors="surrogateescape")
            return _bytes(text, self.on_text(text), str)
        try:
            if path == RECIPE:
                value = yaml.safe_load(file.read_text(encoding="utf-8"))
                return _bytes(value, self.value(value), _as_yaml)
            if file.suffix != ".json" or file.name in VOCABULARIES:
                return None
            value = json.loads(small_bytes(file))
        except (ValueError, RecursionError, yaml.YAMLError, SourceError):  # the last: it is too large
            return None
        if path == RECORD:
            return _bytes(value, self._record(value, file.parent), _as_json)
        return _bytes(value, self.value(value) if REPORT.fullmatch(path) else self._config(value), _as_json)

    def value(self, value: Any, key: str = "") -> Any:
        """Plain data of a record, recipe or report; `key` is the field that holds it."""
        if key == HERE:
            return "."
        if key in SOURCE_KEYS and not isinstance(value, list):
            return self._source(value)
        on_text = self.on_path if key in PATH_KEYS else self.on_text
        match value:
            case str():
                return on_text(value)
            case list() if key == "models":  # of a merge
                return [self._source(item) for item in value]
            case list():
                return [on_text(item) if isinstance(item, str) else self.value(item) for item in value]
            case dict() if key == "merge" and "base" in value:
                return self.value({name: item for name, item in value.items() if name != "base"}, key) | {
                    "base": self._source(value["base"])
                }
            case dict() if key in PATH_KEYS:  # such as a name of each file
                return {name: self.value(item, key if _is_text(item) else name) for name, item in value.items()}
            case dict():
                return {name: self.value(item, name) for name, item in value.items()}
        return value

    def source(self, name: SourceName) -> SourceName:
        """A source with its paths rewritten."""
        return replace(name, path=self.on_path(name.path), adapter=name.adapter and self.on_path(name.adapter))

    def _source(self, value: Any) -> Any:
        try:
            return self.source(parse_source(value, folder=self.folder)).to_data()
        except ValueError:
            return self.value(value, "path")

    def _config(self, value: Any) -> Any:
        match value:
            case dict():
                return {
                    key: self.on_path(item)
                    if isinstance(item, str) and CONFIG_KEY.fullmatch(key)
                    else self._config(item)
                    for key, item in value.items()
                }
            case list():
                return [self._config(item) for item in value]
        return value

    def _record(self, record: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The record, with the base's config as other configs, and with the hashes of files as they are published."""
        changed: dict[str, Any] = self.value(record) | {"base_config": self._config(record.get("base_config"))}
        hashes = dict(record.get("files", {}))
        for name in hashes:
            new = self.file(folder / name, path=name) if (folder / name).is_file() else None
            if new is not None:
                hashes[name] = _sha256(new)
        # configs of adapters that lie in the artifact are published with it
        for was, config in zip(record.get("configs", ()), changed.get("configs", ()), strict=True):
            inside = os.path.relpath(was["file"], record["recipe_folder"])
            there = not inside.startswith("..") and (folder / inside).is_file()
            new = self.file(folder / inside, path=inside) if there else None
            if new is not None:
                config["sha256"] = _sha256(new)
        return changed | {"files": hashes}

    def _safetensors(self, file: Path) -> "bytes | Spliced | None":
        """A safetensors file with its metadata rewritten; tensors stay where they are."""
        try:
            read_header(file)
            raw, _ = raw_header(file)
        except FrankenMoEError:  # it is none
            return None
        header = json.loads(raw)
        old = header.get("__metadata__") or {}
        new = {key: self._metadata(value) for key, value in old.items()}
        if new == old:
            return None
        head = json.dumps(header | {"__metadata__": new}, separators=(",", ":"), ensure_ascii=False).encode()
        head += b" " * (-len(head) % PREFIX)
        made = Spliced(len(head).to_bytes(PREFIX, "little") + head, file, PREFIX + len(raw))
        if made.size > LARGE:
            return made
        with made:
            return made.read()

    def _metadata(self, text: str) -> str:
        """A value of the metadata, which often is JSON itself."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return self.on_text(text)
        changed = self.value(value) if isinstance(value, dict | list) else value
        return text if changed == value else json.dumps(changed)


class Spliced(io.BufferedIOBase):
    """A stream of `head`, followed by what lies in a file from position `start` on: a large file with another head."""

    def __init__(self, head: bytes, file: Path, start: int) -> None:
        self._head, self._file, self._start, self._at = head, file.open("rb"), start, 0
        self.size = len(head) + file.stat().st_size - start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, self.size - self._at)
        wanted = rest if size is None or size < 0 else min(size, rest)
        found = self._head[self._at : self._at + wanted]
        if len(found) < wanted:
            self._file.seek(self._start + max(0, self._at - len(self._head)))
            found += self._file.read(wanted - len(found))
        self._at += len(found)
        return found

    def close(self) -> None:
        self._file.close()
        super().close()


def _sha256(new: "bytes | Spliced") -> str:
    if isinstance(new, bytes):
        return hashlib.sha256(new).hexdigest()
    with new:
        return hashlib.file_digest(new, "sha256").hexdigest()


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _bytes(old: Any, new: Any, write: Callable[[Any], str]) -> bytes | None:
    return None if new == old else write(new).encode("utf-8", "surrogateescape")


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _as_yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
