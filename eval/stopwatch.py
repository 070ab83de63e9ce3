"""Where the time of a job goes: wall, processor and compilation seconds by phase."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import jax

# Lowering and compiling (or retrieving from the persistent cache). Tracing is left out: its events nest, and would be
# counted several times.
_EVENTS = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")


@dataclass
class Stopwatch:
    """Adds up phases by name.

    Attributes:
        phases: name -> seconds: "wall", "cpu" (all threads), "compile".
    """

    phases: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator["Stretch"]:
        """Time what happens inside; the stretch it yields is complete afterwards."""
        stretch = Stretch()
        before = _COMPILED[0]
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield stretch
        finally:
            stretch.wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            stretch.compiled = _COMPILED[0] - before
            total = self.phases.setdefault(name, {"wall": 0.0, "cpu": 0.0, "compile": 0.0})
            for kind, seconds in (("wall", stretch.wall), ("cpu", cpu), ("compile", stretch.compiled)):
                total[kind] += seconds


@dataclass
class Stretch:
    """One timed stretch.

    Attributes:
        wall: seconds.
        compiled: seconds of them that went into lowering and compiling.
    """

    wall: float = 0.0
    compiled: float = 0.0

    @property
    def warm(self) -> bool:
        """Whether nothing was compiled."""
        return self.compiled == 0.0


_COMPILED = [0.0]


def _count(event: str, duration_secs: float, **_: str | int) -> None:
    if event in _EVENTS:
        _COMPILED[0] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_count)
