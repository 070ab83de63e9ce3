"""Being told to stop: SIGTERM, or a time limit; on several machines all processes stop after the same step."""

import signal
import threading
import time
from types import FrameType
from typing import Any

import jax

from kvx.errors import BadInput


class Interruption:
    """A context in which SIGTERM does not end the process, but is remembered; it may be entered within itself.

    Args:
        seconds: from now on, after which a run stops in any case; None: never.

    Raises:
        BadInput: a limit for several processes, whose clocks are not one.
    """

    def __init__(self, seconds: float | None = None):
        # Several processes have JAX's own notice, which spreads the signal that one of them gets.
        self._together = jax.process_count() > 1
        if self._together and seconds is not None:
            raise BadInput(f"seconds={seconds} for {jax.process_count()} processes; allowed: one process, or SIGTERM")
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._told = False
        self._before: Any = None
        self._depth = 0

    def __enter__(self) -> "Interruption":
        self._depth += 1
        if self._depth == 1 and not self._together and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    @property
    def told(self) -> bool:
        """Whether a signal came, within this context, to the one process that runs."""
        return self._told

    @property
    def over(self) -> bool:
        """Whether a run of one process is to stop."""
        return self._told or (self._deadline is not None and time.monotonic() > self._deadline)

    def after(self, step: int) -> bool:
        """Whether to stop after this step; to be asked after every step, by all processes."""
        if not self._together:
            return self.over
        from jax.experimental import multihost_utils

        return bool(multihost_utils.reached_preemption_sync_point(step))

    def _notice(self, _: int, __: FrameType | None) -> None:
        self._told = True
