"""The demo's parents: ordinary checkpoints, made once, whole or not at all."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from frankenmoe.demo.parents import BASE, PARENTS, Settings, make_parents
from frankenmoe.demo.text import DOMAINS, held_out
from frankenmoe.errors import ArtifactError
from frankenmoe.progress import Progress

TINY = Settings(
    vocabulary=300,
    hidden=32,
    ffn=32,
    layers=2,
    heads=2,
    characters=4_000,
    rows=4,
    row_tokens=32,
    base_steps=3,
    expert_steps=2,
)


class Killed(BaseException):
    """Stands for a signal: nothing in the code under test may catch it."""


def make(folder: Path, *, seed: int = 0, settings: Settings = TINY) -> list[str]:
    """The parents that were trained, in order."""
    trained: list[str] = []
    progress = Progress(start=lambda stage, total, unit: trained.append(stage.removeprefix("training ")))
    make_parents(folder, seed=seed, settings=settings, progress=progress)
    return trained


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (data, _) in snapshot(folder).items()}


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_parents(tmp_path_factory.mktemp("parents") / "deep" / "down", settings=TINY)


@pytest.fixture
def made(tmp_path: Path, parents: dict[str, Path]) -> Path:
    """A copy of the folder with the parents, to change."""
    return shutil.copytree(parents[BASE].parent, tmp_path / "made")


def test_every_parent_is_an_ordinary_checkpoint(parents: dict[str, Path]) -> None:
    assert tuple(parents) == PARENTS == (BASE, *DOMAINS)
    for name, path in parents.items():
        assert path.name == name
        assert (path / "README.md").read_text().startswith("---\nlicense: apache-2.0\n---\n")
        model = AutoModelForCausalLM.from_pretrained(path)
        assert model.dtype == torch.bfloat16
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(path)) == TINY.vocabulary


def test_tokenizer_begins_with_bos_and_loses_nothing(parents: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(parents["maths"])
    text = "Ça coûte 12 € — 日本\t\n\n" + held_out("python")
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id != tokenizer.eos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_experts_differ_from_their_base_in_every_ffn_and_nowhere_else(parents: dict[str, Path]) -> None:
    base = load_file(parents[BASE] / "model.safetensors")
    for domain in DOMAINS:
        expert = load_file(parents[domain] / "model.safetensors")
        assert expert.keys() == base.keys()
        changed = {name for name in base if not torch.equal(base[name], expert[name])}
        assert changed == {name for name in base if ".mlp." in name}


def test_experts_differ_from_each_other(parents: dict[str, Path]) -> None:
    weights = {(parents[domain] / "model.safetensors").read_bytes() for domain in DOMAINS}
    assert len(weights) == len(DOMAINS)


def test_training_lowers_the_loss_and_reports_every_step(tmp_path: Path) -> None:
    heard: list[object] = []
    longer = Settings(**{**vars(TINY), "base_steps": 40})
    progress = Progress(start=lambda *stage: heard.append(stage), advance=heard.append)
    trained = make_parents(tmp_path, settings=longer, progress=progress)
    assert heard[:41] == [(f"training {BASE}", 40, "steps"), *[1] * 40]
    assert heard[41:] == [step for domain in DOMAINS for step in ((f"training {domain}", 2, "steps"), 1, 1)]
    model = AutoModelForCausalLM.from_pretrained(trained[BASE], dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(trained[BASE])(held_out("verse")[:500], return_tensors="pt").input_ids
    chance = torch.tensor(float(longer.vocabulary)).log()
    assert model(input_ids=ids, labels=ids).loss < chance - 0.5


def test_a_second_run_trains_nothing_and_touches_nothing(made: Path) -> None:
    before = snapshot(made)
    assert make(made) == []
    assert snapshot(made) == before


def test_another_seed_or_setting_makes_all_parents_again(made: Path, parents: dict[str, Path]) -> None:
    assert make(made, seed=1, settings=Settings(**{**vars(TINY), "expert_steps": 1})) == list(PARENTS)
    assert make(made, settings=Settings(**{**vars(TINY), "expert_steps": 1})) == list(PARENTS)
    assert make(made) == list(PARENTS)
    assert contents(made) == contents(parents[BASE].parent)


def test_an_expert_whose_base_has_changed_is_made_again(made: Path) -> None:
    weights = made / BASE / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert make(made) == list(DOMAINS)


@pytest.mark.parametrize("victim", [BASE, "python"])
def test_a_killed_run_keeps_the_finished_parents_and_goes_on_to_the_same_bytes(
    tmp_path: Path, parents: dict[str, Path], victim: str
) -> None:
    left: dict[str, int] = {}  # the parent in training -> its remaining steps

    def start(stage: str, total: int, unit: str) -> None:
        left.clear()
        left[stage.removeprefix("training ")] = total

    def advance(amount: int) -> None:
        [parent] = left
        left[parent] -= amount
        if left == {victim: 0}:
            raise Killed

    with pytest.raises(Killed):
        make_parents(tmp_path, settings=TINY, progress=Progress(start=start, advance=advance))
    finished = PARENTS[: PARENTS.index(victim)]
    assert {path.name for path in tmp_path.iterdir()} == set(finished)
    assert make(tmp_path) == [parent for parent in PARENTS if parent not in finished]
    assert contents(tmp_path) == contents(parents[BASE].parent)


def test_a_kill_while_writing_leaves_nothing_that_looks_finished(
    tmp_path: Path, parents: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(path: Path, target: Path) -> Path:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kill)
        with pytest.raises(Killed):
            make(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"base.partial"}
    assert make(tmp_path) == list(PARENTS)
    assert contents(tmp_path) == contents(parents[BASE].parent)


def test_training_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    make(tmp_path)
    assert torch.equal(torch.rand(2), expected)


def test_a_folder_that_is_not_ours_is_refused_untouched(tmp_path: Path) -> None:
    thesis = tmp_path / "verse" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(ArtifactError, match=r"verse .*found neither") as caught:
        make(tmp_path)
    assert caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"verse"}
    assert thesis.read_text() == "years of work"
