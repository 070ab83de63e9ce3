"""Claims about preferences as messages and from tables: the pairs that plain texts give, and one sentence otherwise."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from kvx.errors import BadInput
from kvx.train.data import open_pairs, pair_batches
from tests.train.letters import letters


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = turn("user", "why?")
PLAIN = {"prompt": "why?", "chosen": "so", "rejected": "no"}
ULTRAFEEDBACK = {
    "prompt": "why?",
    "chosen": [ASKED, turn("assistant", "so")],
    "rejected": [ASKED, turn("assistant", "no")],
}
ROWS = {
    "a text, then messages from it on": ULTRAFEEDBACK,
    "messages alone": {side: ULTRAFEEDBACK[side] for side in ("chosen", "rejected")},
    "a prompt of messages": {"prompt": [ASKED], "chosen": ULTRAFEEDBACK["chosen"][1:], "rejected": "no"},
}


def written(folder, row, kind=".jsonl"):
    path = folder / f"pairs{kind}"
    if kind == ".jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    return [str(path)]


def batch(pairs):
    return next(pair_batches(pairs, letters(chat=True), sequence=40, prompt=24, batch=1))


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize("row", [PLAIN, *ROWS.values()], ids=["texts", *ROWS])
def test_messages_are_the_pairs_that_plain_texts_are(tmp_path, row, kind):
    found, expected = batch(open_pairs(written(tmp_path, row, kind), "pairs")), batch([PLAIN])
    for side in ("chosen", "rejected"):
        ours, theirs = getattr(found, side), getattr(expected, side)
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.mask, theirs.mask)


def test_a_longer_conversation_is_a_prompt_of_all_its_turns(tmp_path):
    before = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    row = {side: [*before, turn("assistant", answer)] for side, answer in (("chosen", "d"), ("rejected", "e"))}
    (pair,) = open_pairs(written(tmp_path, row), "pairs")
    assert pair == {"prompt": before, "chosen": "d", "rejected": "e"}
    chosen = batch([pair]).chosen
    asked = chosen.tokens[0][(chosen.segments[0] > 0) & ~chosen.mask[0]]
    assert letters(chat=True).decode(asked.tolist()).replace("</s>", "").endswith("user: cassistant: ")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({**PLAIN, "chosen": [ASKED]}, "'chosen' ends with a message of 'user'; allowed: of 'assistant'"),
        ({**PLAIN, "chosen": []}, r"'chosen' is \[\]; allowed: a text that is not empty, or a list of messages"),
        (
            {**PLAIN, "chosen": [{"role": "user"}]},
            "'chosen': messages hold .*, which is none; allowed: objects with role",
        ),
        ({**PLAIN, "prompt": [1]}, "'prompt': messages hold 1"),
        ({**ROWS["messages alone"], "rejected": "no"}, "have other messages before their last; allowed: the same"),
        ({"chosen": "so", "rejected": "no"}, "'prompt' is None; allowed: a text"),
    ],
)
def test_what_is_no_pair_is_refused_by_file_and_number(tmp_path, row, sentence):
    with pytest.raises(BadInput, match=rf"pairs\.jsonl:1: {sentence}|pairs\.jsonl:1: .*{sentence}"):
        open_pairs(written(tmp_path, row), "pairs")


def test_a_table_without_answers_and_messages_without_a_template_are_refused(tmp_path):
    with pytest.raises(BadInput, match="allowed: one of them is 'rejected'"):
        open_pairs(written(tmp_path, {"prompt": "a", "chosen": "b"}, ".parquet"), "pairs")
    pairs = open_pairs(written(tmp_path, ULTRAFEEDBACK), "pairs")
    with pytest.raises(BadInput, match="prompts of messages, and the model no chat template; allowed: texts"):
        pair_batches(pairs, letters(), sequence=40, prompt=24, batch=1)
