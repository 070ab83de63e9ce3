"""Generation: one compiled loop over donated caches, fed first with given tokens, then with sampled ones."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from kvx.buckets import bucket
from kvx.cache import KVCache
from kvx.decoder import Decoder
from kvx.errors import BadInput
from kvx.inputs import check_room, check_rows, checked_policy, checked_prompt, traced
from kvx.layer_by_layer import while_loop
from kvx.lending import takes_cache
from kvx.parts.amounts import whole
from kvx.policy import Policy
from kvx.prefill import prefill
from kvx.pytree import pytree
from kvx.sampling import GREEDY, Sampling, next_token, row_keys, said_tokens, with_said
from kvx.step import decode

STOPS = 8
"""Stop tokens are padded to a multiple of this, so that one more of them compiles nothing."""


@pytree
class Generation:
    """What `generate` returns.

    Attributes:
        tokens: new tokens of each row, up to and including its stop token; -1 beyond.
        lengths: how many.
        cache: the cache after the last token that was fed (the newest token has not been).
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, "B"]
    cache: KVCache


def decode_step(
    model: Decoder, token: Array | np.ndarray, cache: KVCache, policy: Policy
) -> tuple[Float[Array, "B N"], KVCache]:
    """Feed one token of every row; the given cache is donated and must not be used again.

    Returns:
        float32 logits after it, and the new cache.

    Raises:
        BadInput: a token outside the vocabulary, or a cache without room.
    """
    if not traced(token, cache.room):
        token = np.asarray(token)
        if token.ndim != 1 or not np.issubdtype(token.dtype, np.integer):
            raise BadInput(f"token has shape {token.shape} and dtype {token.dtype}; allowed: integers (batch,)")
        if token.min() < 0 or token.max() >= model.vocabulary:
            raise BadInput(f"token holds {token.tolist()}; allowed: 0 to {model.vocabulary - 1}")
        check_room(cache, 1)
        return _decode_step(model, jnp.asarray(token, jnp.int32), cache, policy)
    return decode(model, jnp.asarray(token), cache, policy, jnp.ones(token.shape, bool))


@takes_cache()
def _decode_step(model: Decoder, token: Int[Array, "B"], cache: KVCache, policy: Policy):
    return decode(model, token, cache, policy, jnp.ones(token.shape, bool))


def generate(
    model: Decoder,
    tokens: Array | np.ndarray,
    *,
    policy: Policy | None = None,
    lengths: Array | np.ndarray | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    stop: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    cache: KVCache | None = None,
    start: tuple[Float[Array, "B N"], KVCache] | None = None,
    **prefilling: Any,
) -> Generation:
    """Continue every prompt of a batch.

    Args:
        policy: how the cache is compressed; None: not at all.
        lengths: tokens of each row of `tokens`.
        max_new_tokens: how many to generate at most.
        sampling: `kvx.sampling(...)`; greedy by default.
        stop: tokens that end a row.
        seed: one seed for all rows (equal prompts then draw equally), or one for each.
        cache: continue this cache with `tokens` as the next turn; it is donated.
        start: the logits and cache that `kvx.prefill` gave for `tokens`, or their `kvx.fork` (several continuations of
            each row, with a seed for each); the cache is donated.
        prefilling: `labels`, `prefill_chunk`, `compress`, `cache_dtype` of `kvx.prefill`.

    Raises:
        BadInput: see `kvx.prefill`.
    """
    policy = full_policy() if policy is None else checked_policy(policy)
    count = whole(max_new_tokens, "max_new_tokens", least=1)
    if cache is None:
        logits, cache = _started(model, tokens, policy, lengths, count, start, prefilling)
        rows = len(logits)
        given = _for_rows(rows, tokens, lengths)
        tokens, lengths = jnp.zeros((rows, 0), jnp.int32), jnp.zeros(rows, jnp.int32)
    else:
        if start is not None:
            raise BadInput("start and cache are both given; allowed: one, since each says where to begin")
        tokens, lengths = checked_prompt(model, tokens, lengths, (policy,), 0)
        given = np.asarray(tokens), lengths
        check_rows(tokens, cache)
        check_room(cache, int(jnp.max(lengths)) + count - 1)
        logits = jnp.zeros((len(tokens), model.vocabulary), jnp.float32)
        tokens = jnp.pad(tokens, ((0, 0), (0, bucket(tokens.shape[1]) - tokens.shape[1])))
    stops, keys = stop_tokens(model, stop), row_keys(seed, len(tokens))
    said = said_tokens(model.vocabulary, *given) if sampling.repetition_penalty is not None else None
    return _trim(
        _generate(
            model,
            policy,
            cache,
            logits,
            tokens,
            lengths,
            jnp.int32(count),
            sampling,
            stops,
            keys,
            said,
            most=bucket(count),
        ),
        count,
    )


