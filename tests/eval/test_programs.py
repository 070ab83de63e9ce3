"""Claims about compiled programs of long jobs: they are let go when there are too many, and not before."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kvx.eval.programs import make_room

MAPS = Path("/proc/self/maps")

pytestmark = pytest.mark.skipif(not MAPS.exists(), reason="needs Linux's list of mappings")


def mappings():
    return len(MAPS.read_bytes().splitlines())


def test_programs_are_kept_while_there_is_room_and_let_go_when_there_is_none():
    before = mappings()
    functions = [jax.jit(lambda x, factor=factor: jnp.cumsum(jnp.sin(x) * factor)) for factor in range(60)]
    results = [function(jnp.arange(3.0)) for function in functions]
    grown = mappings()
    assert grown > before + 60
    assert not make_room() and mappings() == pytest.approx(grown, abs=20)
    assert make_room(share=0.0)
    assert mappings() < grown - 60
    # What was computed stays, and what is asked again is compiled again.
    assert float(results[2][1]) == float(functions[2](jnp.arange(3.0))[1])
