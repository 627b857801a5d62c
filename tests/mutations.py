"""Breaks text, JSON, YAML and safetensors files as a seeded generator says: structure first, bytes second.

It does not know what the files mean.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

# what no JSON library writes; the keys stand for it until the text is made
RAW = {
    "@digits": "9" * 5000,
    "@exponent": "-1e999999",
    "@deep list": "[" * 20_000 + "]" * 20_000,
    "@deep map": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "@surrogate": '"\\ud800"',
    "@escape": '"\\u001b[2J\\u0000"',
}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**31 - 1, 2**63, -(2**63), 10**30, 10**400, -(10**400)),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", " ", "x", "0", "1e9", "true", "null", "x" * 10_000, "x y " * 3_000, "\0", "a\nb\tc", "漢字🧟\u202e", "é"),
    *("/", "..", "../..", "/etc/passwd", "/dev/zero", "~", "~nobody", "a/b", "org/name@main", "{0}", "%s", "${HOME}"),
    *("(.*)*x", "(" * 500 + ")" * 500, "[", "{{ 1 }}", "<s>", "float16", "llama", "base", "base+lora"),
    *([], {}, [None], [[]], [{}], {"": None}, {"x": 1}, [1, "a", None], ["x"] * 3000, {str(n): n for n in range(3000)}),
    *RAW,
)
LETTERS = "\0\x1b\r\n\t\"'\\{}[]:,#&*!|>%@`-~é漢\u202e\ufeff\U0001f9df9e."


def pick(random: Random, items: Any) -> Any:
    return items[random.randrange(len(items))]


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value below and of `value` itself."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, each in below for place in places(each, (*at, key)))]


def changed(value: Any, at: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """`value` with what is at a path replaced."""
    if not at:
        return change(value)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = changed(copy[at[0]], at[1:], change)
    return copy


def odd_text(random: Random, text: str) -> str:
    """A text with letters added, lost, or repeated."""
    place = random.randrange(len(text) + 1)
    return pick(
        random,
        (
            text[:place] + pick(random, LETTERS) + text[place:],
            text[:place],
            text * 2,
            text.upper(),
            text[:place] + text[place + 1 :],
            text + " ",
            (text * 2000)[:20_000],
        ),
    )


def odd(random: Random, value: Any) -> Any:
    """Another value in the place of one, often of a similar kind."""
    kind = random.random()
    if isinstance(value, str) and kind < 0.4:
        return odd_text(random, value)
    if isinstance(value, int | float) and kind < 0.4:
        return pick(
            random, (-value, value + 1, value - 1, value * 2, value * 10**6, str(value), value / 2, value * 1.0)
        )
    if isinstance(value, dict) and value and kind < 0.7:
        key = pick(random, list(value))
        rest = {other: each for other, each in value.items() if other != key}
        return pick(
            random,
            (
                rest,
                rest,
                rest | {odd_text(random, key): value[key]},
                value | {"unknown": 1},
                value | {"": pick(random, VALUES)},
            ),
        )
    if isinstance(value, list) and value and kind < 0.7:
        item = pick(random, value)
        return pick(
            random, (value[1:], value[:-1], value[::-1], [*value, item], [*value, pick(random, VALUES)], [value], item)
        )
    if kind < 0.75:
        return pick(random, ([value], {"x": value}, [value] * (3 if isinstance(value, dict | list) else 300)))
    return pick(random, VALUES)


def odd_structure(random: Random, value: Any) -> Any:
    """Plain data with one to three values replaced, lost, or exchanged."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        at = pick(random, places(value))
        if random.random() < 0.15:
            other = pick(random, places(value))
            found = value
            for part in other:
                found = found[part]
            value = changed(value, at, lambda _, found=found: found)
        else:
            value = changed(value, at, lambda old: odd(random, old))
    return value


