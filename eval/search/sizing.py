"""How many bytes a policy's cache takes for a task's prompts: from the shapes of a prefill that is never run."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

import kvx
from kvx.buckets import bucket
from kvx.decoder import Decoder
from kvx.errors import BadInput
from kvx.eval.shared_pass import prefill_each


@dataclass(frozen=True)
class Prompts:
    """One batch as a task's samples come.

    Attributes:
        tokens: right-padded to the width that all batches have.
        lengths: of the rows.
        room: tokens that a cache takes beyond its prompt.
    """

    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, "B"]
    room: int


def cache_sizes(decoder: Decoder, prompts: Prompts, policies: Sequence[kvx.Policy]) -> list[int | BadInput]:
    """Resident bytes of one row's cache under each policy, or why the model cannot have it.

    Nothing is computed, but for policies whose size only the data decide (`Policy.measures`) and for prompts so long
    that the model has no positions for their padding: those share a pass over the prompts.
    """
    rows, width, room = *prompts.tokens.shape, prompts.room
    padded = bucket(width) + bucket(max(room, 1)) <= decoder.max_positions
    if padded:
        width, room = bucket(width), bucket(max(room, 1))
    found: list[int | BadInput] = []
    for policy in policies:
        try:
            found.append(_by_shape(decoder, policy, rows, width, room))
        except BadInput as error:
            found.append(error)
    unsure = [
        at
        for at, (policy, size) in enumerate(zip(policies, found, strict=True))
        if not isinstance(size, BadInput) and (policy.measures or not padded)
    ]
    if unsure:
        chosen = [policies[at] for at in unsure]
        caches = prefill_each(decoder, prompts.tokens, chosen, prompts.room, prompts.lengths)
        for at, (_, cache) in zip(unsure, caches, strict=True):
            found[at] = cache.nbytes // rows
    return found


def _by_shape(decoder: Decoder, policy: kvx.Policy, rows: int, width: int, room: int) -> int:
    def prefill(tokens: jax.Array, lengths: jax.Array) -> list[jax.Array]:
        _, cache = kvx.prefill(decoder, tokens, policy, lengths, max_new_tokens=room)
        return jax.tree.leaves(cache)

    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
    arrays = jax.eval_shape(prefill, jax.ShapeDtypeStruct((rows, width), jnp.int32), lengths)
    return sum(array.size * array.dtype.itemsize for array in arrays) // rows
