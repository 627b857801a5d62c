"""Names and quotations in Markdown show letter by letter and do nothing, as another program reads it: markdown-it."""

import html
import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from frankenmoe.artifact.folder import Artifact, open_artifact
from frankenmoe.build.run import build
from frankenmoe.publish.card import make_card
from frankenmoe.publish.markdown import code, fenced, plain, sentence, table, without_controls

READER = MarkdownIt("commonmark", {"html": True}).enable("table")
NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![pixel](http://example.org/x.png)",
    "[a](javascript:alert(1)) [b][c] <http://x.org>",
    "*bold* _em_ `code` ~~gone~~ a_b_c \\<b>",
    "a|b \\| `|` c\\\\|d",
    "# head",
    "&lt; &amp; &#60;script&#62;",
    "]: http://example.org",
]
TEXT = st.text(alphabet="<>&;#ab1 |\\`*_[]()!~:/.-+=$\"'", min_size=1, max_size=30).filter(lambda text: text.strip())


def shown(markup: str) -> tuple[str, set[str]]:
    """What a reader sees, and the names of the HTML elements."""
    out = READER.render(markup)
    return html.unescape(re.sub(r"<[^>]*>", "", out)).strip("\n"), set(re.findall(r"<([a-z0-9]+)", out))


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("text", NASTY)
def test_plain_text_is_only_shown(text: str) -> None:
    assert shown(f"see {plain(text)}") == (f"see {text}", {"p"})
    assert shown(f"# {plain(text)}") == (text, {"h1"})
    assert shown(f"- {plain(text)}")[1] == {"ul", "li"}


@given(TEXT)
def test_any_plain_text_is_only_shown(text: str) -> None:
    seen, tags = shown(f"see {plain(text)}.")
    assert flat(seen) == flat(f"see {text}.")
    assert tags == {"p"}


@given(TEXT, TEXT)
def test_cells_of_a_table_are_only_shown(one: str, two: str) -> None:
    seen, tags = shown(table(("a", "b"), [(plain(one), code(two))]))
    assert tags == {"table", "thead", "tbody", "tr", "th", "td", "code"}
    assert [flat(row) for row in seen.splitlines() if row.strip()][2:] == [flat(one), flat(two)]


@given(TEXT)
def test_code_on_a_line_is_only_shown(text: str) -> None:
    seen, tags = shown(f"is {code(text)}!")
    assert flat(seen) == f"is {flat(text)}!"
    assert tags == {"p", "code"}


@given(st.lists(st.sampled_from(["```", "~~~", "````text", "<b>", "a", "  ```", ""]), min_size=1, max_size=6))
def test_a_block_of_code_ends_where_it_should(lines: list[str]) -> None:
    text = "\n".join(lines)
    tokens = MarkdownIt("commonmark").parse(f"{fenced(text)}\n\nafter")
    assert [token.type for token in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]
    assert tokens[0].content.rstrip("\n") == text.rstrip("\n")


def test_controls_are_spelt_out() -> None:
    assert without_controls("a\x1b[31m\x00\u202e\ud800\r") == "a\\x1b[31m\\x00\\u202e\\ud800\\r"
    assert plain("red \x1b[0m") == "red &#92;x1b&#91;0m"
    assert code("") == code(" \n") == ""
    assert code("a\nb\x07") == "<code>a b&#92;x07</code>"
    assert "\x1b" not in fenced("\x1b]0;title\x07")
    assert plain("my_model-v1.5 (β)") == "my_model-v1.5 (β)"


@pytest.mark.parametrize("text", NASTY)
def test_sentences_keep_their_own_code_and_no_more(text: str) -> None:
    _, tags = shown(sentence(f"use `frankenmoe eval`, said {text}"))
    assert not tags & {"script", "img", "a"}


@given(st.text(alphabet="<>b/`\\ a[]()!&\n", min_size=1, max_size=30))
def test_in_any_sentence_only_code_and_emphasis_act(text: str) -> None:
    assert shown(f"see {sentence(text)}")[1] <= {"p", "code", "em", "strong"}


def test_what_is_code_in_a_sentence_is_shown_letter_by_letter() -> None:
    said = "give `--data NAME=<FILE> & [a](b)` or ``a `<b>` c``, not <b> & `"
    assert shown(sentence(said)) == (said.replace("`", "").replace("a <b> c", "a `<b>` c") + "`", {"p", "code"})


EVIL = "<img src=x onerror=alert(1)>|`[x](http://evil.example)\x1b[31m*_~"


def test_a_whole_card_of_nasty_names_does_nothing(made: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((made / "recipe.yml").read_text())
    recipe["name"] = EVIL
    recipe["experts"][0] |= {"name": EVIL, "positive_prompts": ["a\n```\n<script>x</script>\n"]}
    for expert in [recipe, *recipe["experts"]]:
        for key in ("base_model", "source_model"):
            if key in expert:
                expert[key] = str(made / expert[key])
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    artifact = build(tmp_path / "r.yml", tmp_path / "moe", virtual=True)
    (artifact.folder / "reports").mkdir()
    trace = [{"token": EVIL, "experts": [0]}]
    samples = {
        "kind": "frankenmoe samples",
        "experts": [EVIL + "\n```\n<b>", "two"],
        "settings": {"max_new_tokens": 3, "temperature": 0.0, "seed": 0},
        "samples": [{"prompt": f"{EVIL}\n<script>", "reply": f"```\n{EVIL}", "trace": trace}],
    }
    exported = {"files": [{"path": f"{EVIL}.gguf", "type": EVIL, "bytes": 5, "bits_per_weight": 4.0, "notes": [EVIL]}]}
    (artifact.folder / "reports" / "samples.json").write_text(json.dumps(samples))
    (artifact.folder / "reports" / "export.json").write_text(json.dumps({"kind": "frankenmoe export", **exported}))
    text = make_card(open_artifact(artifact.folder)).text
    assert "\x1b" not in text
    out = READER.render(text.partition("\n---\n")[2])
    assert not re.findall(r"<(script|img|b|em|strong|del)\b", out)
    assert "evil.example" in out
    assert f"llama-cli -m '{without_controls(EVIL.rpartition('/')[2])}.gguf' -p" in html.unescape(out)
    assert not re.findall(r'href="[^"]*evil', out)
    assert out.count("<details>") == out.count("</details>") == 1


def test_an_ordinary_card_has_no_references(artifact: Artifact) -> None:
    assert "&#" not in make_card(artifact).text
