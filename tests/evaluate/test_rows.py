"""Rows that are missing or wrong are refused by file and line."""

import re
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from frankenmoe.errors import SourceError
from frankenmoe.evaluate.prompts import BENCHMARKS
from frankenmoe.evaluate.rows import arc_gold, read_rows
from frankenmoe.evaluate.run import evaluate
from frankenmoe.evaluate.tasks import load_tasks, task_names
from rowfiles import ROWS, write_rows, write_split


@pytest.mark.parametrize(
    ("name", "split", "change", "said"),
    [
        ("arc_challenge", "test", {"question": None}, "question"),
        ("arc_challenge", "test", {"answerKey": "Z"}, "answerKey 'Z'"),
        ("arc_challenge", "test", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "label"),
        ("hellaswag", "validation", {"label": "9"}, "label '9'"),
        ("mmlu", "test", {"choices": ["a"]}, "four"),
        ("mmlu", "test", {"answer": 4}, "answer 4"),
        ("truthfulqa", "validation", {"mc2_targets": {"choices": ["a"], "labels": [0]}}, "mc2_targets"),
        ("truthfulqa", "validation", {"mc2_targets": {"choices": ["a"], "labels": [[1]]}}, "mc2_targets"),
        ("winogrande", "validation", {"sentence": "no gap"}, "gap"),
        ("gsm8k", "test", {"answer": "forty-two"}, "####"),
    ],
)
def test_a_wrong_row_is_named(name: str, split: str, change: dict, said: str, tmp_path: Path) -> None:
    folder = write_rows(tmp_path)
    rows = list(ROWS[name][split])
    write_split(folder, name, split, [rows[0], {**rows[1], **change}, *rows[2:]])
    with pytest.raises(SourceError, match=rf"{split}\.jsonl:2 ") as error:
        load_tasks(BENCHMARKS[name], data_dir=folder)
    assert said in error.value.message


def test_a_missing_field_a_missing_file_and_broken_json_are_named(tmp_path: Path) -> None:
    folder = write_rows(tmp_path)
    write_split(folder, "gsm8k", "test", [{"question": "1 + 1?"}])
    with pytest.raises(SourceError, match=r"test\.jsonl:1 has no field `answer`"):
        read_rows("gsm8k", "test", data_dir=folder)
    (folder / "gsm8k" / "test.jsonl").write_text('{"question": \n')
    with pytest.raises(SourceError, match=r"test\.jsonl:1 is not JSON"):
        read_rows("gsm8k", "test", data_dir=folder)
    (folder / "gsm8k" / "test.jsonl").write_text("")
    with pytest.raises(SourceError, match="no rows"):
        read_rows("gsm8k", "test", data_dir=folder)
    (folder / "gsm8k" / "test.jsonl").unlink()
    with pytest.raises(SourceError, match=r"test\.jsonl cannot be read"):
        read_rows("gsm8k", "test", data_dir=folder)


def test_half_of_a_character_is_no_text(tmp_path: Path) -> None:
    folder = write_rows(tmp_path)
    (folder / "gsm8k" / "test.jsonl").write_text(r'{"question": "half of \ud83d", "answer": "#### 1"}')
    with pytest.raises(SourceError, match=r"test\.jsonl:1 contains half of a character \(a lone surrogate\), '.ud83d'"):
        read_rows("gsm8k", "test", data_dir=folder)


def test_too_few_examples_for_a_prompt_are_refused(tmp_path: Path) -> None:
    folder = write_rows(tmp_path)
    write_split(folder, "arc_challenge", "train", ROWS["arc_challenge"]["train"][:24])
    with pytest.raises(SourceError, match="needs 25 examples from its split train, found 24"):
        load_tasks(BENCHMARKS["arc_challenge"], data_dir=folder)
    write_split(folder, "mmlu", "dev", [row for row in ROWS["mmlu"]["dev"] if row["subject"] == "odd_words"])
    with pytest.raises(SourceError, match="of subject plain_sums, found 0"):
        load_tasks(BENCHMARKS["mmlu"], data_dir=folder)


def test_unicode_line_ends_within_a_row_do_not_part_it(tmp_path: Path) -> None:
    folder = write_rows(tmp_path)
    row = {"question": "one\u2028two\x85three", "answer": "#### 1"}
    write_split(folder, "gsm8k", "test", [row])
    assert read_rows("gsm8k", "test", data_dir=folder) == [row]


@pytest.mark.parametrize(
    ("labels", "key", "gold"), [("ABCD", "C", 2), ("1234", "3", 2), ("1234", "C", 2), ("ABC", "D", None)]
)
def test_arc_labels_are_letters_or_numbers(labels: str, key: str, gold: int | None) -> None:
    assert arc_gold({"choices": {"label": list(labels)}, "answerKey": key}) == gold


def test_an_unknown_task_gets_the_nearest_name() -> None:
    with pytest.raises(SourceError, match="hellaswagg") as error:
        task_names("arc_challenge,hellaswagg")
    assert error.value.hint == "did you mean 'hellaswag'?"


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SourceError, match=re.escape(str(tmp_path / "rows" / "gsm8k"))):
        evaluate([], tasks=("gsm8k",), data_dir="~/rows")
