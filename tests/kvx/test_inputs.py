"""Bad input is refused before anything is compiled, with one sentence: argument, value, allowed range."""

import numpy as np
import pytest

import kvx
from kvx.loop import attend_turned
from kvx.policies import adakv, d2o, h2o, kivi, knorm, mikv, pyramidkv, quest, snapkv, streaming_llm, tova
from tests import tiny

PROMPT = np.ones((1, 8), np.int32)
FULL = kvx.policies.full()


@pytest.fixture(scope="module")
def model():
    return tiny.model(num_hidden_layers=3)


def one_sentence(error: kvx.BadInput) -> str:
    text = str(error)
    assert ("\n" not in text and "allowed: " in text) or "known: " in text
    return text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tokens": np.ones((1, 0), np.int32)}, "empty prompt"),
        ({"tokens": np.ones((0, 4), np.int32)}, "empty prompt"),
        ({"tokens": np.ones(4, np.int32)}, r"tokens has shape \(4,\)"),
        ({"tokens": np.ones((1, 4), np.float32)}, "float32; allowed: integers"),
        ({"tokens": np.full((1, 4), 97)}, "tokens holds 97; allowed: 0 to 96"),
        ({"tokens": np.full((1, 4), -1)}, "tokens holds -1"),
        ({"tokens": np.ones((1, 4097), np.int32), "max_new_tokens": 0}, "4097 positions"),
        ({"lengths": np.array([9])}, r"lengths=\[9\] disagree with tokens of length 8; allowed: 1 to 8"),
        ({"lengths": np.array([0])}, r"lengths=\[0\]"),
        ({"lengths": np.array([4, 4])}, r"lengths has shape \(2,\)"),
        ({"lengths": np.array([4.0])}, "float64"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"compress": "never"}, "compress='never'"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"policy": (FULL, FULL), "prefill_chunk": 4, "compress": "chunk"}, "policy is a tuple"),
        (
            {"policy": d2o(4, recent=0, sinks=1), "prefill_chunk": 4, "compress": "chunk"},
            "compress='chunk' cannot serve d2o",
        ),
    ],
)
def test_prefill_refuses(model, arguments, words):
    before = attend_turned._cache_size()
    with pytest.raises(kvx.BadInput, match=words) as raised:
        kvx.prefill(model, **{"tokens": PROMPT, "policy": FULL, **arguments})
    one_sentence(raised.value)
    assert attend_turned._cache_size() == before, "before anything is compiled"


def test_a_renumbering_policy_takes_a_prompt_longer_than_the_models_positions():
    model = tiny.model(num_hidden_layers=2, max_position_embeddings=64)
    tokens, _ = tiny.prompts(100)
    with pytest.raises(kvx.BadInput, match="at most 64"):
        kvx.prefill(model, tokens, snapkv(32, window=8), max_new_tokens=8)
    logits, cache = kvx.prefill(model, tokens, streaming_llm(32), prefill_chunk=16, compress="chunk", max_new_tokens=8)
    assert np.isfinite(np.asarray(logits)).all() and int(cache.next[0]) == 100


@pytest.mark.parametrize("recipe", [h2o, snapkv, tova, knorm, pyramidkv, adakv, streaming_llm, quest, d2o])
@pytest.mark.parametrize("budget", [0, -3, 0.0, 1.5, -0.5, float("nan"), float("inf"), True, "many", None])
def test_budgets_are_checked_when_a_policy_is_built(recipe, budget):
    with pytest.raises(kvx.BadInput, match="budget=") as raised:
        kvx.policy(recipe.__name__, budget=budget)
    assert "share of the prompt" in one_sentence(raised.value)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda: snapkv(32, window=64),
            "budget=32 is smaller than its protected slots .window=64.; allowed: at least 64",
        ),
        (lambda: streaming_llm(4), "sinks=4"),
        (lambda: d2o(8, recent=8), "protected"),
        (lambda: snapkv(64, kernel=4, window=8), "kernel=4 is even"),
        (lambda: snapkv(64, window=0), "window=0"),
        (lambda: snapkv(64, window=8, pooling="sum"), "pooling='sum'.*mean, max"),
        (lambda: h2o(64, average="median"), "average='median'"),
        (lambda: h2o(64, recent=1.5), "recent=1.5"),
        (lambda: kivi(bits=5), "bits=5 is not offered; allowed: 2, 3, 4, 8, None"),
        (lambda: kivi(bits=2.0), "bits=2.0"),
        (lambda: kivi(residual=100), "residual=100 is not a multiple of group=32"),
        (lambda: mikv(bits=16), "bits=16"),
        (lambda: mikv(high=0), "high=0"),
        (lambda: quest(8), "smaller than one page"),
        (lambda: adakv(64, window=8, floor=2.0), "floor=2.0"),
        (lambda: kvx.policy("snapkw", budget=64), "did you mean 'snapkv'"),
        (lambda: kvx.policy("snapkv", budgets=64), "did you mean 'budget'"),
        (lambda: kvx.policy("snapkv"), "missing a required argument: 'budget'"),
        (lambda: kvx.chain(), "no policies"),
        (lambda: kvx.chain(kivi(), snapkv(64, window=8)), "nothing can follow it"),
        (lambda: kvx.chain(h2o(64), adakv(64, window=8)), "cannot evict at every step"),
    ],
)
def test_hyperparameters_are_checked_when_a_policy_is_built(build, words):
    with pytest.raises(kvx.BadInput, match=words):
        build()


def test_an_uncalibrated_policy_is_refused_before_any_work(model):
    with pytest.raises(kvx.BadInput, match="not calibrated"):
        kvx.prefill(model, PROMPT, kvx.policies.q_filters(64, window=8))


def test_a_policy_that_does_not_fit_the_model_is_refused_before_any_work(model):
    with pytest.raises(kvx.BadInput, match="group=64 does not divide the head dim 32"):
        kvx.prefill(model, PROMPT, kivi(bits=4, group=64, residual=64))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"stop": (97,)}, "stop=97"),
    ],
)
def test_generate_refuses(model, arguments, words):
    with pytest.raises(kvx.BadInput, match=words):
        kvx.generate(model, PROMPT, **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ],
)
def test_sampling_refuses(arguments, words):
    with pytest.raises(kvx.BadInput, match=words):
        kvx.sampling(**arguments)
