"""Claims about LongBench v2: the prompt to the letter, options, facts, and what counts as an answer."""

import json

import pytest

from kvx.errors import BadInput
from tests.eval.tasks.files.written import lines, made, prompt, score

ROW = {
    "_id": "66", "domain": "Code", "sub_domain": "x", "difficulty": "hard", "length": "short",
    "question": " Which {A}? ", "choice_A": "one", "choice_B": "two", "choice_C": "three", "choice_D": "four ",
    "answer": "C", "context": "\nSome $Q$ text.\n",
}  # fmt: skip

PROMPT = """Please read the following text and answer the question below.

<text>
Some $Q$ text.
</text>

What is the correct answer to this question: Which {A}?
Choices:
(A) one
(B) two
(C) three
(D) four

Format your response as follows: "The correct answer is (insert answer here)"."""


def test_a_record_becomes_the_published_prompt(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([ROW, ROW]))
    sample, _ = made("longbench_v2", path=str(tmp_path))
    assert prompt(sample) == PROMPT
    assert sample.context.endswith("<text>\nSome $Q$ text.")
    facts = {"_id": "66", "domain": "Code", "difficulty": "hard", "length": "short"}
    assert sample.questions[0].facts == facts


def test_the_letter_in_the_form_asked_for_scores_1(tmp_path):
    (sample,) = made("longbench_v2", path=lines(tmp_path / "data.jsonl", ROW))
    answers = ("The correct answer is (C).", "The correct answer is (A).", "C", "")
    assert [score("longbench_v2", sample, each) for each in answers] == [1, 0, 0, 0]


@pytest.mark.parametrize("answer", ["E", "AB", "", 3])
def test_an_answer_that_is_no_option_is_refused(tmp_path, answer):
    with pytest.raises(BadInput, match=r"data\.jsonl:2: 'answer'"):
        made("longbench_v2", path=lines(tmp_path / "data.jsonl", ROW, {**ROW, "answer": answer}))
