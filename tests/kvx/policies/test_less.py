"""Claims about LESS (Dong et al. 2024): recurrent = parallel form, exact maps = full cache, zero maps = the host."""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

import kvx
from kvx import policies
from kvx.cache import ENDLESS
from kvx.context import Spec
from kvx.decoder import AttentionSpec
from kvx.kernels.merge_partials import merge_partials
from kvx.parts.feature_state import Absorb, FeatureMaps, FeatureState
from kvx.policy import Policy
from kvx.pytree import pytree
from kvx.step import decode
from kvx.stores.dense import Dense
from tests.kvx.policies import direct
from tests.kvx.policies.masked_simulation import Simulation, kept_by
from tests.kvx.policies.test_h2o import HeavyHitters
from tests.tiny import model, prompts


def drawn(policy: Policy, layers: int = 4, seed: int = 3, weight: float = 0.3) -> Policy:
    """With random maps for the tiny model, of scales at which the state matters."""
    (stage,) = policy.stages
    attention = model().blocks[0].spec
    keys = jax.random.split(jax.random.key(seed), layers)
    maps = jax.tree.map(lambda *each: jnp.stack(each), *[stage.losers.initial(key, attention) for key in keys])
    maps = replace(maps, key_scale=maps.key_scale * 0 + weight, mix_scale=maps.mix_scale * 0 + 0.5)
    return with_maps(policy, maps)


def with_maps(policy: Policy, maps) -> Policy:
    (stage,) = policy.stages
    return replace(policy, stages=(replace(stage, losers=replace(stage.losers, maps=maps)),))


def small(budget=12, **changes) -> Policy:
    return policies.less(budget, **{"recent": 4, "features": 5, "hidden": 16, **changes})


def gelu(x):
    return np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float32), approximate=False), np.float64)


def features(maps: FeatureMaps, layer: int, q, k):
    """phi (G, R, T, M) and psi (G, S, M) in numpy, straight from the formula."""
    a1, a2, b1, b2, c, s1, s2 = (np.asarray(array, np.float64)[layer] for array in jax.tree.leaves(maps))
    groups, ratio = q.shape[:2]
    phi = np.stack(
        [
            np.stack([np.abs(gelu(gelu(q[g, r] @ a1[g * ratio + r]) @ a2[g * ratio + r])) for r in range(ratio)])
            for g in range(groups)
        ]
    )
    u = np.stack([np.abs(s1[g]) * gelu(gelu(k[g] @ b1[g]) @ b2[g]) for g in range(groups)])
    return phi, np.stack([np.abs(u[g] + (u[g] @ c[g]) * s2[g]) for g in range(groups)])


class Parallel(Simulation):
    """The masked form: kept tokens weigh exp(l), evicted ones phi . psi, under one normaliser; no state anywhere."""

    def __init__(self, model, prompt, rule, maps):
        self.maps = maps
        super().__init__(model, prompt, rule)

    def step(self, token: int) -> np.ndarray:
        x = self.model.embed(jnp.asarray([[token]], jnp.int32))
        for index, (block, layer) in enumerate(zip(self.model.blocks, self.layers, strict=True)):
            q, k, v = self._project(block, x, np.asarray([self.seen]))
            layer.keys = np.concatenate([layer.keys, k], axis=1)
            layer.values = np.concatenate([layer.values, v], axis=1)
            layer.alive = np.pad(layer.alive, ((0, 0), (0, 1)), constant_values=True)
            exact = np.exp(np.einsum("grtd,gsd->grts", q, layer.keys) * block.spec.scale)
            phi, psi = features(self.maps, index, q, layer.keys)
            alive = layer.alive[:, None, None]
            weights = np.where(alive, exact, np.einsum("grtm,gsm->grts", phi, psi))
            x = self._finish(
                block, x, np.einsum("grts,gsd->grtd", weights / weights.sum(axis=-1, keepdims=True), layer.values)
            )
            # The host's score is the softmax over kept tokens alone.
            layer.last = (np.where(alive, exact, 0) / np.where(alive, exact, 0).sum(axis=-1, keepdims=True))[:, :, 0]
            layer.mass = np.pad(layer.mass, ((0, 0), (0, 1))) + layer.last.mean(axis=1)
            self.rule.step(index, layer)
        self.seen += 1
        return np.asarray(self.model.unembed(x[:, 0]))[0]


