"""Claims about GSM8K: examples, extraction, and fewer examples where there is no room."""

import pytest

from kvx.errors import BadInput
from tests.eval.tasks.files.written import lines, made, prompt, score

TRAIN = [
    {"question": f"What is {n} + 1?", "answer": f"It is {n}+1=<<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"}
    for n in range(9)
]
TEST = {"question": " How many? ", "answer": "Half of 2,468 is <<2468/2=1234>>1,234.\n#### 1,234"}


@pytest.fixture
def path(tmp_path):
    lines(tmp_path / "train.jsonl", *TRAIN)
    lines(tmp_path / "test.jsonl", TEST, {**TEST, "question": "And now?"})
    return str(tmp_path)


def test_worked_examples_come_before_the_question(path):
    sample = made("gsm8k", path=path, shots=2)[0]
    assert prompt(sample) == (
        "Question: What is 0 + 1?\nAnswer: It is 0+1=1.\n#### 1\n\n"
        "Question: What is 1 + 1?\nAnswer: It is 1+1=2.\n#### 2\n\n"
        "Question: How many?\nAnswer:"
    )
    assert sample.questions[0].text == "Question: How many?\nAnswer:"


def test_the_final_number_counts(path):
    sample = made("gsm8k", path=path)[0]
    said = ("12 and 7.\n#### 1234", "so $1,234.00", "1,235", "")
    assert [score("gsm8k", sample, each) for each in said] == [1, 1, 0, 0]
    assert score("gsm8k", sample, TEST["answer"]) == 1


def test_all_questions_have_the_same_examples_and_as_many_as_fit(path):
    first, second = made("gsm8k", path=path)
    assert first.context == second.context and first.context.count("Question") == 8
    (few,) = made("gsm8k", 150, count=1, path=path)
    assert first.context.startswith(few.context) and few.context.count("Question") == 2
    with pytest.raises(BadInput, match="length=50 is too short for task=gsm8k"):
        made("gsm8k", 50, path=path)


@pytest.mark.parametrize("answer", ["7", "#### none", "", "# 7", "7 ####"])
def test_a_solution_without_its_number_is_refused(tmp_path, path, answer):
    lines(tmp_path / "test.jsonl", TEST, {**TEST, "answer": answer})
    with pytest.raises(BadInput, match=r"test\.jsonl:2: 'answer'"):
        made("gsm8k", path=path)


def test_no_examples_are_refused(path):
    with pytest.raises(BadInput, match="shots=0"):
        made("gsm8k", path=path, shots=0)


def test_examples_never_come_from_the_test(tmp_path, path):
    with pytest.raises(BadInput, match="allowed: a folder with train"):
        made("gsm8k", path=path + "/test.jsonl")
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(BadInput, match=r"no file 'train\.jsonl'"):
        made("gsm8k", path=path)
