"""Reads benchmark rows from a folder of JSONL files or from the hub, and checks every field. Does not import torch."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from frankenmoe.checkpoint.hub import stream_rows
from frankenmoe.checkpoint.jsonfile import small_bytes
from frankenmoe.counted import counted
from frankenmoe.errors import SourceError

TaskRow = Mapping[str, Any]
Check = Callable[[TaskRow], str | None]
"""Returns what is wrong with a row, or None."""

LETTERS = "ABCDE"
LAYOUT = "a data folder holds one folder per task, such as arc_challenge/test.jsonl, with the hub's fields in each line"


@dataclass(frozen=True)
class DataSet:
    """Where the rows of one benchmark are on the hub: in configuration `config` of `hub`."""

    hub: str
    config: str
    check: Check


def _fields(**wanted: type | tuple[type, ...]) -> Check:
    def check(row: TaskRow) -> str | None:
        for name, kind in wanted.items():
            if name not in row:
                return f"has no field `{name}`, found {', '.join(map(str, row)) or 'no fields'}"
            if not isinstance(row[name], kind) or isinstance(row[name], bool):
                return f"has `{name}`: {str(row[name])[:40]!r}, which is of the wrong type"
        return None

    return check


def _broken_text(row: TaskRow) -> str | None:
    """Finds lone surrogates, which JSON can write and tokenizers reject."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"contains half of a character (a lone surrogate), {error.object[error.start]!a}"
    return None


def _first_problem(*checks: Check) -> Check:
    return lambda row: next((problem for check in checks if (problem := check(row)) is not None), None)


def _texts(value: Any, least: int) -> bool:
    return isinstance(value, list) and len(value) >= least and all(isinstance(item, str) for item in value)


def _arc(row: TaskRow) -> str | None:
    choices = row["choices"]
    if not (_texts(choices.get("text"), 2) and _texts(choices.get("label"), 2)):
        return "has `choices` without lists of texts called `text` and `label`"
    if len(choices["text"]) != len(choices["label"]):
        return f"has {counted(len(choices['text']), 'choice')}, but {counted(len(choices['label']), 'label')}"
    if arc_gold(row) is None:
        return f"has answerKey {row['answerKey']!r}, which is none of its labels {', '.join(choices['label'])}"
    return None


def arc_gold(row: TaskRow) -> int | None:
    """The index of the right choice, or None. Labels 1 to 5 mean A to E."""
    labels = [_letter(label) for label in row["choices"]["label"]]
    key = _letter(row["answerKey"])
    return labels.index(key) if key in labels else None


def _letter(label: str) -> str:
    return LETTERS[int(label) - 1] if label in {"1", "2", "3", "4", "5"} else label


def _hellaswag(row: TaskRow) -> str | None:
    if not _texts(row["endings"], 2):
        return "has `endings` that are not a list of texts"
    label = str(row["label"])
    if not label.isdecimal() or int(label) >= len(row["endings"]):
        return f"has label {label!r}, expected 0 to {len(row['endings']) - 1}"
    return None


def _mmlu(row: TaskRow) -> str | None:
    if not _texts(row["choices"], 4) or len(row["choices"]) != 4:
        return "has `choices` that are not four texts"
    return None if 0 <= row["answer"] <= 3 else f"has answer {row['answer']}, expected 0 to 3"


def _truthfulqa(row: TaskRow) -> str | None:
    for name in ("mc1_targets", "mc2_targets"):
        choices, labels = row[name].get("choices"), row[name].get("labels")
        if not _texts(choices, 1) or not isinstance(labels, list) or len(choices) != len(labels):
            return f"has `{name}` without `choices` and as many `labels`"
        if not all(label in (0, 1) for label in labels) or 1 not in labels:
            return f"has `{name}` whose labels are not 0 and 1, with at least one 1"
    return None


def _winogrande(row: TaskRow) -> str | None:
    if "_" not in row["sentence"]:
        return "has a `sentence` without the gap `_`"
    return None if row["answer"] in ("1", "2") else f"has answer {row['answer']!r}, expected '1' or '2'"


def _gsm8k(row: TaskRow) -> str | None:
    return None if re.search(r"#### -?[0-9.,]", row["answer"]) else "has an `answer` without `#### number`"


# by the name of the folder that holds them in a data folder
DATA_SETS: Mapping[str, DataSet] = {
    "arc_challenge": DataSet(
        "allenai/ai2_arc",
        "ARC-Challenge",
        _first_problem(_fields(question=str, choices=Mapping, answerKey=str), _arc),
    ),
    "hellaswag": DataSet(
        "Rowan/hellaswag",
        "default",
        _first_problem(_fields(activity_label=str, ctx_a=str, ctx_b=str, endings=list, label=(str, int)), _hellaswag),
    ),
    "mmlu": DataSet(
        "cais/mmlu",
        "all",
        _first_problem(_fields(question=str, subject=str, choices=list, answer=int), _mmlu),
    ),
    "truthfulqa": DataSet(
        "truthfulqa/truthful_qa",
        "multiple_choice",
        _first_problem(_fields(question=str, mc1_targets=Mapping, mc2_targets=Mapping), _truthfulqa),
    ),
    "winogrande": DataSet(
        "allenai/winogrande",
        "winogrande_xl",
        _first_problem(_fields(sentence=str, option1=str, option2=str, answer=str), _winogrande),
    ),
    "gsm8k": DataSet("openai/gsm8k", "main", _first_problem(_fields(question=str, answer=str), _gsm8k)),
}


def read_rows(name: str, split: str, *, data_dir: Path | None) -> list[dict[str, Any]]:
    """All rows of one split in order; the few-shot draws depend on the order.

    Raises SourceError with file and line for missing, broken or wrong rows.
    """
    found = DATA_SETS[name]
    if data_dir is None:
        origin = f"dataset {found.hub}, configuration {found.config}, split {split}"
        numbered: Iterable[tuple[str, Any]] = (
            (f"row {number} of {origin}", row) for number, row in enumerate(_from_hub(found, split), 1)
        )
    else:
        file = data_dir / name / f"{split}.jsonl"
        origin, numbered = str(file), _lines(file)
    rows = []
    for where, row in numbered:
        problem = found.check(row) if isinstance(row, Mapping) else f"is a JSON {type(row).__name__}, not an object"
        problem = problem or _broken_text(row)
        if problem is not None:
            raise SourceError(f"{where} {problem}", hint=f"mend that row; {LAYOUT}")
        rows.append(dict(row))
    if not rows:
        raise SourceError(f"{origin} holds no rows", hint=LAYOUT)
    return rows


def _from_hub(found: DataSet, split: str) -> Iterator[Any]:
    try:
        yield from stream_rows(found.hub, revision=None, config=found.config, split=split)
    except SourceError as error:
        raise SourceError(error.message, hint=f"check the network, or give rows with --data-dir: {LAYOUT}") from error


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = small_bytes(file).decode("utf-8-sig")
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror}", hint=LAYOUT) from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{file} is not UTF-8: {error.reason}", hint="fetch the file again") from error
    # not splitlines(): JSON strings may contain U+2028
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{file}:{number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(
                f"{file}:{number} is not JSON: {error}", hint="every line must be a JSON object of its own"
            ) from error


def digest(*groups: Iterable[TaskRow]) -> str:
    """SHA-256, in hex, of rows in order: the version of the data."""
    hashed = hashlib.sha256()
    for row in chain.from_iterable(groups):
        hashed.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
    return hashed.hexdigest()
