"""Claims about measured cost: bytes are those of the cache, time is compiled code's, and nonsense is refused."""

import numpy as np
import pytest

import kvx
from kvx.errors import BadInput
from kvx.eval.cost import costs
from kvx.generate import full_policy
from tests import tiny

TEXT = np.arange(500) % 97


@pytest.mark.slow
def test_costs_of_two_policies_at_two_batches():
    model = tiny.model(num_hidden_layers=2)
    window = kvx.parse_policy("streaming_llm(budget=32)")
    found = list(costs(model, "tiny", [full_policy(), window], [200], [1, 2], tokens=TEXT, steps=4, repeats=2))
    assert [(each.policy, each.length, each.batch) for each in found] == [
        (policy, 200, batch) for batch in (1, 2) for policy in ("full", "streaming_llm(budget=32)")
    ]
    full, small, wide, _ = found
    _, cache = kvx.prefill(model, TEXT[None, :200], full_policy(), max_new_tokens=4)
    assert (full.cache_bytes, full.bytes_read) == (cache.nbytes, cache.bytes_read())
    assert small.cache_bytes < full.cache_bytes < wide.cache_bytes < 2 * full.cache_bytes
    weights = sum(leaf.nbytes for leaf in _leaves(model))
    for each in found:
        assert 0 < each.metadata_bytes < each.cache_bytes
        # The whole cache, and more than it, is there when the last layer's prompt is packed.
        assert each.peak_bytes > weights + each.cache_bytes
        # Compilation takes seconds; a step of this model does not.
        assert 0 < each.step_seconds < 0.5 and 0 < each.prefill_seconds < 2


def test_the_model_the_policy_and_the_text_are_checked_before_any_work():
    model = tiny.model(num_hidden_layers=2)
    good = {"tokens": TEXT, "steps": 2, "repeats": 1}
    for changed, word in (
        ({"tokens": TEXT[None]}, "tokens has shape"),
        ({"tokens": TEXT[:0]}, "tokens has shape"),
        ({"tokens": TEXT * 0.5}, "dtype float64"),
        ({"steps": 0}, "steps=0"),
        ({"repeats": 0}, "repeats=0"),
    ):
        with pytest.raises(BadInput, match=word):
            costs(model, "tiny", [full_policy()], [64], [1], **(good | changed))
    with pytest.raises(BadInput, match="lengths=0"):
        costs(model, "tiny", [full_policy()], [0], [1], **good)
    with pytest.raises(BadInput, match="batches=0"):
        costs(model, "tiny", [full_policy()], [64], [0], **good)
    with pytest.raises(BadInput, match="positions"):
        list(costs(model, "tiny", [full_policy()], [4096], [1], **good))


def _leaves(model):
    import jax

    return jax.tree.leaves(model)
