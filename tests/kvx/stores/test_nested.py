"""Claims about the nested store: two buffers played literally, runs that are taken back, error bounds, bytes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvx.kernels.quantize_pack import quantize
from kvx.stores.base import nbytes
from kvx.stores.nested import Nested
from tests.kvx.stores.one_layer import GROUP, HEADS, SPEC, WIDTH, attention, query, tokens

BITS, N, DRAFTS = 4, 8, 5


@partial(jax.jit, static_argnames=("capacity", "bits", "group", "drafts"))
def packed(prompt, capacity=64, bits=BITS, group=N, drafts=DRAFTS):
    return Nested.pack(prompt, prompt.present, capacity, bits=bits, group=group, drafts=drafts)


settle = jax.jit(lambda store: store.settle())
append = jax.jit(lambda store, run: store.append(run))
crop = jax.jit(lambda store, next: store.crop(next))
read = jax.jit(lambda store, query: store.read(query))


def text(length: int, rows: int = 1, seed: int = 0):
    """Tokens 0 to length - 1 of every row."""
    return tokens(np.broadcast_to(np.arange(length), (rows, length)), seed)


def part(everything, start, count: int):
    """A run of each row's tokens from `start[row]` on."""
    index = jnp.asarray(np.asarray(start)[:, None] + np.arange(count), jnp.int32)
    index = jnp.broadcast_to(index[:, None], (index.shape[0], HEADS, count))
    return everything.take(index, jnp.ones(index.shape, bool))


def prompt(everything, lengths):
    """The first tokens of each row."""
    index = jnp.broadcast_to(jnp.arange(everything.positions.shape[-1]), everything.positions.shape)
    return everything.take(index, index < jnp.asarray(lengths)[:, None, None])


