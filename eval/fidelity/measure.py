"""The measurement: policies walk through documents beside the full cache, token by token, and are compared on the way.

What is held fixed. Every run is teacher-forced on the text, and its residual stream is its own: the divergence of the
distributions is the whole error, accumulated through layers and steps. The attention error is not: at every layer and
step the policy's query is also put to the full cache's store, and the two answers are compared, so that an error of
the layers below moves the query but is not counted again. The tokens asked for are the full run's: the same question
to every policy.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console

import kvx
from kvx.cache import KVCache
from kvx.decoder import Decoder
from kvx.errors import BadInput
from kvx.eval.cost.cache_bytes import as_bfloat16
from kvx.eval.fidelity.findings import Fidelity
from kvx.eval.fidelity.looks import Gap, Gaps, MostAttended
from kvx.eval.shared_pass import prefill_each
from kvx.eval.side_by_side import side_by_side
from kvx.layer_by_layer import scan
from kvx.lending import takes_cache
from kvx.parts.amounts import whole
from kvx.progress import Steps
from kvx.pytree import pytree
from kvx.step import observed_run

SEGMENT = 32
"""Decode steps whose distributions exist at a time: the full cache's and one policy's, over the whole vocabulary."""

MOST = 32
"""Tokens that count as the most attended."""


def fidelity(
    model: Decoder,
    texts: Int[np.ndarray, "B T"],
    prompt: int,
    policies: Sequence[kvx.Policy],
    *,
    most: int = MOST,
    by_layer: bool = False,
    console: Console | None = None,
) -> list[Fidelity]:
    """How far each policy lies from the full cache while documents are forced through the decode path.

    The distribution after the prompt does not count: it comes before any policy has been read. The policies walk
    through the documents side by side, `SEGMENT` steps at a time: all their caches exist at once.

    Args:
        texts: one batch of documents, all of one length.
        prompt: tokens of each that are prefilled; the others are forced, one by one.
        policies: what to measure; the full cache need not be among them, and costs nothing more if it is.
        most: k of the recall of the k most attended tokens, by query head; 0: attention is not looked at, and only
            distributions are compared (on SmolLM2-135M a third less compilation and a tenth less time).
        by_layer: compile single layers instead of whole decode steps (`kvx.layer_by_layer`).

    Raises:
        BadInput: a prompt that leaves fewer than two tokens to force (nothing follows the last), or k below 0.
    """
    batch, length = texts.shape
    if not 1 <= prompt <= length - 2:
        raise BadInput(f"prompt={prompt} of documents of {length} tokens; allowed: 1 to {length - 2}")
    whole(most, "most", least=0)
    full = kvx.policies.full()
    every = [full, *(policy for policy in policies if policy.text != full.text)]
    forced = texts[:, prompt:]
    caches = [cache for _, cache in prefill_each(model, texts[:, :prompt], every, forced.shape[1])]
    bytes_of = [(cache.nbytes // batch, cache.bytes_read() // batch) for cache in caches]
    bfloat16 = as_bfloat16(caches[0]) // batch
    # What follows the last token is not known; it is cut off again.
    following = np.concatenate([forced[:, 1:], forced[:, -1:]], axis=1)
    walks: list[list[_Walk]] = [[] for _ in every]
    starts = range(0, forced.shape[1], SEGMENT)
    with Steps(len(starts) * len(every), console) as steps:
        for start in starts:
            here = slice(start, start + SEGMENT)
            tokens, after = (jnp.asarray(array[:, here], jnp.int32) for array in (forced, following))
            steps(f"steps {start + 1} to {start + tokens.shape[1]}: {full.text}")
            with kvx.layer_by_layer(by_layer):
                reference, wanted, caches[0] = _reference(model, tokens, caches[0], most=most)
            walks[0].append(_compared(reference, reference, after, _no_gaps(wanted)))

            def one(index: int, tokens=tokens, after=after, reference=reference, wanted=wanted):
                with kvx.layer_by_layer(by_layer):
                    scores, gaps, cache = _forced(model, tokens, wanted, caches[index], every[index], caches[0])
                return _compared(reference, scores, after, gaps), cache

            # The first stretch compiles; later ones fill the cores by themselves.
            for index, (walk, cache) in enumerate(side_by_side(model, one, range(1, len(every)), timed=start > 0), 1):
                steps(f"steps {start + 1} to {start + tokens.shape[1]}: {every[index].text}")
                walks[index].append(walk)
                caches[index] = cache
    found = [
        _findings(policy, walk, prompt, bfloat16, *sizes)
        for policy, walk, sizes in zip(every, walks, bytes_of, strict=True)
    ]
    others = iter(found[1:])
    # In their order and not by their text, which policies that learned different arrays may share.
    return [found[0] if policy.text == full.text else next(others) for policy in policies]


@pytree
class _Walk:
    """One segment of a policy's walk; gaps, one a layer, are summed over its steps."""

    divergence: Float[Array, "B T"]
    agreement: Float[Array, "B T"]
    surprisal: Float[Array, "B T"]
    gaps: tuple[Gap, ...]


