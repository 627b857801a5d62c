"""Progress bars on stderr with rate and remaining time. Silent if stderr is not a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from frankenmoe.moe.processes import is_main
from frankenmoe.progress import SILENT, Progress

SHORT = 10  # characters of a bar that leaves room for rate and note in 80 columns
PERIOD = 300.0  # seconds that a rate is measured over; a training step may take a minute


class _Rate(ProgressColumn):
    """The rate over the last minutes, such as `1,234 tokens/s`, or `8.3 s each` where it is below one."""

    def render(self, task: Task) -> Text:
        speed, unit = task.finished_speed or task.speed, task.fields["unit"]
        if speed is None:
            return Text(f"? {unit}/s")
        if 0 < speed < 1:
            return Text(f"{1 / speed:,.1f} s each")
        return Text(f"{speed:,.0f} {unit}/s" if speed >= 10 else f"{speed:.1f} {unit}/s")


class _Note(ProgressColumn):
    """What comes last is cut where a line is too long: this column may wrap, and its text may not."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


@contextmanager
def bars() -> Iterator[Progress]:
    """A Progress that draws one bar per activity; nothing if stderr is not a terminal, or in a launcher's others."""
    console = Console(stderr=True)
    if not console.is_terminal or not is_main():
        yield SILENT
        return
    text = TextColumn("{task.description}")
    bytes_bar = Bars(
        text,
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        speed_estimate_period=PERIOD,
    )
    count_bar = Bars(
        text,
        BarColumn(SHORT),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        _Note(),
        console=console,
        transient=True,
        speed_estimate_period=PERIOD,
    )
    current: list[tuple[Bars, TaskID]] = []

    def end() -> None:
        if current:
            current.pop()[0].stop()

    def start(stage: str, total: int, unit: str) -> None:
        end()
        bar = bytes_bar if unit == "B" else count_bar
        bar.start()
        current.append((bar, bar.add_task(stage, total=total, unit=unit, note="")))

    def advance(amount: int) -> None:
        if current:
            current[-1][0].advance(current[-1][1], amount)

    def note(text: str) -> None:
        if current:
            current[-1][0].update(current[-1][1], note=text)

    try:
        yield Progress(start=start, advance=advance, note=note)
    finally:
        end()
