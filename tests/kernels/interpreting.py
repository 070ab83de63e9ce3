"""TPU kernels in Pallas' interpreter, which simulates memory spaces and copies and watches for races between them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# There is no public way yet to ask whether a race was found.
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu


@contextmanager
def interpreted_without_races() -> Iterator[None]:
    """Kernels called inside are interpreted; fails if any of them raced. Results must be awaited inside."""
    watch, kernels = interpret_pallas_call.RaceDetectionState, []

    def watched(**options: Any) -> Any:
        """Every kernel has a watch of its own, and the interpreter keeps the last one's."""
        kernels.append(watch(**options))
        return kernels[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpret_pallas_call, "RaceDetectionState", watched)
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
            yield
    assert kernels, "no kernel was interpreted"
    raced = [place for place, kernel in enumerate(kernels) if kernel.races_found]
    assert not raced, f"of {len(kernels)} kernels those raced: {raced}"
