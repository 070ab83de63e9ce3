"""Generation: one loop that equals plain forward passes, ends rows by themselves, and continues caches."""

import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from tests import tiny

FULL = kvx.policies.full()


@pytest.fixture(scope="module")
def model():
    return tiny.model(num_hidden_layers=3)


def greedy_by_forward(model, prompt: list[int], count: int) -> list[int]:
    """The oracle: a whole forward pass for every token, padded to one shape."""
    text = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(text)] = text
        text.append(int(jnp.argmax(model(jnp.asarray(padded))[0, len(text) - 1])))
    return text[len(prompt) :]


def test_greedy_generation_equals_forward_passes(model):
    tokens, lengths = tiny.prompts(60, 33)
    result = kvx.generate(model, tokens, lengths=lengths, max_new_tokens=20)
    for row, length in enumerate(lengths):
        assert np.asarray(result.tokens[row]).tolist() == greedy_by_forward(model, tokens[row, :length].tolist(), 20)
    assert result.lengths.tolist() == [20, 20] and (result.cache.next == lengths + 19).all()


def test_decoding_one_by_one_equals_one_prefill(model):
    tokens, _ = tiny.prompts(60)
    whole, _ = kvx.prefill(model, tokens, FULL)
    logits, cache = kvx.prefill(model, tokens[:, :20], FULL)
    for place in range(20, 60):
        logits, cache = kvx.decode_step(model, tokens[:, place], cache, FULL)
    assert np.abs(np.asarray(whole - logits)).max() < 1e-5 * np.abs(np.asarray(whole)).max() + 1e-5


def test_teacher_forcing_scores_what_a_forward_pass_scores(model):
    tokens, _ = tiny.prompts(60)
    logits, cache = kvx.prefill(model, tokens[:, :40], FULL)
    scores, _ = kvx.teacher_forced(model, tokens[:, 40:], cache, FULL, logits)
    everything = np.asarray(model(jnp.asarray(tokens)))[0]
    log_softmax = everything - np.log(np.exp(everything).sum(-1, keepdims=True))
    expected = [log_softmax[place - 1, tokens[0, place]] for place in range(40, 60)]
    assert np.abs(np.asarray(scores[0]) - expected).max() < 1e-4


def test_a_stop_token_ends_its_row_only(model):
    tokens, lengths = tiny.prompts(60, 33)
    free = np.asarray(kvx.generate(model, tokens, lengths=lengths, max_new_tokens=20).tokens)
    stop = int(free[0, 7])
    ended = kvx.generate(model, tokens, lengths=lengths, max_new_tokens=20, stop=(stop,))
    for row in range(2):
        hits = np.flatnonzero(free[row] == stop)
        length = int(hits[0]) + 1 if len(hits) else 20
        assert int(ended.lengths[row]) == length
        assert np.asarray(ended.tokens[row])[:length].tolist() == free[row, :length].tolist()
        assert (np.asarray(ended.tokens[row])[length:] == -1).all()
    assert int(ended.cache.next[0]) == 60 + int(ended.lengths[0]) - 1, "its cache holds what was fed and no more"


@pytest.mark.parametrize("text", ["full", "h2o(budget=24)", "snapkv(budget=24, window=8)"])
def test_continuing_a_cache_equals_feeding_its_tokens_one_by_one(model, text):
    policy = kvx.parse_policy(text)
    tokens, _ = tiny.prompts(60)
    question = tiny.prompts(9, seed=5)[0]
    _, cache = kvx.prefill(model, tokens, policy, max_new_tokens=40)
    answer = kvx.generate(model, question, policy=policy, cache=cache, max_new_tokens=6)
    logits, cache = kvx.prefill(model, tokens, policy, max_new_tokens=40)
    for token in question[0]:
        logits, cache = kvx.decode_step(model, np.array([token]), cache, policy)
    expected = []
    for _ in range(6):
        expected.append(int(jnp.argmax(logits)))
        logits, cache = kvx.decode_step(model, np.array(expected[-1:]), cache, policy)
    assert np.asarray(answer.tokens[0]).tolist() == expected


def test_streaming_yields_what_generation_returns(model):
    tokens, lengths = tiny.prompts(60, 33)
    rule = kvx.sampling(temperature=0.9, top_k=20, repetition_penalty=1.1)
    arguments = {"lengths": lengths, "max_new_tokens": 12, "sampling": rule, "seed": (3, 4)}
    result = np.asarray(kvx.generate(model, tokens, **arguments).tokens)
    stop = int(result[0, 5])
    result = np.asarray(kvx.generate(model, tokens, **arguments, stop=(stop,)).tokens)
    steps = [np.asarray(step) for step in kvx.stream(model, tokens, **arguments, stop=(stop,))]
    streamed = np.stack(steps, axis=1)
    assert streamed.tolist() == result[:, : streamed.shape[1]].tolist()
    assert (result[:, streamed.shape[1] :] == -1).all()


def test_a_repetition_penalty_changes_the_text_and_sees_the_prompt(model):
    tokens = np.array([[5, 9] * 20], np.int32)
    plain = kvx.generate(model, tokens, max_new_tokens=12)
    strong = kvx.generate(model, tokens, max_new_tokens=12, sampling=kvx.sampling(repetition_penalty=50.0))
    new = np.asarray(strong.tokens[0]).tolist()
    assert len(set(new)) == 12 and not {5, 9} & set(new), "with a strong penalty nothing is said twice"
    assert np.asarray(plain.tokens).tolist() != [new]


def test_a_cache_in_bfloat16_takes_half_the_bytes_of_keys_and_values(model):
    tokens, _ = tiny.prompts(100)
    _, wide = kvx.prefill(model, tokens, FULL)
    _, narrow = kvx.prefill(model, tokens, FULL, cache_dtype=jnp.bfloat16)
    rows = 3 * 2 * 256 * 2 * 32  # layers, heads, slots (bucket of the prompt + 128), keys and values of width 32
    assert wide.nbytes - narrow.nbytes == 2 * rows
    result = kvx.generate(model, tokens, max_new_tokens=5, cache_dtype=jnp.bfloat16)
    assert result.lengths.tolist() == [5]