@takes_cache(static=("most",))
def _reference(
    model: Decoder, tokens: Int[Array, "B T"], cache: KVCache, *, most: int
) -> tuple[Float[Array, "B T N"], tuple[Int[Array, "T B H K"], ...], KVCache]:
    """The full cache's log-probabilities after each token, and the tokens that every layer attended to most."""
    everyone, look = jnp.ones((len(tokens), 1), bool), MostAttended(most) if most else None

    def advance(cache, token):
        logits, cache, wanted = observed_run(model, token[:, None], cache, kvx.policies.full(), everyone, look)
        return cache, (_log_softmax(logits[:, 0]), wanted)

    cache, (scores, wanted) = scan(advance, cache, tokens.T)
    return jnp.swapaxes(scores, 0, 1), wanted if most else (), cache


@takes_cache()
def _forced(
    model: Decoder,
    tokens: Int[Array, "B T"],
    wanted: tuple[Int[Array, "T B H K"], ...],
    cache: KVCache,
    policy: kvx.Policy,
    full: KVCache,
) -> tuple[Float[Array, "B T N"], tuple[Gap, ...], KVCache]:
    """A policy's log-probabilities after each token, and each layer's gaps.

    Args:
        full: the full cache after these tokens; what is later than a query, it does not see.
    """
    everyone, stores = jnp.ones((len(tokens), 1), bool), full.layers

    def advance(cache, step):
        token, wanted = step
        look = Gaps(stores, wanted) if wanted else None
        logits, cache, gaps = observed_run(model, token[:, None], cache, policy, everyone, look)
        return cache, (_log_softmax(logits[:, 0]), gaps)

    cache, (scores, gaps) = scan(advance, cache, (tokens.T, wanted))
    return jnp.swapaxes(scores, 0, 1), gaps if wanted else (), cache


_log_softmax = jax.jit(jax.nn.log_softmax)


def _no_gaps(wanted: tuple[Int[Array, "T B H K"], ...]) -> tuple[Gap, ...]:
    """The full cache's from itself."""
    asked = [jnp.sum(each >= 0, axis=-1, dtype=jnp.int32) for each in wanted]
    return tuple(Gap(jnp.zeros(each.shape), jnp.ones(each.shape), each, each) for each in asked)


@jax.jit
def _compared(
    reference: Float[Array, "B T N"], scores: Float[Array, "B T N"], after: Int[Array, "B T"], gaps: tuple[Gap, ...]
) -> _Walk:
    """A segment's numbers: KL(reference || scores), equal likeliest tokens, -log p of the tokens that follow."""
    divergence = jnp.sum(jnp.exp(reference) * (reference - scores), axis=-1)
    same = jnp.argmax(reference, axis=-1) == jnp.argmax(scores, axis=-1)
    surprisal = -jnp.take_along_axis(scores, after[..., None], axis=-1)[..., 0]
    return _Walk(divergence, same.astype(jnp.float32), surprisal, jax.tree.map(lambda array: jnp.sum(array, 0), gaps))


def _findings(
    policy: kvx.Policy, walk: list[_Walk], start: int, bf16_bytes: int, cache_bytes: int, bytes_read: int
) -> Fidelity:
    """The segments put together, in float64."""

    def along(name: str) -> Float[np.ndarray, "B T"]:
        return np.concatenate([np.asarray(getattr(each, name), np.float64) for each in walk], axis=1)

    def by_layer(name: str) -> tuple[Float[np.ndarray, "B _"], ...]:
        layers = zip(*(each.gaps for each in walk), strict=True)
        return tuple(
            np.sum([np.asarray(getattr(each, name), np.float64) for each in layer], axis=0) for layer in layers
        )

    return Fidelity(
        policy.text,
        start,
        along("divergence"),
        along("agreement"),
        along("surprisal")[:, :-1],
        by_layer("distance"),
        by_layer("size"),
        by_layer("found"),
        by_layer("asked"),
        cache_bytes,
        bf16_bytes,
        bytes_read,
        policy.nbytes,
    )
