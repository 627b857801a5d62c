"""What the rows of benchmarks/real.py are made with: values with samples, and reasons where there is no value."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from common import Row, Run, log, measure
from real_bed import Bed, Losses

from frankenmoe.errors import FrankenMoEError


class NotMeasuredError(Exception):
    """Something that a row needs is not here."""


# an absent feature shows as one of these
_REASONS = (
    *(FrankenMoEError, NotMeasuredError, RuntimeError),
    *(ImportError, AttributeError, TypeError, ValueError),
)


def make_row(
    what: str,
    value: float | None,
    unit: str,
    *,
    limit: float | None = None,
    least: float | None = None,
    by: Mapping[str, float] | None = None,
    note: str = "",
) -> Row:
    samples = {name: [number] for name, number in (by or {}).items()}
    return Row(what, value, unit, limit, samples, at_least=least, note=note)


def kept_row(bed: Bed, what: str, losses: Losses, *, least: float | None = None) -> Row:
    """The share of the parents' advantage that is kept: mean over domains, with every domain's own."""
    shares = bed.kept(losses)
    row = make_row(what, shares.pop("mean"), "%", least=least, by=shares)
    log(
        f"    {bed.parents.name}: {what}: {row.value:.1f} %  "
        + ", ".join(f"{name} {share:.0f}" for name, share in shares.items())
    )
    return row


def best_row(what: str, rows: list[Row], least: float) -> Row:
    if not rows:
        return make_row(what, None, "%", least=least, note="none was measured")
    row = max(rows, key=lambda each: each.value or 0.0)
    return Row(what, row.value, "%", None, row.samples, at_least=least, note=row.what)


@contextmanager
def attempted(what: str) -> Iterator[list[Row]]:
    """Rows to be filled; after an error, a row `what` without a value that tells the reason."""
    rows: list[Row] = []
    begun = time.perf_counter()
    try:
        yield rows
    except _REASONS as error:
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[-1 if isinstance(error, RuntimeError) else 0][:300]}"
        log(f"    {what}: not measured ({reason})")
        rows.append(make_row(what, None, "%", note=f"not measured: {reason}"))
    log(f"    {what}: {time.perf_counter() - begun:.0f} s")


def command(words: Sequence[str]) -> Run:
    """A command of frankenmoe's; NotMeasuredError with its message where it refuses or does not exist."""
    try:
        return measure(words)
    except RuntimeError as error:
        said = [line for line in str(error).splitlines() if line.strip()]
        raise NotMeasuredError(" ".join(said[-2:])) from error
