"""How sources are named, in short and long form; does not know what is in them."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import PydanticCustomError

from frankenmoe.recipe.sourcename import SourceName, parse_source

NOWHERE = Path("/nowhere")
EXPERT = st.none() | st.sampled_from(["0", "12", "shared"])
PART = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6).filter(str.strip)


# names that look as if an expert of a mixture were part of them
MARKED = PART | st.builds("{}#{}".format, PART, st.sampled_from(["0", "shared"]))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", SourceName("org/name")),
        ("org/name@v1", SourceName("org/name", "v1")),
        ("org/name+lora", SourceName("org/name", None, "lora")),
        ("org/name@v1+org/lora@v2", SourceName("org/name", "v1", "org/lora", "v2")),
        (r"C:\models\base", SourceName(r"C:\models\base")),
        ("org/name#0", SourceName("org/name", part="0")),
        ("org/name@v1#12+lora@v2", SourceName("org/name", "v1", "lora", "v2", part="12")),
        ("./folder#shared", SourceName("./folder", part="shared")),
        ("c#", SourceName("c#")),
        ("base+lora#3", SourceName("base", None, "lora#3")),
    ],
)
def test_the_short_form_reads_and_writes(text: str, name: SourceName) -> None:
    assert parse_source(text, folder=NOWHERE) == name
    assert str(name) == name.to_data() == text


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ({"model": "a/b@v1"}, SourceName("a/b", "v1")),
        ({"model": {"path": "a/b"}}, SourceName("a/b")),
        ({"model": {"path": "a@b", "revision": "v1"}, "lora": None}, SourceName("a@b", "v1")),
        ({"model": "a+b", "lora": {"path": "l", "revision": None}}, SourceName("a+b", None, "l")),
        ({"model": "a", "lora": "l@v", "override_architecture": "X"}, SourceName("a", None, "l", "v")),
        ({"model": "a", "expert": 3}, SourceName("a", part="3")),
        ({"model": {"path": "a#3"}, "expert": "shared"}, SourceName("a#3", part="shared")),
    ],
)
def test_mergekits_long_form_reads(table: dict[str, object], name: SourceName) -> None:
    assert parse_source(table, folder=NOWHERE) == name


def test_a_folder_in_the_home_folder_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "we@home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_source("~/we@home", folder=NOWHERE) == SourceName("~/we@home")


def test_an_existing_folder_is_not_cut(tmp_path: Path) -> None:
    for folder in ("my+model", "we@home", "plain"):
        (tmp_path / folder).mkdir()
    assert parse_source("my+model", folder=tmp_path) == SourceName("my+model")
    assert parse_source("my+model@v1+we@home", folder=tmp_path) == SourceName("my+model", "v1", "we@home")
    assert parse_source("plain+we@home@v2", folder=tmp_path) == SourceName("plain", None, "we@home", "v2")
    assert parse_source("my+model", folder=NOWHERE) == SourceName("my", None, "model")
    (tmp_path / "run#3").mkdir()
    assert parse_source("run#3", folder=tmp_path) == SourceName("run#3")
    assert parse_source("run#3", folder=NOWHERE) == SourceName("run", part="3")


@pytest.mark.parametrize("text", ["", " ", "a@", "a+", "@v", "+l", "a@b@c", "a+b+c", "a+b@c+d"])
def test_malformed_text_is_refused(text: str) -> None:
    with pytest.raises(PydanticCustomError, match="must read path, path@revision"):
        parse_source(text, folder=NOWHERE)


@pytest.mark.parametrize(
    ("value", "message", "at"),
    [
        (3, "must be a hub id or a folder, found 3", ()),
        ({"modl": "a"}, "is not a known key", ("modl",)),
        ({"lora": "a"}, "must have the key 'model'", ()),
        ({"model": 3}, "must be a path, found 3", ("model",)),
        ({"model": {"path": "a", "revison": "b"}}, "is not a known key", ("model", "revison")),
        ({"model": {"path": 3}}, "must be text, found 3", ("model", "path")),
        ({"model": "a", "lora": {"path": "l", "revision": 1.0}}, "must be text, found 1.0", ("lora", "revision")),
        ({"model": "a", "lora": "b@c@d"}, "must read path", ("lora",)),
        ({"model": "a", "expert": -1}, "must be the number of an expert", ("expert",)),
        ({"model": "a", "expert": "first"}, "must be the number of an expert", ("expert",)),
    ],
)
def test_a_wrong_value_is_refused_at_its_key(value: object, message: str, at: tuple[str, ...]) -> None:
    with pytest.raises(PydanticCustomError) as caught:
        parse_source(value, folder=NOWHERE)
    assert caught.value.message().startswith(message)
    assert caught.value.context is not None
    assert caught.value.context["at"] == at


@settings(deadline=None)
@given(
    st.builds(SourceName, MARKED, MARKED | st.none(), MARKED, MARKED | st.none(), EXPERT)
    | st.builds(SourceName, MARKED, part=EXPERT)
)
def test_plain_data_reads_back(name: SourceName) -> None:
    assert parse_source(name.to_data(), folder=NOWHERE) == name
