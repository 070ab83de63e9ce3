"""Layer by layer: decoding led by the host, for short answers, where compiling a step costs more than running it.

A decode step is one program of all layers, unrolled: the fastest step, but XLA compiles every layer of it, again for
each policy and shape of cache. Layer by layer, equal layers share one compiled body, at the price of a call for each.
The code is the same: a program's body runs as it is, its layers (`kvx.step`) are what is compiled.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool

State = TypeVar("State")

_ASKED: ContextVar[bool] = ContextVar("layer_by_layer", default=False)


@contextmanager
def layer_by_layer(on: bool = True) -> Iterator[None]:
    """Inside, `generate`, `teacher_forced`, `decode_step` and `prefill(cache=)` compile single layers, not whole steps.

        with kvx.layer_by_layer():
            result = kvx.generate(model, tokens, policy=policy, max_new_tokens=8)

    The results are the same up to rounding. On two CPU cores a policy's first answer from SmolLM2-135M came 4 to 17
    seconds earlier, and a step took 14 to 33 % longer (full, h2o, snapkv, kivi). Holds for this thread (or task) alone,
    and not under a caller's jit.

    Args:
        on: False: whole steps, as outside.
    """
    token = _ASKED.set(on)
    try:
        yield
    finally:
        _ASKED.reset(token)


def is_asked() -> bool:
    """Whether decoding runs layer by layer here."""
    return _ASKED.get()


def while_loop(
    unfinished: Callable[[State], Bool[Array, ""]], advance: Callable[[State], State], state: State
) -> State:
    """`jax.lax.while_loop` in a program; where arrays are at hand, a loop of the host."""
    if _traced(state):
        return jax.lax.while_loop(unfinished, advance, state)
    while bool(unfinished(state)):
        state = advance(state)
    return state


def scan(advance: Callable[[Any, Any], tuple[Any, Any]], carry: Any, rows: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` over at least one row in a program; where arrays are at hand, a loop of the host."""
    if _traced((carry, rows)):
        return jax.lax.scan(advance, carry, rows)
    found = []
    for index in range(len(jax.tree.leaves(rows)[0])):
        carry, one = advance(carry, jax.tree.map(lambda array, index=index: array[index], rows))
        found.append(one)
    return carry, jax.tree.map(lambda *arrays: jnp.stack(arrays), *found)


def _traced(tree: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))
