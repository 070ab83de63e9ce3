"""Claims about arithmetic: chains are right and stay small, answers are read as people write them, one by one."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.eval.prompts import Frame
from kvx.eval.tasks import registry
from kvx.eval.tasks.arithmetic import MOST, Chain, arithmetic, long_arithmetic, share_of_results
from kvx.eval.tasks.sample import Question
from kvx.eval.tasks.source import Source
from kvx.prose import prose
from tests.eval.letters import Letters


@pytest.fixture(scope="module")
def source():
    return Source(Letters(), prose(), Frame())


@given(seed=st.integers(0, 10**6), steps=st.integers(1, 30))
def test_every_written_step_is_true_and_follows_from_the_one_before(seed, steps):
    chain = Chain.of(np.random.default_rng(seed), steps)
    written = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)\.", chain.worked)
    value = chain.start
    for before, sign, amount, after in written:
        assert int(before) == value
        value = {"+": value + int(amount), "-": value - int(amount), "*": value * int(amount)}[sign]
        assert int(after) == value >= 0 and (sign != "*" or value <= MOST)
    assert len(written) == steps and value == chain.result
    assert chain.worked.endswith(f"The answer is {chain.result}.")
    assert len(re.findall(r"(?:Add|Subtract|Multiply by) \d+\.", chain.asked)) == steps


def test_a_worked_chain_is_what_it_should_be():
    chain = Chain(12, (("+", 8), ("-", 5), ("*", 3)))
    assert chain.asked == "Start with 12. Add 8. Subtract 5. Multiply by 3. What is the result?"
    assert chain.worked == "12 + 8 = 20. 20 - 5 = 15. 15 * 3 = 45. The answer is 45."
    assert chain.result == 45


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("12 + 8 = 20. The answer is 1,245.", 1),
        ("1245", 1),
        ("It is 1245.00", 1),
        ("#### 1245\n(12 steps)", 1),
        (r"\boxed{1245} after 3 steps", 1),
        ("The answer is -1245.", 0),
        ("1245, or 7", 0),
        ("12 + 8 = 1246.", 0),
        ("none", 0),
    ],
)
def test_the_final_number_decides(answer, score):
    assert registry.find("arithmetic").score(answer, Question("", ("2 + 3 = 5. The answer is 1245.",))) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (" 1 + 2 = 3. The answer is 3.\nAnswer 2: The answer is 20.\nAnswer 3: 100", 1),
        (" 3\nAnswer 3: 100\nAnswer 2: 20", 1),  # by their numbers, not their order
        (" 3\nAnswer 2: 21\nAnswer 3: 100", 2 / 3),
        (" 3\nAnswer 2: 21\nAnswer 2: 20", 1 / 3),  # the first says what was meant
        (" 3 20 100", 0),
        (" 3", 1 / 3),
        ("", 0),
    ],
)
def test_results_are_looked_for_behind_their_own_numbers(answer, score):
    question = Question(
        "", ("The answer is 3.\nAnswer 2: The answer is 20.\nAnswer 3: The answer is 100.",), "Answer 1:"
    )
    assert share_of_results(answer, question) == pytest.approx(score)


def test_no_worked_example_gives_an_answer_away(source):
    for make, options in ((arithmetic, {"steps": 2}), (long_arithmetic, {"questions": 5, "steps": 2})):
        (sample,) = make(source, 6000, 1, 0, **options)
        examples = re.findall(r"Question: (.+)\nAnswer:", sample.context)
        questions = re.findall(r"Question(?: \d+)?: (.+)", sample.context + sample.questions[0].text)
        asked = [each for each in questions if each not in examples]
        assert len(examples) > 20 and len(asked) == options.get("questions", 1)


def test_long_answers_are_long(source):
    """What makes them worth having: the answer takes hundreds of tokens of a real tokenizer, here letters."""
    (sample,) = long_arithmetic(source, 4000, 1, 0, questions=12, steps=5)
    assert sample.questions[0].new_tokens > 12 * 5 * len("1 + 2 = 3.") and len(sample.evidence) == 12
    for number, (first, last) in enumerate(sample.evidence, 1):
        assert sample.context[first:last].startswith(f"Question {number}: Start with")