def rounded(groups: np.ndarray, bits: int, upper: bool) -> np.ndarray:
    """Groups along the last axis, coded and decoded by the formulas."""
    codes, scale, minimum = (np.asarray(array, np.float64) for array in quantize(jnp.asarray(groups), bits))
    coarse = codes * scale[..., None] + minimum[..., None]
    fine = scale[..., None] / 2**bits
    rest = np.clip(np.round((groups - coarse) / fine), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return coarse if upper else coarse + rest * fine


class TwoBuffers:
    """One row and head: F1 and F2 of n tokens, as the paper lists them; the codes of either view."""

    def __init__(self):
        self.keys, self.values = {True: [], False: []}, {True: [], False: []}
        self.first, self.second = [], []

    def append(self, key, value):
        if len(self.second) == N:
            for upper in (True, False):
                keys, values = (np.stack(rows) for rows in zip(*self.first, strict=True))
                self.keys[upper] += list(rounded(keys.T, BITS, upper).T)
                self.values[upper] += list(rounded(values.reshape(N, -1, N), BITS, upper).reshape(N, -1))
            self.first, self.second = self.second, []
        (self.first if len(self.first) < N else self.second).append((key, value))

    def read(self, queries, upper: bool):
        exact = self.first + self.second
        keys = np.array(self.keys[upper] + [key for key, _ in exact])
        values = np.array(self.values[upper] + [value for _, value in exact])
        logits = SPEC.scale * np.asarray(queries, np.float64) @ keys.T
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return (weights / weights.sum(-1, keepdims=True)) @ values


@pytest.mark.parametrize("lengths", [(0, 3), (16, 17), (15, 31), (40, 8)])
def test_rounds_of_drafts_and_verification_read_what_two_buffers_hold(lengths):
    """Junk is drafted and taken back, runs are verified together, a random part of each stays."""
    random = np.random.default_rng(sum(lengths))
    everything, junk = text(128, rows=2), tokens(np.broadcast_to(np.arange(128), (2, 128)), seed=99)
    store = packed(prompt(everything, lengths), capacity=128)
    oracles = [[TwoBuffers() for _ in range(HEADS)] for _ in range(2)]
    keys, values = np.asarray(everything.keys), np.asarray(everything.values)

    def feed(row, at):
        for head in range(HEADS):
            oracles[row][head].append(keys[row, head, at], values[row, head, at])

    for row, length in enumerate(lengths):
        for at in range(length):
            feed(row, at)
    next = np.array(lengths)
    for _ in range(12):
        store = settle(store)
        before = jax.tree.leaves((store.keys, store.values, store.slots))
        drafted = store.narrow()
        for draft in range(DRAFTS):
            spots = next[:, None] + draft
            drafted = append(drafted, part(junk, spots[:, 0], 1))
            if draft == 0:
                narrow = read(drafted, query(spots)).out
        store = crop(drafted.narrow(on=False), jnp.asarray(next))
        store = append(store, part(everything, next, DRAFTS + 1))
        asked = query(next[:, None] + np.arange(DRAFTS + 1))
        out = np.asarray(read(store, asked).out)
        after = jax.tree.leaves((store.keys, store.values, store.slots))
        assert all(map(np.array_equal, before, after)), "no run touches codes"
        stay = random.integers(1, DRAFTS + 2, 2)
        for row in range(2):
            for step in range(stay[row]):
                feed(row, next[row] + step)
                for head in range(HEADS):
                    expected = oracles[row][head].read(asked.rotated[row, head, :, step], upper=False)
                    # float32 sums over up to a hundred tokens; a code apart would be 1e-2.
                    np.testing.assert_allclose(out[row, head, :, step], expected, atol=2e-5)
        store = crop(store, jnp.asarray(next + stay))
        next = next + stay
    assert np.array_equal(np.max(store.positions(), axis=(1, 2)) + 1, next)
    assert narrow.shape == (2, HEADS, GROUP, 1, WIDTH)


@pytest.mark.slow
def test_a_draft_reads_upper_codes_and_the_exact_buffer():
    everything = text(64)
    store = settle(packed(prompt(everything, [50])))
    oracle = TwoBuffers()
    for at in range(51):
        oracle.append(np.asarray(everything.keys)[0, 0, at], np.asarray(everything.values)[0, 0, at])
    store = append(store, part(everything, [50], 1))
    asked = query([[50]])
    for upper in (True, False):
        out = np.asarray(read(store.narrow(upper), asked).out)[0, 0, :, 0]
        np.testing.assert_allclose(out, oracle.read(asked.rotated[0, 0, :, 0], upper), atol=2e-5)
    assert abs(np.asarray(read(store.narrow(), asked).out - read(store, asked).out)).max() > 1e-3, "the views differ"


def test_a_token_alone_and_a_run_give_the_same_cache():
    everything = text(96)
    one, runs = packed(prompt(everything, [20]), capacity=96), packed(prompt(everything, [20]), capacity=96)
    for at in range(20, 80):
        one = append(settle(one), part(everything, [at], 1))
    for at in range(20, 80, 6):
        runs = append(settle(runs), part(everything, [at], 6))
    one, runs = settle(one), settle(runs)
    at_once = packed(prompt(everything, [80]), capacity=96)
    for other in (runs, at_once):
        coded = 80 // N
        assert np.array_equal(one.slots, other.slots) and coded * N == (np.asarray(one.slots[0, 0]) >= 0).sum()
        assert np.array_equal(one.keys.words[..., : coded * N], other.keys.words[..., : coded * N])
        assert np.array_equal(one.keys.lower[..., : coded * N], other.keys.lower[..., : coded * N])
        assert np.array_equal(one.keys.ranges[:, :, :coded], other.keys.ranges[:, :, :coded])
        for mine, theirs in zip(jax.tree.leaves(one.values), jax.tree.leaves(other.values), strict=True):
            assert np.array_equal(mine[..., : coded * N], theirs[..., : coded * N])
        assert np.array_equal(np.sort(one.buffer.slots), np.sort(other.buffer.slots))


def test_the_newest_tokens_are_exact_and_every_token_shows_once():
    everything = text(96)
    store = packed(prompt(everything, [0]), capacity=96)
    for at in range(70):
        store = append(settle(store), part(everything, [at], 1))
        keys, values, positions = map(np.asarray, store.dense())
        for head in range(HEADS):
            assert np.array_equal(np.sort(positions[0, head])[-(at + 1) :], np.arange(at + 1))
            assert (positions[0, head] >= 0).sum() == at + 1
            newest = positions[0, head] > max(at - N, -1)
            order = positions[0, head][newest]
            assert np.array_equal(keys[0, head][newest], np.asarray(everything.keys)[0, head, order])
            assert np.array_equal(values[0, head][newest], np.asarray(everything.values)[0, head, order])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_errors_are_within_half_a_step_of_either_code(bits):
    """s / 2 for the upper codes; s / 2^(b + 1) for both, up to twice that near +s / 2, which has no lower code."""
    everything = text(96, seed=3)
    store = packed(everything, capacity=96, bits=bits)
    for name in ("keys", "values"):
        codes, true = getattr(store, name), np.asarray(getattr(everything, name), np.float64)
        step, true = np.asarray(codes.scale, np.float64), true.swapaxes(2, 3)
        step = step.repeat(N, axis=2).swapaxes(2, 3) if name == "keys" else step.repeat(N, axis=2)
        upper, both = (np.asarray(codes.decode(upper=upper), np.float64) for upper in (True, False))
        # Rounding of float32, at numbers up to 30.
        slack = 4e-6
        assert (abs(upper - true) <= step / 2 + slack).all()
        clipped = true - upper > step / 2 - step / 2 ** (bits + 1)
        bound = np.where(clipped, step / 2**bits, step / 2 ** (bits + 1))
        assert (abs(both - true) <= bound + slack).all()
        # A residual is about uniform over 2^b steps, of which half of one is clipped.
        assert clipped.mean() < 2.0 ** -(bits + 1) + 0.05
        assert abs(upper - true).max() > 0.9 * (step / 2).min(), "the bound is reached"


def test_reading_equals_attention_over_what_the_store_stands_for():
    everything = text(96, rows=2)
    store = settle(packed(prompt(everything, [61, 20]), capacity=96))
    store = append(store, part(everything, [61, 20], 1))
    asked = query([[61], [20]])
    # The next token's query may stand beyond a boundary that this one does not: 61 and 20 do not end a block.
    out, lse, probabilities = attention(asked, *store.dense())
    answer = read(store, asked)
    np.testing.assert_allclose(answer.out, out, atol=2e-5)
    np.testing.assert_allclose(answer.lse, lse, atol=2e-5)
    np.testing.assert_allclose(store.probabilities(asked, answer.lse), probabilities, atol=2e-6)


def test_a_row_that_has_ended_stays_what_it_is():
    everything = text(96, rows=2)
    both = packed(prompt(everything, [30, 30]), capacity=96)
    asked = query([[31], [31]])
    before = np.asarray(read(both, asked).out)[1]
    for at in range(30, 60):
        run = part(everything, [at, at], 1)
        ended = jnp.where(jnp.arange(2)[:, None, None] == 1, -1, run.positions)
        both = append(settle(both), type(run)(run.keys, run.values, ended, run.rotary))
    assert sorted(np.asarray(both.positions())[1, 0])[-30:] == list(range(30))
    assert (np.asarray(both.positions())[1] >= 0).sum() == 30 * HEADS
    np.testing.assert_allclose(np.asarray(read(both, asked).out)[1], before, atol=1e-6)


@pytest.mark.parametrize(("bits", "group"), [(4, 8), (4, 64), (2, 16)])
def test_bytes_are_the_closed_form(bits, group):
    store = packed(text(256), capacity=256, bits=bits, group=group)
    run = min(group, WIDTH)
    slot = 2 * WIDTH * 2 * bits / 8 + 4 * WIDTH / group + 4 * WIDTH / run + 4
    entry = 2 * WIDTH * 4 + 4
    rotary = nbytes(store.buffer.rotary)
    assert nbytes(store) == HEADS * (256 * slot + (2 * group + DRAFTS) * entry) + rotary
    assert store.bytes_read() == nbytes(store)
    assert nbytes(store) - store.narrow().bytes_read() == HEADS * 256 * 2 * WIDTH * bits / 8
