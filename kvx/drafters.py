"""Drafters: who proposes what is verified. The target by a narrow view of its cache, or another model with its own."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from kvx.cache import KVCache
from kvx.decoder import Decoder
from kvx.policy import Policy
from kvx.pytree import pytree
from kvx.sampling import Sampling, law, with_said
from kvx.step import decode_run, settle

DRAFT, ACCEPT, EMIT = 1, 2, 3
"""The decisions about a token, each with a random number of its own."""


@pytree
class Drafter:
    """Another model that proposes tokens, of the same vocabulary.

    Attributes:
        model: a decoder.
        policy: of its own cache.
    """

    model: Any
    policy: Policy


@pytree
class Draws:
    """Random numbers by row, true position and decision, and the law they are drawn from.

    A token at a position may be drafted in several rounds with the same key. Only the last of these counts: what was
    rejected before it had no part in any decision that stands.
    """

    rule: Sampling
    keys: Key[Array, "B"]

    def token(self, law: Float[Array, "B N"], positions: Int[Array, "B"], decision: int) -> Int[Array, "B"]:
        """A token from each row's law."""
        keys = self._at(positions, decision)
        return jax.vmap(jax.random.categorical)(keys, jnp.log(law)).astype(jnp.int32)

    def uniforms(self, positions: Int[Array, "B L"], decision: int) -> Float[Array, "B L"]:
        """Numbers in [0, 1)."""
        each = jax.vmap(lambda spots: jax.vmap(jax.random.uniform)(self._at(spots, decision)), in_axes=1, out_axes=1)
        return each(positions)

    def _at(self, positions: Int[Array, "B"], decision: int) -> Key[Array, "B"]:
        keys = jax.vmap(jax.random.fold_in)(self.keys, positions)
        return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, decision)


def propose(
    model: Decoder,
    token: Int[Array, "B"],
    cache: KVCache,
    policy: Policy,
    active: Bool[Array, "B"],
    draws: Draws,
    said: Bool[Array, "B N"] | None,
    count: int,
) -> tuple[Int[Array, "B L"], Float[Array, "B L N"], KVCache]:
    """`count` tokens after `token`, one by one, and the laws they were drawn from.

    Returns:
        drafts, laws, and the cache with the rows of all tokens but the last, for the caller to crop.
    """

    def step(state, _):
        cache, token, said = state
        logits, cache = decode_run(model, token[:, None], cache, policy, active[:, None], provisional=True)
        cache = replace(cache, next=cache.next + active)
        q = law(logits[:, 0], draws.rule, said)
        token = draws.token(q, cache.next, DRAFT)
        return (cache, token, with_said(said, token)), (token, q)

    (cache, _, _), (drafts, laws) = jax.lax.scan(step, (cache, token, said), length=count)
    return drafts.T, jnp.swapaxes(laws, 0, 1), cache


def propose_narrowly(
    model: Decoder,
    token: Int[Array, "B"],
    cache: KVCache,
    policy: Policy,
    active: Bool[Array, "B"],
    draws: Draws,
    said: Bool[Array, "B N"] | None,
    count: int,
) -> tuple[Int[Array, "B L"], Float[Array, "B L N"], KVCache]:
    """Drafts by the target through the narrow view of its own cache, which comes back as it was."""
    drafts, laws, drafted = propose(model, token, cache.narrow(), policy, active, draws, said, count)
    return drafts, laws, drafted.narrow(on=False).crop(cache.next)


def propose_beside(
    drafter: Drafter,
    token: Int[Array, "B"],
    own: KVCache,
    active: Bool[Array, "B"],
    draws: Draws,
    said: Bool[Array, "B N"] | None,
    count: int,
) -> tuple[Int[Array, "B L"], Float[Array, "B L N"], KVCache]:
    """Drafts by another model. Its cache comes back with the rows of all of them: whatever stands has one."""
    own = settle(drafter.model, own, drafter.policy)
    drafts, laws, own = propose(drafter.model, token, own, drafter.policy, active, draws, said, count + 1)
    return drafts[:, :count], laws[:, :count], own
