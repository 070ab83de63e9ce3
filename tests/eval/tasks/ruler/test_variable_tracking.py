"""Claims about variable tracking: the chain, the worked example, the literal prompt, and where lines lie."""

import re
from itertools import pairwise

import numpy as np
from scipy.stats import kstest

from kvx.eval.tasks import registry
from tests.eval.tasks.ruler.pieces import Pieces, source

TASK = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


def make(length=2048, count=4, seed=0):
    return registry.find("ruler/vt").make(source(), length, count, seed)


def test_the_prompt_is_the_published_one():
    (sample,) = make(count=1)
    (question,) = sample.questions
    value = question.text.split()[-5]
    assert question.text == f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
    assert question.prefix == (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"5 variables are assigned the value {value}, they are: "
    )
    assert question.new_tokens == 30 and 10_000 <= int(value) <= 99_998
    assert sample.context.startswith(TASK) and sample.context.count(TASK) == 2


def test_a_chain_is_five_names_of_five_letters_in_their_order():
    for sample in make():
        names = sample.questions[0].answers
        value = sample.questions[0].text.split()[-5]
        lines = [sample.context[first:last].strip() for first, last in sample.evidence]
        assert lines[0] == f"VAR {names[0]} = {value}"
        assert lines[1:] == [f"VAR {new} = VAR {old}" for old, new in pairwise(names)]
        assert len(set(names)) == 5 and all(re.fullmatch("[A-Z]{5}", name) for name in names)
        assert sorted(sample.evidence) == list(sample.evidence)
        starts = [sample.context.rindex("\n", 0, first) for first, _ in sample.evidence]
        assert len(set(starts)) == 5


def test_the_example_is_of_500_tokens_solved_and_of_names_of_its_own():
    samples = make()
    examples = [sample.context[: sample.context.rindex(TASK)] for sample in samples]
    for sample, example in zip(samples, examples, strict=True):
        prompt, _, answer = example.rpartition("they are: ")
        # The answer is beside the 500 tokens; clauses have at most 8 of these tokens.
        assert 490 <= len(Pieces().encode(prompt + "they are: ")) <= 500
        names = answer.split()
        assert len(names) == 5 and all(re.fullmatch("[A-Z]{3}", name) for name in names)
        assigned = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)\s*$", prompt, re.M)
        assert [name for name, _ in assigned] == names
        assert [held for _, held in assigned][1:] == names[:-1]
        asked = sample.questions[0].text.split()[-5]
        assert assigned[0][1] != asked and asked not in example
        assert not set(names) & set(sample.questions[0].answers)
        assert example.endswith("\n\n")
    assert len(set(examples)) == len(examples)


def test_lines_lie_anywhere():
    samples = make(4096, count=30)
    places = []
    for sample in samples:
        start = sample.context.rindex(TASK) + len(TASK)
        places += [(first - start) / (len(sample.context) - start) for first, _ in sample.evidence]
    assert kstest(places, "uniform").pvalue > 0.01
    assert np.all(np.asarray(places) >= 0)
