"""Claims about RazorAttention (Tang et al. 2024): formula 7 against a dense oracle, identities, bytes, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.errors import BadInput
from kvx.loop import pack_layer
from kvx.parts.head_classes import HeadClasses
from kvx.policies import full, h2o, q_filters, razor_attention, streaming_llm
from kvx.policy import Policy
from kvx.stores.base import nbytes
from kvx.stores.dense import Dense
from kvx.stores.tiers import Tiers
from tests.kvx.policies.direct import softmax
from tests.kvx.policies.masked_simulation import Simulation, kept_by
from tests.tiny import model, prompts

HEADS = ((0, 1), (2, 0), (3, 0), (3, 1))
"""In the tiny model: a layer with each number of retrieval heads, and two with one, of different index."""
EVERY = tuple((layer, head) for layer in range(4) for head in range(2))


class Formula7(Simulation):
    """The whole rule in float64: heads that are not named see sinks, a growing buffer and a mean with its count."""

    def __init__(self, model, prompt, heads, buffer, ratio, sinks, compensate=True):
        self.heads, self.buffer, self.ratio, self.sinks, self.compensate = heads, buffer, ratio, sinks, compensate
        super().__init__(model, prompt, self)

    def prompt(self, layers):
        """Attention of the prompt is exact, and nothing is decided by it."""

    def kept(self, layer, head, count):
        """Of `count` tokens."""
        places = np.arange(count)
        if (layer, head) in self.heads:
            return places >= 0
        return (places < self.sinks) | (places >= count - max(self.buffer, count // self.ratio if self.ratio else 0))

    def step(self, token):
        x = self.model.embed(jnp.asarray([[token]], jnp.int32))
        for index, (block, layer) in enumerate(zip(self.model.blocks, self.layers, strict=True)):
            q, k, v = self._project(block, x, np.asarray([self.seen]))
            layer.keys = np.concatenate([layer.keys, k], axis=1)
            layer.values = np.concatenate([layer.values, v], axis=1)
            out = np.stack([self.attention(index, head, layer, q[head], block.spec.scale) for head in range(len(q))])
            x = self._finish(block, x, out)
        self.seen += 1
        return np.asarray(self.model.unembed(x[:, 0]))[0]

    def attention(self, index, head, layer, q, scale):
        """One KV head's output (R, 1, V): what it kept before, the fresh token, and the mean of the rest."""
        kept = np.append(self.kept(index, head, self.seen), True)
        keys, values = layer.keys[head][kept], layer.values[head][kept]
        bias = np.zeros(len(keys))
        if self.compensate and not kept.all():
            keys = np.vstack([keys, layer.keys[head][~kept].mean(axis=0)])
            values = np.vstack([values, layer.values[head][~kept].mean(axis=0)])
            bias = np.append(bias, np.log((~kept).sum()))
        return softmax(scale * q @ keys.T + bias) @ values


