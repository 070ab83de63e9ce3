"""TPU kernels in Pallas' interpreter, which simulates memory spaces and copies and watches for races between them."""

from collections.abc import Iterator
from contextlib import contextmanager

# There is no public way yet to ask whether a race was found.
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu


@contextmanager
def interpreted_without_races() -> Iterator[None]:
    """Kernels called inside are interpreted; fails if the last of them raced. Results must be awaited inside."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    assert interpret_pallas_call.races is not None, "no kernel was interpreted"
    assert not interpret_pallas_call.races.races_found
