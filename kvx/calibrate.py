"""Calibration: forward passes over a few texts that fill what a policy learns: arrays, or hyperparameters."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from kvx.context import Activations
from kvx.decoder import Block, Decoder
from kvx.errors import BadInput
from kvx.inputs import checked_policy, checked_prompt
from kvx.loop import attend, project
from kvx.mesh import Placement, kernels_on, placement_of
from kvx.parts.amounts import whole
from kvx.policy import Policy
from kvx.policy_text import amended
from kvx.prefill import embed


def calibrate(
    policy: Policy, model: Decoder, batches: Iterable[ArrayLike] = (), *, rows: int = 3000, seed: int = 0
) -> Policy:
    """The policy with what it learns filled from what the model computes over some texts.

    Layer by layer over all batches, so that one layer's activations exist at a time; every stage digests a layer
    before the next one runs. A stage may bring a text of its own (razor_attention), for which it takes one more pass.

    Args:
        policy: stages that learn nothing stay as they are; without any that does, the model is not run.
        model: a decoder of `kvx.models`.
        batches: (B, T) token ids each, rows of full length: as long as the prompts to come, since directions of
            rotated queries depend on the positions seen. Not read if every stage that learns brings its own text.
        rows: tokens sampled over all batches, the same for every layer and head (Q-Filters: 3000).
        seed: of that sample, and of random texts.

    Returns:
        The calibrated policy. Its text names hyperparameters that were found; `kvx.save_policy` keeps both them and its
        arrays.

    Raises:
        BadInput: no batches where they are read, token ids that the model does not have, or a text of a stage's own
            that is longer than the model's positions.
    """
    policy = checked_policy(policy)
    whole(rows, "rows", least=1)
    stages = list(policy.stages)
    probes = {
        index: stage.probe(model.vocabulary, model.max_positions, seed)
        for index, stage in enumerate(stages)
        if stage.learns
    }
    for index, probe in probes.items():
        if probe is not None:
            text, _ = checked_prompt(model, probe[None], None, (policy,), 0)
            (digests,) = _digests([stages[index]], model, [text], [np.arange(text.size)])
            stages[index] = stages[index].calibrate(digests)
    sampling = [index for index, probe in probes.items() if probe is None]
    if sampling:
        texts = [checked_prompt(model, batch, None, (policy,), 0)[0] for batch in batches]
        if not texts:
            raise BadInput("batches is empty; allowed: at least one batch of token ids (B, T)")
        picks = _sample([text.size for text in texts], rows, seed)
        digested = _digests([stages[index] for index in sampling], model, texts, picks)
        for index, digests in zip(sampling, digested, strict=True):
            stages[index] = stages[index].calibrate(digests)
    if not probes:
        return policy
    text = policy.text
    for index in probes:
        text = amended(text, index, stages[index].learned)
    return replace(policy, stages=tuple(stages), text=text)


def _digests(
    stages: list[Any], model: Decoder, texts: list[Int[Array, "B T"]], picks: list[Int[np.ndarray, "N"]]
) -> list[list[Any]]:
    """What each stage keeps of every layer's activations at the picked tokens."""
    positions = [_positions(text) for text in texts]
    states = [embed(model, text) for text in texts]
    layers = []
    for block in model.blocks:
        parts = [_activations(block, *one) for one in zip(states, positions, picks, strict=True) if len(one[2])]
        activations = jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=-2), *parts)
        layers.append(_digest(stages, activations, placement=placement_of(model)))
        states = [attend(block, x, spots)[0] for x, spots in zip(states, positions, strict=True)]
    return [list(each) for each in zip(*layers, strict=True)]


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

    return Activations(picked(query.rotated), picked(tokens.rotated_keys), picked(tokens.attended_values), block.spec)


@partial(jax.jit, static_argnames=("placement",))
def _digest(stages: list[Any], activations: Activations, *, placement: Placement | None) -> list[Any]:
    with kernels_on(placement):
        return [stage.digest(activations) for stage in stages]