@pytest.mark.sampled
@pytest.mark.parametrize("heads", [HEADS, ()])
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("ratio", [4, None])
def test_logits_equal_formula_7_while_the_buffer_grows(heads, compensate, ratio):
    prompt, _ = prompts(20)
    policy = razor_attention(6, ratio, sinks=2, heads=heads, compensate=compensate)
    oracle = Formula7(model(), prompt[0], heads, 6, ratio, 2, compensate)
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=40)
    for token in range(10, 36):
        logits, cache = kvx.decode_step(model(), np.asarray([token]), cache, policy)
        # float32 against float64 over four layers.
        np.testing.assert_allclose(logits[0], oracle.step(token), atol=2e-4)
    if ratio:
        assert max(6, oracle.seen // ratio) > 10, "it did grow"


@pytest.mark.slow
def test_counts_and_means_are_those_of_what_left():
    prompt, _ = prompts(20)
    policy = razor_attention(6, None, sinks=2, heads=HEADS)
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=40)
    full_cache = kvx.prefill(model(), prompt, full(), max_new_tokens=40)[1]
    mean = cache.layers[0].stores[1].tiers[1]
    np.testing.assert_array_equal(mean.count, [[12]])
    keys, values, _ = full_cache.layers[0].dense()
    np.testing.assert_allclose(mean.key[0, 0], keys[0, 0, 2:14].mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(mean.value[0, 0], values[0, 0, 2:14].mean(axis=0), atol=1e-5)
    for step in range(3):
        _, cache = kvx.decode_step(model(), np.asarray([step]), cache, policy)
        # What a step puts over the buffer leaves when the next token comes.
        np.testing.assert_array_equal(cache.layers[0].stores[1].tiers[1].count, [[12 + step]])


def test_retrieval_heads_hold_every_token_and_others_sinks_buffer_and_one_more():
    prompt, _ = prompts(30)
    _, cache = kvx.prefill(model(), prompt, razor_attention(8, None, sinks=3, heads=HEADS), max_new_tokens=8)
    for layer, heads in enumerate(kept_by(cache)):
        for head, positions in enumerate(heads):
            # The mean of 3 to 21 stands at 21.
            assert positions == (list(range(30)) if (layer, head) in HEADS else [0, 1, 2, *range(21, 30)])


def test_each_layer_has_stores_for_the_heads_it_has():
    prompt, _ = prompts(20)
    _, cache = kvx.prefill(model(), prompt, razor_attention(6, 4, sinks=2, heads=HEADS), max_new_tokens=8)
    kinds = [[type(part) for part in layer.stores] for layer in cache.layers]
    assert kinds == [[Dense, Tiers], [Tiers], [Dense, Tiers], [Dense]]
    for layer, store in enumerate(cache.layers):
        members = [np.asarray(heads).tolist() for heads in store.split.members]
        named = [head for index, head in HEADS if index == layer]
        assert members == [part for part in (named, [head for head in range(2) if head not in named]) if part]


@pytest.mark.sampled
@pytest.mark.parametrize(
    "policy",
    [
        razor_attention(6, 4, sinks=2, heads=EVERY),
        razor_attention(60, None, sinks=4, heads=()),
        # 28 tokens: the buffer is all of them.
        razor_attention(1, 1, sinks=0, heads=()),
    ],
    ids=lambda policy: policy.text,
)
def test_with_all_heads_retrieving_or_a_buffer_that_holds_all_it_is_exact(policy):
    prompt, lengths = prompts(20, 11)
    continuation = np.random.default_rng(0).integers(0, 97, (2, 8)).astype(np.int32)
    scores = []
    for each in (policy, full()):
        logits, cache = kvx.prefill(model(), prompt, each, lengths, max_new_tokens=8)
        scores.append(np.asarray(kvx.teacher_forced(model(), continuation, cache, each, logits)[0]))
    np.testing.assert_allclose(*scores, atol=2e-4)


@pytest.mark.slow
def test_without_heads_or_compensation_it_is_a_stream_at_true_positions():
    prompt, _ = prompts(40)
    razor = razor_attention(12, None, sinks=4, heads=(), compensate=False)
    stream = streaming_llm(16, sinks=4, renumber=False)
    one, other = (kvx.prefill(model(), prompt, policy, max_new_tokens=20)[1] for policy in (razor, stream))
    for token in range(20):
        assert kept_by(one) == kept_by(other)
        first, one = kvx.decode_step(model(), np.asarray([token]), one, razor)
        second, other = kvx.decode_step(model(), np.asarray([token]), other, stream)
        np.testing.assert_allclose(first, second, atol=1e-5)


def test_a_constant_buffer_without_retrieval_heads_serves_endless_texts():
    assert razor_attention(12, None, heads=()).bounded
    assert not razor_attention(12, 5, heads=()).bounded, "its buffer grows"
    assert not razor_attention(12, None, heads=((0, 0),)).bounded, "its retrieval heads keep everything"


def test_a_growing_buffer_has_room_for_all_that_may_come_and_no_more_tokens():
    prompt, _ = prompts(20)
    policy = razor_attention(4, 2, sinks=0, heads=(), compensate=False)
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=128)
    logits, cache = kvx.prefill(model(), prompts(128, seed=3)[0], policy, None, cache)
    assert np.isfinite(np.asarray(logits)).all()
    # 148 tokens, the newest not yet weighed when it was read: half of them.
    assert all(head == list(range(74, 148)) for layer in kept_by(cache) for head in layer)
    with pytest.raises(BadInput, match="room"):
        kvx.prefill(model(), prompt, policy, None, cache)


def test_bytes_are_the_sheets_formula():
    """2 (D + V) a token for retrieval heads, the same for sinks and buffer of the others, float32 means beside."""
    prompt, _ = prompts(128, 70)
    policy = razor_attention(20, None, sinks=4, heads=HEADS)
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=128, cache_dtype=jnp.bfloat16)
    slot, mean = 2 * 2 * 32 + 4, 4 * 2 * 32 + 4 + 4
    whole, part = 128 + 128, 32  # prompt and room; 24 slots, and two for tokens on the move, in a tile of 16
    heads = 4 * whole * slot + 4 * (part * slot + mean + 4)
    rotary = sum(nbytes(leaf) for leaf in jax.tree.leaves(cache, is_leaf=is_rotary) if is_rotary(leaf))
    # Which heads a layer's parts have, and the states of the others: counts, sinks, recent.
    states = nbytes(cache.states)
    assert states == 2 * 4 * (4 + 3 * 2)
    assert cache.nbytes == 2 * heads + rotary + 4 * 8 + states + nbytes((cache.next, cache.room))
    _, everything = kvx.prefill(model(), prompt, full(), max_new_tokens=128, cache_dtype=jnp.bfloat16)
    assert cache.nbytes < 0.6 * everything.nbytes


