"""Writes every document with its requests and answers, in lm-eval's JSONL format."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable, sanitize_list

from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.errors import ArtifactError


def write_samples(folder: Path, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Writes samples_TASK.jsonl for each task atomically. `arguments` are gen_args_0 .. with arg_0, arg_1."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for task, rows in samples.items():
            lines = "".join(
                json.dumps(_row(row), default=handle_non_serializable, ensure_ascii=False) + "\n" for row in rows
            )
            write_atomic(folder / f"samples_{task}.jsonl", lines.encode("utf-8", "surrogatepass"))
    except OSError as error:
        raise ArtifactError(
            f"samples cannot be written to {folder}: {error.strerror}", hint="choose another folder"
        ) from error


def _row(sample: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {
        f"gen_args_{at}": {f"arg_{place}": value for place, value in enumerate(pair)}
        for at, pair in enumerate(sample["arguments"])
    }
    plain = {name: sanitize_list(sample[name]) for name in ("resps", "filtered_resps")}
    return {**sample, "arguments": arguments, "target": str(sample["target"]), **plain}
