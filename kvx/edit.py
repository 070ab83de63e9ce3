"""Edits of a cached text: spans are replaced, and what follows them moves to its new place instead of being read again.

Positional Integrity Encoding (PIE; He et al. 2024, "Let the Code LLM Edit Itself When You Edit the Code").
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvx.buckets import bucket
from kvx.cache import KVCache
from kvx.decoder import Decoder
from kvx.errors import BadInput
from kvx.inputs import checked_policy
from kvx.mesh import place_rows, placement_of
from kvx.policy import Policy
from kvx.step import decode_run

RUN = 16
"""Tokens that are read together; a divisor of every bucket."""


def edit(
    model: Decoder,
    cache: KVCache,
    policy: Policy,
    edits: Sequence[tuple[Any, Any, Any]],
    tail: Any = None,
) -> tuple[Float[Array, "B N"] | None, KVCache]:
    """Replace spans of the cached text; the given cache is donated and must not be used again.

        new tokens are read behind all that comes before them;   k'_t = R(delta) k_t, v'_t = v_t for all that follows

    R(delta) is the rotation by the change of position, so that the distances between all tokens are those of the new
    text. What a later token has seen of an old span stays in its keys and values: an approximation in every layer but
    the first, exact where nothing follows. All edits of one call are made in order, left to right, and every key is
    rotated once, by its total, in float32: prefer one call to several if the cache is of a narrow dtype.

        _, cache = kvx.edit(model, cache, policy, [(12, 15, [5, 9, 2])], tail=last_token_of_each_row)

    Args:
        policy: that of the cache; one that does not act while decoding and keeps dense slots (`full`, and what
            selects once after the prompt, whose spans then hold fewer tokens).
        edits: (start, stop, tokens): the tokens at positions start to stop - 1 of the old text are replaced. start ==
            stop inserts, no tokens delete. start and stop are integers or one for each row (B,), tokens (m,) or (B, m).
        tail: the last tokens of the text, (B,) or (B, w), which are read again: for logits of the new text, and as
            many exact tokens (the paper reads one again). None: nothing is.

    Returns:
        float32 logits after the last token that was read: the text's last with `tail`, else the last edit's last new
        one (None if no edit of it has tokens); and the cache, whose next token goes behind the whole text.

    Raises:
        BadInput: spans that overlap, are not in order or lie outside the text; tokens outside the vocabulary; a tail
            longer than what follows the last edit; a cache without slots for the new tokens; a policy that acts while
            decoding, or whose store cannot move tokens.
    """
    if any(
        checked_policy(policy).at(layer, len(model.blocks)).undoes is not None for layer in range(len(cache.places))
    ):
        raise BadInput(
            f"policy {policy.text} keeps tokens where they cannot be moved; allowed: full, or selections that act once"
        )
    ends = np.asarray(cache.next)
    starts, stops, texts = _spans(model, edits, ends)
    sizes = np.asarray([text.shape[1] for text in texts], np.int32).reshape(-1, 1)
    after = ends + np.sum(sizes - (stops - starts), axis=0, dtype=np.int32)
    if after.max() > model.max_positions:
        raise BadInput(
            f"edits make a text of {after.max()} tokens; allowed: {model.max_positions}, the model's positions"
        )
    again = np.zeros((len(ends), 0), np.int32) if tail is None else _tokens(model, tail, len(ends), "tail")
    follow = int((ends - stops[-1]).min()) if len(texts) else int(ends.min())
    if again.shape[1] > follow:
        raise BadInput(f"tail has {again.shape[1]} tokens, but {follow} follow the last edit; allowed: at most so many")
    where = (starts, stops, np.broadcast_to(sizes, starts.shape), after - again.shape[1])
    coming, free = sum(text.shape[1] for text in (*texts, again)), int(_free(cache, *where))
    if coming > free:
        raise BadInput(
            f"cache has {free} free slots, edits bring {coming} tokens; allowed: prefill with a larger max_new_tokens"
        )
    placement = placement_of(model)
    # What will follow a span has moved on before it is read, so that causality hides it.
    cache, logits, moved = _move(cache, *where), None, np.zeros_like(ends)
    for start, stop, text in zip(starts, stops, texts, strict=True):
        if text.shape[1]:
            logits, cache = _read(model, policy, cache, text, start + moved)
        moved = moved + text.shape[1] - (stop - start)
    if again.shape[1]:
        logits, cache = _read(model, policy, cache, again, after - again.shape[1])
    counters = place_rows(placement, (jnp.asarray(after, jnp.int32), jnp.int32(free - coming)))
    return logits, replace(cache, next=counters[0], room=counters[1])


def _spans(
    model: Decoder, edits: Sequence[tuple[Any, Any, Any]], ends: Int[np.ndarray, "B"]
) -> tuple[Int[np.ndarray, "E B"], Int[np.ndarray, "E B"], list[Int[np.ndarray, "B m"]]]:
    """Checked starts, stops and new tokens of every edit and row."""
    rows, before = len(ends), np.zeros_like(ends)
    starts, stops, texts = [], [], []
    for index, (start, stop, tokens) in enumerate(edits):
        start, stop = (np.asarray(bound) for bound in (start, stop))
        if not all(np.issubdtype(x.dtype, np.integer) and x.shape in ((), (rows,)) for x in (start, stop)):
            raise BadInput(
                f"edit {index} has start={start!r} and stop={stop!r}; allowed: integers, or one for each row"
            )
        start, stop = (np.broadcast_to(bound, (rows,)).astype(np.int32) for bound in (start, stop))
        if (start < before).any() or (stop < start).any() or (stop > ends).any():
            raise BadInput(
                f"edit {index} spans {start.tolist()} to {stop.tolist()}; allowed: from the end of the edit before it, "
                f"{before.tolist()}, to the end of the text, {ends.tolist()}"
            )
        starts.append(start)
        stops.append(stop)
        texts.append(_tokens(model, tokens, rows, f"edit {index}"))
        before = stop
    shape = (len(texts), rows)
    return np.asarray(starts, np.int32).reshape(shape), np.asarray(stops, np.int32).reshape(shape), texts


def _tokens(model: Decoder, tokens: Any, rows: int, name: str) -> Int[np.ndarray, "B m"]:
    """New tokens of every row; (B,) of a tail are one each, (m,) of an edit the same for all rows."""
    tokens = np.asarray(tokens)
    if not tokens.size:
        return np.zeros((rows, 0), np.int32)
    if tokens.ndim == 1:
        tokens = tokens[:, None] if name == "tail" else np.broadcast_to(tokens, (rows, len(tokens)))
    if tokens.ndim != 2 or len(tokens) != rows or not np.issubdtype(tokens.dtype, np.integer):
        raise BadInput(
            f"{name} has tokens of shape {tokens.shape} and dtype {tokens.dtype}; allowed: integers of each row"
        )
    if tokens.min() < 0 or tokens.max() >= model.vocabulary:
        raise BadInput(f"{name} holds {tokens.tolist()}; allowed: 0 to {model.vocabulary - 1}, the model's vocabulary")
    return tokens.astype(np.int32)


def _places(
    slots: Int[Array, "B G C"],
    starts: Int[Array, "E B"],
    stops: Int[Array, "E B"],
    sizes: Int[Array, "E B"],
    end: Int[Array, "B"],
) -> Int[Array, "B G C"]:
    """Where the token of every slot stands in the new text; -1 for those that go, and at or beyond `end`."""
    starts, stops, sizes = (bound[..., None, None] for bound in (starts, stops, sizes))
    gone = jnp.any((slots >= starts) & (slots < stops), axis=0)
    moved = slots + jnp.sum(jnp.where(slots >= stops, sizes - (stops - starts), 0), axis=0)
    return jnp.where((slots < 0) | gone | (moved >= end[:, None, None]), -1, moved)


@jax.jit
def _free(cache: KVCache, starts, stops, sizes, end) -> Int[Array, ""]:
    """Slots that every row and head of every layer will have for new tokens."""
    free = [jnp.sum(_places(store.positions(), starts, stops, sizes, end) < 0, axis=-1) for store in cache.layers]
    return jnp.min(jnp.stack([jnp.min(count) for count in free]))


@partial(jax.jit, donate_argnames="cache")
def _move(cache: KVCache, starts, stops, sizes, end) -> KVCache:
    storage = cache.storage
    for where in cache.places:
        store = where.load(storage)
        storage = where.save(storage, store.move(_places(store.positions(), starts, stops, sizes, end)))
    return replace(cache, storage=storage)


def _read(model: Decoder, policy: Policy, cache: KVCache, tokens: Int[np.ndarray, "B m"], start: Int[np.ndarray, "B"]):
    """Logits after these tokens, read at positions from `start`, and the cache with them."""
    count = tokens.shape[1]
    padded = np.pad(tokens, ((0, 0), (0, bucket(count) - count)))
    return _run(model, policy, cache, jnp.asarray(padded), jnp.asarray(start, jnp.int32), jnp.int32(count))


@partial(jax.jit, donate_argnames="cache")
def _run(model, policy, cache, tokens, start, count):
    def unfinished(state):
        return state[0] < count

    def advance(state):
        done, cache, _ = state
        piece = jax.lax.dynamic_slice_in_dim(tokens, done, RUN, axis=1)
        active = jnp.broadcast_to(done + jnp.arange(RUN) < count, piece.shape)
        logits, cache = decode_run(model, piece, cache, policy, active, provisional=True)
        last = jnp.minimum(count - done, RUN) - 1
        return done + RUN, replace(cache, next=cache.next + RUN), logits[:, last]

    nothing = jnp.zeros((tokens.shape[0], model.vocabulary), jnp.float32)
    state = (jnp.int32(0), replace(cache, next=start), nothing)
    _, cache, logits = jax.lax.while_loop(unfinished, advance, state)
    return logits, cache
