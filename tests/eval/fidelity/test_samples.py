"""Claims about fidelity's records: one a policy and document, the same whatever was left to do."""

import hashlib

import numpy as np
import pytest

import kvx
from kvx.eval.fidelity import fidelity, fidelity_records
from kvx.eval.fidelity.samples import seeded_documents
from kvx.eval.records import Cell, Record, append, read
from kvx.policies import full, h2o
from kvx.prose import prose
from tests import tiny
from tests.eval.letters import Letters

SIZES = {"documents": 3, "prompt": 20, "forced": 12}


@pytest.fixture(scope="module")
def model():
    return tiny.model(num_hidden_layers=2)


def records(model, policies, seed=0):
    return list(fidelity_records("tiny", model, Letters(), prose(), policies, **SIZES, seed=seed))


def test_a_record_says_what_the_measurement_found(model, tmp_path):
    found = records(model, [full(), h2o(8)])
    assert [(each.policy, each.index) for each in found] == [
        (policy, index) for policy in ("full", h2o(8).text) for index in range(3)
    ]
    texts = seeded_documents(Letters(), prose(), 3, 32, 0)
    (expected,) = fidelity(model, texts, 20, [h2o(8)])
    for record, divergence, perplexity in zip(found[3:], expected.divergence, expected.perplexity, strict=True):
        assert record.score == pytest.approx(divergence) and record.score > 0
        assert record.measures["perplexity"] == pytest.approx(perplexity)
        assert set(record.measures) == {"agreement", "perplexity", "top_k_recall", "attention_error"}
        assert record.cell == Cell("tiny", "fidelity", 32, "agnostic") and record.tokens == 32
    assert found[0].score == 0 and found[0].sha256 == found[3].sha256 != found[1].sha256
    assert found[1].sha256 == hashlib.sha256(texts[1].astype("<i4").tobytes()).hexdigest()
    append(tmp_path / "records.jsonl", found)
    assert read(tmp_path / "records.jsonl", Record) == found


def test_what_is_left_to_do_does_not_change_what_is_found(model, monkeypatch):
    policies = [full(), h2o(8)]
    together, alone = records(model, policies), records(model, policies[1:])
    monkeypatch.setattr("kvx.eval.fidelity.samples.TOGETHER", 1)
    assert together == records(model, policies)
    assert together[3:] == alone


def test_the_seed_moves_the_documents(model):
    first, second, again = (seeded_documents(Letters(), prose(), 3, 32, seed) for seed in (0, 1, 0))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)


def test_too_many_documents_are_refused(model):
    with pytest.raises(kvx.BadInput, match="when cut into 100000 documents"):
        next(fidelity_records("tiny", model, Letters(), prose(), [full()], **SIZES | {"documents": 100_000}, seed=0))