def is_rotary(node):
    return type(node).__name__ == "Rotary"


def test_layers_with_equal_counts_share_one_program():
    prompt, _ = prompts(20)
    before = pack_layer._cache_size()
    heads = tuple((layer, layer % 2) for layer in range(3))
    kvx.prefill(model(), prompt, razor_attention(7, 4, heads=heads))
    assert pack_layer._cache_size() == before + 2, "three layers with one head each, and one with none"


def test_cutting_chunks_is_refused_since_the_means_have_to_see_what_leaves():
    prompt, _ = prompts(40)
    with pytest.raises(BadInput, match="keeps a trace of every token that leaves"):
        kvx.prefill(model(), prompt, razor_attention(8, heads=()), prefill_chunk=16, compress="chunk")


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"buffer": 0}, "buffer=0 is out of range"),
        ({"ratio": 0}, "ratio=0 is out of range"),
        ({"sinks": -1}, "sinks=-1 is out of range"),
        ({"induction": 1.5}, "induction=1.5 is out of range"),
        ({"echo": -0.1}, "echo=-0.1 is out of range"),
        ({"compensate": 1}, "compensate=1 is not offered"),
        ({"block": 1}, "block=1 is out of range"),
        ({"bos": -1}, "bos=-1 is out of range"),
        ({"heads": (0, 1)}, r"heads=\(0, 1\) is not a tuple of \(layer, KV head\) pairs"),
        ({"heads": ((0, 1), (0, 1))}, "names a head twice"),
        ({"heads": ((0, -1),)}, "heads=-1 is out of range"),
    ],
)
def test_parameters_out_of_range_are_refused_when_it_is_built(parameters, sentence):
    with pytest.raises(BadInput, match=sentence):
        razor_attention(**parameters)


def test_heads_that_the_model_lacks_are_refused_before_any_work():
    prompt, _ = prompts(20)
    for pair in ((4, 0), (0, 2)):
        with pytest.raises(BadInput, match="which the model does not have; allowed: layers 0 to 3, KV heads 0 to 1"):
            kvx.prefill(model(), prompt, razor_attention(heads=(pair,)))
    with pytest.raises(BadInput, match="not calibrated"):
        kvx.prefill(model(), prompt, razor_attention())


@pytest.mark.slow
def test_classes_follow_any_rule_that_decides_by_layer_and_head():
    """Heads under H2O keep what they would if all heads were under it: statistics too are a rule's own."""
    prompt, lengths = prompts(40, 23)
    classes = Policy((HeadClasses.of((h2o(12, recent=4), streaming_llm(8, renumber=False)), (HEADS,)),))
    caches = {}
    for name, policy in (
        ("classes", classes),
        ("h2o", h2o(12, recent=4)),
        ("stream", streaming_llm(8, renumber=False)),
    ):
        _, caches[name] = kvx.prefill(model(), prompt, policy, lengths, max_new_tokens=8)
    layers = {name: [np.asarray(store.positions()) for store in cache.layers] for name, cache in caches.items()}
    for layer, head in EVERY:
        other = layers["h2o" if (layer, head) in HEADS else "stream"][layer][:, head]
        width = other.shape[-1]
        found = layers["classes"][layer][:, head]
        np.testing.assert_array_equal(found[:, :width], other)
        assert np.all(found[:, width:] == -1)
    mass = caches["classes"].layers[0].stats["mass"]
    np.testing.assert_allclose(mass[:, 1, :12], caches["h2o"].layers[0].stats["mass"][:, 1, :12], rtol=1e-5)
    for token in range(4):
        _, caches["classes"] = kvx.decode_step(model(), np.asarray([token, token]), caches["classes"], classes)
    assert [len(head) for layer in kept_by(caches["classes"]) for head in layer] == [
        12 if pair in HEADS else 8 for pair in EVERY
    ]


def test_rules_that_need_more_than_their_own_heads_are_refused():
    for rule in (streaming_llm(8), q_filters(64), kvx.policies.d2o(32)):
        with pytest.raises(BadInput, match="cannot serve some heads of a layer"):
            HeadClasses.of((full(), rule), (HEADS,))
