"""YAML as plain data with lines, and everything it refuses; does not know a recipe's keys."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from frankenmoe.errors import RecipeError
from frankenmoe.recipe.yaml import MAX_BYTES, parse_yaml, read_text

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def refused(text: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, origin="r.yml")
    return caught.value


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=8), PLAIN, max_size=5))
def test_reads_what_safe_load_reads(data: dict[str, object]) -> None:
    text = yaml.safe_dump(data)
    assert parse_yaml(text, origin="r.yml").data == yaml.safe_load(text) == data


def test_every_key_and_item_has_its_line() -> None:
    file = parse_yaml("# note\na: 1\nb:\n- c: 2\n  d: 3\n- [e,\n   f]\n", origin="r.yml")
    assert file.lines == {
        (): 1,
        ("a",): 2,
        ("b",): 3,
        ("b", 0): 4,
        ("b", 0, "c"): 4,
        ("b", 0, "d"): 5,
        ("b", 1): 6,
        ("b", 1, 0): 6,
        ("b", 1, 1): 7,
    }
    assert file.line(("b", 0, "missing", 3)) == 4


def test_merge_keys_and_aliases_read_as_safe_load_reads_them() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc:\n  z: 5\n  <<: [*a, *b]\nd: *a\ne: {<<: *b, y: 6}\n"
    file = parse_yaml(text, origin="r.yml")
    assert file.data == yaml.safe_load(text)
    assert file.line(("c", "z")) == 4


@pytest.mark.parametrize(
    ("text", "found"),
    [("", "nothing"), ("# only a comment\n", "nothing"), ("- a\n", "a list"), ("just text\n", "a single value")],
)
def test_anything_but_a_mapping_is_refused(text: str, found: str) -> None:
    assert refused(text).message == f"r.yml:1: expected a mapping of keys to values, found {found}"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a: 1\nb: [\n", "r.yml:3:1: "),
        ("a: b\n\tc: d\n", "r.yml:2:1: "),
        ("a: *x\n", "r.yml:1:4: "),
        ("---\na: 1\n---\nb: 2\n", "r.yml:3:1: "),
    ],
)
def test_unreadable_yaml_is_placed_by_line_and_column(text: str, where: str) -> None:
    error = refused(text)
    assert error.message.startswith(f"{where}the YAML cannot be read: ")
    assert "\n" not in error.message
    assert error.hint


def test_a_key_given_twice_is_refused_with_both_lines() -> None:
    assert refused("a: 1\nb:\n  c: 1\n  c: 2\n").message.startswith("r.yml:4: 'c' is given twice, first on line 3")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("!!python/object/apply:os.getcwd []", "python/object/apply:os.getcwd"),
        ("!mine x", "!mine"),
        ("!!set {a}", "set"),
        ("2024-01-01", "timestamp"),
        ("!!binary aGk=", "binary"),
    ],
)
def test_only_plain_types_are_read(value: str, kind: str) -> None:
    error = refused(f"x: 1\na: {value}\n")
    assert error.message.startswith("r.yml:2: ")
    assert error.message.endswith(f"found a value of the YAML type '{kind}'")


@pytest.mark.parametrize("text", ["a: !!int foo", "a: !!bool foo", "a: 0x_", f"a: {'9' * 5000}"])
def test_a_number_that_is_none_is_refused(text: str) -> None:
    assert refused(text).message.startswith("r.yml:1: expected a value of the YAML type ")


@pytest.mark.parametrize(("key", "found"), [("1", "'1'"), ("yes", "'yes'"), ("? [a]\n", "a list or mapping")])
def test_a_key_must_be_text(key: str, found: str) -> None:
    assert refused(f"{key}: x\n").message == f"r.yml:1: expected text as a key, found {found}"


def test_a_merge_of_anything_but_a_mapping_is_refused() -> None:
    assert refused("b: 1\na: {<<: 3}\n").message.startswith("r.yml:2: expected a mapping behind '<<'")


@pytest.mark.parametrize(
    "bomb",
    [
        "a: &a [*a]\n",
        "a: &a {<<: *a}\n",
        "a: " + "[" * 5000,
        "a: " + "[" * 101 + "]" * 101,
        "x0: &x0 [1, 2]\n" + "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 9)),
        "x0: &x0 {k: 1}\n" + "".join(f"x{i}: &x{i} {{<<: [{', '.join([f'*x{i - 1}'] * 9)}]}}\n" for i in range(1, 9)),
    ],
)
def test_bombs_are_refused_before_they_expand(bomb: str) -> None:
    assert "nested or aliased too much" in refused(bomb).message


def test_a_control_character_is_named_with_its_line() -> None:
    assert refused("a: 1\nb: \x01\n").message == "r.yml:2: expected printable text, found the character '\\x01'"


@pytest.mark.parametrize("text", ['a: 1\nb: "\\ud83d"', 'a: 1\n"\\ud83d": b'])
def test_half_a_surrogate_pair_is_refused(text: str) -> None:
    assert refused(text).message == "r.yml:2: expected Unicode text, found \\ud83d"


def test_files_that_are_no_text(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yml"
    latin.write_bytes("a: 1\nb: é\n".encode("latin-1"))
    large = tmp_path / "large.yml"
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    expected = {
        tmp_path / "none.yml": f"{tmp_path / 'none.yml'}: no such recipe, expected a YAML file there",
        tmp_path: f"{tmp_path}: expected a recipe file, found a folder",
        latin: f"{latin}:2: expected UTF-8 text, found the byte 0xe9",
        large: f"{large}: a recipe has at most 1,000,000 bytes, found more",
        latin / "below": f"{latin / 'below'}: the recipe cannot be opened: Not a directory",
    }
    for path, message in expected.items():
        with pytest.raises(RecipeError) as caught:
            read_text(path)
        assert caught.value.message == message
        assert caught.value.hint
