"""Claims about MiniCache (Liu et al. 2024): a float64 simulation of the whole rule, what stays exact, and memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx import policies
from kvx.stores.pair import Half
from tests import tiny
from tests.kvx.policies.masked_simulation import Simulation
from tests.kvx.test_prefill_memory import full_layer, sampled_prefill

LENGTH, NEW = 60, 12


class Interpolation:
    """The rule in float64: both layers' rows are overwritten by what the pair would restore."""

    def __init__(self, layers, start, t, gamma, cap, apart="distinct"):
        first = math.floor(start * layers)
        self.pairs = {upper: upper - 1 for upper in range(first + 1, layers, 2)}
        self.t, self.gamma, self.cap, self.apart = t, gamma, cap, apart

    def prompt(self, layers):
        self.layers = layers
        for upper, lower in self.pairs.items():
            for name in ("keys", "values"):
                x, y = getattr(layers[upper], name), getattr(layers[lower], name)
                merges = ~self._apart(*self._angle(x, y))
                for rows, new in zip((x, y), self._merged(x, y), strict=True):
                    rows[merges] = new[merges]

    def step(self, index, layer):
        if index not in self.pairs:
            return
        lower = self.layers[self.pairs[index]]
        for name in ("keys", "values"):
            x, y = getattr(layer, name), getattr(lower, name)
            x[:, -1], y[:, -1] = self._merged(x[:, -1], y[:, -1])

    def _angle(self, x, y):
        cosine = np.sum(x * y, axis=-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        return cosine, np.arccos(cosine)

    def _apart(self, cosine, angle):
        chosen = np.zeros(cosine.shape, bool)
        for head in range(len(cosine)):
            by = cosine[head] if self.apart == "distinct" else angle[head] / np.pi
            inside = np.flatnonzero(by < by.min() + self.gamma * (by.max() - by.min()))
            inside = inside[np.argsort(by[inside], kind="stable")][: math.ceil(self.cap * by.size)]
            chosen[head, inside] = True
        return chosen

    def _merged(self, x, y):
        angle = self._angle(x, y)[1][..., None]
        a, b = (np.linalg.norm(rows, axis=-1, keepdims=True) for rows in (x, y))
        e = (np.sin((1 - self.t) * angle) * x / a + np.sin(self.t * angle) * y / b) / np.sin(angle)
        return a * e, b * e


@pytest.mark.sampled
@pytest.mark.parametrize(
    "rule",
    [
        {"start": 0.5, "t": 0.6, "gamma": 0.05, "cap": 0.05},
        {"start": 0.0, "t": 0.5, "gamma": 0.4, "cap": 0.1},
        {"start": 0.0, "t": 0.3, "gamma": 0.4, "cap": 1.0},
        # Layers 1 and 2; the last has no neighbour.
        {"start": 0.3, "t": 0.8, "gamma": 0.2, "cap": 0.5, "apart": "alike"},
    ],
)
def test_logits_and_caches_equal_the_simulation(rule):
    model, (prompt, _) = tiny.model(), tiny.prompts(LENGTH)
    policy = policies.minicache(**rule)
    oracle = Simulation(model, prompt[0], Interpolation(4, **rule))
    logits, cache = kvx.prefill(model, prompt, policy, max_new_tokens=NEW)
    for token in range(10, 10 + NEW):
        logits, cache = kvx.decode_step(model, np.asarray([token]), cache, policy)
        # float32 against float64 over four layers.
        np.testing.assert_allclose(logits[0], oracle.step(token), atol=5e-4)
    for store, layer in zip(cache.layers, oracle.layers, strict=True):
        keys, values, positions = (np.asarray(array[0]) for array in store.dense())
        order = np.argsort(np.where(positions < 0, 10**6, positions), axis=-1)[:, : LENGTH + NEW - 1]
        # All but the newest token, which is exact until the next one comes.
        np.testing.assert_allclose(np.take_along_axis(keys, order[..., None], 1), layer.keys[:, :-1], atol=2e-4)
        np.testing.assert_allclose(np.take_along_axis(values, order[..., None], 1), layer.values[:, :-1], atol=2e-4)


def prefilled(policy, *lengths):
    tokens, lengths = tiny.prompts(*lengths)
    return kvx.prefill(tiny.model(), tokens, policy, lengths, max_new_tokens=NEW)


def test_norms_and_the_rows_kept_apart_are_exact_in_both_layers():
    _, exact = prefilled(policies.full(), LENGTH)
    _, cache = prefilled(policies.minicache(start=0.0, gamma=0.3, cap=0.2), LENGTH)
    for layer, (store, full) in enumerate(zip(cache.layers, exact.layers, strict=True)):
        assert isinstance(store, Half) and store.layer == layer % 2
        for shared, found, wanted in zip(
            (store.pair.keys, store.pair.values), store.dense(), full.dense(), strict=False
        ):
            found, wanted = np.asarray(found)[0, :, :LENGTH], np.asarray(wanted)[0, :, :LENGTH]
            norms = [np.linalg.norm(rows, axis=-1) for rows in (found, wanted)]
            np.testing.assert_allclose(*norms, rtol=1e-5)
            for head, slots in enumerate(np.asarray(shared.slots)[0]):
                rows = slots[slots < LENGTH]
                assert len(rows) > 0
                np.testing.assert_array_equal(found[head, rows], wanted[head, rows])
                assert np.abs(found[head] - wanted[head]).max() > 0.1, "the others did merge"
    kept = cache.layers[0].pair
    assert not np.array_equal(kept.keys.slots, kept.values.slots), "keys and values choose for themselves"


@pytest.mark.sampled
@pytest.mark.parametrize("parameters", [{"start": 1.0}, {"start": 0.0, "gamma": None}])
def test_no_pairs_and_pairs_that_all_stay_apart_are_the_full_cache(parameters):
    continuation = np.random.default_rng(5).integers(0, 97, (2, NEW)).astype(np.int32)
    scores = []
    for policy in (policies.full(), policies.minicache(**parameters)):
        logits, cache = prefilled(policy, LENGTH, 25)
        found, cache = kvx.teacher_forced(tiny.model(), continuation, cache, policy, logits)
        scores.append(np.asarray(found))
    np.testing.assert_allclose(*scores, atol=1e-5)


@pytest.mark.parametrize(
    ("start", "layers", "paired"),
    [(0.5, 4, [2, 3]), (0.0, 4, [0, 1, 2, 3]), (0.5, 5, [2, 3]), (0.5, 3, [1, 2]), (0.9, 4, []), (1.0, 4, [])],
)
def test_pairs_begin_at_the_start_and_a_layer_without_neighbour_stays(start, layers, paired):
    policy = policies.minicache(start=start)
    assert [layer for layer in range(layers) if policy.at(layer, layers).stages] == paired


def test_a_pair_takes_about_half_the_bytes_of_two_layers():
    """With 16-bit caches of 128 channels: the share that the docstring promises, norms and positions included."""
    model = tiny.model(head_dim=128, num_hidden_layers=2)
    tokens, _ = tiny.prompts(300)
    sizes = []
    for policy in (policies.full(), policies.minicache(start=0.0, gamma=0.0, cap=0.0)):
        _, cache = kvx.prefill(model, tokens, policy, cache_dtype=jnp.bfloat16)
        sizes.append(cache.nbytes)
    assert 0.5 < sizes[1] / sizes[0] < 0.53


def test_pairs_and_bytes_follow_the_closed_form():
    _, cache = prefilled(policies.minicache(start=0.0, gamma=0.05, cap=0.05), LENGTH)
    _, full = prefilled(policies.full(), LENGTH)
    slots, width = full.layers[0].slots.shape[-1], 32
    rows, vectors = math.ceil(0.05 * slots), 2 * width * 4
    head = slots * (vectors + 20) + rows * (2 * vectors + 8) + 2 * (vectors + 4)
    dense = 2 * slots * (vectors + 4)
    pairs, heads = 2, 2
    assert full.nbytes - cache.nbytes == pairs * heads * (dense - head)
    assert len(cache.storage) == pairs


@pytest.mark.slow
@pytest.mark.parametrize("layers", [4, 8])
def test_a_prefill_holds_one_waiting_layer_and_the_current_one_beside_the_pairs(monkeypatch, layers):
    length = 768
    peak, after, _ = sampled_prefill(monkeypatch, "minicache(start=0.0)", layers, length)
    print(layers, "layers: peak", peak, "after", after, "full layer", full_layer(length))
    assert peak == 2 * full_layer(length) + after


def test_pairs_share_their_compiled_programs(monkeypatch):
    from kvx.loop import pack_layer

    tokens, _ = tiny.prompts(50)
    policy = policies.minicache(start=0.0, t=0.37)
    kvx.prefill(tiny.model(num_hidden_layers=2), tokens, policy)
    before = pack_layer._cache_size()
    kvx.prefill(tiny.model(num_hidden_layers=4), tokens, policy)
    # The spec names the number of layers, so a deeper model packs anew: twice, whatever its pairs.
    assert pack_layer._cache_size() == before + 2


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"start": 1.5}, "start=1.5 is out of range"),
        ({"t": -0.1}, "t=-0.1 is out of range"),
        ({"gamma": 2}, "gamma=2 is out of range"),
        ({"cap": math.nan}, "cap=nan is out of range"),
        ({"apart": "far"}, "apart='far' is not offered; allowed: distinct, alike"),
    ],
)
def test_bad_parameters_are_refused(parameters, sentence):
    with pytest.raises(kvx.BadInput, match=sentence):
        policies.minicache(**parameters)


def test_a_selection_before_it_is_refused():
    for earlier in (policies.snapkv(32, window=8), policies.h2o(32)):
        with pytest.raises(kvx.BadInput, match="needs the same tokens in the same slots of all layers"):
            kvx.chain(earlier, policies.minicache())
    assert len(kvx.chain(policies.full(), policies.minicache()).stages) == 1


def test_a_compiled_prefill_works_on_shapes_alone():
    """As ahead-of-time compilation asks for: the pair is made inside a trace."""
    model, policy = tiny.model(), policies.minicache(start=0.0)
    shape = jax.eval_shape(lambda tokens: kvx.prefill(model, tokens, policy)[1].next, jnp.zeros((2, 32), jnp.int32))
    assert shape.shape == (2,)
