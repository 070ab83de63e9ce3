"""Claims about PyramidInfer (Yang et al. 2024): the rule with its vote buffers in numpy, schedules, bounds, by hand."""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx import policies
from kvx.context import Spec
from kvx.kernels.prefill_attention.columns import Column
from kvx.loop import attend_turned
from kvx.parts.cut_blocks import CutBlocks
from kvx.parts.thin import WIDTHS, Thin, cosine
from tests import tiny
from tests.kvx.policies.direct import attention, context, evidence, softmax, tokens
from tests.kvx.policies.masked_simulation import Simulation, kept_by
from tests.tiny import prompts


@pytest.fixture(scope="module")
def model():
    return tiny.model(num_hidden_layers=5)


class Paper(Simulation):
    """The method as it is told: gathered hidden states, whole attention maps, and a rolling buffer of recent rows."""

    def __init__(self, model, prompt, rate, recent, sinks, least, rise, interval, block, share, last):
        self.model, self.seen, self.prompt = model, len(prompt), len(prompt)
        self.block, self.share, self.last = block, share, last
        self.layers = []
        self.recent = int(recent * len(prompt)) + 1
        self.weights = np.linspace(1, rise, self.recent)
        x, positions, layers = model.embed(jnp.asarray(prompt[None])), np.arange(len(prompt)), len(model.blocks)
        for index, block in enumerate(model.blocks):
            q, k, v = self._project(block, x, positions)
            logits = np.einsum("grtd,gsd->grts", q, k) * block.spec.scale
            p = softmax(np.where(np.tril(np.ones(logits.shape[-2:], bool)), logits, -np.inf))
            x = self._finish(block, x, np.einsum("grts,gsd->grtd", p, v))
            rows = p.mean(axis=(0, 1))[-self.recent :]
            self.layers.append({"k": k, "v": v, "positions": positions, "rows": rows, "outside": 0})
            rho = (1 - rate) * (np.cos(np.pi * index / layers) + 1) / 2 + rate
            others = len(positions) - self.recent
            count = int(others * rho)
            if index % interval == 0 and rho < 1 and others > least and count > least:
                votes = (rows[:, :others] * self.weights[:, None]).mean(axis=0)
                votes[:sinks] = np.inf
                stay = np.r_[np.sort(np.argsort(-votes, kind="stable")[:count]), others : len(positions)]
                x, positions = x[:, stay], positions[stay]
        self.logits = np.asarray(model.unembed(x[:, -1]))[0]

    def step(self, token):
        x = self.model.embed(jnp.asarray([[token]], jnp.int32))
        for index, (block, layer) in enumerate(zip(self.model.blocks, self.layers, strict=True)):
            q, k, v = self._project(block, x, np.asarray([self.seen]))
            layer["k"], layer["v"] = (np.concatenate([layer[name], new], axis=1) for name, new in (("k", k), ("v", v)))
            layer["positions"] = np.append(layer["positions"], self.seen)
            p = softmax(np.einsum("grtd,gsd->grts", q, layer["k"]) * block.spec.scale)
            x = self._finish(block, x, np.einsum("grts,gsd->grtd", p, layer["v"]))
            rows = np.concatenate([np.pad(layer["rows"], ((0, 0), (0, 1))), p.mean(axis=(0, 1))])
            layer["rows"] = rows[-self.recent :]
            # Generated tokens beyond the window, since the last cut.
            layer["outside"] += self.seen - self.recent >= self.prompt
            if layer["outside"] == self.block:
                self._cut(index, layer)
        self.seen += 1
        return np.asarray(self.model.unembed(x[:, 0]))[0]

    def _cut(self, index, layer):
        size = len(layer["positions"])
        block = np.arange(size - self.recent - self.block, size - self.recent)
        votes = (layer["rows"][:, block] * self.weights[:, None]).mean(axis=0)
        rho = (1 - self.last) * (np.cos(np.pi * index / len(self.layers)) + 1) / 2 + self.last
        count = max(1, int(self.block * self.share * rho))
        gone = block[np.argsort(-votes, kind="stable")[count:]]
        layer["outside"] = 0
        layer["k"], layer["v"] = (np.delete(layer[name], gone, axis=1) for name in ("k", "v"))
        layer["positions"], layer["rows"] = np.delete(layer["positions"], gone), np.delete(layer["rows"], gone, axis=1)

    def kept(self):
        return [[layer["positions"].tolist()] * 2 for layer in self.layers]


