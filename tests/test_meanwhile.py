"""Two processes with one output folder, changes between two runs or afterwards, and closed standard streams."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import forks
import frankenmoe as fm
import tiny
from frankenmoe.artifact import folder as artifact
from frankenmoe.artifact.folder import LOCK, ROUTERS, UNFINISHED, growing, partial_folder
from frankenmoe.build import run as building
from frankenmoe.errors import ArtifactError, SourceError
from refusals import cli, refused

Parents = dict[str, list[Path]]
FORMS = pytest.mark.parametrize("form", [(), ("--virtual",)], ids=["built", "virtual"])


@pytest.fixture
def recipe(parents: Parents, tmp_path: Path) -> Path:
    base, one, two = parents["llama"]
    return tiny.write_recipe(tmp_path / "r.yml", base, [base, one, two])


# two builders


@pytest.mark.parametrize("then", [Path.mkdir, lambda folder: None], ids=["begun anew", "gone"])
def test_a_lock_whose_folder_has_moved_away_is_not_held(
    then: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    real = fcntl.flock

    def flock(*args: Any) -> None:  # the owner finishes after we open the file, before we lock it
        partial_folder(out).rename(tmp_path / "elsewhere")
        then(partial_folder(out))
        real(*args)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ArtifactError, match="another process is building"), growing(out, digest="x"):
        pass


def test_a_folder_that_was_finished_while_we_waited_for_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    real = artifact._locked

    def locked(*args: Any) -> Any:
        out.mkdir()
        (out / "frankenmoe.json").write_text("{}")
        return real(*args)

    monkeypatch.setattr(artifact, "_locked", locked)
    with pytest.raises(ArtifactError, match="is not empty"), growing(out, digest="x"):
        pass
    assert not partial_folder(out).exists()


def test_whoever_looks_while_a_folder_is_removed_sees_that_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "out", []
    real = Path.unlink

    def unlink(file: Path, **keys: Any) -> None:
        real(file, **keys)
        seen.append({each.name for each in file.parent.iterdir()})

    with suppress(SourceError), growing(out, digest="x") as partial:
        for name in ("a", "z"):
            (partial / name).touch()
        monkeypatch.setattr(Path, "unlink", unlink)
        raise SourceError("no use")
    assert not partial_folder(out).exists()
    assert all(LOCK in names and UNFINISHED in names for names in seen[:2])
    assert seen[2:] == [{LOCK}, set()]


def test_a_file_system_without_locks_can_be_built_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with growing(tmp_path / "out", digest="x") as partial:
        assert partial.is_dir()


def test_the_folder_one_stands_in_is_not_replaced(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "../here", tmp_path / "here"):
        facts = (str(tmp_path / "here"), "the folder you are in")
        refused("build", recipe, name, inside=tmp_path, facts=facts, hint="a new folder")
    assert cli("build", recipe, "moe").code == 0


# changes between two runs, or afterwards


@pytest.fixture
def with_routers(recipe: Path, parents: Parents, tmp_path: Path) -> Path:
    """A recipe with its routers in a file next to it, gates.safetensors."""
    made = fm.build(recipe, tmp_path / "first", virtual=True)
    (made.folder / ROUTERS).rename(tmp_path / "gates.safetensors")
    return tiny.write_recipe(recipe, parents["llama"][0], parents["llama"], routers="gates.safetensors")


def test_routers_in_a_file_that_changes_between_two_runs(
    with_routers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(building, "compose", stop)
        with pytest.raises(KeyboardInterrupt):
            fm.build(with_routers, tmp_path / "out")
    file = tmp_path / "gates.safetensors"
    save_file({name: gate * 2 for name, gate in load_file(file).items()}, file)
    with pytest.raises(ArtifactError, match="begun from another recipe"):
        fm.build(with_routers, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda gates: gates.clear(), "lacks model.layers.0.block_sparse_moe.gate.weight"),
        (
            lambda gates: gates.update(x=next(iter(gates.values())).clone()),
            "holds x, which is not a router of this MoE",
        ),
        (lambda gates: gates.update({key: gate[:2] for key, gate in gates.items()}), "F32 [2, 32], expected floats [3"),
        (lambda gates: gates.update({key: gate.int() for key, gate in gates.items()}), "I32 [3, 32], expected floats"),
        (None, "is not a file"),
    ],
)
def test_routers_of_another_moe_are_told_by_the_plan(
    change: Callable[[dict[str, Any]], Any] | None, fact: str, with_routers: Path, tmp_path: Path
) -> None:
    assert "gates.safetensors, 2 gates" in cli("plan", with_routers).stdout
    file = tmp_path / "gates.safetensors"
    gates = {name: gate.clone() for name, gate in load_file(file).items()}
    file.unlink()
    if change:
        change(gates)
        save_file(gates, file)
    for command in (("plan", with_routers), ("build", with_routers, tmp_path / "out")):
        refused(*command, inside=tmp_path, facts=(str(file), fact))


@FORMS
def test_verify_notices_one_flipped_bit_in_a_router(form: tuple[str, ...], recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("build", recipe, out, *form).code == 0
    raw = bytearray((out / ROUTERS).read_bytes())
    raw[-3] ^= 1
    (out / ROUTERS).write_bytes(raw)
    refused("verify", out, inside=tmp_path, facts=(ROUTERS, "was edited"))


def test_verify_notices_weights_that_transformers_would_take_for_ours(
    recipe: Path, parents: Parents, tmp_path: Path
) -> None:
    out = fm.build(recipe, tmp_path / "out").folder
    (out / "model.safetensors").symlink_to(parents["llama"][0] / "model.safetensors")
    refused("verify", out, inside=tmp_path, facts=(str(out / "model.safetensors"), "instead of"), hint="move it away")


# closed standard streams


def test_chat_without_any_stdin_ends_like_an_empty_one(recipe: Path) -> None:
    done = forks.run(forks.COMMAND, "chat", recipe, no_stdin=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("option", ["", "--json"])
def test_an_output_that_is_full_is_one_sentence(recipe: Path, option: str) -> None:
    command = f"{sys.executable} -m frankenmoe.cli plan {recipe} {option} > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: the disk or the quota is full" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def umlauts(recipe: Path) -> Path:
    """The recipe with non-ASCII letters."""
    recipe.write_text(recipe.read_text().replace("name: e", "name: ë") + "name: dëmo\n", encoding="utf-8")
    return recipe


def test_a_terminal_without_these_letters(umlauts: Path) -> None:
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "frankenmoe.cli", "plan", str(umlauts)]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"\\xeb" in done.stdout


def test_chat_in_a_terminal_without_these_letters(umlauts: Path) -> None:
    code = f"import sys\nsys.stdout.reconfigure(encoding='ascii', errors='surrogateescape')\n{forks.COMMAND}"
    done = forks.run(code, "chat", umlauts, "--prompt", "hi", "--max-new-tokens", 4, "--trace")
    assert done.returncode == 0, done.stderr
    assert "\\xeb" in done.stdout


def test_the_next_command_can_be_typed_as_it_is_printed(recipe: Path, tmp_path: Path) -> None:
    as_module = f"import sys\nsys.argv[0] = '__main__.py'\n{forks.COMMAND}"
    done = forks.run(as_module, "build", recipe, tmp_path / "my $HOME 'moe'", "--virtual")
    command = done.stdout.partition("next: ")[2].strip()
    words = subprocess.check_output(["bash", "-c", f"printf '%s\\0' {command}"], text=True).rstrip("\0").split("\0")
    program = ["frankenmoe"] if shutil.which("frankenmoe") else [sys.executable, "-m", "frankenmoe.cli"]
    assert words[: len(program)] == program
    again = cli(*words[len(program) :], "--prompt", "hi", "--max-new-tokens", 2)
    assert again.code == 0, (command, again.stderr)
