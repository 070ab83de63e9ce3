"""Policies made ready for a model: told its tokenizer's kinds of tokens, and calibrated where they learn."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax

import kvx
from kvx.decoder import Decoder
from kvx.models.token_kinds import token_kinds
from kvx.prose import Prose, documents


def ready(
    policies: Sequence[kvx.Policy],
    decoder: Decoder,
    tokenizer: Any,
    prose: Prose,
    texts: tuple[int, int],
    seed: int,
) -> list[kvx.Policy]:
    """The policies with the arrays that they need, each under the text that it was asked by.

    Args:
        prose: calibration texts come from its first half.
        texts: how many of them, and their length in tokens.
        seed: of what calibration draws.
    """
    if any(policy.by_kind for policy in policies):
        kinds = token_kinds(tokenizer)
        policies = [policy.with_kinds(kinds) if policy.by_kind else policy for policy in policies]
    if not any(_lacks(policy) for policy in policies):
        return list(policies)
    batch = documents(tokenizer, prose.haystack, *texts)
    # One text at a time: calibration is no faster in a batch, and its peak is a quarter.
    rows = [batch[row : row + 1] for row in range(len(batch))]
    return [
        replace(kvx.calibrate(policy, decoder, rows, seed=seed), text=policy.text) if _lacks(policy) else policy
        for policy in policies
    ]


def _lacks(policy: kvx.Policy) -> bool:
    """Whether there is something to learn that is not there yet, as in a policy that a file brought."""
    return any(stage.learns and not jax.tree.leaves(stage) for stage in policy.stages)
