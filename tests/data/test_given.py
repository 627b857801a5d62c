"""Paths, hub datasets and EXPERT=FILE, as users write them."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from frankenmoe.data.documents import read_documents
from frankenmoe.data.given import by_label, pairs, user_path
from frankenmoe.errors import RecipeError

WORDS = st.text("ab=~./@: ", min_size=1, max_size=6)
FOLDER = Path("/recipes/raiden")
QUIET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("x.txt", "/recipes/raiden/x.txt"),
        ("../x.txt", "/recipes/x.txt"),
        ("/x.txt", "/x.txt"),
        ("data/x.jsonl", "/recipes/raiden/data/x.jsonl"),
        ("org/name.gz", "/recipes/raiden/org/name.gz"),
        ("name", "/recipes/raiden/name"),
        ("a/b/c", "/recipes/raiden/a/b/c"),
    ],
)
def test_a_path_is_absolute(text: str, path: str) -> None:
    assert user_path(text, folder=FOLDER) == path


def test_the_home_folder_is_expanded(home: Path) -> None:
    assert user_path("~/x.txt", folder=FOLDER) == str(home / "x.txt")
    assert user_path("~", folder=FOLDER) == str(home)


@pytest.mark.parametrize("text", ["org/name", "org/name@main", "org/name:test", "org/name@v1:config:train"])
def test_a_dataset_keeps_its_name_unless_something_is_called_so(text: str, tmp_path: Path) -> None:
    assert user_path(text, folder=tmp_path) == text
    (tmp_path / text).parent.mkdir(parents=True)
    (tmp_path / text).write_text("a file after all")
    assert user_path(text, folder=tmp_path) == str(tmp_path / text)


@given(text=st.text(max_size=8) | WORDS)
def test_a_result_is_a_dataset_or_absolute_and_stays_so(text: str) -> None:
    found = user_path(text, folder=FOLDER)
    assert os.path.isabs(found) or found == text
    assert user_path(found, folder=FOLDER) == found


def test_what_is_checked_is_what_is_read(home: Path, tmp_path: Path) -> None:
    (home / "x.txt").write_text("from home")
    ((label, file),) = pairs(["maths=~/x.txt"], flag="--data", folder=tmp_path)
    assert (label, file) == ("maths", str(home / "x.txt"))
    for name in (file, "~/x.txt"):
        assert [document.text for document in read_documents([name], folder=FOLDER)] == ["from home"]


@given(names=st.lists(WORDS, max_size=4, unique=True), rest=WORDS, data=st.data())
def test_a_known_name_comes_back_whatever_is_in_it(names: list[str], rest: str, data: st.DataObject) -> None:
    assume(names)
    label = data.draw(st.sampled_from(names))
    # a longer known name may begin like this one and the value
    assume(not any(f"{label}={rest}".startswith(f"{other}=") for other in names if len(other) > len(label)))
    assert pairs([f"{label}={rest}"], flag="--data", names=names) == [(label, rest)]


@given(label=st.text("ab~./@: ", min_size=1, max_size=6), rest=WORDS)
def test_an_unknown_name_ends_at_the_first_sign(label: str, rest: str) -> None:
    assert pairs([f"{label}={rest}"], flag="--data", names=["other"]) == [(label, rest)]


@given(text=WORDS, names=st.lists(WORDS, max_size=3), unlabelled=st.booleans())
def test_every_text_is_split_at_a_sign_or_rejected(text: str, names: list[str], unlabelled: bool) -> None:
    try:
        ((label, value),) = pairs([text], flag="--data", names=names, unlabelled=unlabelled)
    except RecipeError as error:
        reason = str(error)
    else:
        assert (f"{label}={value}" if label is not None else value) == text
        assert label is not None or (unlabelled and "=" not in text)
        return
    assert repr(text) in reason
    assert "hint:" in reason


@QUIET
@given(name=st.text("ab=~@ ", min_size=1, max_size=6))
def test_a_file_with_a_sign_in_its_name_needs_no_label(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("text")
    assume(not name.startswith("~"))
    found = pairs([name], flag="--data", unlabelled=True, folder=tmp_path)
    assert found == [(None, str(tmp_path / name))]
    assert pairs([f"x={name}"], flag="--data", folder=tmp_path) == [("x", str(tmp_path / name))]


def test_the_longest_known_name_wins_so_that_every_name_can_be_written() -> None:
    names = ["a", "a=b"]
    assert pairs(["a=b=f", "a=./b=f"], flag="--data", names=names) == [("a=b", "f"), ("a", "./b=f")]


@pytest.mark.parametrize("text", ["", "file.txt", "=file.txt", "maths="])
def test_a_pair_that_is_none_is_rejected(text: str) -> None:
    with pytest.raises(RecipeError, match="--data must be EXPERT=FILE, found ") as caught:
        pairs([text], flag="--data")
    assert caught.value.hint
    with pytest.raises(RecipeError, match="--weights must be NAME=X, found "):
        pairs([text], flag="--weights", form="NAME=X")


@pytest.mark.parametrize("text", ["", "=file.txt", "maths="])
def test_no_side_of_a_sign_is_empty_even_where_labels_may_be_left_out(text: str) -> None:
    with pytest.raises(RecipeError, match="must be EXPERT=FILE or FILE"):
        pairs([text], flag="--data", unlabelled=True)


def test_values_are_grouped_by_label_in_order() -> None:
    found = pairs(["b=1", "a=2", "b=3", "4"], flag="--data", unlabelled=True)
    assert by_label(found) == {"b": ["1", "3"], "a": ["2"]}
    assert list(by_label(found)) == ["b", "a"]
