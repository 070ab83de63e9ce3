"""Kept positions after the prompt equal those of kvpress on real weights, prompts and counts, method by method.

kvpress's hooks are asked what they would keep, and the cache is left whole: no layer's output depends on what an
earlier layer keeps, so all presses and ratios share one forward pass for each attention implementation.
"""

import pydoc_data.topics
from contextlib import ExitStack
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
kvpress = pytest.importorskip("kvpress")

import kvx
from kvx import policies
from kvx.calibrate import calibrate
from kvx.context import Context, Spec
from kvx.loop import attend
from kvx.models.load import load, save
from kvx.policy import Policy

pytestmark = [pytest.mark.peer, pytest.mark.weights]
transformers.utils.logging.disable_progress_bar()

LENGTHS = {"assignment": 800, "class": 600}
"""Topics of CPython's documentation, and how many tokens of each make a prompt."""
RATIOS = (0.5, 0.85)
"""Shares that kvpress removes."""
PYRAMID_RATIOS = (0.4,)
"""Above one half kvpress gives every layer the same count."""
ALLOWED = 1e-4
"""Share of positions that two float32 summation orders may rank differently."""
NEAR = 1e-4
"""How close, relative to the threshold, the score of such a position must be."""


def _counts(length, ratio):
    return max(1, int(length * (1 - ratio)))


def _cases(length, layers):
    """(name, press, policy, attention implementation) for one prompt length."""
    for ratio in RATIOS:
        kept = _counts(length, ratio)
        yield f"snapkv {ratio}", kvpress.SnapKVPress(ratio), policies.snapkv(kept), "sdpa"
        yield f"knorm {ratio}", kvpress.KnormPress(ratio), policies.knorm(kept), "sdpa"
        for renumber in (False, True) if ratio == RATIOS[0] else (True,):
            policy = policies.streaming_llm(kept, renumber=renumber)
            yield f"streaming_llm {renumber} {ratio}", kvpress.StreamingLLMPress(ratio), policy, "sdpa"
        yield f"tova {ratio}", kvpress.TOVAPress(ratio), policies.tova(kept, recent=1), "sdpa"
        adakv = kvpress.AdaKVPress(kvpress.SnapKVPress(ratio))
        yield f"adakv {ratio}", adakv, policies.adakv(kept, floor=adakv.alpha_safeguard), "sdpa"
        filtered = policies.q_filters(kept, window=0, every_step=False)
        yield f"q_filters {ratio}", kvpress.QFilterPress(ratio), filtered, "sdpa"
        mean = policies.h2o(kept, average="mean", recent=0)
        yield f"h2o {ratio}", kvpress.ObservedAttentionPress(ratio), mean, "eager"
    for ratio in PYRAMID_RATIOS:
        press = kvpress.PyramidKVPress(ratio)
        table = _pyramid(press, length, layers)
        yield f"pyramidkv {ratio}", press, policies.pyramidkv(max(table), table=table), "sdpa"


def _pyramid(press, length, layers):
    """kvpress's slots of every layer."""

    class Module:
        config = type("Config", (), {"num_hidden_layers": layers})

    counts = []
    for layer in range(layers):
        module = Module()
        module.layer_idx = layer
        counts.append(press.get_layer_budget(module, length))
    return tuple(counts)


NAMES = [name for name, *_ in _cases(1000, 30)]


@pytest.fixture(scope="session")
def kvx_model():
    return load("smollm2-135m-instruct", dtype="float32")


