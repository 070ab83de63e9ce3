"""Claims about HashEvict (Liu et al. 2024): the whole rule against a dense one, ties, protection, exact occupancy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx import policies
from kvx.parts.simhash import hyperplanes, simhash
from tests.kvx.policies.masked_simulation import Simulation, kept_by
from tests.tiny import model, prompts


class HashEvict(Simulation):
    """The rule on booleans in float64: before a token is seen, the farthest code leaves every full head."""

    def __init__(self, model, prompt, budget, bits=16, sinks=4, recent=10, seed=0):
        self.budget, self.sinks, self.recent, self.queries = budget, sinks, recent, []
        self.planes = [
            np.asarray(hyperplanes(seed, jnp.int32(layer), bits, block.spec.key_dim), np.float64)
            for layer, block in enumerate(model.blocks)
        ]
        super().__init__(model, prompt, self)

    def prompt(self, layers):
        for index, layer in enumerate(layers):
            everyone, layer.alive = layer.alive, np.zeros_like(layer.alive)
            for place in range(everyone.shape[1]):
                self._free(index, layer.alive, layer.keys, self.queries[index][:, :, place], place)
                layer.alive[:, place] = True
        self.queries = None

    def step(self, token_or_index, layer=None):
        # The simulation calls its rule after attention, where this one has nothing to do.
        return super().step(token_or_index) if layer is None else None

    def _project(self, block, x, positions):
        q, k, v = super()._project(block, x, positions)
        if self.queries is not None:
            self.queries.append(q)
        else:
            index = next(index for index, each in enumerate(self.model.blocks) if each is block)
            layer = self.layers[index]
            self._free(index, layer.alive, layer.keys, q[:, :, 0], self.seen)
        return q, k, v

    def _free(self, index, alive, keys, query, place):
        """Frees a slot in every full head for the token at `place`, by its queries (G, R, D)."""
        sides = self.planes[index]
        for head in range(len(alive)):
            if alive[head].sum() < self.budget:
                continue
            free = [each for each in np.flatnonzero(alive[head]) if self.sinks <= each < place - self.recent]
            theirs = keys[head, free] @ sides.T > 0
            distance = sum(((own @ sides.T > 0) != theirs).sum(axis=1) for own in query[head])
            alive[head, free[int(np.argmax(distance))]] = False


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("budget", "other"),
    [
        (20, {}),
        (20, {"bits": 40}),
        (12, {"bits": 3, "sinks": 1, "recent": 2}),
        (16, {"seed": 3, "recent": 0}),
    ],
)
def test_kept_sets_and_logits_equal_the_dense_rule(budget, other):
    """Three bits tie all the time: there the oldest leaves."""
    prompt, _ = prompts(40)
    policy = policies.hashevict(budget, **other)
    oracle = HashEvict(model(), prompt[0], budget, **other)
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=16)
    assert kept_by(cache) == oracle.kept()
    for token in range(10, 26):
        logits, cache = kvx.decode_step(model(), np.asarray([token]), cache, policy)
        # float32 against float64 over four layers.
        np.testing.assert_allclose(logits[0], oracle.step(token), atol=2e-4)
        assert kept_by(cache) == oracle.kept()


def test_heads_and_layers_decide_for_themselves():
    prompt, _ = prompts(60)
    _, cache = kvx.prefill(model(), prompt, policies.hashevict(40))
    heads = [tuple(head) for layer in kept_by(cache) for head in layer]
    assert len(set(heads)) == len(heads)


def test_always_full_with_sinks_and_the_newest_and_no_slot_more():
    prompt, _ = prompts(50)
    policy = policies.hashevict(32)
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=300)
    for seen in range(50, 60):
        for store in cache.layers:
            assert store.positions().shape[-1] == 32, "nothing to spare: the free slot comes before the token"
        for head in (head for layer in kept_by(cache) for head in layer):
            assert len(set(head)) == 32
            assert {0, 1, 2, 3, *range(seen - 10, seen)} <= set(head)
        _, cache = kvx.decode_step(model(), np.asarray([seen]), cache, policy)


def test_below_the_budget_nothing_leaves():
    prompt, _ = prompts(24)
    policy = policies.hashevict(32)
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=16)
    for seen in range(24, 32):
        assert kept_by(cache) == [[list(range(seen))] * 2] * 4
        _, cache = kvx.decode_step(model(), np.asarray([seen]), cache, policy)


@pytest.mark.slow
@pytest.mark.parametrize("length", [64, 77])
def test_a_prompt_cut_after_every_chunk_goes_on_where_it_was(length):
    """A chunk sees what earlier ones left; in the first layer nothing depends on that, so it keeps the same."""
    prompt, _ = prompts(length)
    policy = policies.hashevict(24)
    _, whole = kvx.prefill(model(), prompt, policy)
    _, chunked = kvx.prefill(model(), prompt, policy, prefill_chunk=16, compress="chunk")
    assert kept_by(chunked)[0] == kept_by(whole)[0]
    assert all(len(head) == 24 for layer in kept_by(chunked) for head in layer)


STAGE = policies.hashevict(24, bits=4096, sinks=1, recent=2).stages[0]


def test_with_many_bits_the_widest_angle_leaves():
    random = np.random.default_rng(0)
    keys, queries = (jnp.asarray(random.standard_normal((8, 2, n, 16)), jnp.float32) for n in (20, 1))
    sides = hyperplanes(0, jnp.int32(0), 4096, 16)
    positions = jnp.asarray(np.stack([random.permutation(20) for _ in range(16)]).reshape(8, 2, 20), jnp.int32)
    chosen = STAGE.victim(simhash(keys, sides), positions, simhash(queries, sides), jnp.full((8, 1), 20, jnp.int32))
    cosine = np.einsum("bgcd,bgrd->bgc", keys, queries) / np.linalg.norm(keys, axis=-1)
    cosine = np.where((np.asarray(positions) < 1) | (np.asarray(positions) >= 18), np.inf, cosine)
    cosine /= np.linalg.norm(queries, axis=-1)
    best = np.take_along_axis(cosine, np.asarray(chosen)[..., None], axis=-1)[..., 0]
    # An estimate of the angle from 4096 bits is good to pi sqrt(1/4 / 4096) = 0.025; two such may change places.
    assert (np.arccos(cosine.min(axis=-1)) - np.arccos(best) < 0.1).all()
    assert (np.asarray(chosen) == cosine.argmin(axis=-1)).mean() > 0.8


def test_in_a_tie_the_oldest_leaves_and_empty_slots_and_padding_do_not_count():
    codes = jnp.zeros((1, 1, 8, 128), jnp.uint32).at[0, 0, 3].set(2**32 - 1)
    query = jnp.zeros((1, 1, 1, 128), jnp.uint32)
    # Slot 3 differs most but is empty; 0 is a sink, 8 and 9 are the newest; 4, 6 and 7 tie.
    positions = jnp.asarray([[[7, 0, 9, -1, 4, 8, 6, -1]]], jnp.int32)
    assert int(STAGE.victim(codes, positions, query, jnp.asarray([[10]], jnp.int32))[0, 0]) == 4


def test_hashes_cost_four_bytes_a_word_and_planes_none():
    prompt, _ = prompts(50)
    _, (short, long) = kvx.prefill(model(), prompt, (policies.hashevict(32), policies.hashevict(32, bits=64)))
    for few, many in zip(short.layers, long.layers, strict=True):
        assert sum(leaf.nbytes for leaf in jax.tree.leaves((few.keys, few.values, few.slots))) + 32 * 2 * 4 == sum(
            leaf.nbytes for leaf in jax.tree.leaves((few.keys, few.values, few.slots, few.stats))
        )
        assert many.stats.keys() == {"hash0", "hash1"}
    assert long.nbytes - short.nbytes == 4 * 32 * 2 * 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: policies.hashevict(14), "budget=14 is smaller than its protected slots"),
        (lambda: policies.hashevict(64, bits=0), "bits=0 is out of range"),
    ],
)
def test_what_cannot_work_is_refused(build, message):
    with pytest.raises(kvx.BadInput, match=message):
        build()
