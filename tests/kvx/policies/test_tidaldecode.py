"""Claims about TidalDecode (Yang et al. 2024): a masked float64 simulation of whole steps, exact choices, bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx import policies
from kvx.step import decode_run
from kvx.stores.chosen import Chosen
from kvx.stores.dense import Dense
from tests import tiny
from tests.kvx.policies.direct import softmax
from tests.kvx.policies.masked_simulation import Simulation
from tests.kvx.stores import one_layer

LENGTH, NEW = 60, 12


class Persistent(Simulation):
    """Dense attention everywhere; above a layer that chooses, logits outside its set are masked."""

    def __init__(self, model, prompt, layers, count, recent, group=None):
        self.choosing, self.count, self.recent, self.group = layers, count, recent, group
        super().__init__(model, prompt, self)

    def prompt(self, layers):
        pass

    def step(self, token):
        x = self.model.embed(jnp.asarray([[token]], jnp.int32))
        allowed = None
        for index, (block, layer) in enumerate(zip(self.model.blocks, self.layers, strict=True)):
            q, k, v = self._project(block, x, np.asarray([self.seen]))
            layer.keys = np.concatenate([layer.keys, k], axis=1)
            layer.values = np.concatenate([layer.values, v], axis=1)
            logits = np.einsum("grtd,gsd->grts", q, layer.keys) * block.spec.scale
            if index in self.choosing:
                allowed = self._chosen(softmax(logits))
                p = softmax(logits)
            else:
                p = softmax(logits if allowed is None else np.where(allowed, logits, -np.inf))
            x = self._finish(block, x, np.einsum("grts,gsd->grtd", p, layer.values))
        self.seen += 1
        return np.asarray(self.model.unembed(x[:, 0]))[0]

    def _chosen(self, p):
        if self.group:
            p = np.broadcast_to(getattr(np, self.group)(p, axis=1, keepdims=True), p.shape)
        p = np.where(np.arange(p.shape[-1]) >= p.shape[-1] - self.recent, np.inf, p)
        best = np.argsort(-p, axis=-1, kind="stable")[..., : self.count]
        allowed = np.zeros(p.shape, bool)
        np.put_along_axis(allowed, best, True, axis=-1)
        return allowed


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("layers", "recent", "group"),
    [((0,), 0, None), ((0, 2), 4, None), ((1,), 1, None), ((1, 2), 1, "max"), ((0,), 4, "mean")],
)
def test_logits_equal_the_masked_simulation(layers, recent, group):
    model, (prompt, _) = tiny.model(), tiny.prompts(LENGTH)
    policy = policies.tidaldecode(8, layers, recent, group)
    oracle = Persistent(model, prompt[0], layers, 8, recent, group)
    logits, cache = kvx.prefill(model, prompt, policy, max_new_tokens=NEW)
    for token in range(10, 10 + NEW):
        logits, cache = kvx.decode_step(model, np.asarray([token]), cache, policy)
        # float32 against float64 over four layers.
        np.testing.assert_allclose(logits[0], oracle.step(token), atol=5e-4)


def scores(policy, *lengths):
    continuation = np.random.default_rng(5).integers(0, 97, (len(lengths), NEW)).astype(np.int32)
    tokens, lengths = tiny.prompts(*lengths)
    logits, cache = kvx.prefill(tiny.model(), tokens, policy, lengths, max_new_tokens=NEW)
    found, cache = kvx.teacher_forced(tiny.model(), continuation, cache, policy, logits)
    return np.asarray(found), cache


@pytest.mark.sampled
@pytest.mark.parametrize("group", [None, "max", "mean"])
def test_a_choice_of_everything_is_dense(group):
    wanted, _ = scores(policies.full(), LENGTH, 25)
    found, _ = scores(policies.tidaldecode(LENGTH + NEW, layers=(0,), group=group), LENGTH, 25)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.sampled
@pytest.mark.parametrize("layers", [(-1,), (0, 1, 2, 3), (2, 3)])
def test_without_a_layer_that_reuses_every_layer_is_dense(layers):
    wanted, _ = scores(policies.full(), LENGTH, 25)
    np.testing.assert_allclose(scores(policies.tidaldecode(4, layers), LENGTH, 25)[0], wanted, atol=1e-5)


def test_slots_hold_the_same_tokens_in_every_layer_also_after_a_row_has_ended():
    tokens, lengths = tiny.prompts(40, 25)
    policy = policies.tidaldecode(8, layers=(0,))
    _, cache = kvx.prefill(tiny.model(), tokens, policy, lengths, max_new_tokens=NEW)
    _, cache = kvx.prefill(tiny.model(), tokens[:, :9], policy, np.asarray([9, 3], np.int32), cache)
    first = np.asarray(cache.layers[0].positions())
    assert (first.max(axis=-1) == [[48, 48], [27, 27]]).all()
    for layer in cache.layers:
        np.testing.assert_array_equal(layer.positions(), first)


def store(count, length=50, sets=2, group=None, recent=0, sparse=False, capacity=64):
    tokens = one_layer.tokens([range(length)])
    inner = Dense.pack(tokens, jnp.ones((1, 2, length), bool), capacity)
    return Chosen(inner, jnp.asarray([count]), count, recent, sets, group, sparse)


def logits_of(kept, asked):
    logits = np.einsum("bgrtd,bgcd->bgrtc", asked.rotated, kept.inner.keys) * one_layer.SPEC.scale
    slots = np.asarray(kept.inner.slots)[:, :, None, None]
    seen = (slots >= 0) & (slots <= np.asarray(asked.positions)[:, None, None, :, None])
    return np.where(seen, logits, -np.inf)


def test_every_query_head_chooses_its_own_exact_top():
    kept, asked = store(7), one_layer.query([[49]])
    part, chosen = kept.choose(asked)
    np.testing.assert_array_equal(chosen, np.argsort(-logits_of(kept, asked), axis=-1, kind="stable")[..., :7])
    assert not np.array_equal(chosen[:, :, 0], chosen[:, :, 1])
    whole = kept.inner.read(asked)
    np.testing.assert_array_equal(part.out, whole.out)
    np.testing.assert_array_equal(part.lse, whole.lse)


@pytest.mark.parametrize("group", ["max", "mean"])
def test_query_heads_that_share_choose_by_the_largest_or_the_mean_probability(group):
    kept, asked = store(7, sets=1, group=group), one_layer.query([[49]])
    reduced = getattr(np, group)(softmax(logits_of(kept, asked)), axis=2, keepdims=True)
    _, chosen = kept.choose(asked)
    np.testing.assert_array_equal(chosen, np.argsort(-reduced, axis=-1, kind="stable")[..., :7])


def test_equal_probabilities_choose_the_lower_slot():
    kept, asked = store(3), one_layer.query([[49]])
    flat = Dense(jnp.zeros_like(kept.inner.keys), kept.inner.values, kept.inner.slots, kept.inner.rotary)
    _, chosen = Chosen(flat, kept.budget, 3, 1, 2, None, False).choose(asked)
    assert np.array_equal(chosen, np.broadcast_to([49, 0, 1], chosen.shape)), "the newest is forced, then the lowest"


def test_recent_tokens_are_in_every_choice():
    asked = one_layer.query([[49]])
    _, free = store(6).choose(asked)
    _, forced = store(6, recent=4).choose(asked)
    assert not (np.asarray(free) >= 46).any(axis=-1).all(), "else this shows nothing"
    assert (np.sort(np.asarray(forced)[..., :4], axis=-1) == [46, 47, 48, 49]).all()


@pytest.mark.sampled
@pytest.mark.parametrize(("sets", "group"), [(2, None), (1, "max")])
def test_reading_a_choice_is_attention_masked_outside_it(sets, group):
    kept, asked = store(9, sets=sets, group=group), one_layer.query([[49]])
    # The choice of another layer: other keys, other queries.
    other = Chosen(
        Dense.pack(one_layer.tokens([range(50)], seed=8), jnp.ones((1, 2, 50), bool), 64),
        jnp.asarray([6]), 9, 0, sets, group, False,
    )  # fmt: skip
    _, chosen = other.choose(one_layer.query([[49]], seed=9))
    assert (np.asarray(chosen)[..., 6:] == -1).all(), "beyond the row's budget"
    part = kept.read_at(asked, chosen)
    allowed = np.zeros((1, 2, sets, 1, 64), bool)
    np.put_along_axis(allowed, np.asarray(chosen)[..., :6], True, axis=-1)
    logits = np.where(allowed, logits_of(kept, asked), -np.inf)
    p = softmax(logits)
    np.testing.assert_allclose(part.out, np.einsum("bgrtc,bgcv->bgrtv", p, kept.inner.values), atol=1e-5)
    np.testing.assert_allclose(part.lse, np.log(np.exp(logits.astype(np.float64)).sum(axis=-1)), atol=1e-5)


@pytest.mark.slow
def test_several_queries_have_a_choice_each():
    kept, together = store(5, recent=2), one_layer.query([[47, 48, 49]])
    part, chosen = kept.choose(together)
    reused = kept.read_at(together, chosen)
    for index, position in enumerate((47, 48, 49)):
        alone = type(together)(
            together.raw[:, :, :, index : index + 1], jnp.asarray([[position]]), together.rotary, together.spec
        )
        one, own = kept.choose(alone)
        np.testing.assert_array_equal(chosen[:, :, :, index], own[:, :, :, 0])
        np.testing.assert_allclose(part.out[:, :, :, index], one.out[:, :, :, 0], atol=1e-5)
        np.testing.assert_allclose(reused.out[:, :, :, index], kept.read_at(alone, own).out[:, :, :, 0], atol=1e-5)


@pytest.mark.slow
def test_a_run_of_tokens_equals_them_one_by_one():
    model, (prompt, _) = tiny.model(), tiny.prompts(30)
    policy = policies.tidaldecode(8, layers=(0,))
    run = jnp.asarray([[5, 17, 44]])
    _, cache = kvx.prefill(model, prompt, policy, max_new_tokens=NEW)
    together, _ = jax.jit(decode_run)(model, run, cache, policy, jnp.ones((1, 3), bool))
    for index in range(3):
        logits, cache = kvx.decode_step(model, run[:, index], cache, policy)
        np.testing.assert_allclose(together[:, index], logits, atol=1e-4)


def test_bytes_read_follow_the_closed_form():
    row, slots = 2 * 2 * 32 * 4, 64  # keys and values of 2 heads, 32 channels, float32
    positions, budget = 2 * slots * 4, 4
    assert store(7, sparse=True).bytes_read() == 2 * 7 * row + positions + budget
    assert store(7, sets=1, group="max", sparse=True).bytes_read() == 7 * row + positions + budget
    # Two choices of 40 of 64 slots have some in common: no slot is read from memory twice.
    assert store(40, sparse=True).bytes_read() == slots * row + positions + budget
    rotary = 16 * 4 + 4
    assert store(7).bytes_read() == slots * row + positions + budget + rotary


def test_a_cache_reads_whole_below_and_in_the_layers_that_choose():
    _, cache = scores(policies.tidaldecode(8, layers=(1,)), LENGTH)
    kinds = [(type(layer), getattr(layer, "sparse", None)) for layer in cache.layers]
    assert kinds == [(Dense, None), (Chosen, False), (Chosen, True), (Chosen, True)]
    whole, choosing, *sparse = (layer.bytes_read() for layer in cache.layers)
    slots = cache.layers[0].slots.shape[-1]
    assert all(abs(each - (2 * 8 * 512 + 2 * slots * 4)) <= 4 for each in sparse)
    assert choosing == whole + 4 and cache.bytes_read() == whole + choosing + sum(sparse)


@pytest.mark.parametrize(
    ("depth", "choosing"), [(32, {2, 13}), (16, {1, 7}), (30, {2, 12}), (80, {5, 33}), (4, {0, 2})]
)
def test_the_papers_layers_scale_with_the_depth(depth, choosing):
    policy = policies.tidaldecode()
    stages = [policy.at(layer, depth).stages for layer in range(depth)]
    assert {layer for layer, each in enumerate(stages) if each and not each[0].sparse} == choosing
    assert [bool(each) for each in stages] == [layer >= min(choosing) for layer in range(depth)]


def test_a_layer_that_the_model_does_not_have_is_refused():
    tokens, _ = tiny.prompts(20)
    for layers in ((4,), (0, -5)):
        with pytest.raises(kvx.BadInput, match=rf"names layer {layers[-1]}; allowed: -4 to 3"):
            kvx.prefill(tiny.model(), tokens, policies.tidaldecode(8, layers))


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"budget": 0}, "budget=0 is not positive"),
        ({"budget": 3}, "recent=4 protects more slots than budget=3 has; allowed: at most 3"),
        ({"layers": ()}, "lets no layer choose"),
        ({"group": "sum"}, "group='sum' is not offered; allowed: max, mean, None"),
    ],
)
def test_bad_parameters_are_refused(parameters, sentence):
    with pytest.raises(kvx.BadInput, match=sentence):
        policies.tidaldecode(**parameters)


def test_a_selection_before_it_is_refused():
    with pytest.raises(kvx.BadInput, match="needs the same tokens in the same slots of all layers"):
        kvx.chain(policies.snapkv(32, window=8), policies.tidaldecode(8))
    assert len(kvx.chain(policies.full(), policies.tidaldecode(8)).stages) == 1
