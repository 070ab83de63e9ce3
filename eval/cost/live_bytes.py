"""The most bytes alive at once while a run of programs goes by, told from its trace.

`kvx.prefill` is many programs that Python calls one after another, so no compiler reports a peak for it. Its trace
(`jax.make_jaxpr`) is the list of these calls: an array is alive from the call that makes it to the last one that reads
it, and within a call there is also the scratch that its compiler plans. The largest sum over the calls is the peak.

What is not in it: arrays that Python still holds though nothing reads them again, and the allocator's fragments. What
the caller gives (weights, tokens) is alive throughout and counted by who knows it.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from kvx.eval.cost.cache_bytes import array_bytes

PROGRAM = "jit"
"""The name of the primitive that calls a compiled program."""


def most_alive(
    trace: ClosedJaxpr, size: Callable[[Any], int] | None = None, scratch: Callable[[Any], int] | None = None
) -> int:
    """The peak, in bytes, of what the trace's calls make; inputs and constants are not counted.

    Args:
        size: bytes of an array by its abstract value; None: all of it, but nothing of arrays in host memory.
        scratch: bytes that a call (an equation of the trace) takes beside its arguments and results; None: nothing.
    """
    size = size or device_bytes
    calls = trace.jaxpr.eqns
    last = {var: at for at, call in enumerate(calls) for var in call.invars if not isinstance(var, Literal)}
    last |= {var: len(calls) for var in trace.jaxpr.outvars if not isinstance(var, Literal)}
    alive: dict[Any, int] = {}
    peak = 0
    for at, call in enumerate(calls):
        made = {var: size(var.aval) for var in call.outvars}
        donated = zip(call.invars, call.params.get("donated_invars", ()), strict=False)
        reused = sum(alive.get(var, 0) for var, given in donated if given and not isinstance(var, Literal))
        here = sum(alive.values()) + max(0, sum(made.values()) - reused)
        peak = max(peak, here + (scratch(call) if scratch else 0))
        alive |= made
        alive = {var: held for var, held in alive.items() if last.get(var, -1) > at}
    return peak


def device_bytes(aval: Any) -> int:
    """Bytes of an array in device memory, by its abstract value."""
    return 0 if getattr(aval, "memory_space", None) == jax.memory.Space.Host else array_bytes(aval)


class Scratch:
    """What the compiler of this machine, or of another, plans for the programs of a trace beside their arguments.

    Each program is compiled once, however often the trace calls it. Single operations outside of programs count as 0.

    Args:
        sharding: where the arguments lie, if not on the default device: a chip to compile for that is not there.
    """

    def __init__(self, sharding: jax.sharding.Sharding | None = None):
        self.sharding = sharding
        # The body is kept beside its answer: a key by identity must not outlive what it names.
        self.known: dict[int, tuple[Any, int]] = {}

    def __call__(self, call: Any) -> int:
        if call.primitive.name != PROGRAM:
            return 0
        body = call.params["jaxpr"]
        if id(body) not in self.known:
            self.known[id(body)] = body, self._compiled(body, call.params.get("donated_invars", ()))
        return self.known[id(body)][1]

    def _compiled(self, body: ClosedJaxpr, donated: tuple[bool, ...]) -> int:
        given = [jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=self.sharding) for aval in body.in_avals]
        which = tuple(at for at, gone in enumerate(donated) if gone)
        program = jax.jit(jaxpr_as_fun(body), donate_argnums=which).lower(*given).compile()
        sizes = program.memory_analysis()
        return 0 if sizes is None else sizes.temp_size_in_bytes
