"""The first contract of every policy: with a budget that holds every token it is the full cache."""

import numpy as np
import pytest

import kvx
from tests import tiny
from tests.kvx.contract_cases import CASES, parameters
from tests.kvx.forced_run import LENGTHS, forced, model, run


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", parameters())
def test_a_budget_that_holds_every_token_is_the_full_cache(name):
    """Also in a batch with a row below its budget and one above: only the second may differ."""
    tokens, lengths = tiny.prompts(*LENGTHS)
    full, _ = run(model(), kvx.policies.full(), tokens, lengths, forced())
    scores, _ = run(model(), CASES[name].exact(4096), tokens, lengths, forced())
    # 1e-5 of the largest logit, about 10 here; two log-softmaxes of rounding on top.
    assert np.abs(scores - full).max() < 2e-4
    scores, _ = run(model(), CASES[name].exact(80), tokens, lengths, forced())
    assert np.abs(scores[1] - full[1]).max() < 2e-4, "row 1 ends at 64 tokens, below the budget of 80"
