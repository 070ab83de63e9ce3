"""MiniLM's relation losses: how tokens relate to each other in one layer, whatever its widths and head counts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvx.train.losses import mean_over

UNSEEN = -1e30
"""Stands for a product with a token that is not seen: finite, so that gradients of what is left out are zeros."""


def relation_loss(
    student: Float[Array, "B T H D"],
    teacher: Float[Array, "B T G F"],
    segments: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
    heads: int | None = None,
) -> Float[Array, ""]:
    """KL between softmaxed products of queries with queries, keys with keys, or values with values.

        R = softmax over j <= t of the same document of (m_t . m_j) / sqrt(d_r)
        loss = 1 / (A n) sum over heads a and counted t of KL(R_teacher[a, t] || R_student[a, t])

    MiniLMv2 (Wang et al. 2021, equations 4 to 6), with a causal mask. A is the number of relation heads, n that of the
    counted tokens, d_r each side's own width of a relation head.

    Args:
        student, teacher: one of the layer's queries, keys (both rotated) or values; no gradient goes into the teacher.
        segments: the document of each token.
        counted: tokens whose rows count.
        heads: relation heads: the heads side by side are cut anew into that many. None: the heads as they are, those of
            the side that has fewer repeated, as grouped attention does.

    Raises:
        ValueError: `heads` does not divide the widths, or one side's heads do not divide the other's.
    """
    if heads is None:
        heads = max(student.shape[2], teacher.shape[2])
        student, teacher = _repeated(student, heads), _repeated(teacher, heads)
    student, teacher = _cut(student, heads), _cut(teacher, heads)
    index = jnp.arange(student.shape[1])
    visible = (index[:, None] >= index) & (segments[:, :, None] == segments[:, None, :])

    def row_losses(pair: tuple[Array, Array]) -> Float[Array, "B T"]:
        q, p = (_log_relation(side, visible) for side in pair)
        return jnp.sum(jnp.where(visible, jnp.exp(p) * (p - q), 0.0), axis=-1)

    # One relation head at a time, and again for the gradient: B x T x T numbers exist, not A times as many.
    pairs = (jnp.moveaxis(student, 2, 0), jax.lax.stop_gradient(jnp.moveaxis(teacher, 2, 0)))
    found = jnp.mean(jax.lax.map(jax.checkpoint(row_losses, prevent_cse=False), pairs), axis=0)
    return mean_over(found, counted)


def _log_relation(side: Float[Array, "B T D"], visible: Bool[Array, "B T T"]) -> Float[Array, "B T T"]:
    side = side.astype(jnp.float32)
    products = jnp.einsum("btd,bjd->btj", side, side) / jnp.sqrt(jnp.float32(side.shape[-1]))
    return jax.nn.log_softmax(jnp.where(visible, products, UNSEEN), axis=-1)


def _repeated(side: Float[Array, "B T H D"], heads: int) -> Float[Array, "B T A D"]:
    if heads % side.shape[2]:
        raise ValueError(f"{side.shape[2]} heads beside {heads}; allowed: a divisor of them, or heads=")
    return jnp.repeat(side, heads // side.shape[2], axis=2)


def _cut(side: Float[Array, "B T H D"], heads: int) -> Float[Array, "B T A R"]:
    width = side.shape[2] * side.shape[3]
    if width % heads:
        raise ValueError(f"heads={heads} relation heads of {width} channels; allowed: a divisor of them")
    return side.reshape(*side.shape[:2], heads, width // heads)
