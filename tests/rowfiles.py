"""A data folder of small rows in the hub's fields, for tests that need all six tasks and no download."""

import json
from pathlib import Path
from typing import Any


def write_rows(folder: Path) -> Path:
    """Every split that the six tasks read, with odd cases among them: numeric labels, tags, unsorted labels."""
    for name, splits in ROWS.items():
        (folder / name).mkdir(parents=True)
        for split, rows in splits.items():
            write_split(folder, name, split, rows)
    return folder


def write_split(folder: Path, name: str, split: str, rows: list[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def _arc(number: int) -> dict[str, Any]:
    labels = list("1234" if number % 5 == 4 else "ABCD")[: 3 + number % 2]
    texts = [f"it is {number + at}" for at in range(len(labels))]
    choices = {"text": texts, "label": labels}
    return {"id": str(number), "question": f"What is {number}?", "choices": choices, "answerKey": labels[number % 3]}


def _hellaswag(number: int) -> dict[str, Any]:
    endings = [f"ends {number} {word}." for word in ("well", "badly", "[substeps] at last", "never [title] Twice")]
    fields = {
        "activity_label": "Cooking",
        "ctx_a": f"[header] Step {number}  comes. [title] Heat it",
        "ctx_b": "the COOK",
    }
    return {**fields, "endings": endings, "label": str(number % 4)}


def _mmlu(number: int) -> dict[str, Any]:
    subject = ("plain_sums", "odd_words")[number % 2]
    return {"question": f" How many are {number}? ", "subject": subject, "choices": list("wxyz"), "answer": number % 4}


def _truthfulqa(number: int) -> dict[str, Any]:
    single = {"choices": [f"Yes {number}.", f"No {number}."], "labels": [1, 0]}
    more = {"choices": [f"Yes {number}.", f"No {number}.", f"Indeed {number}."], "labels": [1, 0, 1]}
    return {"question": f"Is {number} so?", "mc1_targets": single, "mc2_targets": more}


def _winogrande(number: int) -> dict[str, Any]:
    sentence = f"Box {number} went to Ann and not to Bob since _  asked for it."
    return {"sentence": sentence, "option1": "Ann", "option2": "Bob", "answer": str(1 + number % 2)}


def _gsm8k(number: int) -> dict[str, Any]:
    return {
        "question": f"Add {number} and 2.",
        "answer": f"It is {number}+2=<<{number}+2={number + 2}>>.\n#### {number + 2}",
    }


ROWS = {
    "arc_challenge": {"test": [_arc(at) for at in range(6)], "train": [_arc(at) for at in range(40, 70)]},
    "hellaswag": {"validation": [_hellaswag(at) for at in range(5)], "train": [_hellaswag(at) for at in range(20, 34)]},
    "mmlu": {"test": [_mmlu(at) for at in range(8)], "dev": [_mmlu(at) for at in range(30, 44)]},
    "truthfulqa": {"validation": [_truthfulqa(at) for at in range(5)]},
    "winogrande": {
        "validation": [_winogrande(at) for at in range(6)],
        "train": [_winogrande(at) for at in range(50, 60)],
    },
    "gsm8k": {"test": [_gsm8k(at) for at in range(4)], "train": [_gsm8k(at) for at in range(80, 90)]},
}
