"""Speculative generation: draft a few tokens, verify them in one pass of the target, keep its law exactly."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvx.acceptance import accept_chain
from kvx.buckets import bucket
from kvx.decoder import Decoder
from kvx.drafters import ACCEPT, EMIT, Drafter, Draws, propose_beside, propose_narrowly
from kvx.errors import BadInput
from kvx.generate import Generation, full_policy, stop_tokens
from kvx.inputs import checked_policy
from kvx.parts.amounts import whole
from kvx.policy import Policy
from kvx.prefill import prefill
from kvx.pytree import pytree
from kvx.sampling import GREEDY, Sampling, law, next_token, row_keys, said_tokens, with_said
from kvx.step import decode_run, settle


@pytree
class Speculation(Generation):
    """What `speculate` returns: a generation, and how it went.

    Attributes:
        rounds: verification passes of each row by the number of drafts that stood in them, from 0 to gamma.
    """

    rounds: Int[Array, "B n"]

    @property
    def passes(self) -> Int[Array, "B"]:
        """Target passes of each row after its prompt."""
        return jnp.sum(self.rounds, axis=1)

    @property
    def acceptance(self) -> Float[Array, "B"]:
        """Drafts that stood, of those that were decided about (none is after the first that falls)."""
        gamma = self.rounds.shape[1] - 1
        stood = jnp.arange(gamma + 1)
        decided = jnp.sum(self.rounds * jnp.minimum(stood + 1, gamma), axis=1)
        return jnp.sum(self.rounds * stood, axis=1) / jnp.maximum(decided, 1)

    @property
    def tokens_per_pass(self) -> Float[Array, "B"]:
        """New tokens for each target pass; the first one comes from the prompt's."""
        return (self.lengths - 1) / jnp.maximum(self.passes, 1)


def speculate(
    model: Decoder,
    tokens: Array | np.ndarray,
    *,
    policy: Policy | None = None,
    draft: Drafter | None = None,
    gamma: int = 5,
    lengths: Array | np.ndarray | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    stop: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    **prefilling: Any,
) -> Speculation:
    """Continue every prompt of a batch, in fewer passes of the model than there are tokens.

    Each new token has exactly the law of `kvx.generate` under the same policy: that of the compressed target, warped as
    `sampling` asks (Leviathan et al. 2023; Chen et al. 2023). Greedy tokens are the same tokens, up to rounding in the
    last bits, which differs between passes over one and over several tokens. A sampled text is another one than
    `generate` draws from that seed.

    Args:
        policy: of the target's cache: one that can take tokens back (`full`, any that acts once after the prompt,
            `quantspec`).
        draft: who proposes; None: the target itself through the narrow view of its cache (`quantspec`).
        gamma: drafts in a round; 0: none, a token a pass.
        lengths, max_new_tokens, sampling, stop, seed: see `kvx.generate`.
        prefilling: `labels`, `prefill_chunk`, `compress`, `cache_dtype` of `kvx.prefill`, for the target.

    Raises:
        BadInput: a policy that cannot take back gamma + 1 tokens or has no narrow view, a drafter of another
            vocabulary; see also `kvx.prefill`.
    """
    policy = full_policy() if policy is None else checked_policy(policy)
    gamma = whole(gamma, "gamma", least=0)
    count = whole(max_new_tokens, "max_new_tokens", least=1)
    _check_undoing(model, policy, gamma, "policy")
    if draft is None:
        _check_narrow(policy)
    else:
        _check_undoing(draft.model, checked_policy(draft.policy, "draft.policy"), gamma, "draft.policy")
        if draft.model.vocabulary != model.vocabulary:
            raise BadInput(
                f"draft has a vocabulary of {draft.model.vocabulary} tokens; allowed: {model.vocabulary}, the model's"
            )
    stops, keys = stop_tokens(model, stop), row_keys(seed, len(tokens))
    said = (
        said_tokens(model.vocabulary, np.asarray(tokens), lengths) if sampling.repetition_penalty is not None else None
    )
    # A dense cache holds what is verified beside what is there to stay.
    room = count + gamma
    logits, cache = prefill(model, tokens, policy, lengths, max_new_tokens=room, **prefilling)
    own = None if draft is None else prefill(draft.model, tokens, draft.policy, lengths, max_new_tokens=room)[1]
    result, _ = _speculate(
        model,
        policy,
        draft,
        cache,
        own,
        logits,
        jnp.int32(count),
        Draws(sampling, keys),
        stops,
        said,
        gamma=gamma,
        most=bucket(count),
    )
    return Speculation(result.tokens[:, :count], result.lengths, result.cache, result.rounds)


