"""A search as it is watched: a bar, and the frontier so far; lines where there is no terminal."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvx.eval.search.loop import Found
from kvx.eval.search.ranking import Point, frontier


class Watch:
    """What `search` tells, shown."""

    def __init__(self, trials: int, console: Console | None = None):
        self.console = console or Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.bar = Progress(*columns, console=self.console)
        self.task = self.bar.add_task("start", total=trials)
        self.live = Live(self.bar, console=self.console, transient=True, refresh_per_second=4)
        self.begin, self.shown = time.perf_counter(), ""

    def __enter__(self) -> "Watch":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def __call__(self, found: Found, label: str) -> None:
        """A step begins."""
        self.bar.update(self.task, description=label, completed=len(found.run))
        edge = so_far(found)
        if self.console.is_terminal:
            self.live.update(Group(self.bar, _table(found, edge)))
            return
        best = f"; best so far {edge[-1].quality:.3f}, {edge[-1].name}" if edge else ""
        line = f"{len(found.run)} policies run, {label}{best}"
        if line != self.shown:
            seconds = time.perf_counter() - self.begin
            self.console.print(f"{seconds:7.1f} s  {line}", highlight=False, markup=False, soft_wrap=True)
        self.shown = line


def so_far(found: Found) -> list[Point]:
    """The frontier of all that was run, each by the samples that it has seen."""
    return frontier(
        [
            Point(text, sum(scores) / len(scores), found.nbytes(text))
            for text in found.run
            if (scores := found.scores[text])
        ]
    )


def _table(found: Found, edge: list[Point]) -> Table:
    shown = Table("policy", box=None, pad_edge=False, header_style="bold")
    for column in ("bytes a token", "quality", "samples"):
        shown.add_column(column, justify="right")
    for point in reversed(edge):
        shown.add_row(point.name, f"{point.nbytes:.0f}", f"{point.quality:.3f}", str(len(found.scores[point.name])))
    return shown
