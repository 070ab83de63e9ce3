"""Where a run's numbers go: a progress bar, a JSONL file that a resumed run continues, and TensorBoard.

A line of the file is an object with "step" and numbers: of every step its loss and terms, of every evaluation
"held_out". Numbers are written so that reading them gives the same float32. How fast it was (`SPEED`) stands beside
them, and is never twice the same: the mean since the first step of this start, which compiles and has none. Only the
first process writes.
"""

import json
import math
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvx.destinations import replace_file
from kvx.errors import BadInput

FILE = "metrics.jsonl"

SPEED = ("tokens_per_second", "mfu")
"""Tokens per second, and the share of the devices' peak that their operations are, where that is known."""


class Metrics:
    """The numbers of one stage; a context that keeps its files open.

    Args:
        folder: for the file, and TensorBoard's beside it.
        total: steps of the stage.
        tokens: of a step, over all devices.
        flops: of a token; None: MFU is not known.
        peak: operations per second of all devices; None: so too.
        console: of the bar; None: standard error.
        tensorboard: write its files too.
    """

    def __init__(
        self,
        folder: Path,
        total: int,
        tokens: int,
        flops: float | None = None,
        peak: float | None = None,
        console: Console | None = None,
        tensorboard: bool = True,
    ):
        self.folder, self.total, self.tokens = folder, total, tokens
        self.share = None if flops is None or peak is None else flops / peak
        self.console = console or Console(stderr=True)
        self.writes = jax.process_index() == 0
        self.tensorboard = tensorboard and self.writes
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not (self.writes and self.console.is_terminal),
        )
        self._file: Any = None
        self._board: Any = None
        self._begun, self._first = time.perf_counter(), 0

    def open(self, step: int) -> "Metrics":
        """Begin after so many steps: what a run that was interrupted wrote beyond them goes, since it is done again."""
        self._first = step
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / FILE
            kept = [line for line in read(path) if line["step"] <= step] if step and path.exists() else []
            replace_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed in `close`)
        if self.tensorboard:
            self._board = _board(self.folder / "tensorboard", step)
        self.bar.start()
        self._task = self.bar.add_task("compiling", total=self.total, completed=step)
        self._begun = time.perf_counter()
        return self

    def close(self) -> None:
        """Let go of files and bar."""
        self.bar.stop()
        for each in (self._file, self._board):
            if each is not None:
                each.close()

    def step(self, step: int, numbers: Mapping[str, float | int]) -> None:
        """Numbers of a step that is done; steps count from 1."""
        seconds = time.perf_counter() - self._begun
        if step == self._first + 1:
            # The first step compiles; speed is measured from its end.
            self._begun, speed = time.perf_counter(), {}
        else:
            speed = self._speed((step - self._first - 1) * self.tokens / seconds)
        self._write(step, {**numbers, "tokens_seen": step * self.tokens, **speed})
        self.bar.update(self._task, completed=step, description=self._text(numbers, speed))
        if not self.bar.disable:
            return
        if self.writes and (step == self.total or _round(step)):
            self.console.print(f"step {step}/{self.total}  {self._text(numbers, speed)}", highlight=False)

    def evaluation(self, step: int, numbers: Mapping[str, float | int]) -> None:
        """Numbers of an evaluation after so many steps."""
        self._write(step, numbers)
        if self.writes:
            text = "  ".join(f"{name} {number:.4f}" for name, number in numbers.items())
            self.console.print(f"step {step}/{self.total}  {text}", highlight=False)

    def _speed(self, tokens: float) -> dict[str, float]:
        """By the names of `SPEED`, for so many tokens a second."""
        known = (tokens,) if self.share is None else (tokens, tokens * self.share)
        return dict(zip(SPEED, known, strict=False))

    def _text(self, numbers: Mapping[str, float | int], speed: Mapping[str, float]) -> str:
        forms = {"tokens_per_second": "{:,.0f} tokens/s", "mfu": "MFU {:.1%}"}
        return "  ".join([f"loss {numbers['loss']:.4f}", *(forms[name].format(speed[name]) for name in speed)])

    def _write(self, step: int, numbers: Mapping[str, float | int]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        if self._board is not None:
            for name, number in numbers.items():
                self._board.add_scalar(name, number, step)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut by a kill is left out."""
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def check_tensorboard() -> None:
    """Refuse to begin where TensorBoard's files cannot be written.

    Raises:
        BadInput: `tensorboardX` is missing.
    """
    if find_spec("tensorboardX") is None:
        raise BadInput("tensorboardX is missing, which writes TensorBoard's files; allowed: pip install 'kvx[train]'")


def _board(folder: Path, step: int) -> Any:
    check_tensorboard()
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)


def _round(step: int) -> bool:
    """1, 2, 5, 10, 20, 50, ...: enough lines to see that it goes on, where there is no terminal."""
    return step // 10 ** int(math.log10(step)) in (1, 2, 5) and step % 10 ** int(math.log10(step)) == 0