SETTINGS = {"rate": 0.5, "recent": 0.1, "sinks": 2, "least": 8, "rise": 1.2, "interval": 1}
BLOCKS = {"block": 4, "share": 0.9, "last": 0.1}


@pytest.mark.parametrize(
    "changes",
    [
        {"interval": 2, "rise": 3.0},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"recent": 0.02, "least": 30}, marks=pytest.mark.slow),
    ],
)
def test_kept_tokens_and_logits_equal_the_paper_with_its_vote_buffers(model, changes):
    """With recent=0.02 the last token votes alone."""
    prompt, settings = prompts(45)[0], {**SETTINGS, **BLOCKS, **changes}
    oracle = Paper(model, prompt[0], **settings)
    policy = policies.pyramidinfer(**settings)
    logits, cache = kvx.prefill(model, prompt, policy, max_new_tokens=24)
    assert kept_by(cache) == oracle.kept()
    # float32 against float64 over five layers.
    np.testing.assert_allclose(logits[0], oracle.logits, atol=2e-4)
    sizes = []
    for token in np.random.default_rng(3).integers(0, 97, 24):
        logits, cache = kvx.decode_step(model, np.asarray([token]), cache, policy)
        np.testing.assert_allclose(logits[0], oracle.step(int(token)), atol=2e-4)
        assert kept_by(cache) == oracle.kept()
        sizes.append(len(oracle.kept()[-1][0]))
    assert (np.diff(sizes) < 0).sum() >= 4, "blocks were cut"


@pytest.mark.parametrize("changes", [{"rate": 1.0}, {"least": 128}])
def test_a_rate_of_one_or_a_short_prompt_is_the_full_model(model, changes):
    prompt, lengths = prompts(100, 61)
    policy = policies.pyramidinfer(**{**SETTINGS, **changes}, block=None)
    logits, _ = kvx.prefill(model, prompt, policy, lengths)
    full, _ = kvx.prefill(model, prompt, policies.full(), lengths)
    np.testing.assert_allclose(logits, full, atol=1e-5)


def test_layers_hold_ever_fewer_tokens_in_order_the_last_ones_always(model):
    prompt, lengths = prompts(90, 40)
    _, cache = kvx.prefill(model, prompt, policies.pyramidinfer(**SETTINGS, block=None), lengths)
    for row, length in enumerate(lengths):
        held = [np.asarray(store.positions())[row, 0] for store in cache.layers]
        held = [positions[positions >= 0] for positions in held]
        assert len(held[0]) == len(held[1]) == length, "the first cut comes after the second layer"
        assert all(len(above) < len(below) for below, above in pairwise(held[1:]))
        for below, above in pairwise(held):
            assert (np.diff(above) > 0).all() and set(above) <= set(below)
            assert {0, 1} <= set(above) and set(range(length - int(0.1 * length) - 1, length)) <= set(above)


def test_sinks_stay_without_a_vote_and_ties_keep_the_lower_position():
    """20 tokens, R = 3: of 16 others 8 go on, votes only for 10 and 11."""
    stage, rate = Thin(recent=0.15, last=0.0, sinks=2, least=4), 0.5
    assert cosine(0.0, 2)[1] == rate
    votes = np.zeros((1, 1, 20), np.float32)
    votes[..., 10:12] = 1.0
    seen = evidence(20)
    seen.columns[Column(last=0.15, rise=1.2)] = jnp.asarray(votes)[None]
    going = np.asarray(stage.thin(tokens(1, 20), seen, context(20, layer=1, layers=2)))[0]
    np.testing.assert_array_equal(np.flatnonzero(going), [0, 1, 2, 3, 4, 5, 10, 11, 16, 17, 18, 19])


def spec(prompt, shortest, layers=32, room=0):
    return Spec(attention(4, 2, 8), layers, prompt, shortest, room)


