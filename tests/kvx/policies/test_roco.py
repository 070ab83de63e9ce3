"""Claims about RoCo (Ren and Zhu 2024): a hand case, and the whole rule against dense numpy, also in strides."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx import policies
from kvx.kernels.prefill_attention.columns import SUM
from kvx.parts.amounts import Slots
from kvx.parts.budgets import Uniform
from kvx.parts.evict import Evict
from kvx.parts.scores import POOLED_SQUARE, ColumnMass, Deviation
from kvx.policy import Policy
from tests.kvx.policies.direct import context, evidence, kept, softmax, tokens
from tests.kvx.policies.masked_simulation import Simulation, kept_by
from tests.tiny import model, prompts

ROWS = np.array([[0.6, 0.1, 0.1, 0.1, 0.1], [0.5, 0.2, 0.1, 0.1, 0.1], [0.7, 0.05, 0.05, 0.1, 0.1]])


class RoCo:
    """The rule in float64, on everything that was ever there: which of the living tokens of a layer leave."""

    def __init__(self, budget, share, sinks, recent, prompt=0):
        self.budget, self.share, self.sinks, self.recent, self.whole = budget, share, sinks, recent, prompt

    def cut(self, alive, mass, squares):
        """Evicts from every head until it holds the budget; `alive`, sums and sums of squares (G, S)."""
        length = alive.shape[1]
        counts = length - np.arange(length)
        mean = mass / counts
        deviation = np.sqrt(np.maximum(squares / counts - mean**2, 0))
        sinks = max(self.sinks, self.whole)
        for head in range(len(alive)):
            excess = alive[head].sum() - self.budget - self.whole
            if excess <= 0:
                continue
            candidates = [place for place in np.flatnonzero(alive[head]) if place >= sinks]
            newest = [place for place in candidates if place >= length - self.recent]
            others = sorted(set(candidates) - set(newest), key=lambda place: (-deviation[head, place], place))
            feasible = others[max(int(self.share * self.budget + 1e-6) - self.recent, 0) :]
            leaving = sorted(feasible, key=lambda place: (mean[head, place], -place))[:excess]
            alive[head, leaving] = False


class Masked(RoCo):
    """Beside `masked_simulation.Simulation`."""

    def prompt(self, layers):
        self.squares = [(layer.rows.mean(axis=1) ** 2).sum(axis=1) for layer in layers]
        for layer, squares in zip(layers, self.squares, strict=True):
            self.cut(layer.alive, layer.mass, squares)

    def step(self, index, layer):
        self.squares[index] = np.pad(self.squares[index], ((0, 0), (0, 1))) + layer.last.mean(axis=1) ** 2
        self.cut(layer.alive, layer.mass, self.squares[index])


@pytest.mark.sampled
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_kept_sets_and_logits_equal_the_dense_rule(share):
    prompt, _ = prompts(40)
    policy = policies.roco(20, share=share, sinks=2, recent=4)
    oracle = Simulation(model(), prompt[0], Masked(20, share, 2, 4))
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=16)
    assert kept_by(cache) == oracle.kept()
    for token in range(10, 30):
        logits, cache = kvx.decode_step(model(), np.asarray([token]), cache, policy)
        # float32 against float64 over four layers.
        np.testing.assert_allclose(logits[0], oracle.step(token), atol=2e-4)
        assert kept_by(cache) == oracle.kept()


def test_the_deviation_makes_a_difference():
    """The control: without its share the same run keeps other tokens."""
    prompt, _ = prompts(40)
    _, (some, none) = kvx.prefill(
        model(), prompt, (policies.roco(20, share=0.6, recent=4), policies.roco(20, share=0.0, recent=4))
    )
    assert kept_by(some) != kept_by(none)


@pytest.mark.slow
def test_beside_the_prompt_only_generated_tokens_leave():
    prompt, _ = prompts(24)
    policy = policies.roco(10, mode="decoding", share=0.5, recent=3)
    oracle = Simulation(model(), prompt[0], Masked(10, 0.5, 0, 3, prompt=24))
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=40)
    for token in range(10, 36):
        logits, cache = kvx.decode_step(model(), np.asarray([token]), cache, policy)
        np.testing.assert_allclose(logits[0], oracle.step(token), atol=2e-4)
        assert kept_by(cache) == oracle.kept()
    for layer in kept_by(cache):
        for head in layer:
            assert head[:24] == list(range(24)) and len(head) == 34


def test_after_the_prompt_generated_tokens_only_add():
    prompt, _ = prompts(40)
    policy = policies.roco(20, mode="encoding", share=0.5)
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=8)
    before = kept_by(cache)
    for token in range(5):
        _, cache = kvx.decode_step(model(), np.asarray([token]), cache, policy)
    assert kept_by(cache) == [[head + list(range(40, 45)) for head in layer] for layer in before]
    assert all(len(head) == 20 for layer in before for head in layer)


class Strides(Simulation):
    """A prompt in strides of n tokens, each attending to what the rule has left and causally to its own; then the cut.

    Nothing is moved: what has left is masked. Sums run over the queries that came while a token was there.
    """

    def __init__(self, model, prompt, rule, stride):
        self.model, self.seen, self.lengths = model, 0, []
        groups, dim = model.blocks[0].spec.kv_heads, model.blocks[0].spec.key_dim
        self.held = [[np.zeros((groups, 0, dim))] * 2 + [np.zeros((groups, 0))] * 3 for _ in model.blocks]
        for start in range(0, len(prompt), stride):
            self.logits = self._stride(prompt[start : start + stride], rule)
            self.lengths.append([held[4].sum(axis=1).tolist() for held in self.held])

    def _stride(self, piece, rule):
        x, new = self.model.embed(jnp.asarray(piece[None])), len(piece)
        for index, block in enumerate(self.model.blocks):
            q, k, v = self._project(block, x, self.seen + np.arange(new))
            keys, values, *sums = self.held[index]
            keys, values = np.concatenate([keys, k], axis=1), np.concatenate([values, v], axis=1)
            mass, squares, alive = (np.pad(each, ((0, 0), (0, new))) for each in sums)
            alive[:, -new:] = 1
            visible = np.arange(self.seen + new) <= self.seen + np.arange(new)[:, None]
            logits = np.einsum("grtd,gsd->grts", q, keys) * block.spec.scale
            p = softmax(np.where(visible & (alive > 0)[:, None, None], logits, -np.inf))
            x = self._finish(block, x, np.einsum("grts,gsd->grtd", p, values))
            pooled = p.mean(axis=1)
            mass, squares = mass + pooled.sum(axis=1), squares + (pooled**2).sum(axis=1)
            alive = alive > 0
            rule.cut(alive, mass, squares)
            self.held[index] = [keys, values, mass, squares, alive.astype(float)]
        self.seen += new
        return np.asarray(self.model.unembed(x[:, -1]))[0]

    def kept(self):
        return [[np.flatnonzero(head).tolist() for head in held[4]] for held in self.held]


@pytest.mark.slow
@pytest.mark.parametrize("length", [64, 77])
def test_a_prompt_in_strides_equals_the_dense_rule(length):
    """Statistics of what stays, squares too, travel from stride to stride in the tokens."""
    prompt, _ = prompts(length)
    policy = policies.roco(24, share=0.5, sinks=2, recent=4)
    oracle = Strides(model(), prompt[0], RoCo(24, 0.5, 2, 4), stride=16)
    logits, cache = kvx.prefill(model(), prompt, policy, prefill_chunk=16, compress="chunk")
    assert kept_by(cache) == oracle.kept()
    np.testing.assert_allclose(logits[0], oracle.logits, atol=2e-4)
    for store, held in zip(cache.layers, oracle.held, strict=True):
        for head, places in enumerate(np.asarray(store.positions())[0]):
            order = places[places >= 0]
            for name, dense in (("mass", held[2]), ("squares", held[3])):
                found = np.asarray(store.stats[name])[0, head][places >= 0]
                np.testing.assert_allclose(found, dense[head, order], rtol=1e-4, atol=1e-6)
    # Constant from the stride on that exceeds the budget.
    assert [lengths[0] for lengths in oracle.lengths[1:]] == [[24, 24]] * (len(oracle.lengths) - 1)


@pytest.mark.parametrize("length", [16, 32, 48, 64])
def test_every_stride_ends_at_the_budget(length):
    prompt, _ = prompts(64)
    policy = policies.roco(24, share=0.5)
    _, cache = kvx.prefill(model(), prompt[:, :length], policy, prefill_chunk=16, compress="chunk")
    assert {len(head) for layer in kept_by(cache) for head in layer} == {min(length, 24)}


@pytest.mark.slow
def test_without_a_share_it_is_mean_attention():
    prompt, _ = prompts(40)
    ours = policies.roco(20, share=0.0, sinks=0, recent=4)
    mean = policies.h2o(20, recent=4, average="mean")
    _, (first, second) = kvx.prefill(model(), prompt, (ours, mean), max_new_tokens=16)
    assert kept_by(first) == kept_by(second)
    for token in range(8):
        _, first = kvx.decode_step(model(), np.asarray([token]), first, ours)
        _, second = kvx.decode_step(model(), np.asarray([token]), second, mean)
        assert kept_by(first) == kept_by(second)


def by_hand():
    """Five tokens that three queries saw, all of them, and their sums."""
    seen = evidence(3)
    columns = {SUM: ROWS.sum(axis=0), POOLED_SQUARE: (ROWS**2).sum(axis=0)}
    columns = {name: jnp.asarray(column, jnp.float32)[None, None, None] for name, column in columns.items()}
    some = tokens(1, 5)
    return replace(some, positions=jnp.zeros_like(some.positions)), replace(seen, columns=columns)


def test_means_and_deviations_by_hand():
    some, seen = by_hand()
    stats = ColumnMass("mean").stats(some, seen, context(5)) | Deviation().stats(some, seen, context(5))
    some = replace(some, stats=stats)
    np.testing.assert_allclose(ColumnMass("mean").rank(some, seen)[0, 0], [0.6, 0.11667, 0.08333, 0.1, 0.1], atol=1e-5)
    deviation = np.asarray(Deviation().rank(some, seen))[0, 0]
    # 0.1 three times: the two terms differ by rounding alone, to either side; never NaN.
    np.testing.assert_allclose(deviation, [0.0816, 0.0624, 0.0236, 0, 0], atol=1e-4)


@pytest.mark.parametrize(("protected", "leaves"), [(0, 2), (2, 2), (3, 4)])
def test_the_lowest_mean_of_the_stable_leaves(protected, leaves):
    """With two stable tokens feasible they tie on the mean, and the lower stays."""
    some, seen = by_hand()
    rule = Evict(ColumnMass("mean"), Uniform(Slots(4)), first=Deviation(), share=protected / 4)
    mask = kept(Policy((rule,)), some, seen, context(5))
    np.testing.assert_array_equal(mask, [np.arange(5) != leaves])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: policies.roco(14), "budget=14 is smaller than its protected slots"),
        (lambda: policies.roco(40, share=1.0), "share=1.0 leaves no token to evict"),
        (lambda: policies.roco(40, mode="auto"), "mode='auto' is not offered"),
    ],
)
def test_what_cannot_work_is_refused(build, message):
    with pytest.raises(kvx.BadInput, match=message):
        build()