@pytest.fixture(scope="session")
def peer(kvx_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "model"
    save(*kvx_model, path)
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def prompts(kvx_model):
    _, tokenizer = kvx_model
    found = {}
    for topic, length in LENGTHS.items():
        text = "\n".join(pydoc_data.topics.topics[name] for name in (topic, "compound"))
        found[topic] = np.asarray([tokenizer.encode(text)[:length]], np.int32)
        assert found[topic].shape == (1, length)
    return found


@pytest.fixture(scope="session")
def filters(kvx_model, prompts):
    """Directions for Q-Filters, calibrated on other text than the prompts."""
    model, tokenizer = kvx_model
    tokens = np.asarray([tokenizer.encode(pydoc_data.topics.topics["exprlists"])[:256]], np.int32)
    policy = calibrate(policies.q_filters(64), model, [tokens])
    return policy.stages[0].score


@pytest.fixture(scope="session", params=LENGTHS)
def kept(request, kvx_model, peer, prompts, filters):
    """For one prompt and every case: what each side keeps, (L, G, S) masks; kvx's scores, (L, G, S); policy; tokens."""
    model, _ = kvx_model
    tokens = prompts[request.param]
    cases = list(_cases(tokens.shape[1], len(model.blocks)))
    ours = [_with_filters(policy, filters) for _, _, policy, _ in cases]
    _, caches = kvx.prefill(model, tokens, tuple(ours), max_new_tokens=1)
    scores = _scores(model, tokens, ours)
    theirs = _peer_kept(peer, tokens, cases, filters)
    return {
        name: (_positions_mask(cache, tokens.shape[1]), theirs[name], scores[index], policy, tokens[0])
        for index, ((name, *_), cache, policy) in enumerate(zip(cases, caches, ours, strict=True))
    }


def _with_filters(policy, filters):
    stage = policy.stages[0]
    if not stage.learns:
        return policy
    return Policy((replace(stage, score=filters),), policy.text)


def _positions_mask(cache, length):
    mask = np.zeros((len(cache.layers), cache.layers[0].positions().shape[1], length), bool)
    for layer, store in enumerate(cache.layers):
        for head, places in enumerate(np.asarray(store.positions())[0]):
            mask[layer, head, places[places >= 0]] = True
    return mask


def _scores(model, tokens, ours):
    """kvx's score of every token, by policy: (L, G, S)."""
    length = tokens.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    x = model.embed(jnp.asarray(tokens))
    found = [[] for _ in ours]
    for layer, block in enumerate(model.blocks):
        requests = ours[0].observe(True)
        for policy in ours[1:]:
            requests |= policy.observe(True)
        x, new, evidence = attend(block, x, positions, requests=requests)
        spec = Spec(block.spec, len(model.blocks), length, 1, 1)
        context = Context(jnp.int32(layer), jnp.asarray([length], jnp.int32), spec)
        for index, policy in enumerate(ours):
            stage = policy.stages[0]
            stats = stage.stats(new, evidence, context)
            found[index].append(np.asarray(stage.rank(replace(new, stats=stats), evidence))[0])
    return [np.stack(layers) for layers in found]


def _peer_kept(peer, tokens, cases, filters):
    """What every press would keep: (L, G, S) masks by name."""
    masks = {}
    for implementation in ("sdpa", "eager"):
        peer.set_attn_implementation(implementation)
        with ExitStack() as stack, torch.no_grad():
            for name, press, _, needed in cases:
                if needed == implementation:
                    masks[name] = []
                    _record(press, masks[name])
                    if isinstance(press, kvpress.QFilterPress):
                        # kvpress stores filters negated, and loads them from a hub when it enters the model.
                        press.q_filters = -torch.from_numpy(np.array(filters.directions))
                        press.post_init_from_model = lambda model: None
                    stack.enter_context(press(peer))
            peer.model(torch.from_numpy(tokens).long(), past_key_values=transformers.DynamicCache())
    return {name: np.stack(layers) for name, layers in masks.items()}


def _record(press, layers):
    """Make a press note what it keeps, and return the cache as it was."""
    compress = press.compress

    def noting(module, hidden_states, keys, values, attentions, kwargs):
        mask = torch.ones(keys.shape[1:3], dtype=torch.bool)
        if isinstance(press, kvpress.AdaKVPress):
            compress(module, hidden_states, keys, values, attentions, kwargs)
            _, heads, places = module.masked_key_indices
            module.masked_key_indices = None
            mask[heads, places] = False
        else:
            # No press here looks at values, so that positions can travel in their place.
            places = torch.arange(keys.shape[2], dtype=torch.float64)[None, None, :, None].expand(values.shape)
            _, places = compress(module, hidden_states, keys, places, attentions, kwargs)
            mask = torch.zeros_like(mask).scatter_(1, places[0, :, :, 0].long(), True)
        layers.append(mask.numpy())
        return keys, values

    press.compress = noting


@pytest.mark.parametrize("name", NAMES)
def test_kept_positions_equal_those_of_kvpress(name, kept):
    ours, theirs, scores, policy, tokens = kept[name]
    assert ours.shape == theirs.shape
    assert 0 < ours.sum() < ours.size
    np.testing.assert_array_equal(ours.sum(axis=(1, 2)), theirs.sum(axis=(1, 2)))
    different = (ours != theirs) & ~_tied(name, ours, scores, tokens)
    assert different.mean() <= ALLOWED
    for layer, head, place in np.argwhere(different):
        score = scores[layer, head, place]
        margins = [abs(score - cut) / abs(cut) for cut in _cuts(policy, ours[layer], scores[layer], head)]
        assert min(margins) <= NEAR, (layer, head, place, margins)


def _tied(name, kept, scores, tokens):
    """Where the rule does not say which token stays: (L, G, S).

    A key of the first layer depends on its token alone, and rotation does not change its norm. So a token that occurs
    twice ties exactly, and if it is the one at the threshold, float32 rounding picks among its places.
    """
    tied = np.zeros_like(kept)
    if name.startswith("knorm"):
        for head, mask in enumerate(kept[0]):
            edge = tokens[np.flatnonzero(mask)[scores[0, head, mask].argmin()]]
            tied[0, head] = tokens == edge
    return tied


def test_repeated_tokens_at_the_threshold_have_equal_norms(kept):
    """What `_tied` excuses are ties indeed, and few."""
    for ratio in RATIOS:
        ours, _, scores, _, tokens = kept[f"knorm {ratio}"]
        tied = _tied(f"knorm {ratio}", ours, scores, tokens)
        assert tied.mean() < 0.01
        for head, mask in enumerate(tied[0]):
            assert np.ptp(scores[0, head, mask]) <= 1e-6 * np.abs(scores[0, head, mask]).max()


def _cuts(policy, kept, scores, head):
    """The lowest kept scores that a token of this head may have lost to: its own head's, or any head's."""
    protected = policy.stages[0].recent
    start = kept.shape[1] - (protected.count if protected else 0)
    inside = [scores[index, :start][kept[index, :start]] for index in range(len(kept))]
    if policy.text.startswith("adakv"):
        return [found.min() for found in inside if found.size]
    return [inside[head].min()]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("pyramidkv")])
def test_the_pyramid_gives_layers_different_counts_here(name, kept):
    _, theirs, *_ = kept[name]
    counts = theirs.sum(axis=2)[:, 0]
    assert len(set(counts)) > 20
    assert np.all(np.diff(counts) <= 0)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("adakv")])
def test_heads_really_get_different_counts_here(name, kept):
    ours, *_ = kept[name]
    assert np.ptp(ours.sum(axis=2), axis=1).max() > 50