class Lambda:
    """Sinks and the most recent tokens."""

    def __init__(self, budget, sinks):
        self.budget, self.sinks = budget, sinks

    def prompt(self, layers):
        for layer in layers:
            self.step(0, layer)

    def step(self, index, layer):
        place = np.arange(layer.alive.shape[1])
        layer.alive[:] = (place < self.sinks) | (place >= len(place) - (self.budget - self.sinks))


@pytest.mark.sampled
@pytest.mark.parametrize("host", ["h2o", "lambda"])
def test_kept_sets_and_logits_equal_the_parallel_form(host):
    """The recurrent state against a matrix of weights, decode step by decode step."""
    prompt, _ = prompts(24)
    policy = drawn(small(host=host))
    rule = HeavyHitters(12, 4) if host == "h2o" else Lambda(12, 4)
    oracle = Parallel(model(), prompt[0], rule, policy.stages[0].losers.maps)
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=16)
    _, plain = kvx.prefill(model(), prompt, policies.h2o(12, recent=4), max_new_tokens=16)
    assert kept_by(cache) == oracle.kept()
    for token in range(10, 22):
        logits, cache = kvx.decode_step(model(), np.asarray([token]), cache, policy)
        # float32 against float64 over four layers.
        np.testing.assert_allclose(logits[0], oracle.step(token), atol=2e-4)
        assert kept_by(cache) == oracle.kept()
        without, plain = kvx.decode_step(model(), np.asarray([token]), plain, policies.h2o(12, recent=4))
    assert np.abs(np.asarray(without - logits)).max() > 0.05, "the state matters here"


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["query_out", "key_scale"])
def test_maps_of_zero_are_the_sparse_policy(zero):
    """phi = 0 or psi = 0, with sums over a group, which order as H2O's means do."""
    prompt, lengths = prompts(40, 23)
    maps = drawn(small()).stages[0].losers.maps
    policy = with_maps(small(), replace(maps, **{zero: getattr(maps, zero) * 0}))
    host = policies.h2o(12, recent=4)
    found = []
    for each in (policy, host):
        _, cache = kvx.prefill(model(), prompt, each, lengths, max_new_tokens=8)
        rows = []
        for token in range(8):
            logits, cache = kvx.decode_step(model(), np.asarray([token, token]), cache, each)
            rows.append(np.asarray(logits))
        found.append((rows, [np.asarray(store.positions()) for store in cache.layers]))
    (rows, positions), (host_rows, host_positions) = found
    np.testing.assert_allclose(rows, host_rows, atol=1e-5)
    np.testing.assert_array_equal(positions, host_positions)


@pytree
class Exact(FeatureMaps):
    """Maps that are exact on known keys: psi is the index of a key among them, phi their exponentials."""

    known: Float[Array, "*layers G N D"] | None = None

    def psi(self, keys):
        distance = jnp.sum((keys[..., None, :] - self.known[:, None]) ** 2, axis=-1)
        return jax.nn.one_hot(jnp.argmin(distance, axis=-1), self.known.shape[-2])

    def phi(self, queries):
        return jnp.exp(jnp.einsum("bgrtd,gnd->bgrtn", queries, self.known) * queries.shape[-1] ** -0.5)


class Trusting(Absorb):
    """Maps of another kind have other shapes, and are not trained."""

    def objection(self, layers: Mapping[int, AttentionSpec]) -> str | None:
        return None

    def check(self, spec: Spec) -> None:
        pass


jax.tree_util.register_dataclass(Trusting)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["h2o", "lambda"])
def test_exact_maps_are_the_full_cache(host):
    """As many features as tokens: every logit of the full cache, whatever was evicted at prefill and while decoding."""
    text, _ = prompts(40)
    _, whole = kvx.prefill(model(), text, policies.full(), max_new_tokens=1)
    known = jnp.stack([store.dense()[0][0, :, :40] for store in whole.layers])
    (stage,) = small(8, host=host).stages
    policy = Policy((replace(stage, losers=Trusting(Exact(known=known), features=40)),), "exact")
    _, cache = kvx.prefill(model(), text[:, :24], policy, max_new_tokens=16)
    _, full = kvx.prefill(model(), text[:, :24], policies.full(), max_new_tokens=16)
    for place in range(24, 40):
        logits, cache = kvx.decode_step(model(), text[:, place], cache, policy)
        expected, full = kvx.decode_step(model(), text[:, place], full, policies.full())
        np.testing.assert_allclose(logits, expected, atol=2e-4)
    assert max(len(head) for layer in kept_by(cache) for head in layer) == 8


