"""Entries of the user's cache that are folders of files."""

from pathlib import Path

import pytest

from frankenmoe.artifact import store


def test_an_entry_that_another_process_has_finished_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def keep(text: str) -> Path | None:
        def fill(into: Path) -> None:
            (into / "file").write_text(text)

        return store.keep("backbones", "key", fill, name="a name")

    folder = keep("first")
    assert folder is not None
    assert keep("second") == folder
    assert (folder / "file").read_text() == "first"
    (folder / "file").write_text("damaged")
    assert keep("third") == folder
    assert (folder / "file").read_text() == "third"
    assert [each.name for each in folder.parent.iterdir()] == ["key"]
