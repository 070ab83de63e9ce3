"""Cost measured: bytes, time of prefill and time of a token, against the prompt's length and the batch's size."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import jax
import numpy as np
from jaxtyping import Int

import kvx
from kvx.decoder import Decoder
from kvx.errors import BadInput
from kvx.eval.cost.cache_bytes import CacheBytes, array_bytes, parts
from kvx.eval.cost.live_bytes import Scratch, most_alive
from kvx.eval.plan.abstract import abstract_prefill
from kvx.eval.programs import make_room
from kvx.eval.records import Cost
from kvx.parts.amounts import whole


def costs(
    decoder: Decoder,
    model_name: str,
    policies: Sequence[kvx.Policy],
    lengths: Sequence[int],
    batches: Sequence[int],
    *,
    tokens: np.ndarray,
    steps: int = 16,
    repeats: int = 3,
) -> Iterator[Cost]:
    """Measure every policy alone at every length and batch size, one after the other, as the iterator is read.

    Prefill is timed whole (the exact pass, the evidence that the policy reads, its packing), a step as one of `steps`
    in the compiled loop of `kvx.generate`. Each runs once unmeasured, which compiles; then the median of `repeats`.

    `peak_bytes` holds the weights, the prompt, and the most that is alive while the prefill's programs go by, their
    scratch as this machine's compiler plans it (`kvx.eval.cost.live_bytes`). It is told from the programs and not
    sampled, so it is the same in every run; where the data decide how many slots a policy needs, it is that of the
    most.

    Args:
        decoder: a model with weights.
        model_name: what records call it.
        policies: calibrated where they need it.
        lengths: tokens of every prompt.
        batches: prompts at once.
        tokens: ids of a text, (length,) integers; prompts are consecutive pieces of it, from its beginning again where
            it is too short.
        steps: decode steps that are timed together.
        repeats: times that prefill and steps are timed.

    Raises:
        BadInput: a text that is not integers or is empty; lengths, batches, steps or repeats below 1; what
            `kvx.prefill` refuses.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise BadInput(
            f"tokens has shape {tokens.shape} and dtype {tokens.dtype}; allowed: integers (length,), not empty"
        )
    for name, values in (("lengths", lengths), ("batches", batches), ("steps", (steps,)), ("repeats", (repeats,))):
        for value in values:
            whole(value, name, least=1)
    return _costs(decoder, model_name, policies, lengths, batches, tokens, steps, repeats)


def _costs(decoder, model_name, policies, lengths, batches, tokens, steps: int, repeats: int) -> Iterator[Cost]:
    for length in lengths:
        for batch in batches:
            prompts = np.resize(tokens, (batch, length)).astype(np.int32)
            scratch = Scratch()
            for policy in policies:
                make_room()
                yield _cost(decoder, model_name, policy, prompts, steps, repeats, scratch)


def _cost(
    decoder: Decoder,
    model_name: str,
    policy: kvx.Policy,
    prompts: Int[np.ndarray, "B T"],
    steps: int,
    repeats: int,
    scratch: Scratch,
) -> Cost:
    batch, length = prompts.shape
    trace = abstract_prefill(decoder, policy, length, batch, steps).trace
    alive = most_alive(trace, scratch=scratch)
    laps = [lap(decoder, prompts, policy, steps) for _ in range(1 + repeats)][1:]
    return Cost(
        model=model_name,
        policy=policy.text,
        length=length,
        batch=batch,
        cache_bytes=laps[0].held.total,
        metadata_bytes=laps[0].held.metadata,
        peak_bytes=sum(array_bytes(leaf) for leaf in jax.tree.leaves(decoder)) + prompts.nbytes + alive,
        bytes_read=laps[0].bytes_read,
        prefill_seconds=median(each.prefill_seconds for each in laps),
        step_seconds=median(each.step_seconds for each in laps),
    )


@dataclass(frozen=True)
class Lap:
    """A prefill and some decode steps, once.

    Attributes:
        prefill_seconds: of the exact pass, the evidence that the policy reads, and its packing.
        step_seconds: of one step in the compiled loop.
        held: bytes of the cache after the prompt.
        bytes_read: of it, in a step.
    """

    prefill_seconds: float
    step_seconds: float
    held: CacheBytes
    bytes_read: int


def lap(decoder: Decoder, prompts: Int[np.ndarray, "B T"], policy: kvx.Policy, steps: int) -> Lap:
    """Run and time both; the first lap of a policy compiles."""
    begin = time.perf_counter()
    start = jax.block_until_ready(kvx.prefill(decoder, prompts, policy, max_new_tokens=steps))
    middle = time.perf_counter()
    held = CacheBytes.of(parts(start[1]))
    again = time.perf_counter()
    # The first token comes from the prefill's logits, so this many steps give one token more.
    result = kvx.generate(decoder, prompts, policy=policy, max_new_tokens=steps + 1, start=start)
    jax.block_until_ready(result)
    end = time.perf_counter()
    return Lap(middle - begin, (end - again) / steps, held, result.cache.bytes_read())
