"""Reads YAML text as plain data, with the line of every key."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from frankenmoe.errors import RecipeError, brief

MAX_BYTES = 1_000_000
# aliases can expand a short file without end; both limits are far above hand-written recipes
MAX_NODES = 100_000
MAX_DEPTH = 100
DESCRIPTORS = ("/dev/", "/proc/")  # pipes that a shell made for this command

Location = tuple[str | int, ...]

_PREFIX = "tag:yaml.org,2002:"
_SCALARS = {_PREFIX + kind for kind in ("str", "int", "float", "bool", "null")}
_MERGE = _PREFIX + "merge"
_PLAIN_HINT = "put quotes around a value that is meant as text; tags such as !!python are never run"


@dataclass(frozen=True)
class YamlFile:
    """A YAML mapping as plain data; `lines` has the line, from 1, of every key and list item."""

    data: dict[str, Any]
    origin: str
    lines: Mapping[Location, int]

    def line(self, location: Location) -> int:
        """The line of `location`, or of the nearest enclosing key that is in the file."""
        while location not in self.lines:
            location = location[:-1]
        return self.lines[location]


def read_text(path: Path) -> str:
    """The UTF-8 text of a recipe file. Raises RecipeError if it cannot be read."""
    try:
        if path.is_fifo() and not str(path).startswith(DESCRIPTORS):  # nobody may ever write to it
            raise RecipeError(f"{path}: expected a recipe file, found a pipe", hint="name a file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: no such recipe, expected a YAML file there", hint="check the path and its spelling"
        ) from None
    except IsADirectoryError:
        raise RecipeError(
            f"{path}: expected a recipe file, found a folder", hint="name the .yml file inside it"
        ) from None
    except OSError as error:
        raise RecipeError(
            f"{path}: the recipe cannot be opened: {error.strerror}", hint="check the path and its permissions"
        ) from error
    if len(content) > MAX_BYTES:
        raise _too_long(str(path))
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path}:{line}: expected UTF-8 text, found the byte 0x{content[error.start]:02x}",
            hint="save the file as UTF-8",
        ) from error


def _too_long(origin: str) -> RecipeError:
    return RecipeError(
        f"{origin}: a recipe has at most {MAX_BYTES:,} bytes, found more",
        hint="is this the recipe? long texts belong in files named by `data`",
    )


def parse_yaml(text: str, *, origin: str) -> YamlFile:
    """Reads `text` as one YAML mapping of plain values; otherwise raises a RecipeError that starts with `origin`."""
    if len(text) > MAX_BYTES:
        raise _too_long(origin)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise _unreadable(origin, error.problem_mark, error.problem or "it is malformed", text) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{origin}:{line}: expected printable text, found the character {chr(error.character)!r}",
            hint="remove the character, or write it as an escape between double quotes",
        ) from error
    except RecursionError:
        raise _too_much(origin) from None
    if not isinstance(root, yaml.MappingNode):
        found = "nothing" if root is None else "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise RecipeError(
            f"{origin}:1: expected a mapping of keys to values, found {found}",
            hint="a recipe starts with lines such as `base_model: org/name`",
        )
    walk = _Walk(loader, origin)
    return YamlFile(data=walk.mapping(root, (), depth=0), origin=origin, lines=walk.lines)


def _unreadable(origin: str, mark: yaml.Mark | None, problem: str, text: str) -> RecipeError:
    where = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
    return RecipeError(
        f"{where}: the YAML cannot be read: {brief(' '.join(problem.split()))}",
        hint=_without_backslashes(text, mark)
        if mark and "escape" in problem
        else "check the indentation (spaces, no tabs) and put quotes around text that has ': ' or '#' in it",
    )


def _without_backslashes(text: str, mark: yaml.Mark) -> str:
    # splitlines() ends lines where YAML does; what else it splits at is no character of YAML
    line = text.splitlines()[mark.line].strip().replace("\\", "/")
    return f"between double quotes a backslash begins an escape; for a path, write forward slashes: {line:.200}"


def _too_much(origin: str) -> RecipeError:
    return RecipeError(
        f"{origin}: the YAML is nested or aliased too much, "
        f"expected at most {MAX_DEPTH} levels and {MAX_NODES:,} values",
        hint="write the values out instead of repeating them with anchors",
    )


class _Walk:
    """Converts nodes to plain data, counts the values, and records the line of each key."""

    def __init__(self, loader: yaml.SafeLoader, origin: str) -> None:
        self.lines: dict[Location, int] = {(): 1}
        self._loader = loader
        self._origin = origin
        self._made = 0

    def value(self, node: yaml.Node, at: Location, *, depth: int) -> Any:
        self._made += 1
        if self._made > MAX_NODES or depth > MAX_DEPTH:
            raise _too_much(self._origin)
        if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
            return self.mapping(node, at, depth=depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
            return [self._item(item, (*at, index), depth=depth + 1) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self._scalar(node)
        raise self._error(
            node,
            "expected text, a number, true, false, a list or a mapping, "
            f"found a value of the YAML type '{brief(node.tag.removeprefix(_PREFIX))}'",
            hint=_PLAIN_HINT,
        )

    def mapping(self, node: yaml.MappingNode, at: Location, *, depth: int) -> dict[str, Any]:
        seen: dict[str, int] = {}
        merged: dict[str, Any] = {}
        own: list[tuple[str, yaml.Node, yaml.Node]] = []
        for key_node, value_node in node.value:
            key = self._key(key_node, seen)
            if key_node.tag == _MERGE:
                merged = self._merge(value_node, at, depth=depth + 1)
            else:
                own.append((key, key_node, value_node))
        # the mapping's own keys come last because they override merged ones, and so do their lines
        for key, key_node, value_node in own:
            self.lines[(*at, key)] = _line(key_node)
            merged[key] = self.value(value_node, (*at, key), depth=depth + 1)
        return merged

    def _item(self, node: yaml.Node, at: Location, *, depth: int) -> Any:
        self.lines[at] = _line(node)
        return self.value(node, at, depth=depth)

    def _key(self, node: yaml.Node, seen: dict[str, int]) -> str:
        if node.tag not in (_PREFIX + "str", _MERGE) or not isinstance(node, yaml.ScalarNode):
            found = brief(repr(node.value)) if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            raise self._error(node, f"expected text as a key, found {found}", hint=_PLAIN_HINT)
        key = self._text(node)
        if key in seen:
            raise self._error(
                node,
                f"'{brief(key)}' is given twice, first on line {seen[key]}, expected once",
                hint="delete one of the two",
            )
        seen[key] = _line(node)
        return key

    def _merge(self, node: yaml.Node, at: Location, *, depth: int) -> dict[str, Any]:
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for source in reversed(sources):
            if not isinstance(source, yaml.MappingNode):
                raise self._error(source, "expected a mapping behind '<<', found something else", hint=_PLAIN_HINT)
            merged |= self.value(source, at, depth=depth)
        return merged

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        self._text(node)
        try:
            return self._loader.construct_object(node)
        except (ValueError, KeyError):
            kind = node.tag.removeprefix(_PREFIX)
            raise self._error(
                node, f"expected a value of the YAML type '{kind}', found '{node.value[:40]}'", hint=_PLAIN_HINT
            ) from None

    def _text(self, node: yaml.ScalarNode) -> str:
        """The text of a scalar. Half a surrogate pair is rejected: no tokenizer and no terminal accepts it."""
        try:
            # JSON writes characters beyond 16 bits as two escapes, which PyYAML does not join
            node.value = str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            found = node.value[:40].encode("ascii", "backslashreplace").decode()
            raise self._error(
                node, f"expected Unicode text, found {found}", hint="write the character itself"
            ) from None
        return str(node.value)

    def _error(self, node: yaml.Node, message: str, *, hint: str) -> RecipeError:
        return RecipeError(f"{self._origin}:{_line(node)}: {message}", hint=hint)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