def json_text(value: Any) -> str:
    """JSON with one key or item per line, and what only a hostile writer writes."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text


def odd_lines(random: Random, text: str) -> str:
    """A text with a line lost, repeated, moved, or indented."""
    lines = text.split("\n")
    at, other = random.randrange(len(lines)), random.randrange(len(lines))
    match random.randrange(5):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[at])
        case 2:
            lines[at], lines[other] = lines[other], lines[at]
        case 3:
            lines[at] = pick(random, (" ", "  ", "\t", "- ", "#", "---\n", "<<: ")) + lines[at]
        case _:
            lines[at] = odd_text(random, lines[at])
    return "\n".join(lines)


def odd_bytes(random: Random, data: bytes) -> bytes:
    """Bytes cut off, changed, added, or in another encoding."""
    at = random.randrange(len(data) + 1)
    match random.randrange(6):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]
        case 2:
            return data[:at] + random.randbytes(random.randrange(1, 9)) + data[at:]
        case 3:
            return b"\xef\xbb\xbf" + data
        case 4:
            return data.decode("latin-1").encode("utf-16")
        case _:
            return data + data


def odd_json(random: Random, data: bytes) -> bytes:
    """A JSON file, broken."""
    text = json_text(odd_structure(random, json.loads(data)))
    if random.random() < 0.2:
        text = odd_lines(random, text)
    raw = text.encode("utf-8", "surrogatepass")
    return odd_bytes(random, raw) if random.random() < 0.1 else raw


YAML = (
    "a: &a [x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\n",
    "seed: !!python/object/apply:os.getpid []\n",
    "seed: 0o777777777777777777777777\n",
    "seed: 1_000_000\n",
    "seed: 2001-01-01\n",
    "seed: !!binary aGk=\n",
    "seed: !!float nan\n",
    "name: &x [*x]\n",
    "<<: {seed: 1}\n",
    "? [a, b]\n: c\n",
    "%YAML 9.9\n---\n",
    "--- a\n--- b\n",
    "name: >\n  folded\n\n  text\n",
    "name: !!str {a: b}\n",
    "seed: 190:20:30\n",
    "seed: .inf\n",
    "seed: 0x" + "f" * 6000 + "\n",
    "x" * 2000 + ": 1\n",
)


def odd_yaml(random: Random, data: bytes) -> bytes:
    """A YAML file, broken."""
    kind = random.random()
    if kind < 0.5:
        return odd_json(random, json.dumps(yaml.safe_load(data)).encode())
    text = data.decode()
    for _ in range(random.choice((1, 1, 2, 4))):
        text = odd_lines(random, text)
    if kind < 0.7:
        text = text + pick(random, YAML)
    raw = text.encode("utf-8", "surrogatepass")
    return odd_bytes(random, raw) if kind > 0.9 else raw


def odd_json_lines(random: Random, data: bytes) -> bytes:
    """A file of JSON lines, one of them broken."""
    lines = data.splitlines()
    at = random.randrange(len(lines))
    lines[at] = odd_json(random, lines[at]).replace(b"\n", b" ")
    raw = b"\n".join(lines)
    return odd_bytes(random, raw) if random.random() < 0.2 else raw


def odd_head(random: Random, data: bytes) -> bytes:
    """A text whose YAML head is broken."""
    head, rest = data.removeprefix(b"---\n").split(b"---\n", 1)
    return b"---\n" + odd_yaml(random, head) + pick(random, (b"\n---\n", b"\n---\n", b"---")) + rest


def odd_tensors(random: Random, data: bytes) -> bytes:
    """A safetensors file with a broken header, or with more or less data than that says."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = random.random()
    if kind < 0.7:
        header = odd_json(random, header)
    if kind > 0.6:
        rest = pick(random, (rest[:-1], rest + b"\0", b"", rest[1:], rest * 2, odd_bytes(random, rest)))
    length = len(header)
    if random.random() < 0.1:
        length = pick(random, (0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 10**8, 10**8 - 1))
    return length.to_bytes(8, "little") + header + rest


def odd_numbers(random: Random, data: bytes) -> bytes:
    """A safetensors file with NaN, infinity or huge numbers somewhere in its data."""
    start = 8 + int.from_bytes(data[:8], "little")
    at = start + 4 * random.randrange((len(data) - start) // 4)
    word = pick(random, (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\1\0\0\0"))
    return data[:at] + word + data[at + 4 :]


def odd_file(random: Random, file: Path) -> None:
    """Something else in the place of a file: nothing, a folder, a pipe, a link, a device, gigabytes of nothing."""
    content = file.read_bytes()
    file.unlink()
    match random.randrange(9):
        case 0:
            pass
        case 1:
            file.mkdir()
        case 2:
            os.mkfifo(file)
        case 3:
            file.symlink_to(file.name)
        case 4:
            file.symlink_to("/dev/zero")
        case 5:
            file.symlink_to("/nowhere/at all")
        case 6:
            file.write_bytes(content)
            os.truncate(file, 2**33)
        case 7:
            file.write_bytes(b"")
        case _:
            file.write_bytes(b" " * 10**7 + content)
