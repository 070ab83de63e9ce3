"""Progress of a long job: a bar that names the current step, or lines where there is no terminal."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Steps:
    """A progress bar that names the current step; lines where there is no terminal, one for each stage of the job."""

    def __init__(self, total: int, console: Console | None):
        self.console = console or Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("start", total=total)
        self.begin, self.done, self.stage = time.perf_counter(), 0, ""

    def __enter__(self) -> "Steps":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, label: str) -> None:
        """A step begins, hence the one before is done."""
        self.bar.update(self.task, description=label, completed=self.done)
        self.done += 1
        stage = label.rpartition(":")[0] or label
        if stage != self.stage and not self.console.is_terminal:
            seconds = time.perf_counter() - self.begin
            self.console.print(f"{seconds:6.1f} s  {stage}", highlight=False, soft_wrap=True)
        self.stage = stage
