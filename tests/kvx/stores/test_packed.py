"""The packed store against KIVI's list of steps played literally, and its contracts as a store."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvx.decoder import AttentionSpec
from kvx.kernels.quantize_pack import dequantize, quantize
from kvx.query import Query
from kvx.rotary import Rotary
from kvx.stores.base import nbytes
from kvx.stores.packed import Packed
from kvx.tokens import Tokens

HEADS, GROUP, WIDTH = 2, 2, 32
ROTARY = Rotary(jnp.asarray(10.0 ** -np.arange(WIDTH // 2) / 3, jnp.float32), jnp.float32(1))
SPEC = AttentionSpec(HEADS * GROUP, HEADS, WIDTH, WIDTH, scale=WIDTH**-0.5)


class Stream:
    """Random queries, rotated keys and values of a text, the same for every length; rows are rows of a batch."""

    def __init__(self, length: int, rows: int = 1, seed: int = 0):
        length = max(length, 128)  # prompts are padded with junk

        def draw(name, *shape):
            noise = [np.random.default_rng([seed, name, row]).standard_normal(shape) for row in range(rows)]
            return np.stack(noise).astype(np.float32)

        self.keys = draw(0, length, HEADS, WIDTH).swapaxes(1, 2) * np.linspace(0.3, 4, WIDTH, dtype=np.float32)
        self.values = draw(1, length, HEADS, WIDTH).swapaxes(1, 2)
        self.queries = draw(2, length, HEADS, GROUP, WIDTH).transpose(0, 2, 3, 1, 4)

    def prompt(self, lengths, width: int, **stats) -> Tokens:
        index = np.arange(width)
        positions = np.where(index < np.asarray(lengths)[:, None], index, -1)[:, None].repeat(HEADS, 1)
        keys, values = self.keys[:, :, :width], self.values[:, :, :width]
        stats = {name: jnp.asarray(stat[:, :, :width]) for name, stat in stats.items()}
        return Tokens(jnp.asarray(keys), jnp.asarray(values), jnp.asarray(positions, jnp.int32), ROTARY, stats)

    def token(self, at, active=None) -> tuple[Tokens, Query]:
        """The token of each row at position `at[row]`, and its query."""
        at = np.asarray(at)
        spots = at if active is None else np.where(active, at, -1)
        rows = np.arange(len(at))
        positions = jnp.asarray(spots[:, None], jnp.int32)
        tokens = Tokens(
            jnp.asarray(self.keys[rows, :, at][:, :, None]),
            jnp.asarray(self.values[rows, :, at][:, :, None]),
            jnp.broadcast_to(positions[:, None], (len(at), HEADS, 1)),
            ROTARY,
        )
        return tokens, Query(jnp.asarray(self.queries[rows, :, :, at][:, :, :, None]), positions, ROTARY, SPEC)


class ListOfSteps:
    """One row and head of KIVI, step by step as the paper lists them (methods: prefill 1-2, decode 1-4)."""

    def __init__(self, keys, values, residual: int, group: int, bits: int):
        self.residual, self.group, self.bits = residual, group, bits
        self.packed_keys, self.packed_values = [], []
        sealed = residual * (len(keys) // residual)
        for start in range(0, sealed, group):
            self.packed_keys += self.round(keys[start : start + group].T).T.tolist()
        self.exact_keys = keys[sealed:].tolist()
        sealed = max(0, len(values) - residual)
        for value in values[:sealed]:
            self.packed_values.append(self.round(value.reshape(-1, group)).reshape(-1))
        self.exact_values = list(values[sealed:])

    def round(self, groups):
        return np.asarray(dequantize(*quantize(jnp.asarray(groups), self.bits)))

    def step(self, queries, key, value):
        self.exact_keys.append(key.tolist())
        keys = np.array(self.packed_keys + self.exact_keys)
        logits = queries @ keys.T * WIDTH**-0.5
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        if len(self.exact_keys) == self.residual:
            block = np.array(self.exact_keys, np.float32)
            for start in range(0, self.residual, self.group):
                self.packed_keys += self.round(block[start : start + self.group].T).T.tolist()
            self.exact_keys = []
        self.exact_values.append(value)
        out = weights @ np.array([*self.packed_values, *self.exact_values])
        if len(self.exact_values) > self.residual:
            self.packed_values.append(self.round(self.exact_values.pop(0).reshape(-1, self.group)).reshape(-1))
        return out


@partial(jax.jit, static_argnames=("capacity", "slots", "bits", "group", "residual"))
def packed(tokens, capacity, slots, bits=2, group=8, residual=16):
    """A store of everything present."""
    return Packed.pack(tokens, tokens.present, capacity, slots=slots, bits=bits, group=group, residual=residual)


@partial(jax.jit, donate_argnames="store")
def step(store, tokens, query):
    store = store.append(tokens)
    return store, store.read(query)


def leaves_equal(one, other) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def row_of(store, row: int):
    """One row of a batch, copied, since a step donates what it is given."""
    return jax.tree.map(lambda a: jnp.array(a[row : row + 1] if a.ndim > 1 else a), store)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("length", "residual", "group", "bits"),
    [(0, 16, 8, 2), (5, 16, 8, 4), (16, 16, 8, 2), (17, 16, 16, 3), (47, 16, 8, 8), (48, 16, 16, 2), (40, 32, 32, 4)],
)
def test_every_read_equals_the_list_of_steps(length, residual, group, bits):
    steps = 2 * residual + 3
    stream = Stream(length + steps, rows=2)
    total = -(-(length + steps) // residual) * residual
    store = packed(stream.prompt([length] * 2, 48), 48, total, bits, group, residual)
    oracles = [
        [
            ListOfSteps(stream.keys[b, g, :length], stream.values[b, g, :length], residual, group, bits)
            for g in range(HEADS)
        ]
        for b in range(2)
    ]
    for at in range(length, length + steps):
        tokens, query = stream.token([at, at])
        store, part = step(store, tokens, query)
        queries = np.asarray(query.rotated)
        for b in range(2):
            for g in range(HEADS):
                expected = oracles[b][g].step(queries[b, g, :, 0], stream.keys[b, g, at], stream.values[b, g, at])
                # float32 sums in another order.
                np.testing.assert_allclose(part.out[b, g, :, 0], expected, atol=3e-5, err_msg=f"step {at}")


def counts(store):
    """Tokens whose key is packed, and whose value is, per row and head."""
    values = np.sum(np.asarray(store.slots) >= 0, axis=-1)
    return values + np.sum(np.asarray(store.places) >= 0, axis=-1), values


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(lengths=st.tuples(st.integers(0, 70), st.integers(0, 70)), steps=st.integers(1, 40))
def test_boundaries_are_those_a_step_reads(lengths, steps):
    stream = Stream(112, rows=2)
    store = packed(stream.prompt(lengths, 72), 72, 112)
    for offset in range(steps):
        store, _ = step(store, *stream.token(np.add(lengths, offset)))
    keys, values = counts(store)
    for row, length in enumerate(lengths):
        before = length + steps - 1  # KIVI packs at the end of a step, this store at the start of the next
        assert (keys[row] == 16 * (before // 16)).all()
        assert (values[row] == max(0, before - 16)).all()
        held = np.sort(np.asarray(store.positions())[row], axis=-1)[:, -(before + 1) :]
        assert (held == np.arange(before + 1)).all()
        assert (np.asarray(store.positions())[row] >= 0).sum() == HEADS * (before + 1)


def test_streaming_gives_the_codes_of_one_prefill():
    stream = Stream(64)
    streamed = packed(stream.prompt([0], 72), 72, 64)
    for at in range(64):
        streamed, _ = step(streamed, *stream.token([at]))
    at_once = packed(stream.prompt([63], 72), 72, 64)
    # 63 tokens have packed 48 keys and 47 values; the 64th has packed nothing yet.
    assert leaves_equal(*(store.keys.words[..., :48] for store in (streamed, at_once)))
    assert leaves_equal(*(store.keys.ranges[:, :, : 48 // 8] for store in (streamed, at_once)))
    assert leaves_equal(*([a[..., :47] for a in jax.tree.leaves(store.values)] for store in (streamed, at_once)))
    assert leaves_equal(streamed.slots, at_once.slots)


@pytest.mark.sampled
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_numbers_are_within_half_a_step(bits):
    stream = Stream(96)
    store = packed(stream.prompt([96], 96), 96, 96, bits)
    keys, values, positions = map(np.asarray, store.dense())
    assert (positions[0, :, :80] == np.arange(80)).all()
    key_step = np.asarray(store.keys.scale, np.float32).repeat(8, axis=2)[:, :, :80]
    value_step = np.asarray(store.values.scale, np.float32).repeat(8, axis=2).swapaxes(2, 3)[:, :, :80]
    # 1e-6 for the rounding of float32 itself.
    assert (abs(keys[:, :, :80] - stream.keys[:, :, :80]) <= key_step / 2 + 1e-6).all()
    assert (abs(values[:, :, :80] - stream.values[:, :, :80]) <= value_step / 2 + 1e-6).all()
    assert (values[:, :, 96 : 96 + 16] == stream.values[:, :, 80:96]).all()  # what is in the ring is exact


def test_reading_equals_attention_over_what_the_store_stands_for():
    stream = Stream(90, rows=2)
    store = packed(stream.prompt([61, 20], 64), 64, 96)
    for offset in range(9):
        tokens, query = stream.token([61 + offset, 20 + offset])
        store, part = step(store, tokens, query)
    keys, values, positions = store.dense()
    logits = jnp.einsum("bgrtd,bgcd->bgrtc", query.rotated, keys) * SPEC.scale
    logits = jnp.where(positions[:, :, None, None] >= 0, logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    np.testing.assert_allclose(part.out, jnp.einsum("bgrtc,bgcv->bgrtv", weights, values), atol=1e-5)
    np.testing.assert_allclose(part.lse, jax.nn.logsumexp(logits, axis=-1), atol=1e-5)
    np.testing.assert_allclose(store.probabilities(query, part.lse), weights, atol=1e-6)


@pytest.mark.slow
def test_a_sliding_window_masks_codes_and_tail_alike():
    stream = Stream(60)
    store = packed(stream.prompt([50], 56), 56, 64)
    tokens, query = stream.token([50])
    narrow = Query(query.raw, query.positions, ROTARY, AttentionSpec(**{**vars(SPEC), "window": 40, "softcap": 3.0}))
    store, part = step(store, tokens, narrow)
    keys, values, positions = store.dense()
    logits = 3 * jnp.tanh(jnp.einsum("bgrtd,bgcd->bgrtc", query.rotated, keys) * SPEC.scale / 3)
    weights = jax.nn.softmax(jnp.where(positions[:, :, None, None] > 10, logits, -jnp.inf), axis=-1)
    np.testing.assert_allclose(part.out, jnp.einsum("bgrtc,bgcv->bgrtv", weights, values), atol=1e-5)


def test_a_row_that_has_ended_changes_nothing():
    stream = Stream(80, rows=2)
    store = packed(stream.prompt([48, 33], 48), 48, 80)
    for offset in range(20):
        before = row_of(store, 1)
        active = np.array([True, offset < 3])
        store, _ = step(store, *stream.token([48 + offset, 33 + min(offset, 3)], active))
        if not active[1]:
            # An empty ring entry may be written with a token at position -1; what the store stands for may not change.
            after = row_of(store, 1)
            for one, other in zip(before.dense(), after.dense(), strict=True):
                present = np.asarray(after.positions())[..., None] >= 0
                one, other = (np.asarray(a) if a.ndim == 4 else np.asarray(a)[..., None] for a in (one, other))
                assert (np.where(present, one, 0) == np.where(present, other, 0)).all()
            assert leaves_equal(before.positions(), after.positions())
            assert leaves_equal((before.keys, before.values, before.slots), (after.keys, after.values, after.slots))
    held = np.sum(np.asarray(store.positions()) >= 0, axis=-1)
    assert (held == [[68], [36]]).all()


def test_rows_at_different_lengths_have_the_codes_they_have_alone():
    lengths, stream = [61, 17, 40], Stream(120, rows=3)
    together = packed(stream.prompt(lengths, 64), 64, 112)
    for offset in range(35):
        together, _ = step(together, *stream.token(np.add(lengths, offset)))
    for row, length in enumerate(lengths):
        single = Stream(120, rows=3)
        for name in ("keys", "values", "queries"):
            setattr(single, name, getattr(stream, name)[row : row + 1])
        alone = packed(single.prompt([length], 64), 64, 112)
        for offset in range(35):
            alone, _ = step(alone, *single.token([length + offset]))
        mine = row_of(together, row)
        assert leaves_equal((mine.slots, mine.places, mine.tail.slots), (alone.slots, alone.places, alone.tail.slots))
        packed_slots = np.asarray(alone.slots) >= 0
        for one, other in zip(mine.dense(), alone.dense(), strict=True):
            one, other = np.asarray(one)[:, :, :112], np.asarray(other)[:, :, :112]
            assert (one[packed_slots] == other[packed_slots]).all()


@jax.jit
def release(store, scores, excess):
    return store.release(scores, excess)


class GroupEviction:
    """One row and head: which positions are held, as lists of whole groups, under the stated rule."""

    def __init__(self, length: int, residual: int, group: int):
        self.residual, self.group = residual, group
        self.held = list(range(length))
        self.arrived = length
        self.groups = [list(range(i, i + group)) for i in range(0, residual * (length // residual), group)]

    def append(self):
        if self.arrived % self.residual == 0:
            known = {p for group in self.groups for p in group} | set(range(self.arrived - self.residual))
            block = range(self.arrived - self.residual, self.arrived)
            if self.arrived and block[0] not in known:
                self.groups += [list(block[i : i + self.group]) for i in range(0, self.residual, self.group)]
        self.held.append(self.arrived)
        self.arrived += 1

    def release(self, score, budget):
        if len(self.held) - budget < self.group:
            return
        sealed = self.arrived - 1 - self.residual  # values before this are packed
        free = [g for g in self.groups if g[-1] < sealed and not any(np.isposinf(score[p]) for p in g)]
        if free:
            lowest = min(free, key=lambda g: (np.float32(np.mean([score[p] for p in g], dtype=np.float32)), -g[0]))
            self.groups.remove(lowest)
            self.held = [p for p in self.held if p not in lowest]


def test_eviction_frees_the_weakest_whole_group():
    budget, steps, lengths = 30, 150, [44, 13]
    stream = Stream(200, rows=2)
    worth = np.random.default_rng(5).random((2, HEADS, 200)).astype(np.float32).round(1)  # with ties
    worth[:, :, :3] = np.inf
    store = packed(stream.prompt(lengths, 48), 48, 64)
    oracles = [[GroupEviction(length, 16, 8) for _ in range(HEADS)] for length in lengths]
    for offset in range(steps):
        store, _ = step(store, *stream.token(np.add(lengths, offset)))
        positions = np.asarray(store.positions())
        scores = np.take_along_axis(worth, np.maximum(positions, 0), axis=-1)
        store = release(store, jnp.asarray(scores), jnp.sum(store.positions() >= 0, axis=-1) - budget)
        after = np.asarray(store.positions())
        for b in range(2):
            for g in range(HEADS):
                oracles[b][g].append()
                oracles[b][g].release(worth[b, g], budget)
                assert sorted(after[b, g][after[b, g] >= 0]) == oracles[b][g].held, f"step {offset}"


def test_endless_eviction_in_constant_memory_loses_nothing_else():
    stream = Stream(1100, rows=2)
    store = packed(stream.prompt([32, 22], 48), 48, 64)
    bytes_before = nbytes(store)
    held = [set(range(32)), set(range(22))]
    for offset in range(1000):
        store, part = step(store, *stream.token([32 + offset, 22 + offset]))
        before = np.asarray(store.positions())
        scores = jnp.asarray(np.where(before % 7 == 0, 1.0, before / 2000), jnp.float32)
        store = release(store, scores, jnp.sum(store.positions() >= 0, axis=-1) - 32)
        after = np.asarray(store.positions())
        for row, first in enumerate([32, 22]):
            present = before[row, 0][before[row, 0] >= 0]
            assert set(present) == held[row] | {first + offset} and len(present) <= 32 + 8
            gone = set(present) - set(after[row, 0])
            assert len(gone) in (0, 8) and max(gone, default=0) < first + offset - 16
            held[row] = set(present) - gone
    assert nbytes(store) == bytes_before and bool(jnp.isfinite(part.out).all())


def test_statistics_follow_their_tokens():
    stream = Stream(100)
    own = np.arange(100, dtype=np.float32)[None, None].repeat(HEADS, 1)
    store = packed(stream.prompt([45], 48, mass=own), 48, 80)

    @jax.jit
    def fed(store, tokens, mass):
        tokens = Tokens(tokens.keys, tokens.values, tokens.positions, ROTARY, {"mass": mass})
        store = store.append(tokens)
        return store.with_stats({"mass": store.stats["mass"] + 1000})

    for at in range(45, 80):
        store = fed(store, stream.token([at])[0], jnp.full((1, HEADS, 1), at, jnp.float32))
    present = np.asarray(store.positions()) >= 0
    steps = np.where(np.asarray(store.positions()) < 45, 35, 80 - np.asarray(store.positions()))
    expected = np.asarray(store.positions()) + 1000 * steps
    assert (np.asarray(store.stats["mass"])[present] == expected[present]).all()


@pytest.mark.parametrize(("bits", "dtype", "stats"), [(2, jnp.float32, 0), (3, jnp.bfloat16, 1), (4, jnp.bfloat16, 0)])
def test_bytes_are_those_of_the_closed_form(bits, dtype, stats):
    extra = {"mass": np.zeros((1, HEADS, 64), np.float32)} if stats else {}
    store = packed(Stream(64).prompt([64], 64, **extra).astype(dtype), 64, 96, bits)
    slot = 2 * (WIDTH * bits / 8 + 4 * WIDTH / 8) + 4 + 4 * stats
    entry = 2 * WIDTH * jnp.dtype(dtype).itemsize + 8 + 4 * stats
    assert nbytes(store) - nbytes(ROTARY) == HEADS * (96 * slot + 17 * entry)
    assert store.bytes_read() == nbytes(store)


def test_a_bfloat16_tail_is_read_in_bfloat16():
    stream = Stream(60)
    store = packed(stream.prompt([50], 56).astype(jnp.bfloat16), 56, 64)
    tokens, query = stream.token([50])
    store, part = step(store, tokens, query)
    keys, values, _ = store.dense()
    assert keys.dtype == values.dtype == jnp.bfloat16 and part.out.dtype == jnp.float32


def cache_sized_copies(text: str, elements: int) -> list[str]:
    """Copies, or mere conversions, of arrays of at least so many elements in compiled text."""
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* copy(?:-start)?\(", text)
    shapes += re.findall(r"%wrapped_(?:bitcast-)?convert\S* = \w+\[([\d,]+)\]", text)
    return [shape for shape in shapes if np.prod([int(n) for n in shape.split(",")]) >= elements]


def test_the_decode_loop_copies_no_codes():
    stream = Stream(600)
    tokens, query = stream.token([500])
    store = packed(stream.prompt([500], 512), 512, 1024, bits=4, group=16, residual=32)
    # Ranges, one word for 16 slots, are turned about as they are read: a small part of what is decoded.
    smallest = min(store.keys.words.size, store.values.words.size)
    assert smallest > store.keys.ranges.size

    leaves, structure = jax.tree.flatten(store)

    def advance(body):
        def loop(leaves, tokens, query):
            state = jax.tree.unflatten(structure, leaves), jnp.zeros_like(query.raw)
            store, out = jax.lax.fori_loop(0, 20, lambda _, state: body(*state, tokens, query), state)
            return jax.tree.leaves(store), out

        # Leaves, not the store: what lower() puts in their places would not pass for arrays.
        arrays = jax.tree.flatten((tokens, query))

        def flat(leaves, others):
            return loop(leaves, *jax.tree.unflatten(arrays[1], others))

        return jax.jit(flat, donate_argnums=0).lower(leaves, arrays[0]).compile().as_text()

    def append_then_read(store, _, tokens, query):
        store = store.append(tokens)
        return store, store.read(query).out

    def read_then_append(store, _, tokens, query):
        out = store.read(query).out
        return store.append(tokens), out

    assert not cache_sized_copies(advance(append_then_read), smallest)
    assert cache_sized_copies(advance(read_then_append), smallest)  # the counter can count
