"""The four metrics of a roofline: how many caches fit, and how long a prompt, a token and a change of caches take.

Source: "Challenges in Deploying Long-Context Transformers: A Theoretical Peak Performance Analysis" (2024), whose
metrics these are; formulas were derived again and agree with its published figures. It is a model of peaks: measured
prefill reaches 40 to 70 % of a chip's operations, decoding 60 to 90 % of its bandwidth. Chips work in parallel on every
layer (tensor parallel), and what they tell each other is taken to cost nothing.

A policy enters by bytes and operations, never by the bits it names: `Load` is filled from a cache's own arrays.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from kvx.eval.plan.chips import Chip

SYMBOLS = {
    "N": "chips",
    "M, F, BW, X": "one chip's memory, operations/s, bytes/s to memory, bytes/s to the host",
    "W, W_read": "weights on one chip; those that a step reads (a table of embeddings is looked up, not read)",
    "C(u), r": "cache of u rows on one chip; the share of it that a step reads",
    "KV": "one user's part of a cache on one chip, without padding",
    "S, u": "tokens of a prompt, rows of a batch",
    "FLOP(S), FLOP(1)": "operations for one row: of its prompt, of one token's products with weights",
    "V, R, a": "users, answers each of them gets, tokens of an answer",
}
"""What the letters in formulas stand for."""


@dataclass(frozen=True)
class Machine:
    """Chips that hold one model together."""

    chip: Chip
    chips: int = 1


@dataclass(frozen=True)
class Load:
    """What a model and a policy ask of a machine. Bytes are those on one chip, operations those of all chips.

    Attributes:
        weights: resident bytes of parameters.
        weights_read: of them, what a decode step reads.
        cache: resident bytes of a cache of so many rows; never falls.
        reads: the share of it that a decode step reads.
        user: bytes of one user's cache that move when users change.
        prompt: operations for one row's prompt.
        step: operations of one row's token in products with weights. Attention's are left out: it makes H / G of them
            for every byte or two that it reads, far below any chip's ridge, so memory always binds it.
    """

    weights: int
    weights_read: int
    cache: Callable[[int], int]
    reads: float
    user: int
    prompt: float
    step: float


def fits(load: Load, machine: Machine, rows: int) -> bool:
    """Whether weights and the cache of a batch fit: W + C(u) <= M."""
    return load.weights + load.cache(rows) <= machine.chip.memory


def users(load: Load, machine: Machine) -> int:
    """Rows whose caches fit beside the weights; 0 if not even one does.

    U = the largest u with W + C(u) <= M; where C(u) = u KV, that is floor((M - W) / KV).
    """
    high = 1
    while fits(load, machine, high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(load, machine, middle) else (low, middle)
    return low


def prefill_seconds(load: Load, machine: Machine, rows: int = 1) -> float:
    """Time to read a batch of prompts: by arithmetic, or for very short ones by reading the weights.

    T_pre = max(u FLOP(S) / (N F), W_read / BW)
    """
    chip = machine.chip
    return max(rows * load.prompt / (machine.chips * chip.flops), load.weights_read / chip.bandwidth)


def step_seconds(load: Load, machine: Machine, rows: int = 1) -> float:
    """Time of one token for every row: by what has to be read, or in large batches by products with weights.

    T_step = max((W_read + r C(u)) / BW, u FLOP(1) / (N F))
    """
    chip = machine.chip
    read = (load.weights_read + load.reads * load.cache(rows)) / chip.bandwidth
    return max(read, rows * load.step / (machine.chips * chip.flops))


def switch_seconds(load: Load, machine: Machine) -> float:
    """Time to move one user's cache to the host and another's in, one after the other, every chip over its own link.

    T_sw = 2 KV / X. Links that carry both directions at once can halve it.
    """
    return 2 * load.user / machine.chip.link


def session_rate(load: Load, machine: Machine, count: int, rounds: int, answer: int) -> float:
    """Sessions per second: users who each bring a prompt and get `rounds` answers. Own formulation.

    V / (V T_pre + R ceil(V / u) a T_step(u) [+ R V min(T_sw, T_pre) if V > U]), u = min(U, V): when not all fit, every
    round finds its cache swapped out, or computes it anew where that is faster. 0 if no cache fits.

    Args:
        count: users V.
        rounds: R.
        answer: tokens a of each answer.
    """
    together = min(users(load, machine), count)
    if together == 0:
        return 0.0
    prefill = prefill_seconds(load, machine)
    seconds = count * prefill + rounds * math.ceil(count / together) * answer * step_seconds(load, machine, together)
    if count > together:
        seconds += rounds * count * min(switch_seconds(load, machine), prefill)
    return count / seconds
