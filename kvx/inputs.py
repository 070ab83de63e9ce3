"""Checks of what users pass in, before anything is compiled: one sentence each, nothing clipped or truncated."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from kvx.cache import ENDLESS, KVCache
from kvx.context import Layout
from kvx.decoder import Decoder
from kvx.errors import BadInput
from kvx.policy import Policy


def traced(*values: Any) -> bool:
    """Whether the call is inside a caller's jit, where shapes are all that can be checked."""
    return any(isinstance(value, Tracer) for value in values)


def checked_prompt(
    model: Decoder, tokens: Any, lengths: Any, policies: tuple[Policy, ...], room: int
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Tokens and lengths as int32 arrays.

    Raises:
        BadInput: wrong shape or dtype, empty, outside the vocabulary, lengths that disagree, too long for the model.
    """
    if not traced(tokens):
        tokens = np.asarray(tokens)
    if tokens.ndim != 2:
        raise BadInput(f"tokens has shape {tokens.shape}; allowed: (batch, length)")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise BadInput(f"tokens has dtype {tokens.dtype}; allowed: integers")
    batch, longest = tokens.shape
    if batch == 0 or longest == 0:
        raise BadInput(f"tokens has shape {tokens.shape}, an empty prompt; allowed: at least one token in every row")
    if not isinstance(room, int) or room < 0:
        raise BadInput(f"max_new_tokens={room!r} is out of range; allowed: an int of at least 0")
    if lengths is None:
        lengths = np.full(batch, longest, np.int32)
    if not traced(lengths):
        lengths = np.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise BadInput(f"lengths has shape {lengths.shape} and dtype {lengths.dtype}; allowed: integers ({batch},)")
    if not traced(lengths) and (lengths.min() < 1 or lengths.max() > longest):
        raise BadInput(f"lengths={lengths.tolist()} disagree with tokens of length {longest}; allowed: 1 to {longest}")
    if not traced(tokens, lengths):
        real = tokens[np.arange(longest) < lengths[:, None]]
        if real.min() < 0 or real.max() >= model.vocabulary:
            worst = int(real.min() if real.min() < 0 else real.max())
            raise BadInput(f"tokens holds {worst}; allowed: 0 to {model.vocabulary - 1}, the model's vocabulary")
        tokens = np.where(np.arange(longest) < lengths[:, None], tokens, 0)
    end = longest + room if traced(lengths) else int(lengths.max()) + room
    if end > model.max_positions and not all(policy.renumber or policy.lays_out for policy in policies):
        raise BadInput(
            f"tokens needs {end} positions, {room} of them for new tokens; allowed: at most {model.max_positions}, the "
            "model's positions, unless the policy renumbers them (streaming_llm)"
        )
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32)


def check_layout(model: Decoder, layout: Layout | None, room: int) -> None:
    """Refuse a prompt whose tokens, as its policy lays them out, and new ones go beyond the model's positions.

    Raises:
        BadInput: they do.
    """
    if layout is None or traced(layout.positions):
        return
    end = int(jnp.max(layout.positions)) + 1 + room
    if end > model.max_positions:
        raise BadInput(
            f"labels lay tokens out over {end} positions, {room} of them for new tokens; allowed: at most "
            f"{model.max_positions}, the model's positions"
        )


def checked_labels(labels: Any, tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """A label for every token as int32; zeros where none are given.

    Raises:
        BadInput: labels of another shape than the tokens, not integers, or negative.
    """
    if labels is None:
        return jnp.zeros(tokens.shape, jnp.int32)
    if not traced(labels):
        labels = np.asarray(labels)
    if labels.shape != tokens.shape or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise BadInput(f"labels has shape {labels.shape} and dtype {labels.dtype}; allowed: integers {tokens.shape}")
    if not traced(labels) and labels.min() < 0:
        raise BadInput(f"labels holds {int(labels.min())}; allowed: integers of at least 0")
    return jnp.asarray(labels, jnp.int32)


def checked_policy(policy: Any, name: str = "policy") -> Policy:
    """The policy, if it is one.

    Raises:
        BadInput: something else.
    """
    if not isinstance(policy, Policy):
        raise BadInput(f"{name}={policy!r} is not a policy; allowed: what kvx.policies or kvx.policy(name) returns")
    return policy


def check_rows(tokens: Int[Array, "B T"], cache: KVCache) -> None:
    """Refuse a cache of another batch."""
    if len(tokens) != len(cache.next):
        raise BadInput(f"tokens has {len(tokens)} rows, the cache {len(cache.next)}; allowed: one for each of its rows")


def check_room(cache: KVCache, steps: int) -> None:
    """Refuse a cache that cannot take so many more tokens."""
    room = int(cache.room)
    if room != ENDLESS and room < steps:
        raise BadInput(
            f"cache has room for {room} more tokens, {steps} are needed; allowed: prefill with a larger max_new_tokens"
        )
