"""Being told to stop: SIGTERM, or a time limit; on several machines all processes stop after the same step."""

import signal
import threading
import time
from types import FrameType
from typing import Any

import jax


class Interruption:
    """A context in which SIGTERM does not end the process, but is remembered.

    Args:
        seconds: after which a run of one process stops in any case; None: never.
    """

    def __init__(self, seconds: float | None = None):
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._told = False
        self._before: Any = None
        # Several processes have JAX's own notice, which spreads the signal that one of them gets.
        self._together = jax.process_count() > 1
        self._listens = not self._together and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Interruption":
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)

    def after(self, step: int) -> bool:
        """Whether to stop after this step; to be asked after every step, by all processes."""
        late = self._deadline is not None and time.monotonic() > self._deadline
        if not self._together:
            return self._told or late
        from jax.experimental import multihost_utils

        return bool(multihost_utils.reached_preemption_sync_point(step))

    def _notice(self, _: int, __: FrameType | None) -> None:
        self._told = True
