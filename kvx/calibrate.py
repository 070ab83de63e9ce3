"""Calibration: forward passes over a few texts that fill the learned arrays of a policy."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from kvx.decoder import Block, Decoder
from kvx.errors import BadInput
from kvx.inputs import checked_policy, checked_prompt
from kvx.loop import attend, project
from kvx.parts.amounts import whole
from kvx.policy import Activations, Policy
from kvx.prefill import embed


def calibrate(
    policy: Policy, model: Decoder, batches: Iterable[ArrayLike], *, rows: int = 3000, seed: int = 0
) -> Policy:
    """The policy with its learned arrays filled from what the model computes over some texts.

    Layer by layer over all batches, so that one layer's activations exist at a time; every stage digests a layer
    before the next one runs.

    Args:
        policy: stages that learn nothing stay as they are; without any that does, the model is not run.
        model: a decoder of `kvx.models`.
        batches: (B, T) token ids each, rows of full length: as long as the prompts to come, since directions of
            rotated queries depend on the positions seen.
        rows: tokens sampled over all batches, the same for every layer and head (Q-Filters: 3000).
        seed: of that sample.

    Returns:
        A policy of equal text; `kvx.save_policy` keeps its arrays.

    Raises:
        BadInput: no batches, or token ids that the model does not have.
    """
    policy = checked_policy(policy)
    whole(rows, "rows", least=1)
    if not any(stage.learns for stage in policy.stages):
        return policy
    texts = [checked_prompt(model, batch, None, (policy,), 0)[0] for batch in batches]
    if not texts:
        raise BadInput("batches is empty; allowed: at least one batch of token ids (B, T)")
    picks = _sample([text.size for text in texts], rows, seed)
    positions = [_positions(text) for text in texts]
    states = [embed(model, text) for text in texts]
    digests = []
    for block in model.blocks:
        parts = [_activations(block, *one) for one in zip(states, positions, picks, strict=True) if len(one[2])]
        activations = jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=-2), *parts)
        digests.append(_digest(policy, activations))
        states = [attend(block, x, spots)[0] for x, spots in zip(states, positions, strict=True)]
    stages = [
        stage.calibrate([layer[index] for layer in digests]) if stage.learns else stage
        for index, stage in enumerate(policy.stages)
    ]
    return replace(policy, stages=tuple(stages))


def _sample(sizes: list[int], rows: int, seed: int) -> list[Int[np.ndarray, "N"]]:
    """For each text the places of its tokens in the sample, in order.

    Texts share the rows in proportion to their size, so that texts of one shape compile to one program.
    """
    random, total = np.random.default_rng(seed), sum(sizes)
    ends = [min(rows, total) * end // total for end in accumulate(sizes)]
    counts = [end - start for start, end in pairwise([0, *ends])]
    return [np.sort(random.choice(size, count, replace=False)) for size, count in zip(sizes, counts, strict=True)]


def _positions(text: Int[Array, "B T"]) -> Int[Array, "B T"]:
    return jnp.broadcast_to(jnp.arange(text.shape[1], dtype=jnp.int32), text.shape)


@jax.jit
def _activations(
    block: Block, x: Float[Array, "B T E"], positions: Int[Array, "B T"], picks: Int[Array, "N"]
) -> Activations:
    """Queries, keys and values of the picked tokens of a batch."""
    query, tokens = project(block, x, positions)

    def picked(array):
        """(B, ..., T, D) to (..., N, D)."""
        flat = jnp.moveaxis(array, 0, -3)
        return flat.reshape(*flat.shape[:-3], -1, flat.shape[-1])[..., picks, :]

    return Activations(picked(query.rotated), picked(tokens.rotated_keys), picked(tokens.values))


@jax.jit
def _digest(policy: Policy, activations: Activations) -> list[Any]:
    return [stage.digest(activations) if stage.learns else None for stage in policy.stages]
