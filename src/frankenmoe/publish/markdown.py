"""Text of any origin as Markdown that shows it and does nothing else: no HTML, links, pictures, emphasis or controls.

Escapes are HTML's character references, which mean the same in Markdown and in the HTML inside it.
"""

import html
import re
from collections.abc import Sequence

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MARKS = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)|(?<=:)//|(?<=www)\.|^\s*(?:#|[-+=>]|\d+[.)](?=\s))", re.MULTILINE)
# in a sentence: what stays (escaped backticks, code, backticks without a partner), and what would act
INLINE = re.compile(r"(?P<stays>\\[\\`]|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)|`+)|[&<>]|\](?=[(\[])")


def plain(text: str) -> str:
    """A name or a quotation, letter by letter."""
    return MARKS.sub(lambda match: _references(match[0]), html.escape(without_controls(text), quote=False))


def sentence(text: str) -> str:
    """A sentence of ours on one line, in which names stand: its own code stays; HTML, links and pictures do not act."""
    return INLINE.sub(_quiet, _on_one_line(text))


def code(text: str) -> str:
    """Text as code on one line; nothing if there is no text."""
    flat = _on_one_line(text)
    if set(flat) & set("`|\\"):
        return f"<code>{plain(flat)}</code>"
    return f"`{flat}`" if flat else ""


def fenced(text: str, language: str = "text") -> str:
    """Text as a block of code, whatever fences are in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{without_controls(text)}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown; line ends become spaces."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(' '.join(cell.split()) for cell in line)} |" for line in lines)


def without_controls(text: str) -> str:
    """Text with its control characters spelt out, except line ends and tabs."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _on_one_line(text: str) -> str:
    return " ".join(without_controls(text).split())


def _quiet(match: re.Match[str]) -> str:
    return match[0] if match["stays"] else "]\\" if match[0] == "]" else html.escape(match[0])


def _references(marks: str) -> str:
    return "".join(each if each.isspace() or each.isalnum() else f"&#{ord(each)};" for each in marks)
