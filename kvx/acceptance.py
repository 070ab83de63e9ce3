"""Exact speculative sampling: which drafts stand, and the law of the token after them. Pure functions of probabilities.

p is the law that the user asked for (`kvx.sampling.law`), q the law that a draft was really drawn from. A draft x of q
stands with probability min(1, p(x) / q(x)); if it falls, the token comes from max(0, p - q), normalised:

    q min(1, p / q) + (1 - sum min(p, q)) max(0, p - q) / sum max(0, p - q) = min(p, q) + max(0, p - q) = p

(Leviathan et al. 2023; Chen et al. 2023). Greedy decoding is the case of laws that are one-hot. Any dtype of floats.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def residual(p: Float[Array, "*batch N"], q: Float[Array, "*batch N"]) -> Float[Array, "*batch N"]:
    """The law after a draft from q has fallen; p itself where q is zero, and where they are equal (never reached)."""
    rest = jnp.maximum(p - q, 0)
    total = jnp.sum(rest, axis=-1, keepdims=True)
    return jnp.where(total > 0, rest / jnp.where(total > 0, total, 1), p)


def chances(
    p: Float[Array, "*batch N"], q: Float[Array, "*batch N"], draft: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """min(1, p(x) / q(x)) of each draft; 1 where q(x) is 0, which is never drawn."""
    of_p, of_q = (jnp.take_along_axis(law, draft[..., None], axis=-1)[..., 0] for law in (p, q))
    return jnp.where(of_p < of_q, of_p / jnp.where(of_q > 0, of_q, 1), 1)


def accept_chain(
    p: Float[Array, "B M N"], q: Float[Array, "B L N"], drafts: Int[Array, "B L"], uniforms: Float[Array, "B L"]
) -> tuple[Int[Array, "B"], Float[Array, "B N"]]:
    """The prefix of a chain that stands.

    Args:
        p: M = L + 1 laws, each given the drafts before it.
        q: the L drafts' own.
        uniforms: independent, in [0, 1).

    Returns:
        How many drafts stand, and the law of the token after them: the residual, or after all of them the last of p.
    """
    stands = uniforms < chances(p[:, :-1], q, drafts)
    accepted = jnp.sum(jnp.cumprod(stands, axis=1), axis=1)
    # After the last draft nothing was proposed: q is zero there, and the residual p.
    padded = jnp.concatenate([q, jnp.zeros_like(p[:, :1])], axis=1)
    of_p, of_q = (jnp.take_along_axis(laws, accepted[:, None, None], axis=1)[:, 0] for laws in (p, padded))
    return accepted, residual(of_p, of_q)


def child_chances(
    p: Float[Array, "N"], q: Float[Array, "K N"], children: Int[Array, "K"]
) -> tuple[Float[Array, "K"], Float[Array, "N"]]:
    """A node of a tree of drafts, its K children tried in order (multi-round rejection, as in SpecInfer and EAGLE).

    Args:
        p: the target's law at the node.
        q: what each child was drawn from: the same law for independent children, `without` its predecessors for
            children drawn without replacement, `certain` for children chosen by rule (the k most likely, say; the
            drafter's probabilities in their place are not exact).

    Returns:
        Each child's chance to stand once all before it have fallen, and the law of the token if all of them fall.
    """

    def fall(law, child):
        q, token = child
        return residual(law, q), chances(law, q, token)

    rest, each = jax.lax.scan(fall, p, (q, children))
    return each, rest


def accept_child(
    p: Float[Array, "N"], q: Float[Array, "K N"], children: Int[Array, "K"], uniforms: Float[Array, "K"]
) -> tuple[Int[Array, ""], Float[Array, "N"]]:
    """The child that stands, K if none does, and the law of the token in that case; see `child_chances`."""
    each, rest = child_chances(p, q, children)
    stands = jnp.append(uniforms < each, True)
    return jnp.argmax(stands), rest


def without(q: Float[Array, "*batch N"], token: Int[Array, "*batch"]) -> Float[Array, "*batch N"]:
    """The law of the next child drawn without replacement; zero if there is no other token."""
    rest = jnp.where(_is(token, q.shape[-1]), 0, q)
    total = jnp.sum(rest, axis=-1, keepdims=True)
    return rest / jnp.where(total > 0, total, 1)


def certain(token: Int[Array, "*batch"], like: Float[Array, "*batch N"]) -> Float[Array, "*batch N"]:
    """The law of a token that was chosen by rule, in the shape and dtype of `like`."""
    return _is(token, like.shape[-1]).astype(like.dtype)


def _is(token: Int[Array, "*batch"], vocabulary: int) -> Bool[Array, "*batch N"]:
    return token[..., None] == jnp.arange(vocabulary)
