"""Claims about training LESS: records are what the cache does, the loss falls, runs repeat and can go on."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx import policies
from kvx.context import Context, Spec
from kvx.loop import project
from kvx.parts.losers import Drop
from kvx.policy import Layer, Policy
from kvx.step import decode_layer
from kvx.train import less as training
from kvx.train.feature_maps import Settings, attention
from kvx.train.layer_record import record_layer
from kvx.train.less import train, with_maps
from tests import tiny

PROMPT, LENGTH = 24, 40
QUICK = Settings(steps=40, batch=2, rows=16, rate=5e-3, dropout=0.0, checks=2)


def model():
    return tiny.model(num_hidden_layers=2)


def small(**changes) -> Policy:
    return policies.less(12, **{"recent": 4, "features": 4, "hidden": 16, **changes})


def recorded(policy: Policy, texts: np.ndarray):
    """The first layer's record."""
    (stage,) = policy.stages
    host = Policy((replace(stage, losers=Drop()),), "host")
    x = model().embed(jnp.asarray(texts))
    return record_layer(host, model().blocks[0], x, jnp.int32(0), layers=2, prompt=PROMPT)


@pytest.mark.parametrize("changes", [{}, {"host": "lambda"}])
def test_a_record_holds_what_the_cache_holds_row_by_row(changes):
    """The first layer's kept sets in a real run: a row reads what stayed after the row before it, and itself."""
    texts, _ = tiny.prompts(LENGTH, LENGTH)
    record, host = recorded(small(**changes), texts), policies.h2o(12, recent=4, group="sum")
    if changes:
        host = policies.streaming_llm(12, renumber=False)
    _, cache = kvx.prefill(model(), texts[:, :PROMPT], host, max_new_tokens=LENGTH - PROMPT)
    for row, place in enumerate(range(PROMPT, LENGTH)):
        held = np.zeros((2, 2, LENGTH), bool)
        for text, head, slot in np.argwhere(np.asarray(cache.layers[0].positions()) >= 0):
            held[text, head, cache.layers[0].positions()[text, head, slot]] = True
        expected = ~held & (np.arange(LENGTH) < place)
        np.testing.assert_array_equal(record.lost[:, :, row], expected)
        _, cache = kvx.decode_step(model(), texts[:, place], cache, host)


def test_the_parallel_form_is_what_decoding_computes():
    """The first layer's attention output, row by row, against the recurrent state of a real cache."""
    texts, _ = tiny.prompts(LENGTH, LENGTH)
    policy = small()
    (stage,) = policy.stages
    maps = stage.losers.initial(jax.random.key(0), model().blocks[0].spec)
    maps = replace(maps, key_scale=maps.key_scale + 0.5)
    expected = attention(maps, recorded(policy, texts))
    both = with_maps(policy, jax.tree.map(lambda array: jnp.stack([array, array]), maps))
    _, cache = kvx.prefill(model(), texts[:, :PROMPT], both, max_new_tokens=LENGTH - PROMPT)
    for row, place in enumerate(range(PROMPT, LENGTH)):
        x = model().embed(jnp.asarray(texts[:, place : place + 1]))
        out = _first_attention(both, cache, x, place)
        np.testing.assert_allclose(out[:, :, :, 0], expected[:, :, :, row], atol=2e-5)
        _, cache = kvx.decode_step(model(), texts[:, place], cache, both)


def _first_attention(policy, cache, x, place):
    """What the first layer's cache answers to the token at `place`."""
    block = model().blocks[0]
    here = jnp.full(2, place, jnp.int32)
    context = Context(jnp.int32(0), here, Spec(block.spec, 2, 0, 0, 0))
    query, fresh = project(block, x, here[:, None])
    fresh = policy.stats(fresh, None, context)
    layer = Layer(cache.layers[0], cache.states[0])
    return decode_layer(policy, layer, query, fresh, None, here + 1, context)[0]


def test_training_reduces_the_error_and_repeats_exactly():
    """On held-back text; the same seed gives the same bits, another one other maps."""
    texts, _ = tiny.prompts(*[LENGTH] * 4)
    trained, left = train(small(), model(), texts, QUICK, prompt=PROMPT)
    assert all(share < 0.9 for share in left), left
    again, same = train(small(), model(), texts, QUICK, prompt=PROMPT)
    assert same == left and trained.text == small().text
    for one, other in zip(jax.tree.leaves(trained), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    _, others = train(small(), model(), texts, replace(QUICK, seed=1), prompt=PROMPT)
    assert others != left


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    """The second layer fails; the next run trains that one alone, and ends as an undisturbed one."""
    texts, _ = tiny.prompts(*[LENGTH] * 4)
    expected, _ = train(small(), model(), texts, QUICK, prompt=PROMPT)
    whole, calls = training.train_layer, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(training, "train_layer", failing)
    with pytest.raises(KeyboardInterrupt):
        train(small(), model(), texts, QUICK, prompt=PROMPT, out=tmp_path / "less.safetensors")
    trained, _ = train(small(), model(), texts, QUICK, prompt=PROMPT, out=tmp_path / "less.safetensors")
    assert len(calls) == 3 and [path.name for path in tmp_path.iterdir()] == ["less.safetensors"]
    for one, other in zip(jax.tree.leaves(trained), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_cannot_be_trained_is_refused():
    texts, _ = tiny.prompts(*[LENGTH] * 2)
    with pytest.raises(kvx.BadInput, match="has no feature maps to train"):
        train(policies.h2o(12), model(), texts, QUICK)
    with pytest.raises(kvx.BadInput, match="prompt"):
        train(small(), model(), texts, QUICK, prompt=LENGTH)


def test_the_command_refuses_bad_input_in_one_line(capsys):
    from kvx.cli import run

    with pytest.raises(SystemExit) as ended:
        run(training.app, "python -m kvx.train.less", ["out.safetensors", "--policy", "h2o(budget=4)"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("python -m kvx.train.less: error: policy 'h2o(budget=4)' has no feature")
