"""Claims about RULER's question answering: literal prompts, whole gold documents, depths, lengths, order of filling."""

import re

import numpy as np
import pytest

from kvx.errors import BadInput
from kvx.eval.tasks import registry
from tests.eval.tasks.ruler.pieces import source
from tests.eval.tasks.ruler.question_fixtures import ARTICLES, hotpot, paragraph, squad

BOTH = pytest.mark.parametrize(("name", "write", "gold"), [("ruler/qa_1", squad, 1), ("ruler/qa_2", hotpot, 2)])


def make(name, path, length=2048, count=4, seed=0):
    return registry.find(name).make(source(), length, count, seed, path=str(path))


def documents(sample):
    """The numbered documents of a context."""
    parts = re.split(r"(?:^|\n\n)Document (\d+):\n", sample.context.split("given documents.\n\n")[1])[1:]
    assert [int(number) for number in parts[::2]] == list(range(1, len(parts) // 2 + 1))
    return parts[1::2]


def test_the_prompt_is_the_published_one(tmp_path):
    (sample,) = make("ruler/qa_1", squad(tmp_path), count=1)
    (question,) = sample.questions
    told = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    assert sample.context.startswith(f"{told}\n\nThe following are given documents.\n\nDocument 1:\n")
    assert question.text == f"\n\n{told}\n\nQuestion: Who is mayor number 0 of town 0?"
    assert (question.prefix, question.new_tokens) == (" Answer:", 32)
    assert question.answers == ("Mayor0x0", "mayor number 0")


@BOTH
@pytest.mark.parametrize("length", [2048, 4096])
def test_lengths_are_met_and_gold_documents_are_whole(tmp_path, name, write, gold, length):
    for sample in make(name, write(tmp_path), length):
        tokens = source().size(sample) + 32
        assert 0.99 * length <= tokens <= length
        found = [sample.context[first:last] for first, last in sample.evidence]
        assert len(found) == gold and set(found) <= set(documents(sample))
        assert all(text.endswith("stone.") for text in found)


@BOTH
def test_any_right_answer_scores_fully_and_silence_nothing(tmp_path, name, write, gold):
    task = registry.find(name)
    for sample in make(name, write(tmp_path)):
        (question,) = sample.questions
        assert task.binary and task.score("", question) == 0 and task.score("Mayor9x9", question) == 0
        assert all(task.score(f"It is {answer.upper()}.", question) == 1 for answer in question.answers)


@BOTH
def test_the_ith_sample_asks_the_ith_question_whatever_the_seed_and_the_count(tmp_path, name, write, gold):
    path = write(tmp_path)
    first, again, other, more = (
        make(name, path, seed=seed, count=count) for seed, count in ((1, 3), (1, 3), (2, 3), (1, 4))
    )
    assert first == again and first != other
    asked = [sample.questions for sample in first]
    assert asked == [sample.questions for sample in other] == [sample.questions for sample in more[:3]]


def test_answers_lie_at_depths_that_cover_the_documents(tmp_path):
    samples = sorted(make("ruler/qa_1", squad(tmp_path), 4096, count=10), key=lambda sample: sample.depth)
    depths = [sample.depth for sample in samples]
    count = len(documents(samples[0])) - 1
    np.testing.assert_allclose(depths, [(index + 0.5) / 10 for index in range(10)], atol=1 / count)
    places = [sample.evidence[0][0] / len(sample.context) for sample in samples]
    np.testing.assert_allclose(places, depths, atol=0.1)


def test_documents_of_the_same_article_come_first_then_any_then_all_again(tmp_path):
    path = squad(tmp_path)

    def towns(length):
        (sample,) = make("ruler/qa_1", path, length, count=1)
        found = [text for text in documents(sample) if text != sample.context[slice(*sample.evidence[0])]]
        assert paragraph(0, 0) not in found, "the gold document stands twice"
        return [re.search(r"own (\d)", text) for text in found], found

    few, _ = towns(340)
    assert len(few) > 1 and {town[1] for town in few if town} == {"0"}
    many, found = towns(1400)
    assert len({town[1] for town in many if town}) == ARTICLES and len(set(found)) == len(found)
    _, again = towns(4096)
    assert len(set(again)) < len(again)


def test_only_one_document_is_cut_and_behind_a_word(tmp_path):
    for sample in make("ruler/qa_1", squad(tmp_path), 1000):
        cut = [text for text in documents(sample) if not text.endswith("stone.")]
        assert len(cut) <= 1
        for text in cut:
            assert any(whole.startswith(text) for whole in map(lambda at: paragraph(*at), np.ndindex(4, 5)))
            assert text == text.rstrip()


@BOTH
def test_what_cannot_be_is_refused(tmp_path, name, write, gold):
    path = write(tmp_path)
    with pytest.raises(BadInput, match=rf"length=100 is too short for task={name}"):
        make(name, path, 100)
    with pytest.raises(BadInput, match=r"count=21 of task=.*; allowed: at most \d+, the questions of"):
        make(name, path, count=21)
    with pytest.raises(BadInput, match="needs the option path"):
        registry.find(name).check({})
    registry.find(name).check({"path": "x"})
