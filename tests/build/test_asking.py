"""What transformers says of a plan is asked once: in a child beside the copying, then in the user's cache."""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

import frankenmoe as fm
import gguftools
import tiny
from frankenmoe.build import asking, target
from frankenmoe.build.agreement import agree
from frankenmoe.build.target import Target, target_of
from frankenmoe.cache import cache_folder
from frankenmoe.errors import ArtifactError
from test_tokenizers import as_two_files, parents

# builds a recipe in a process that has not imported torch, and says whether it has now
BUILD = """
import sys, frankenmoe as fm
from frankenmoe.build import asking, run
{before}
try:
    fm.build(sys.argv[1], sys.argv[2])
except fm.FrankenMoEError as error:
    print(type(error).__name__, error.message)
print(sorted({{"torch", "transformers"}} & set(sys.modules)))
"""


def built_afresh(recipe: Path, out: Path, before: str = "") -> list[str]:
    """The lines that BUILD prints, after the statement `before`."""
    command = [sys.executable, "-c", BUILD.format(before=before), str(recipe), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe over parents whose tokenizer files a built folder cannot use as they are; with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = gguftools.bpe("gpt-2")
    folders = parents(tmp_path, tokenizer)
    for folder in folders:
        as_two_files(folder, tokenizer)
    return tiny.write_recipe(tmp_path / "r.yml", folders[0], folders)


def test_only_the_first_build_asks_and_both_write_the_same(old: Path, tmp_path: Path) -> None:
    assert built_afresh(old, tmp_path / "first") == ["[]"]
    no_child = "asking._child = lambda: 1 / 0"
    assert built_afresh(old, tmp_path / "second", no_child) == ["[]"]
    first = hashes(tmp_path / "first")
    assert first.keys() >= {"tokenizer.json", "tokenizer_config.json", "vocab.json"}
    assert hashes(tmp_path / "second") == first
    fm.verify(tmp_path / "second")


def test_what_the_class_disagrees_with_stops_the_build_and_nothing_is_left(old: Path, tmp_path: Path) -> None:
    other = (
        "import dataclasses; real = run.target_of\n"
        "def wrong(*a, **k):\n"
        "    made = real(*a, **k)\n"
        "    return dataclasses.replace(made, tensors=dict(made.tensors) | {'extra.weight': ('F32', (2, 2))})\n"
        "run.target_of = wrong"
    )
    before = sorted(tmp_path.iterdir())
    for _ in range(2):  # a disagreement is not remembered
        said, imported = built_afresh(old, tmp_path / "out", other)
        assert said == (
            "ArtifactError MixtralForCausalLM and the plan disagree on extra.weight: the class has nothing, the plan "
            "torch.float32 [2, 2]"
        )
        assert imported == "[]"
        assert sorted(tmp_path.iterdir()) == before


def test_a_child_that_dies_stops_the_build_and_nothing_is_left(old: Path, tmp_path: Path) -> None:
    said, _ = built_afresh(old, tmp_path / "out", "asking.CHILD = 'frankenmoe.nothing'")
    assert said.endswith("ended without an answer, with code 1")
    assert not list(tmp_path.glob("out*"))
    assert not cache_folder(asking.KIND).exists()


def test_a_target_survives_its_json_and_gives_the_same_answer(old: Path) -> None:
    made = target_of(fm.plan(fm.Recipe.load(old)))
    again = Target.from_json(made.to_json())
    assert again == replace(made, config=again.config)
    assert again.key() == made.key()
    assert agree(again).keys() == {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("change", ["config of an expert", "tokenizer", "another file", "tensors", "version"])
def test_a_changed_input_is_asked_about_again(change: str, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = target_of(fm.plan(fm.Recipe.load(old)))
    before = made.key()
    if change == "config of an expert":
        tiny.edit_config(made.sources[1][0], use_cache=False)
    elif change == "tokenizer":
        (made.base / "merges.txt").write_text("#version: 0.2\n")
    elif change == "another file":
        (made.base / "added_tokens.json").write_text("{}")
    elif change == "tensors":
        made = replace(made, tensors={name: ("BF16", shape) for name, (_, shape) in made.tensors.items()})
    else:
        real = version
        monkeypatch.setattr(target, "version", lambda name: "999" if name == "tokenizers" else real(name))
    assert made.key() not in (None, before)


def test_the_same_files_elsewhere_are_not_asked_about_again(old: Path, tmp_path: Path) -> None:
    before = target_of(fm.plan(fm.Recipe.load(old)))
    folders = [Path(shutil.copytree(folder, tmp_path / f"copy-{folder.name}")) for folder, _ in before.sources]
    moved = target_of(fm.plan(fm.Recipe.load(tiny.write_recipe(tmp_path / "c.yml", folders[0], folders))))
    assert moved.base != before.base
    assert moved.key() == before.key()


def test_what_may_depend_on_more_than_files_is_not_remembered(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = target_of(fm.plan(fm.Recipe.load(old)))
    assert replace(made, trust_remote_code=True).key() is None
    monkeypatch.setattr(target, "versions", lambda: {"transformers": "6.0.0.dev0"})
    assert made.key() is None


def test_without_the_cache_nothing_is_kept(old: Path, tmp_path: Path) -> None:
    fm.build(fm.open(old, cache=False), tmp_path / "out")
    assert not cache_folder(asking.KIND).exists()
    fm.build(old, tmp_path / "again")
    assert len(list(cache_folder(asking.KIND).iterdir())) == 1


def test_a_damaged_memory_is_asked_again(old: Path, tmp_path: Path) -> None:
    first = fm.build(old, tmp_path / "first").folder
    (entry,) = cache_folder(asking.KIND).iterdir()
    (entry / "tokenizer.json").write_text("{}")
    second = fm.build(old, tmp_path / "second").folder
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    assert (entry / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()


def test_a_disagreement_has_the_same_words_here_and_in_a_child(old: Path) -> None:
    made = target_of(fm.plan(fm.Recipe.load(old)))
    wrong = replace(made, tensors={})
    found = []
    for here in (True, False):
        child = None if here else asking._child()
        with pytest.raises(ArtifactError) as caught:
            asking._answer(wrong, child, None, key=None, name="x")
        found.append((caught.value.message, caught.value.hint))
    assert found[0] == found[1]


def test_the_child_runs_no_module_of_the_current_folder(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('a file of the folder was run')")
    monkeypatch.chdir(tmp_path)
    child = asking._child()
    said, _ = child.communicate(target_of(fm.plan(fm.Recipe.load(old))).to_json(), timeout=300)
    assert child.returncode == 0, said
