"""Claims about FastGen (Ge et al. 2023): heads and steps against a numpy rule, constructed heads, rooms and bytes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx import policies
from kvx.buckets import round_up
from kvx.chain import chain
from kvx.evidence import Evidence
from kvx.kernels.prefill_attention.columns import SUM, Column
from kvx.kinds import PUNCTUATION, SPECIAL
from kvx.parts.profile import EVERYTHING, KIND, LOCAL, PUNCTUATED, SPECIALS
from kvx.stores.flat import Flat
from tests.kvx.policies.direct import context, tokens
from tests.kvx.policies.masked_simulation import Simulation, kept_by
from tests.tiny import CONFIG, model, prompts

KINDS = np.zeros(97, np.int8)
KINDS[:4], KINDS[4:20] = SPECIAL, PUNCTUATION


class Profiled:
    """The sheet over whole attention maps: masks of every rule, recoveries of kept mass, then one token at a time."""

    def __init__(self, prompt, recovery, share=0.3, reserve=1000):
        self.recovery, self.share, self.reserve = recovery, share, reserve
        self.kinds = [*KINDS[prompt]]
        self.kinds[0] = SPECIAL

    def prompt(self, layers):
        length = self.length = len(self.kinds)
        self.few = int(np.ceil(self.share * length - 1e-4))
        kinds, distance = np.array(self.kinds), np.arange(length)[:, None] - np.arange(length)
        band = (distance >= 0) & (distance < self.few)
        self.rules, self.added = [], np.zeros((len(layers), layers[0].alive.shape[0]), int)
        for layer in layers:
            rules = []
            for head, p in enumerate(layer.rows.mean(axis=1)):
                special, marked = kinds == SPECIAL, kinds > 0
                mean = np.where(marked, -1.0, p.sum(axis=0) / (length - np.arange(length)))
                heavy = marked.copy()
                heavy[np.argsort(-mean, kind="stable")[: min(self.few, (~marked).sum())]] = True
                masks = [np.broadcast_to(columns, band.shape) for columns in (special, marked, heavy)]
                masks += [heavy | band, np.ones_like(band)]
                recovered = [np.where(mask, p, 0).sum(axis=1).mean() for mask in masks]
                assert np.all(np.diff(recovered) >= -1e-12)
                rules.append(next(rule for rule, r in enumerate(recovered) if r >= self.recovery or rule == 4))
                layer.alive[head] = masks[rules[-1]][-1]
            self.rules.append(rules)

    def step(self, index, layer):
        kinds, seen = np.array(self.kinds), len(self.kinds)
        for head, alive in enumerate(layer.alive):
            rule = self.rules[index][head]
            if rule == EVERYTHING:
                continue
            keeps = kinds == SPECIAL if rule == 0 else kinds > 0
            generated = alive & keeps & (np.arange(seen) >= self.length)
            if generated.sum() > self.reserve:
                alive[np.flatnonzero(generated)[0]] = False
            most = (0, 0, self.few, 2 * self.few)[rule]
            if (alive & ~keeps).sum() > most:
                last = seen - 1 - (rule >= 2) * max(self.few * (rule == LOCAL), 1)
                weak = alive & ~keeps & (np.arange(seen) <= last)
                mean = layer.mass[head] / (seen - np.arange(seen))
                alive[np.where(weak, mean, np.inf).argmin()] = False


@pytest.mark.sampled
@pytest.mark.parametrize(("recovery", "rules"), [(0.2, {0, 1}), (0.35, {1, 2}), (0.85, {2, 3}), (0.96, {3, 4})])
def test_kept_sets_and_logits_equal_the_masked_simulation(recovery, rules):
    prompt, _ = prompts(44)
    policy = policies.fastgen(recovery, shortest=20).with_kinds(KINDS)
    rule = Profiled(prompt[0], recovery)
    oracle = Simulation(model(), prompt[0], rule)
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=24)
    assert [np.asarray(layer[0].rule)[0].tolist() for layer in cache.states] == rule.rules
    assert {each for layer in rule.rules for each in layer} == rules, "the claim is about these"
    assert kept_by(cache) == oracle.kept()
    for token in np.random.default_rng(3).integers(0, 60, 24):
        rule.kinds.append(KINDS[token])
        logits, cache = kvx.decode_step(model(), np.asarray([token]), cache, policy)
        # float32 against float64 over four layers.
        np.testing.assert_allclose(logits[0], oracle.step(int(token)), atol=2e-4)
        assert kept_by(cache) == oracle.kept()


def profile(p, kinds=None, **parameters):
    """The rules of heads with these attention maps (G, S, S), and what the policy keeps of the prompt."""
    heads, length = len(p), p.shape[-1]
    (stage,) = policies.fastgen(**{"shortest": 1, **parameters}).stages
    near = int(np.ceil(stage.local * length - 1e-4))
    distance = np.arange(length)[:, None] - np.arange(length)
    columns = {SUM: p.sum(axis=1), Column(near=stage.local): np.where(distance < near, p, 0).sum(axis=1)}
    columns = {name: jnp.asarray(found, jnp.float32)[None, :, None] for name, found in columns.items()}
    seen = Evidence(jnp.asarray([length], jnp.int32), columns=columns)
    some, where = tokens(heads, length), context(length, heads=heads)
    given = {"id": jnp.broadcast_to(jnp.arange(length), (1, heads, length))}
    if kinds is not None:
        stage = replace(stage, table=jnp.asarray(kinds, jnp.int8))
    some = replace(some, stats=given)
    some = replace(some, stats={**given, **stage.stats(some, seen, where)})
    _, mask, state = stage.keep(some, some.present, seen, where)
    return np.asarray(state.rule)[0], np.asarray(mask)[0], stage, (some, seen, where)


def uniform(length):
    """Causal attention that is the same for all keys."""
    return np.tril(np.ones((length, length))) / np.arange(1, length + 1)[:, None]


def test_a_head_that_looks_at_the_first_token_keeps_only_special_ones():
    p = np.zeros((1, 40, 40))
    p[0, :, 0] = 1
    rule, mask, *_ = profile(p, recovery=0.99)
    assert rule == [SPECIALS]
    np.testing.assert_array_equal(np.flatnonzero(mask[0]), [0])


def test_a_head_that_looks_at_punctuation_keeps_it_too():
    kinds = np.zeros(40, np.int8)
    kinds[::5] = PUNCTUATION
    p = np.tril(np.ones((40, 40))) * (kinds > 0)
    rule, mask, *_ = profile((p / p.sum(axis=1, keepdims=True))[None], kinds, recovery=0.99)
    assert rule == [PUNCTUATED]
    np.testing.assert_array_equal(np.flatnonzero(mask[0]), np.arange(0, 40, 5))


def test_a_head_that_looks_back_a_few_tokens_keeps_the_recent_ones():
    distance = np.arange(60)[:, None] - np.arange(60)
    p = ((distance >= 0) & (distance < 12)).astype(float)
    p /= p.sum(axis=1, keepdims=True)
    rule, mask, *_ = profile(p[None], recovery=0.999, frequent=0.1, local=0.2)
    assert rule == [LOCAL]
    assert mask[0, 48:].all() and mask[0].sum() <= 1 + 6 + 12


def test_no_recovery_asked_keeps_special_tokens_and_all_of_it_keeps_everything():
    p = np.stack([uniform(64)] * 2)
    assert profile(p, recovery=0.0)[0].tolist() == [SPECIALS] * 2
    rule, mask, *_ = profile(p, recovery=1.0)
    assert rule.tolist() == [EVERYTHING] * 2 and mask.all()


def test_uniform_attention_is_recovered_as_derived():
    """x + x ln(1/x) of the mass is in the first x S columns: 0.661 at 0.3, 0.9065 at 0.6 with the band's end."""
    p = uniform(3000)
    rule, _, stage, (some, seen, where) = profile(p[None], recovery=0.9)
    few = jnp.asarray([[900]])
    nested = stage._nested(some, some.present, seen, few)
    recovered = np.asarray(stage.recoveries(nested, some, some.present, seen, where.lengths))[:, 0, 0]
    np.testing.assert_array_equal(np.flatnonzero(nested[2][0, 0]), np.arange(901))
    # 1 / S from the first token, which is special here, and from the sum that stands for an integral.
    np.testing.assert_allclose(recovered[2:], [0.661, 0.9065], atol=1.5e-3)
    assert np.all(np.diff(recovered) >= 0)
    assert rule == [LOCAL] and profile(p[None], recovery=0.91)[0] == [EVERYTHING]


