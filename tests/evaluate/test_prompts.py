"""The six tasks ask what the leaderboard asked, word for word, and score as it scored."""

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")


from frankenmoe.evaluate.prompts import BENCHMARKS, INVALID, clean, draw, gsm8k_number
from frankenmoe.evaluate.rows import read_rows
from frankenmoe.evaluate.tasks import load_tasks, task_names
from oracles import leaderboard_reference as reference
from rowfiles import write_rows

SIX = [name for name, benchmark in BENCHMARKS.items() if benchmark.counted]
ROWS = Path(__file__).parents[3] / "shared" / "data" / "leaderboard"


@pytest.fixture(params=["made here", "the real rows"])
def data_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "made here":
        return write_rows(tmp_path)
    if not ROWS.is_dir():
        pytest.skip(f"{ROWS} is not there: benchmark rows are not part of the project")
    return ROWS


def asked(name: str, data_dir: Path, limit: int | None = None) -> dict[int | tuple[str, int], list[tuple[str, object]]]:
    found: dict = {}
    tasks, _ = load_tasks(BENCHMARKS[name], data_dir=data_dir)
    for task_name, task in tasks.items():
        task.build_all_requests(limit=limit)
        for instance in task.instances:
            context, what = instance.args
            key = (task_name, instance.doc_id) if len(tasks) > 1 else instance.doc_id
            found.setdefault(key, []).append((context, what["until"] if isinstance(what, dict) else what))
    return found


@pytest.mark.parametrize("name", SIX)
def test_requests_are_the_originals(name: str, data_dir: Path) -> None:
    benchmark = BENCHMARKS[name]
    rows = read_rows(benchmark.data, benchmark.split, data_dir=data_dir)
    pool = read_rows(benchmark.data, benchmark.shots_split, data_dir=data_dir) if benchmark.shots_split else []
    if name != "mmlu":
        expected = dict(reference.requests(name, rows, pool))
        found = asked(name, data_dir)
        assert found == expected
        assert list(found) == list(expected)  # in the order of the original's shuffle
        return
    found = asked(name, data_dir)
    for subject in {row["subject"] for row in rows}:
        own = [row for row in rows if row["subject"] == subject]
        expected = reference.requests(name, own, pool)
        assert [(index, found[f"mmlu_{subject}", index]) for index, _ in expected] == expected


@pytest.mark.parametrize("name", ["arc_challenge", "truthfulqa"])
def test_requests_are_those_that_the_originals_own_code_made(name: str) -> None:
    file = ROWS / "expected_requests.json"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    expected = json.loads(file.read_text())[name]
    found = asked(name, ROWS)
    assert [[list(pair) for pair in found[index]] for index in range(len(expected))] == expected


@pytest.mark.parametrize("name", SIX)
def test_a_limit_takes_the_first_of_the_shuffled_order(name: str, tmp_path: Path) -> None:
    folder = write_rows(tmp_path)
    whole, part = asked(name, folder), asked(name, folder, limit=2)
    subjects = 2 if name == "mmlu" else 1
    assert len(part) == 2 * subjects
    assert all(whole[key] == pairs for key, pairs in part.items())
    if subjects == 1:
        assert list(part) == list(whole)[:2]


def test_the_draw_depends_on_every_size() -> None:
    order, drawn = draw(10, 30, 3)
    assert sorted(order) == list(range(10))
    assert draw(10, 60, 3)[1] != drawn
    assert draw(9, 30, 3)[0] != order[:9]
    assert len({tuple(indices) for indices in drawn.values()}) > 5


def test_wikihows_marks_are_taken_out_in_the_originals_order() -> None:
    assert clean("  Heat it [title] Twice") == "Heat it. Twice"
    assert clean("[substeps] Stir.") == " Stir."  # stripped before the tag went, so its space stays
    assert clean("a  b") == "a b"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so\n#### 1,234", "1234"),
        ("#### -5.", "-5."),
        ("#### $12", INVALID),
        ("12", INVALID),
        ("#### 3 and #### 4", "3"),
    ],
)
def test_the_number_of_a_solution(text: str, number: str) -> None:
    assert gsm8k_number(text) == number


def score(name: str, row: dict, answers: list) -> dict[str, float]:
    return dict(BENCHMARKS[name].score(row, answers))


def test_acc_norm_divides_by_characters_without_the_leading_space() -> None:
    row = {"choices": {"text": ["ab", "abcdefgh"], "label": ["A", "B"]}, "answerKey": "B"}
    assert score("arc_challenge", row, [-4.0, -10.0]) == {"acc": 0.0, "acc_norm": 1.0}  # -2 and -1.25
    assert score("arc_challenge", row, [-2.0, -8.0]) == {"acc": 0.0, "acc_norm": 0.0}  # a tie goes to the first


def test_mc2_goes_by_labels_and_does_not_underflow() -> None:
    row = {
        "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
        "mc2_targets": {"choices": ["a", "b", "c"], "labels": [1, 0, 1]},
    }
    lls = [-1.0, -2.0, *(math.log(share) - 5000 for share in (0.2, 0.5, 0.3))]
    assert score("truthfulqa", row, lls) == {"mc1": 1.0, "mc2": pytest.approx(0.5)}


def test_gsm8k_compares_numbers_as_text() -> None:
    row = {"answer": "so #### 1,000"}
    assert score("gsm8k", row, [" it is #### 1000"]) == {"acc": 1.0}
    assert score("gsm8k", row, [" it is #### 1000."]) == {"acc": 0.0}


def test_names_of_tasks() -> None:
    assert task_names("winogrande, arc_challenge") == ("arc_challenge", "winogrande")
    assert set(SIX) < set(task_names("leaderboard-v1"))
    assert task_names("ppl") == ("ppl",)
