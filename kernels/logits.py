"""Scaled, capped, masked attention logits and their partial softmax: what every attention operation here shares."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvx.kernels.merge_partials import Partial

SHARED = -1
"""The label of keys that every query sees, if it does not come before them."""


def visible(
    query_positions: Int[Array, "*#batch #M #N"], key_positions: Int[Array, "*#batch #M #N"], window: int | None
) -> Bool[Array, "*batch M N"]:
    """Which keys a query may see: not empty (-1), not later than it, and inside its sliding window if there is one.

    The two broadcast: queries along rows and keys along columns, or the other way round.
    """
    seen = (key_positions >= 0) & (key_positions <= query_positions)
    return seen if window is None else seen & (query_positions - key_positions < window)


def same_segment(
    queries: Int[Array, "B T"], keys: Int[Array, "B S"], visibility: Bool[Array, "N N"] | None
) -> Bool[Array, "B T S"]:
    """Which keys a query may see by their labels: its own and SHARED, or what row (query label) of the table allows."""
    if visibility is None:
        return (queries[:, :, None] == keys[:, None, :]) | (keys[:, None, :] == SHARED)
    return visibility[queries[:, :, None], keys[:, None, :]]


def tile_mask(
    query_positions: Int[Array, "#M #N"],
    key_positions: Int[Array, "#M #N"],
    window: int | None,
    labels: tuple[Int[Array, "#M #N"], Int[Array, "#M #N"]] | None,
) -> Bool[Array, "M N"]:
    """Which keys of a tile a query may see: `visible` and, given labels (queries', keys'), of its own label or SHARED.

    Queries as rows and keys as columns, or the other way round, so that a kernel need not turn its tile.
    """
    seen = visible(query_positions, key_positions, window)
    if labels is None:
        return seen
    return seen & ((labels[0] == labels[1]) | (labels[1] == SHARED))


def scaled_logits(
    queries: Float[Array, "*#batch T D"], keys: Float[Array, "*#batch S D"], scale: float, softcap: float | None
) -> Float[Array, "*batch T S"]:
    """softcap(scale * q . k), float32."""
    scores = scale * jnp.einsum("...td,...sd->...ts", queries, keys, preferred_element_type=jnp.float32)
    return capped(scores, softcap)


def capped(scores: Float[Array, "*batch"], softcap: float | None) -> Float[Array, "*batch"]:
    """softcap * tanh(scores / softcap); None: the scores as they are."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def partial_softmax(logits: Float[Array, "*batch T S"], values: Float[Array, "*batch S V"]) -> Partial:
    """Attention over one set of keys; logits are -inf where a key is not visible, whole rows may be."""
    weights, lse = softmax_rows(logits)
    out = jnp.einsum("...ts,...sv->...tv", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return Partial(out=out, lse=lse)


def softmax_rows(logits: Float[Array, "*batch T S"]) -> tuple[Float[Array, "*batch T S"], Float[Array, "*batch T"]]:
    """Softmax over the last axis and its log-sum-exp; a row that sees nothing is all zeros with lse -inf."""
    top = jnp.max(logits, axis=-1, initial=-jnp.inf)
    finite_top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(logits - finite_top[..., None])
    total = jnp.sum(weights, axis=-1)
    divisor = jnp.where(total > 0, total, 1.0)
    return weights / divisor[..., None], jnp.where(total > 0, finite_top + jnp.log(divisor), -jnp.inf)


def slot_probabilities(logits: Float[Array, "*batch T S"], lse: Float[Array, "*batch T"]) -> Float[Array, "*batch T S"]:
    """Probabilities of the slots behind `logits` under a log-sum-exp that may include other parts."""
    finite = jnp.where(jnp.isfinite(lse), lse, 0.0)
    return jnp.exp(logits - finite[..., None])
