"""A virtual artifact derived from another MoE: its partial folder, recipe, small files and record."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from frankenmoe.artifact.folder import growing, partial_folder
from frankenmoe.build.record import record_of
from frankenmoe.build.virtual import copy_virtual_files
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.moe.processes import is_main
from frankenmoe.planning import plan
from frankenmoe.progress import Progress
from frankenmoe.recipe import Recipe
from frankenmoe.subject import Subject


@contextmanager
def growing_once(out: Path, *, digest: str) -> Iterator[Path]:
    """Like `growing`; of several processes, only the first one locks the partial folder."""
    if is_main():
        with growing(out, digest=digest) as partial:
            yield partial
    else:
        yield partial_folder(out)


def virtual_record(
    subject: Subject, table: Mapping[str, Any], partial: Path, *, out: Path, progress: Progress
) -> dict[str, Any]:
    """Writes the recipe `table` and the small files into `partial`, which will become `out`; returns the record.

    Sources that the subject's artifact has hashed are not hashed again. `stages` and `files` are the caller's.
    """
    text = yaml.safe_dump(dict(table), sort_keys=False, allow_unicode=True)
    write_atomic(partial / "recipe.yml", text.encode())
    copy_virtual_files(subject.plan, partial)
    # planned in the partial folder, which is next to `out`, so relative paths are valid in both
    derived = Recipe.load(partial / "recipe.yml")
    made = plan(
        derived,
        dtype=subject.plan.dtype,
        weights=True,
        trust_remote_code=subject.trust_remote_code,
        inside=partial,
    )
    known = subject.artifact.record["sources"] if subject.artifact else []
    record = record_of(
        made,
        out,
        folder=partial,
        virtual=True,
        progress=progress,
        known={each["fingerprint"]: each["sha256"] for each in known},
    )
    inside, final = f"{partial}{os.sep}", f"{out}{os.sep}"
    for each in (*record["sources"], *record["configs"]):
        each["file"] = final + each["file"].removeprefix(inside) if each["file"].startswith(inside) else each["file"]
    return record | {"recipe_folder": str(out), "recipe_folder_from_here": "."}
