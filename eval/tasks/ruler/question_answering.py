"""RULER's question answering: a question of SQuAD or HotpotQA, its paragraphs hidden among others.

The file is the user's. The i-th sample asks the file's i-th question (SQuAD: of those that have an answer), as
published. Documents are added as published: those that the answer rests on, others of the same article or search, then
any; the last one is cut where the prompt is full, since a whole one is a tenth of a short prompt.
"""

import re
from collections.abc import Iterator
from itertools import chain, cycle
from pathlib import Path

import numpy as np

from kvx.errors import BadInput
from kvx.eval.metrics.string_match import match_part
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.ruler.interleave import interleave
from kvx.eval.tasks.ruler.question_files import Asked, QuestionFile, read_hotpot, read_squad
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, one, random_of, spread

_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
_TASK = f"{_INSTRUCTION}\n\nThe following are given documents.\n\n"


@task("ruler/qa_1", score=match_part, group="ruler", binary=True)
def squad(source: Source, length: int, count: int, seed: int, *, path: str) -> list[Sample]:
    """Questions of SQuAD v2 among paragraphs of Wikipedia.

    Args:
        path: SQuAD's dev-v2.0.json.

    Raises:
        BadInput: a file of another form, or with fewer questions than samples.
    """
    return _samples("ruler/qa_1", read_squad(Path(path)), path, source, length, count, seed)


@task("ruler/qa_2", score=match_part, group="ruler", binary=True)
def hotpot(source: Source, length: int, count: int, seed: int, *, path: str) -> list[Sample]:
    """Questions of HotpotQA, whose answers rest on two paragraphs each.

    Args:
        path: HotpotQA's hotpot_dev_distractor_v1.json.

    Raises:
        BadInput: a file of another form, or with fewer questions than samples.
    """
    return _samples("ruler/qa_2", read_hotpot(Path(path)), path, source, length, count, seed)


def _samples(
    name: str, file: QuestionFile, path: str, source: Source, length: int, count: int, seed: int
) -> list[Sample]:
    if count > len(file.questions):
        raise BadInput(f"count={count} of task={name}; allowed: at most {len(file.questions)}, the questions of {path}")
    found = []
    for index in range(count):
        asked, random = file.questions[index], random_of(seed, name, length, index)
        question = Question(f"\n\n{_INSTRUCTION}\n\nQuestion: {asked.text}", asked.answers, " Answer:", new_tokens=32)
        # The first of the documents that the answer rests on covers the depths; the others lie anywhere.
        depths = [spread(index, count), *random.random(len(asked.gold) - 1)]
        hidden = list(zip(depths, (file.documents[each] for each in asked.gold), strict=True))
        order, filling = int(random.integers(2**32)), _Filling(file, asked, random)

        def build(words: int, question=question, hidden=hidden, order=order, filling=filling) -> Sample:
            others = filling.take(words)
            others = [others[at] for at in np.random.default_rng(order).permutation(len(others))]
            text, spans, depths = interleave(others, hidden, "\n\n", lambda number: f"Document {number}:\n")
            evidence = tuple((len(_TASK) + first, len(_TASK) + last) for first, last in spans)
            return one(_TASK + text, question, evidence=evidence, depth=depths[0])

        found.append(source.largest(build, length, name, spare=question.new_tokens))
    return found


class _Filling:
    """The documents that an answer does not rest on: near ones first, then any, round and round; measured in words."""

    def __init__(self, file: QuestionFile, asked: Asked, random: np.random.Generator) -> None:
        kept = {*asked.gold, *asked.near}
        near = random.permutation(np.asarray(asked.near, int))
        far = (number for number in random.permutation(len(file.documents)) if number not in kept)
        self._stream: Iterator[int] = cycle(chain(near, far))
        self._documents = file.documents
        self._taken: list[tuple[str, list[int]]] = []

    def take(self, words: int) -> list[str]:
        """As many documents as have so many words, the last one cut behind a word."""
        texts, place = [], 0
        while words > 0:
            if place == len(self._taken):
                text = self._documents[next(self._stream)]
                self._taken.append((text, [word.end() for word in re.finditer(r"\S+", text)]))
            text, ends = self._taken[place]
            if ends:
                texts.append(text[: ends[min(words, len(ends)) - 1]])
            place, words = place + 1, words - len(ends)
        return texts