@partial(jax.jit, donate_argnames=("cache", "own"), static_argnames=("gamma", "most"))
def _speculate(model, policy, draft, cache, own, logits, count, draws, stops, said, *, gamma, most):
    """Rounds of draft, verify, accept and crop, until every row has ended.

    The drafter's cache is returned too: what is donated is reused in place only if it comes out again.
    """
    batch = logits.shape[0]
    rows, index = jnp.arange(batch)[:, None], jnp.arange(gamma + 1)
    start = cache.next

    def unfinished(state):
        return ~jnp.all(state[-1])

    def advance(state):
        cache, own, token, said, out, lengths, rounds, done = state
        active, begin = ~done, cache.next
        cache = settle(model, cache, policy)
        if draft is None:
            drafts, q, cache = propose_narrowly(model, token, cache, policy, active, draws, said, gamma)
        else:
            drafts, q, own = propose_beside(draft, token, own, active, draws, said, gamma)
        run = jnp.concatenate([token[:, None], drafts], axis=1)
        everyone = jnp.broadcast_to(active[:, None], run.shape)
        logits, cache = decode_run(model, run, cache, policy, everyone, provisional=True)
        uniforms = draws.uniforms(begin[:, None] + 1 + index[:gamma], ACCEPT)
        accepted, last = accept_chain(laws(logits, draws.rule, said, drafts), q, drafts, uniforms)
        token = draws.token(last, begin + 1 + accepted, EMIT)
        new = jnp.where(index < accepted[:, None], jnp.append(drafts, token[:, None], axis=1), token[:, None])
        # A row ends with its first stop token or its last allowed one; nothing after that was ever said.
        ends = jnp.any(new[..., None] == stops, axis=-1) | (lengths[:, None] + index + 1 >= count)
        fresh = active[:, None] & (index <= accepted[:, None]) & (jnp.cumsum(ends, axis=1) - ends == 0)
        out = out.at[rows, jnp.where(fresh, lengths[:, None] + index, most)].set(new, mode="drop")
        said = None if said is None else said.at[rows, jnp.where(fresh, new, said.shape[1])].set(True, mode="drop")
        emitted = jnp.sum(fresh, axis=1)
        # What stays has a row: the token this round began with, and all new ones but the newest.
        cache = cache.crop(begin + emitted)
        own = None if own is None else own.crop(begin + emitted)
        token = jnp.take_along_axis(new, jnp.maximum(emitted - 1, 0)[:, None], axis=1)[:, 0]
        rounds = rounds.at[jnp.arange(batch), accepted].add(active)
        return cache, own, token, said, out, lengths + emitted, rounds, done | jnp.any(fresh & ends, axis=1)

    token = next_token(logits, draws.rule, draws.keys, cache.next, said)
    out = jnp.full((batch, most), -1, jnp.int32).at[:, 0].set(token)
    done = jnp.any(token[:, None] == stops, axis=1) | (count == 1)
    rounds, lengths = jnp.zeros((batch, gamma + 1), jnp.int32), jnp.ones(batch, jnp.int32)
    state = (cache, own, token, with_said(said, token), out, lengths, rounds, done)
    cache, own, _, _, out, lengths, rounds, _ = jax.lax.while_loop(unfinished, advance, state)
    room = cache.room - jnp.max(cache.next - start)
    return Speculation(out, lengths, replace(cache, room=room), rounds), own


def laws(
    logits: Float[Array, "B M N"], rule: Sampling, said: Bool[Array, "B N"] | None, drafts: Int[Array, "B L"]
) -> Float[Array, "B M N"]:
    """The target's law after the text so far, and after each draft in turn."""
    if said is not None:
        new = jnp.cumsum(jax.nn.one_hot(drafts, said.shape[1], dtype=jnp.int32), axis=1) > 0
        said = jnp.concatenate([said[:, None], said[:, None] | new], axis=1).reshape(-1, said.shape[1])
    return law(logits.reshape(-1, logits.shape[-1]), rule, said).reshape(logits.shape)


def _check_undoing(model: Decoder, policy: Policy, gamma: int, name: str) -> None:
    """Refuse a policy that cannot take back a round's tokens."""
    layers = len(model.blocks)
    limits = [policy.at(layer, layers).undoes for layer in range(layers)]
    most = min((limit for limit in limits if limit is not None), default=gamma + 1)
    if most == 0:
        raise BadInput(
            f"{name}={policy.text} cannot take back tokens that were rejected; allowed: quantspec, full, and policies "
            "that act once, after the prompt, and store what they keep uncoded"
        )
    if gamma + 1 > most:
        raise BadInput(f"gamma={gamma} is more than {name}={policy.text} can take back; allowed: 0 to {most - 1}")


def _check_narrow(policy: Policy) -> None:
    if not policy.narrows:
        raise BadInput(
            f"policy={policy.text} has no narrow view to draft with; allowed: quantspec, or draft=kvx.Drafter(model, "
            "policy)"
        )