def stream(model: Decoder, tokens: Array | np.ndarray, **arguments: Any) -> Iterator[Int[Array, "B"]]:
    """Like `generate`, one step at a time: yields the (B,) tokens of each step, -1 for rows that have ended.

    Args:
        arguments: those of `generate`.
    """
    policy = arguments.pop("policy", None)
    policy = full_policy() if policy is None else checked_policy(policy)
    count = whole(arguments.pop("max_new_tokens", 64), "max_new_tokens", least=1)
    rule, lengths = arguments.pop("sampling", GREEDY), arguments.pop("lengths", None)
    stops, seed = stop_tokens(model, arguments.pop("stop", ())), arguments.pop("seed", 0)
    logits, cache = _started(model, tokens, policy, lengths, count, arguments.pop("start", None), arguments)
    keys, done = row_keys(seed, len(logits)), jnp.zeros(len(logits), bool)
    given = _for_rows(len(logits), tokens, lengths)
    said = said_tokens(model.vocabulary, *given) if rule.repetition_penalty is not None else None
    token, said = _choose(logits, rule, keys, cache.next, said)
    for index in range(count):
        yield jnp.where(done, -1, token)
        done = done | jnp.any(token[:, None] == stops, axis=1)
        if index + 1 == count or bool(jnp.all(done)):
            return
        token, cache, said = _stream_step(model, policy, cache, token, done, rule, keys, said)


@takes_cache(static=("most",))
def _generate(model, policy, cache, logits, given, given_lengths, count, rule, stops, keys, said, *, most):
    """Feed `given` (may be empty), then sample up to `count` tokens into an array of `most`."""
    asked = given, given_lengths, count, rule, stops, keys

    def unfinished(state):
        return ~jnp.all(state[-1])

    def advance(state):
        step, cache, token, said, out, done = state
        logits, cache = decode(model, token, cache, policy, ~done)
        return step + 1, cache, *_fed(step + 1, logits, cache.next, said, out, done, *asked)

    out, done = jnp.full((logits.shape[0], most), -1, jnp.int32), jnp.zeros(logits.shape[0], bool)
    state = (jnp.int32(0), cache, *_fed(jnp.int32(0), logits, cache.next, said, out, done, *asked))
    _, cache, _, _, out, _ = while_loop(unfinished, advance, state)
    return Generation(out, jnp.sum(out >= 0, axis=1), cache)


@jax.jit
def _fed(step, logits, positions, said, out, done, given, given_lengths, count, rule: Sampling, stops, keys):
    """The token to feed at `step`, recorded if it is a new one, and which rows end with it."""
    batch, most = out.shape
    token, after = _choose(logits, rule, keys, positions, said)
    fresh = jnp.ones(batch, bool)
    if given.shape[1]:
        fresh = step >= given_lengths
        token = jnp.where(fresh, token, given[:, jnp.minimum(step, given.shape[1] - 1)])
        after = None if said is None or after is None else jnp.where(fresh[:, None], after, said)
    place = step - given_lengths
    out = out.at[jnp.arange(batch), jnp.where(fresh & ~done, place, most)].set(token, mode="drop")
    ends = fresh & (jnp.any(token[:, None] == stops, axis=1) | (place + 1 >= count))
    return token, after, out, done | ends


@takes_cache(donated=("said",))
def _stream_step(model, policy, cache, token, done, rule, keys, said):
    logits, cache = decode(model, token, cache, policy, ~done)
    token, said = _choose(logits, rule, keys, cache.next, said)
    return token, cache, said


def _choose(logits, rule: Sampling, keys: Key[Array, "B"], positions, said):
    """A token for every row, and what the text then holds."""
    token = next_token(logits, rule, keys, positions, said)
    return token, with_said(said, token)


def full_policy() -> Policy:
    """The full cache: no stage at all."""
    return Policy((), "full")


def _started(
    model: Decoder, tokens: Any, policy: Policy, lengths: Any, count: int, start: Any, prefilling: dict[str, Any]
) -> tuple[Float[Array, "B N"], KVCache]:
    """Logits and cache after the prompt: those given, or computed here."""
    if start is None:
        return prefill(model, tokens, policy, lengths, max_new_tokens=count, **prefilling)
    if prefilling:
        raise BadInput(f"{', '.join(sorted(prefilling))}: given with start, which is prefilled; allowed: one of them")
    logits, cache = start
    if len(logits) != len(cache.next) or len(logits) % len(tokens):
        raise BadInput(
            f"start has logits of {len(logits)} rows and a cache of {len(cache.next)}, for tokens of {len(tokens)}; "
            "allowed: the same rows, or as many copies of each (kvx.fork)"
        )
    check_room(cache, count - 1)
    return logits, cache


def _for_rows(rows: int, tokens: Any, lengths: Any) -> tuple[np.ndarray, Any]:
    """The prompts and their lengths for every row that continues them."""
    copies = rows // len(tokens)
    return np.repeat(np.asarray(tokens), copies, axis=0), None if lengths is None else np.repeat(lengths, copies)


def stop_tokens(model: Decoder, stop: Sequence[int]) -> Int[Array, "K"]:
    """Checked stop tokens, padded with -1."""
    for token in stop:
        whole(token, "stop", least=0, most=model.vocabulary - 1)
    width = max(-(-len(stop) // STOPS), 1) * STOPS
    return jnp.asarray([*stop, *[-1] * (width - len(stop))], jnp.int32)


def _trim(result: Generation, count: int) -> Generation:
    return Generation(result.tokens[:, :count], result.lengths, result.cache)
