"""Claims about fidelity: full against full is nothing, KL is what its formula says, intervals are Student's."""

import numpy as np
import pytest

import kvx
from kvx.eval.fidelity import Interval, fidelity
from kvx.policies import full, h2o, snapkv
from tests import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.model(num_hidden_layers=2)


def test_the_full_cache_against_itself_is_exactly_nothing(model):
    texts, _ = tiny.prompts(*[60] * 3)
    (found,) = fidelity(model, texts, 20, [full()])
    assert found.divergence == (0.0,) * 3 and found.agreement == (1.0,) * 3


def test_divergence_equals_the_sum_over_the_vocabulary_step_by_step(model):
    """Segments and shared passes change nothing: one step at a time, float64, one document at a time."""
    texts, _ = tiny.prompts(*[70] * 2)
    policy, other = h2o(16), snapkv(20, window=4)
    found = fidelity(model, texts, 30, [other, policy])
    assert [each.policy for each in found] == [other.text, policy.text]
    for document in range(2):
        row, total, same = texts[document : document + 1], 0.0, 0
        _, whole = kvx.prefill(model, row[:, :30], full(), max_new_tokens=40)
        _, cache = kvx.prefill(model, row[:, :30], policy, max_new_tokens=40)
        for place in range(30, 70):
            reference, whole = kvx.decode_step(model, row[:, place], whole, full())
            logits, cache = kvx.decode_step(model, row[:, place], cache, policy)
            p, q = (np.asarray(x, np.float64)[0] for x in (reference, logits))
            same += p.argmax() == q.argmax()
            p, q = (x - np.log(np.sum(np.exp(x))) for x in (p, q))
            total += np.sum(np.exp(p) * (p - q))
        assert found[1].divergence[document] == pytest.approx(total / 40, rel=1e-3)
        assert found[1].agreement[document] == pytest.approx(same / 40)
    assert found[1].kl.mean > 0.001, "it evicts"
    _, cache = kvx.prefill(model, texts[:, :30], policy, max_new_tokens=40)
    assert found[1].cache_bytes == cache.nbytes // 2


def test_intervals_are_students():
    """Of 1, 2, 3: mean 2, standard error 1 / sqrt(3), t of two degrees of freedom 4.3027."""
    found = Interval.of(np.asarray([1.0, 2.0, 3.0]))
    assert (found.mean, found.high - 2) == (2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-6))
    assert Interval.of(np.asarray([1.5])) == Interval(1.5, 1.5, 1.5)


def test_pairing_is_by_document(model):
    texts, _ = tiny.prompts(*[60] * 3)
    close, far = fidelity(model, texts, 20, [h2o(40), h2o(8)])
    difference = np.asarray(far.divergence) - np.asarray(close.divergence)
    assert close.less_than(far) == Interval.of(difference) and difference.mean() > 0


def test_a_prompt_that_leaves_nothing_is_refused(model):
    with pytest.raises(kvx.BadInput, match="prompt=20 of documents of 20 tokens; allowed: 1 to 19"):
        fidelity(model, tiny.prompts(20)[0], 20, [full()])
