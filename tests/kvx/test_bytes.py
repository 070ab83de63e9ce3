"""Bytes are bytes: what a cache says it takes is what the process holds more after a generation."""

import gc

import jax
import pytest

import kvx
from tests import tiny

POLICIES = (
    "full",
    "h2o(budget=32)",
    "adakv(budget=32, window=8)",
    "kivi(bits=4)",
    "d2o(budget=32)",
    "quest(budget=32)",
    "minicache()",
    "paged()",
)


def live_bytes() -> int:
    """Bytes of every array that is alive."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("text", POLICIES)
def test_nbytes_is_the_growth_of_live_arrays_over_generate(text):
    model, (tokens, lengths) = tiny.model(num_hidden_layers=4), tiny.prompts(150, 90)
    policy = kvx.parse_policy(text)
    kvx.generate(model, tokens, policy=policy, lengths=lengths, max_new_tokens=8)  # constants of tracing come to stay
    before = live_bytes()
    result = kvx.generate(model, tokens, policy=policy, lengths=lengths, max_new_tokens=8)
    grown = live_bytes() - before
    assert grown == result.cache.nbytes + result.tokens.nbytes + result.lengths.nbytes
