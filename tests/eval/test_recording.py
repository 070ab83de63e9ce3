"""Claims about records: they say what was answered, by whom, and what it took, row by row."""

import hashlib

import numpy as np

import kvx
from kvx.eval.answering import Answered, batches
from kvx.eval.prompts import Frame
from kvx.eval.recording import recorded
from kvx.eval.records import Cell
from kvx.eval.tasks.registry import find
from kvx.eval.tasks.sample import Question, Sample
from tests.eval.letters import Letters
from tests.tiny import model


def test_a_record_is_its_rows_answer_score_share_of_bytes_and_evidence():
    samples = [
        Sample("abc key 42 def", (Question(" which?", ("42",), " it is"),), evidence=((4, 10),), depth=0.5),
        Sample("abc key 17 def", (Question(" which?", ("17",), " it is"),), evidence=((4, 10),), depth=0.5),
    ]
    (batch,) = batches(Letters(), Frame(), samples, 2, "agnostic")
    policy = kvx.policies.full()
    tokens = np.asarray(batch.contexts, np.int32)
    _, cache = kvx.prefill(model(), tokens, policy, max_new_tokens=batch.room)
    answered = Answered([[" 42."], [" 71."]], [[None], [None]], cache, 12, 1.5, False)
    records = [
        recorded(
            find("passkey"), Cell("tiny", "passkey", 64, "agnostic"), 7 + row, policy, batch, row, answered,
            bf16_bytes=100, seconds={"decode": 1.5}, compiled=False,
        )
        for row in range(2)
    ]  # fmt: skip
    assert [record.score for record in records] == [1.0, 0.0] and [record.index for record in records] == [7, 8]
    assert [record.answers for record in records] == [(" 42.",), (" 71.",)]
    assert records[0].tokens == len("abc key 42 def which? it is") and records[0].retention == 1.0
    assert records[0].cache_bytes == cache.nbytes // 2 and records[0].sha256 != records[1].sha256
    ids = Letters().encode("abc key 42 def") + Letters().encode(" which? it is")
    assert records[0].sha256 == hashlib.sha256(np.asarray(ids, np.int32).tobytes()).hexdigest()