@pytest.mark.slow
def test_linear_and_log_space_agree():
    """One division of sums against partials merged by log-sum-exp."""
    random = np.random.default_rng(0)
    tokens, asked = direct.tokens(2, 9), direct.query(4, 2, 9)
    gone = jnp.broadcast_to(jnp.arange(9) < 4, (1, 2, 9))
    sparse = Dense.pack(tokens, ~gone, 16)
    phi, psi = random.uniform(size=(1, 2, 2, 1, 3)), random.uniform(size=(1, 2, 9, 3))
    state = FeatureState.empty(1, 2, 3, 8).add(jnp.asarray(psi, jnp.float32), tokens.values, gone)
    merged = merge_partials(sparse.read(asked), state.read(jnp.asarray(phi, jnp.float32)))
    exact = np.exp(np.einsum("bgrtd,bgsd->bgrts", asked.rotated, tokens.rotated_keys) * 8**-0.5)
    weights = np.where(np.arange(9) < 4, np.einsum("bgrtm,bgsm->bgrts", phi, psi), exact)
    expected = np.einsum("bgrts,bgsv->bgrtv", weights, tokens.values) / weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(merged.out, expected, atol=1e-6)
    np.testing.assert_allclose(merged.lse, np.log(weights.sum(axis=-1)), atol=1e-6)


def test_a_state_of_no_token_reads_as_nothing():
    part = FeatureState.empty(1, 2, 3, 8).read(jnp.ones((1, 2, 2, 1, 3)))
    assert np.all(np.asarray(part.out) == 0) and np.all(np.asarray(part.lse) == -np.inf)


def test_the_state_depends_on_the_set_of_tokens_and_not_on_their_order():
    random = np.random.default_rng(1)
    psi, values = jnp.asarray(random.uniform(size=(1, 2, 6, 3)), jnp.float32), direct.tokens(2, 6).values
    everyone = jnp.ones((1, 2, 6), bool)
    at_once = FeatureState.empty(1, 2, 3, 8).add(psi, values, everyone)
    one_by_one = FeatureState.empty(1, 2, 3, 8)
    for index in random.permutation(6):
        pick = slice(index, index + 1)
        one_by_one = one_by_one.add(psi[:, :, pick], values[:, :, pick], everyone[:, :, pick])
    np.testing.assert_allclose(at_once.values, one_by_one.values, atol=1e-5)
    np.testing.assert_allclose(at_once.mass, one_by_one.mass, rtol=1e-5)


@pytree
class Counting(FeatureMaps):
    """One feature of 1 for every token: the mass is a count."""

    def psi(self, keys):
        return jnp.ones((*keys.shape[:3], 1))

    def phi(self, queries):
        return jnp.zeros((*queries.shape[:4], 1))


@pytest.mark.slow
def test_every_token_is_kept_or_absorbed_once():
    """Counts over kept and absorbed add up to the text, in every head, for ragged rows and one that has ended."""
    tokens, lengths = prompts(40, 9, 23)
    (stage,) = small().stages
    policy = Policy((replace(stage, losers=Trusting(Counting(), features=1)),), "counting")
    _, cache = kvx.prefill(model(), tokens, policy, lengths, max_new_tokens=16)
    ends = np.array([16, 12, 3])
    _, cache = kvx.prefill(model(), tokens[:, :16], policy, ends, cache)
    for store, ((*_, state),) in zip(cache.layers, cache.states, strict=True):
        held = np.sum(np.asarray(store.positions()) >= 0, axis=-1)
        np.testing.assert_array_equal(held + np.asarray(state.mass)[..., 0], np.repeat((lengths + ends)[:, None], 2, 1))


