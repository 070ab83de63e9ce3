"""Claims about prompts that are made to fit: halves kept, beginnings kept, fewer examples, and never too long."""

import pytest

from kvx.errors import BadInput
from kvx.eval.prompts import Frame
from kvx.eval.tasks.files.fitting import beginning, fewer_examples, whole, without_middle
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import one
from tests.eval.letters import Letters
from tests.eval.tasks.files.written import prompt, source

CONTEXT = "".join(chr(65 + number % 26) + chr(97 + number // 26) for number in range(500))
CHAT = Frame("<user>", "<end>", "", True)


def asked(context=CONTEXT, question="\nWhich?", **more) -> Sample:
    return one(context, Question(question, ("x",), **more))


@pytest.mark.parametrize("frame", [Frame(), CHAT])
@pytest.mark.parametrize("length", [60, 401, 999])
def test_the_middle_goes_and_both_halves_stay(frame, length):
    found = source(frame)
    sample = asked(prefix="It is")
    cut = without_middle(found, sample, length, "t")
    filled, half = prompt(sample), len(prompt(cut)) // 2
    assert prompt(cut) == filled[:half] + filled[-half:]
    assert length - 1 <= found.size(cut) <= length  # of an odd room one token is left out
    assert cut.questions == sample.questions


def test_what_fits_is_not_touched():
    found, sample = source(), asked()
    assert without_middle(found, sample, found.size(sample), "t") is sample


def test_a_question_longer_than_its_half_loses_its_beginning():
    sample = asked("c" * 100, "".join(map(chr, range(33, 127))))
    cut = without_middle(source(), sample, 80, "t")
    assert cut.context == "c" * 40 and cut.questions[0].text == sample.questions[0].text[-40:]
    tiny = without_middle(source(), asked("c" * 5, sample.questions[0].text), 40, "t")
    assert tiny.context == "c" * 5
    assert tiny.questions[0].text == sample.questions[0].text[:15] + sample.questions[0].text[-20:]


class Growing(Letters):
    """Writes a blank at each end of what it decodes, as tokenizers do that mark where words begin."""

    def decode(self, ids, skip_special=True):
        return f" {super().decode(ids)} "


def test_tokens_that_the_joint_adds_count():
    found = source()
    object.__setattr__(found, "tokenizer", Growing())
    cut = without_middle(found, asked(), 100, "t")
    assert found.size(cut) <= 100
    assert cut.context.startswith(" " + CONTEXT[:40]) and cut.context.endswith(CONTEXT[-40:] + " ")


@pytest.mark.parametrize("length", [60, 500])
def test_a_text_is_cut_at_its_end(length):
    def build(characters):
        return asked("head " + CONTEXT[:characters])

    cut = beginning(source(), CONTEXT, build, length, "t")
    assert source().size(cut) == length
    assert cut.context == "head " + CONTEXT[: len(cut.context) - 5]
    assert beginning(source(), CONTEXT, build, 2000, "t").context == "head " + CONTEXT


def test_examples_are_dropped_from_the_end():
    def build(count):
        return asked("".join(f"example {number}\n" for number in range(count)))

    cut = fewer_examples(source(), build, 8, 45, "t")
    assert cut.context == "example 0\nexample 1\nexample 2\n"
    assert fewer_examples(source(), build, 8, 1000, "t").context.count("example") == 8


def test_what_cannot_fit_is_refused_with_what_could():
    with pytest.raises(BadInput, match="length=6 is too short for task=t; allowed: at least 7"):
        without_middle(source(), asked(prefix="It is"), 6, "t")
    with pytest.raises(BadInput, match="length=7 is too short for task=t; allowed: at least 8"):
        beginning(source(), CONTEXT, lambda count: asked(CONTEXT[:count]), 7, "t")
    with pytest.raises(BadInput, match="length=9 is too short for task=t; allowed: at least 10, for one example"):
        fewer_examples(source(), lambda count: asked("abc" * count), 5, 9, "t")
    with pytest.raises(BadInput, match="f:3 makes a prompt of 1007 tokens with length=1006"):
        whole(source(), asked(), 1006, "f:3")
    assert whole(source(), asked(), 1007, "f:3") == asked()