def test_recovery_is_one_minus_half_the_distance_to_renormalised_truncation():
    random = np.random.default_rng(0)
    p = np.tril(np.exp(random.standard_normal((2, 50, 50)) * 2))
    p /= p.sum(axis=-1, keepdims=True)
    _, _, stage, (some, seen, where) = profile(p, recovery=0.5)
    nested = stage._nested(some, some.present, seen, jnp.asarray([[15]]))
    recovered = np.asarray(stage.recoveries(nested, some, some.present, seen, where.lengths))[:, 0]
    distance = np.arange(50)[:, None] - np.arange(50)
    masks = [np.broadcast_to(np.asarray(each)[0, :, None], p.shape) for each in nested]
    masks.append(masks[-1] | ((distance >= 0) & (distance < 15)))
    for mask, found in zip(masks, recovered, strict=True):
        cut = np.where(mask, p, 0)
        whole = cut.sum(axis=-1, keepdims=True)
        far = np.abs(p - cut / whole).sum(axis=-1).mean(axis=-1)
        np.testing.assert_allclose(found, 1 - far / 2, atol=1e-5)


def test_a_short_prompt_is_not_judged():
    assert profile(uniform(64)[None], recovery=0.0, shortest=65)[0] == [EVERYTHING]
    assert profile(uniform(64)[None], recovery=0.0, shortest=64)[0] == [SPECIALS]


