"""Claims about candidates: ready for the model under the text that was asked for, and made once."""

import numpy as np
import pytest

from kvx.errors import BadInput
from kvx.eval.search.candidates import Candidates
from kvx.eval.search.sizing import Prompts
from kvx.prose import prose
from tests.eval.letters import Letters
from tests.tiny import model


@pytest.fixture(scope="module")
def candidates():
    return Candidates(model(), Letters(), prose(), (2, 64), seed=0)


def test_what_learns_is_calibrated_once_and_keeps_its_text(candidates):
    text = "q_filters(budget=0.25, window=8)"
    policy = candidates.policy(text)
    assert policy.text == text and policy.nbytes == 4 * 2 * 32 * 4
    assert candidates.policy(text) is policy


def test_what_cannot_be_is_told_beside_the_sizes_of_the_others(candidates):
    prompts = Prompts(np.ones((1, 64), np.int32), np.asarray([64], np.int32), 16)
    texts = ("full", "kivi+snapkv(budget=0.5)", "less(budget=0.25)", "latent_codes", "h2o(budget=0.25)")
    found = candidates.sizes(texts, prompts)
    refused = {text: str(size) for text, size in found.items() if isinstance(size, BadInput)}
    assert refused.keys() == {"kivi+snapkv(budget=0.5)", "less(budget=0.25)", "latent_codes"}
    assert "nothing can follow" in refused["kivi+snapkv(budget=0.5)"] and "not trained" in refused["less(budget=0.25)"]
    assert 0 < found["h2o(budget=0.25)"] < found["full"]
