"""Claims about InfiniteBench: prompts to the letter, answers as each task writes them, gold answers that score 1."""

import pytest

from kvx.errors import BadInput
from kvx.eval.tasks.files.infinitebench import MEMBERS
from kvx.eval.tasks.files.infinitebench_prompts import NEW_TOKENS, PROMPTS
from tests.eval.tasks.files.written import lines, made, prompt, score

OPTIONS = ["load", "parse", "save", "quit"]

RECORDS = {
    "passkey": ("What is the pass key?", ["71432"]),
    "number_string": ("What is the sequence of digits?", ["2200012222"]),
    "kv_retrieval": ('Key: "ce06"\nThe value is:', ["41cb-8"]),
    "longbook_sum_eng": ("", ["A long tale.\nIt ends."]),
    "longbook_choice_eng": ("Who?", ["parse"]),
    "longbook_qa_eng": ("Who?", ["Mary", "Mary Jones"]),
    "longbook_qa_chn": ("谁?", ["小明"]),
    "longdialogue_qa_eng": ("Who?", ["ACE"]),
    "math_find": ("Find it. The second largest number of the list is:", [42]),
    "math_calc": ("1 + 3 - 8", [[1, 4, -4]]),
    "code_run": ("Please give me the return value of func_21(-3).", [-7]),
    "code_debug": ("Which?", ["parse"]),
}
SAID = {
    "math_find": "The number is 42.", "code_run": " -7.", "code_debug": "B. parse", "longbook_choice_eng": "B",
    "longdialogue_qa_eng": "It's Ace.",
}  # fmt: skip


def write(folder, name, **fields):
    asked, answer = RECORDS[name]
    row = {"id": 0, "context": "A {context}.", "input": asked, "answer": answer, "options": OPTIONS, **fields}
    return lines(folder / f"{name}.jsonl", row)


@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_the_gold_answer_scores_1_and_the_empty_one_0(tmp_path, name):
    write(tmp_path, name)
    (sample,) = made(f"infinitebench/{name}", path=str(tmp_path))
    task, right = f"infinitebench/{name}", sample.questions[0].answers[0]
    assert score(task, sample, SAID.get(name, right)) == 1
    assert score(task, sample, "") == 0
    assert sample.context.endswith("A {context}.")
    assert sample.questions[0].new_tokens == NEW_TOKENS[name]


def test_all_twelve_tasks_have_a_prompt_and_a_limit():
    assert len(MEMBERS) == 12 and set(MEMBERS) == set(PROMPTS) == set(NEW_TOKENS) == set(RECORDS)


def test_some_prompts_take_pieces_of_the_question(tmp_path):
    (sample,) = made("infinitebench/code_run", path=write(tmp_path, "code_run"))
    assert prompt(sample) == (
        "There is a function called func_21 in the following Python code.\n\nA {context}.\n\n"
        "Please compute the exact value of func_21(-3). The value of func_21(-3) is"
    )
    (sample,) = made("infinitebench/math_find", path=write(tmp_path, "math_find"))
    assert prompt(sample) == (
        "What is the second largest number in the following list?\n\nA {context}.\n\n"
        "Find it. The second largest number of the list is:"
    )
    (sample,) = made("infinitebench/code_debug", path=write(tmp_path, "code_debug"))
    assert sample.questions[0].text == ("\n\nOptions:\nA. load\nB. parse\nC. save\nD. quit\n\nThe correct option is:")


def test_answers_are_texts_whatever_the_file_has(tmp_path):
    def answers(name, **fields):
        return made(f"infinitebench/{name}", path=write(tmp_path, name, **fields))[0].questions[0].answers

    assert answers("math_calc") == answers("math_calc", answer=[1, 4, -4]) == ("[1, 4, -4]",)
    assert answers("longbook_choice_eng") == answers("longbook_choice_eng", answer=["parse", "B"]) == ("parse", "B")
    assert answers("math_find", answer=4.5) == ("4.5",)


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("code_run", {"input": "what does it return?"}, "'input'"),
        ("code_run", {"answer": ["none"]}, "'answer'"),
        ("math_find", {"input": "largest"}, "'input'"),
        ("code_debug", {"options": ["a", "b"]}, "'options'"),
        ("code_debug", {"answer": ["e"]}, "'answer'"),
        ("passkey", {"answer": []}, "'answer'"),
        ("math_calc", {"answer": [[1], [2]]}, "'answer'"),
    ],
)
def test_a_broken_record_is_refused_by_its_line(tmp_path, name, fields, says):
    with pytest.raises(BadInput, match=rf"{name}\.jsonl:1: {says}"):
        made(f"infinitebench/{name}", path=write(tmp_path, name, **fields))
