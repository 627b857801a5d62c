"""Licences of sources: what a mixture of them may be under, and every conflict by name."""

from pathlib import Path

import pytest

from frankenmoe.planning.compare import licence
from frankenmoe.publish.licences import weigh


def test_a_licence_all_share_is_the_models() -> None:
    found = weigh([("a", "apache-2.0"), ("b", "apache-2.0"), ("a", "apache-2.0")])
    assert found.chosen == "apache-2.0"
    assert found.findings == ()
    assert found.by_source == (("a", "apache-2.0"), ("b", "apache-2.0"))


def test_different_licences_are_named_and_none_is_chosen() -> None:
    found = weigh([("a", "apache-2.0"), ("b", "mit"), ("c", "mit")])
    assert found.chosen is None
    assert found.findings == ("the sources are under different licences: apache-2.0 (a); mit (b, c)",)


@pytest.mark.parametrize(
    ("licence", "words"),
    [
        ("cc-by-nc-4.0", "forbids commercial use"),
        ("cc-by-nc-nd-4.0", "forbids passing on changed versions"),
        ("gpl-3.0", "under the same licence"),
        ("llama2", "terms of its own"),
        ("other", "terms of its own"),
    ],
)
def test_what_a_licence_asks_is_said_even_where_all_share_it(licence: str, words: str) -> None:
    (finding, *_) = weigh([("a", licence)]).findings
    assert finding.startswith(f"{licence} (a)")
    assert words in finding


def test_two_copyleft_licences_cannot_both_be_kept() -> None:
    assert any("only one can be" in text for text in weigh([("a", "gpl-3.0"), ("b", "cc-by-sa-4.0")]).findings)


def test_a_source_without_a_licence_leaves_the_model_without_one() -> None:
    found = weigh([("a", "mit"), ("b", None)])
    assert found.chosen is None
    assert any("no licence is declared in b" in text for text in found.findings)


def test_the_author_decides_and_a_contradiction_is_said() -> None:
    found = weigh([("a", "cc-by-nc-4.0")], declared="mit")
    assert found.chosen == "mit"
    assert "the author declares mit, and the sources cc-by-nc-4.0" in found.findings
    assert weigh([("a", "mit")], declared="mit").findings == ()


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("license: mit  # as the base", "mit"),
        ("license: Apache-2.0", "apache-2.0"),
        ("license:\n- mit", "mit"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("license: other\nlicense_name: deepseek", "other (deepseek)"),
        ("license: unknown", None),
        ("license:", None),
        ("tags: [a", None),
    ],
)
def test_a_licence_is_read_as_the_hub_writes_it(head: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"\ufeff---\n{head}\n---\n\nlicense: gpl\n")
    assert licence(tmp_path) == expected


def test_licences_without_a_name_of_the_hubs_are_not_taken_for_one() -> None:
    assert weigh([("a", "other (x)"), ("b", "other (y)")]).chosen is None
    assert weigh([("a", "other (x)"), ("b", "other (x)")]).chosen == "other (x)"
    assert weigh([("a", "other"), ("b", "other")]).chosen is None
    assert weigh([("a", "other")]).chosen == "other"
    assert weigh([("a", "mit, apache-2.0"), ("b", "mit, apache-2.0")]).chosen is None
