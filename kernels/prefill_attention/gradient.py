"""The derivative of prefill attention: by output and log-sum-exp, from whichever implementation ran.

With p_ij = exp(l_ij - lse_i) and cotangents dO of the output and e of the log-sum-exp,

    dv_j = sum_i p_ij dO_i,    dl_ij = p_ij (dO_i . v_j - dO_i . O_i + e_i),

from which queries and keys get theirs (Dao 2023, section 3.2, with the term of the log-sum-exp that merging partial
softmaxes needs: without it gradients through `merge_partials` are wrong by a quarter). Statistics have no derivative.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from kvx.kernels.prefill_attention.columns import Column

Result = tuple[Float[Array, "B G R T V"], Float[Array, "B G R T"], dict[Column, Float[Array, "B G R S"]]]
Pullback = Callable[
    [Float[Array, "B G R T V"], Float[Array, "B G R T"] | None],
    tuple[Float[Array, "B G R T D"], Float[Array, "B G S D"], Float[Array, "B G S V"]],
]
"""From the cotangents of output and log-sum-exp (None: zero) to those of queries, keys and values; a pytree."""


class Sight(NamedTuple):
    """The integers that say who sees whom; no derivative runs through them."""

    query_positions: Int[Array, "B T"]
    key_positions: Int[Array, "B G S"]
    lengths: Int[Array, "B"] | None
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None
    visibility: Bool[Array, "N N"] | None

    def named(self) -> dict[str, Any]:
        """What comes after the positions, as keyword arguments."""
        return {"lengths": self.lengths, "segments": self.segments, "visibility": self.visibility}


@dataclass(frozen=True)
class Call:
    """An implementation with its static arguments.

    Attributes:
        forward: the operation.
        remembering: the operation that also returns its pullback.
        options: scale, window, softcap, columns, and a tuning if the implementation has one.
    """

    forward: Callable[..., Result]
    remembering: Callable[..., tuple[Result, Pullback]]
    options: Mapping[str, Any]

    def __call__(self, queries: Array, keys: Array, values: Array, sight: Sight) -> Result:
        return self.forward(queries, keys, values, *sight[:2], **self.options, **sight.named())


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(call: Call, queries: Array, keys: Array, values: Array, sight: Sight) -> Result:
    """The call, with the derivative that its implementation gives."""
    return call(queries, keys, values, sight)


def _forward(call: Call, *primals: Any) -> tuple[Result, Pullback]:
    queries, keys, values, sight = jax.tree.map(lambda primal: primal.value, primals)
    return call.remembering(queries, keys, values, *sight[:2], **call.options, **sight.named())


def _backward(call: Call, pullback: Pullback, cotangents: Any) -> tuple[Array, Array, Array, None]:
    out, lse, columns = cotangents
    for column, cotangent in columns.items():
        if not isinstance(cotangent, SymbolicZero):
            raise ValueError(f"{column} is differentiated, but only output and log-sum-exp of prefill attention can be")
    if isinstance(out, SymbolicZero):
        # The library types no attribute that a SymbolicZero hands on from its shape and dtype.
        out = jnp.zeros(out.shape, out.dtype)  # type: ignore[reportArgumentType]
    return (*pullback(out, None if isinstance(lse, SymbolicZero) else lse), None)


differentiable.defvjp(_forward, _backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def without_derivative(name: str, found: Array) -> Array:
    """What attention saw and reports beside its output: the same array, and a ValueError where it is differentiated."""
    return found


def _without_forward(name: str, found: Any) -> tuple[Array, None]:
    return found.value, None


def _without_backward(name: str, _: None, cotangent: Any) -> tuple[SymbolicZero]:
    if not isinstance(cotangent, SymbolicZero):
        raise ValueError(f"{name} are differentiated, but only output and log-sum-exp of prefill attention can be")
    return (cotangent,)


without_derivative.defvjp(_without_forward, _without_backward, symbolic_zeros=True)


def remember(forward: Callable[..., Result], backward: Callable[..., tuple[Array, Array, Array]]) -> Callable[..., Any]:
    """The `remembering` of an implementation whose `backward` recomputes probabilities from the log-sum-exp.

    What is kept is linear in the tokens: inputs, output (in the inputs' dtype, as it leaves attention) and lse.
    """

    def remembering(queries, keys, values, query_positions, key_positions, **options):
        result = forward(queries, keys, values, query_positions, key_positions, **options)
        kept = Kept(queries, keys, values, result[0].astype(values.dtype), result[1])
        sight = Sight(query_positions, key_positions, *(options.pop(name) for name in Sight._fields[2:]))
        del options["columns"]
        return result, jax.tree_util.Partial(Bound(backward, tuple(options.items())), kept, sight)

    return remembering


@dataclass(frozen=True)
class Bound:
    """A function with static keyword arguments, equal to another of the same: what a pytree's structure may hold."""

    function: Callable[..., Any]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments, **dict(self.options))


class Kept(NamedTuple):
    """What a backward pass starts from."""

    queries: Float[Array, "B G R T D"]
    keys: Float[Array, "B G S D"]
    values: Float[Array, "B G S V"]
    out: Float[Array, "B G R T V"]
    lse: Float[Array, "B G R T"]


def row_terms(
    kept: Kept, d_out: Float[Array, "B G R T V"], d_lse: Float[Array, "B G R T"] | None
) -> Float[Array, "B G R T"]:
    """e_i - dO_i . O_i, what every logit of a row gets beside dO_i . v_j."""
    shared = -jnp.sum(d_out.astype(jnp.float32) * kept.out.astype(jnp.float32), axis=-1)
    if d_lse is None:
        return shared
    # An empty row's log-sum-exp is -inf whatever the inputs; what comes back for it may be nan.
    return shared + jnp.where(jnp.isfinite(kept.lse), d_lse, 0.0)