def test_the_paper_s_configuration_keeps_77_percent_of_a_long_prompt():
    """p = 0.9, R = 0.2 N: 0.2 + 0.8 * 0.709 on average over 32 layers, 0.2 + 0.8 * 0.22 in the last."""
    stage, _ = policies.pyramidinfer().stages
    where = spec(100_000, 100_000)
    shares = [stage.capacity(where, layer) / 100_000 for layer in range(32)]
    assert np.mean(shares) == pytest.approx(0.2 + 0.8 * 0.709, abs=2e-3)
    assert shares[-1] == pytest.approx(0.2 + 0.8 * 0.22, abs=2e-3)
    assert shares[:2] == [1, 1]


def test_capacities_bound_every_length_of_a_bucket_and_not_only_the_longest():
    stage = Thin(recent=0.2, last=0.5, least=64)
    alone = [[stage.capacity(spec(length, length), layer) for length in range(1, 129)] for layer in range(32)]
    for layer, held in enumerate(alone):
        assert stage.capacity(spec(128, 1), layer) == max(held)
    assert max(alone[-1]) > alone[-1][-1], "a shorter prompt escapes cuts that the longest suffers"


def test_a_block_of_sixteen_keeps_fourteen_in_the_first_layer_and_one_in_the_last():
    _, blocks = policies.pyramidinfer().stages
    stays = blocks._stays(32)
    assert (stays[0], stays[-1]) == (14, 1) and (np.diff(stays) <= 0).all()


@pytest.mark.parametrize("room", [1, 20, 64, 200])
def test_growth_is_the_most_that_any_prompt_s_layer_holds_of_what_comes(room):
    stage, where = CutBlocks(recent=0.2, block=8, share=0.5), spec(60, 7, layers=4, room=room)
    for layer in range(4):
        stays, most = int(stage._stays(4)[layer]), 0
        for length in range(7, 61):
            held, outside = 0, 0
            for token in range(room):
                held, most = held + 1, max(most, held + 1)
                outside += token >= int(0.2 * length) + 1
                if outside == 8:
                    held, outside = held - 8 + stays, 0
        assert stage.growth(where, layer) == most


@pytest.mark.slow
def test_layers_share_a_few_widths_and_their_compiled_bodies():
    model, (prompt, _) = tiny.model(num_hidden_layers=16, hidden_size=32), prompts(500)
    before = attend_turned._cache_size()
    _, cache = kvx.prefill(model, prompt, policies.pyramidinfer(rate=0.5, block=None), max_new_tokens=8)
    assert attend_turned._cache_size() - before <= WIDTHS
    _, full = kvx.prefill(model, prompt, policies.full(), max_new_tokens=8)
    assert cache.nbytes < 0.8 * full.nbytes


def test_what_came_through_thinning_can_be_packed(model):
    thin = policies.pyramidinfer(**SETTINGS, block=None)
    prompt, lengths = prompts(90, 40)
    logits, cache = kvx.prefill(model, prompt, thin, lengths)
    packed, codes = kvx.prefill(model, prompt, kvx.chain(thin, policies.kivi(bits=None)), lengths)
    np.testing.assert_array_equal(logits, packed)
    text = np.ones((2, 1), np.int32)
    one, _ = kvx.prefill(model, text, thin, cache=cache)
    two, _ = kvx.prefill(model, text, kvx.chain(thin, policies.kivi(bits=None)), cache=codes)
    np.testing.assert_allclose(one, two, atol=2e-5)
    with pytest.raises(kvx.BadInput, match="relies on slots and positions of its own"):
        kvx.chain(policies.pyramidinfer(), policies.kivi())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rate": 0.0}, "rate=0.0 is out of range"),
        ({"recent": 1.0}, "recent=1.0 is out of range"),
        ({"rise": 0}, "rise=0 is out of range"),
        ({"block": 1}, "block=1 is out of range"),
        ({"interval": 0}, "interval=0"),
        ({"share": 1.5}, "share=1.5"),
    ],
)
def test_hyperparameters_are_checked(arguments, words):
    with pytest.raises(kvx.BadInput, match=words):
        policies.pyramidinfer(**arguments)
