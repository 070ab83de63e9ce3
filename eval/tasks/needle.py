"""Needle in a haystack (Kamradt 2023): the original sentence about San Francisco, at depths from first to last.

The protocol's score is a judge model's. This is the judge-free variant by key words: the share of them that an answer
has. It is coarser than a judge and never to be compared with one. The sentence stands at the sentence end nearest to
its depth (the protocol's: the one before), depths are evenly spaced with both ends, and every sample has prose from
another place.

A model may know the answer without the text, since the sentence is famous by now: run `needle_control`, the same
question over prose alone, beside it. `needle_facts` hides sentences that nobody could know.
"""

import re

from kvx.eval.tasks.haystack import Haystack
from kvx.eval.tasks.planting import planted
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.room import room
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, part, random_of

NEEDLE = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
"""The protocol's sentence."""

KEY_WORDS = ("eat", "sandwich", "dolores park", "sunny", "day")
"""What the right answer says; the sentence's other words are the question's."""

_TASK = "Read the text below. I will ask you about it.\n\n"
_QUESTION = (
    "\n\nWhat is the best thing to do in San Francisco? Answer from the text above alone, and do not repeat yourself.\n"
)
_OPENING, _RIGHT = NEEDLE[: NEEDLE.index(" eat")], NEEDLE[NEEDLE.index("eat") :]


def share_of_key_words(answer: str, question: Question) -> float:
    """Share of the key words that an answer has; words may go on ("eating"), but not begin earlier ("Sunday")."""
    said = " ".join(answer.lower().split())
    return sum(re.search(rf"\b{word}", said) is not None for word in KEY_WORDS) / len(KEY_WORDS)


@task("needle", score=share_of_key_words, group="retrieval")
def needle(source: Source, length: int, count: int, seed: int) -> list[Sample]:
    """The protocol's one sentence in prose."""
    return _samples(source, length, count, seed, hidden=[NEEDLE])


@task("needle_control", score=share_of_key_words, group="retrieval")
def needle_control(source: Source, length: int, count: int, seed: int) -> list[Sample]:
    """The same question over the same prose without the sentence: what a model knows anyway."""
    return _samples(source, length, count, seed, hidden=[])


def _samples(source: Source, length: int, count: int, seed: int, hidden: list[str]) -> list[Sample]:
    question = Question(_QUESTION, (_RIGHT,), _OPENING, new_tokens=room(source, _RIGHT), stop=("\n",))
    found = []
    for index in range(count):
        hay = Haystack.of(source, random_of(seed, "needle", length, index))
        depth = part(index, count) / (count - 1) if count > 1 else 0.5
        build = planted(_TASK, hay, [(depth, text) for text in hidden], [question], range(len(hidden)))
        found.append(source.largest(build, length, "needle"))
    return found