def test_the_state_is_all_that_comes_on_top_of_the_host():
    """4 M (V + 1) bytes per row, layer and KV head, whatever the text's length; the maps are the policy's own bytes."""
    prompt, _ = prompts(40)
    policy = drawn(small())
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=8)
    _, host = kvx.prefill(model(), prompt, policies.h2o(12, recent=4), max_new_tokens=8)
    assert cache.nbytes - host.nbytes == 4 * 2 * (4 * 5 * (32 + 1))
    assert int(cache.room) == ENDLESS
    layer = 4 * (32 * 16 + 16 * 5) + 2 * (32 * 16 + 16 * 5 + 5 * 5 + 2 * 5)
    assert policy.nbytes == 4 * 4 * layer


def test_logits_are_differentiable_in_the_maps_through_prefill_and_decoding():
    """Against central differences along the gradient of every array; kept sets do not change for such small steps."""
    prompt, _ = prompts(20)
    policy = drawn(small(10))

    def loss(maps):
        each = with_maps(policy, maps)
        _, cache = kvx.prefill(model(), prompt, each, max_new_tokens=4)
        total = 0.0
        for token in (3, 5, 7):
            # Not kvx.decode_step, which donates the cache that the backward pass reads.
            logits, cache = decode(model(), jnp.asarray([token]), cache, each, jnp.ones(1, bool))
            total = total + jax.nn.log_softmax(logits)[0, 11]
        return total

    maps, loss = policy.stages[0].losers.maps, jax.jit(loss)
    gradient = jax.jit(jax.grad(loss))(maps)
    leaves, structure = jax.tree.flatten(maps)
    for index, slope in enumerate(jax.tree.leaves(gradient)):
        norm = float(jnp.linalg.norm(slope))
        assert np.isfinite(norm) and norm > 0
        along, step = slope / norm, 3e-3

        def moved(by, index=index, along=along):
            changed = [leaf + by * along if at == index else leaf for at, leaf in enumerate(leaves)]
            return float(loss(jax.tree.unflatten(structure, changed)))

        found = (moved(step) - moved(-step)) / (2 * step)
        # float32 losses of about 15 in the difference: 1e-6 over a step of 6e-3, and the curvature.
        assert found == pytest.approx(norm, rel=0.05, abs=3e-3)


@pytest.mark.slow
def test_a_packed_cache_hands_over_whole_groups():
    """Under KIVI eight tokens leave together; all of them arrive in the state."""
    prompt, _ = prompts(40)
    (stage,) = small().stages
    counting = Policy((replace(stage, losers=Trusting(Counting(), features=1)),), "counting")
    policy = kvx.chain(counting, policies.kivi(bits=4, group=8, residual=8))
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=32)
    _, cache = kvx.prefill(model(), prompt[:, :24], policy, None, cache)
    for store, ((*_, state), _) in zip(cache.layers, cache.states, strict=True):
        held = np.sum(np.asarray(store.positions()) >= 0, axis=-1)
        assert np.all(held < 40)
        np.testing.assert_array_equal(held + np.asarray(state.mass)[..., 0], 64)


def test_a_policy_without_maps_with_foreign_ones_or_on_a_sliding_window_is_refused(tmp_path):
    prompt, _ = prompts(20)
    with pytest.raises(kvx.BadInput, match="is not trained"):
        kvx.prefill(model(), prompt, small())
    with pytest.raises(kvx.BadInput, match=r"query_in has shape \(2, 4, 32, 16\); allowed: \(4, 4, 32, 16\)"):
        kvx.prefill(model(), prompt, drawn(small(), layers=2))
    with pytest.raises(kvx.BadInput, match="keeps a trace of every token"):
        kvx.prefill(model(), prompt, drawn(small()), prefill_chunk=8, compress="chunk")
    kvx.save_policy(drawn(small()), tmp_path / "less.safetensors")
    loaded = kvx.load_policy(tmp_path / "less.safetensors")
    assert loaded.text == small().text
    for found, saved in zip(jax.tree.leaves(loaded), jax.tree.leaves(drawn(small())), strict=True):
        np.testing.assert_array_equal(found, saved)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"host": "tova"}, "host='tova'"),
        ({"features": 0}, "features=0"),
        ({"recent": 20}, "budget=12 is smaller than its protected slots"),
        ({"host": "lambda", "sinks": 12}, "budget=12 is smaller than its protected slots"),
    ],
)
def test_nonsense_is_refused(arguments, sentence):
    with pytest.raises(kvx.BadInput, match=sentence):
        small(**arguments)