def held(cache):
    return np.stack([np.sum(np.asarray(store.positions()) >= 0, axis=-1) for store in cache.layers])


def test_punctuation_beyond_the_reserve_pushes_out_the_oldest_generated():
    prompt, _ = prompts(44)
    policy = policies.fastgen(0.0, shortest=20, reserve=0.05).with_kinds(np.full(97, SPECIAL, np.int8))
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=128)
    room = int(np.ceil(0.05 * 128))
    for token in range(40):
        _, cache = kvx.decode_step(model(), np.asarray([token]), cache, policy)
        np.testing.assert_array_equal(held(cache), 44 + min(token + 1, room))
    newest = [*range(44), *range(84 - room, 84)]
    assert kept_by(cache) == [[newest] * 2] * 4


@pytest.mark.slow
def test_bytes_are_the_slots_that_the_rules_need():
    """In eighths of the worst case, which is a slot a head for every token of the prompt's bucket and the room."""
    heads, width, rows = CONFIG["num_key_value_heads"], CONFIG["head_dim"], 2
    prompt, lengths = prompts(300, 250)
    for recovery, frequent, local in ((0.0, 0.3, 0.3), (0.5, 0.2, 0.1), (1.0, 0.3, 0.3)):
        policy = policies.fastgen(recovery, frequent, local)
        _, cache = kvx.prefill(model(), prompt, policy, lengths, max_new_tokens=128)
        worst, total = 384 + 128, 0
        for store, (state,) in zip(cache.layers, cache.states, strict=True):
            limit = np.minimum(np.asarray(state.ordinary + state.kinds) + 1, np.asarray(lengths)[:, None] + 128)
            need = (-(-limit.sum(axis=1) // heads)).max()
            slots = heads * round_up(int(-(-need // (worst // 8)) * (worst // 8)))
            assert isinstance(store, Flat) and store.slots.shape == (rows, slots)
            # Position, owner, kind and received attention a slot; a rule a head in 13 bytes.
            total += rows * slots * (2 * width * 4 + 4 + 1 + 1 + 4) + rows * heads * 13 + rows * 4
            total += width // 2 * 4 + 4
        assert cache.nbytes == total + rows * 4 + 4
        if recovery == 0.0:
            np.testing.assert_array_equal(held(cache), 1)


def test_an_ordinary_token_is_seen_in_its_own_step_and_then_gone():
    """Under the first rules the logits still depend on the token itself, through attention too."""
    prompt, _ = prompts(70)
    policy = policies.fastgen(0.0)
    outcomes = []
    for token in (50, 51):
        _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=8)
        assert kept_by(cache) == [[[0]] * 2] * 4
        logits, cache = kvx.decode_step(model(), np.asarray([token]), cache, policy)
        assert kept_by(cache) == [[[0]] * 2] * 4
        outcomes.append(np.asarray(logits))
    assert np.abs(outcomes[0] - outcomes[1]).max() > 1e-3


@pytest.mark.slow
def test_inside_a_callers_jit_the_worst_case_is_packed_and_the_same_is_kept():
    prompt, lengths = prompts(100, 70)
    policy = policies.fastgen(0.6)
    _, eager = kvx.prefill(model(), prompt, policy, lengths, max_new_tokens=8)
    _, inside = jax.jit(lambda prompt, lengths: kvx.prefill(model(), prompt, policy, lengths, max_new_tokens=8))(
        jnp.asarray(prompt), jnp.asarray(lengths)
    )
    for own, other in zip(eager.layers, inside.layers, strict=True):
        for row in range(2):
            for head in range(2):
                places = [np.asarray(store.positions())[row, head] for store in (own, other)]
                np.testing.assert_array_equal(*(np.sort(each[each >= 0]) for each in places))
        assert other.slots.shape[1] == round_up(100 + 8) * 2


def test_after_a_selection_it_profiles_what_is_left():
    prompt, _ = prompts(100)
    policy = chain(policies.snapkv(48, window=8), policies.fastgen(1.0))
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=16)
    _, selected = kvx.prefill(model(), prompt, policies.snapkv(48, window=8), max_new_tokens=16)
    assert kept_by(cache) == kept_by(selected)


def test_kinds_are_saved_with_the_policy(tmp_path):
    policy = policies.fastgen(0.8).with_kinds(KINDS)
    kvx.save_policy(policy, tmp_path / "told.safetensors")
    loaded = kvx.load_policy(tmp_path / "told.safetensors")
    np.testing.assert_array_equal(loaded.stages[0].table, KINDS)
    assert loaded.text == policy.text == "fastgen(recovery=0.8)"


def test_ids_the_table_does_not_know_are_ordinary():
    (stage,) = policies.fastgen().with_kinds(KINDS[:10]).stages
    some = replace(tokens(1, 4), stats={"id": jnp.asarray([[[50, 2, 5, 96]]])})
    np.testing.assert_array_equal(stage.stats(some, None, context(4))[KIND][0, 0], [SPECIAL, SPECIAL, PUNCTUATION, 0])


def test_a_chunk_cannot_be_profiled_by_itself():
    prompt, _ = prompts(70)
    with pytest.raises(kvx.BadInput, match="whole prompt"):
        kvx.prefill(model(), prompt, policies.fastgen(), prefill_chunk=32, compress="chunk")


@pytest.mark.parametrize(
    "wrong", [{"recovery": 1.1}, {"frequent": 0.6, "local": 0.5}, {"sinks": -1}, {"shortest": 0}, {"reserve": -0.1}]
)
def test_parameters_that_cannot_be_are_refused(wrong):
    with pytest.raises(kvx.BadInput, match=next(iter(wrong))):
        policies.fastgen(**wrong)
