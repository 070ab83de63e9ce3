"""Many-shot in-context classification (Agarwal et al. 2024): an invented rule, shown by as many labelled items as fit.

An item is a few words, of which one is a cue and decides the class; the others mean nothing. Cues, labels and the rest
are drawn anew for every sample, so nothing can be known but from the shots. SCBench's many-shot task (Li et al. 2025)
asks several questions over the same shots.
"""

import re
from dataclasses import dataclass

import numpy as np

from kvx.eval.tasks.filling import filled
from kvx.eval.tasks.options import within
from kvx.eval.tasks.placing import joined
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.room import room
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, random_of
from kvx.eval.tasks.vocabulary import vocabulary

CUES, NEUTRAL, ITEM = 3, 24, 5
"""Cues of a class, words that mean nothing, words of an item."""

_TASK = "Each item below has a label. Learn how items are labelled, then label a new one in the same way.\n\n"


def first_word(answer: str, question: Question) -> float:
    """1.0 if an answer's first word is the right one, case apart. A list of all labels is not an answer."""
    said = re.search(r"\w+", answer)
    return float(said is not None and said[0].casefold() in {each.casefold() for each in question.answers})


@dataclass(frozen=True)
class Rule:
    """What decides the label of an item.

    Attributes:
        labels: of the classes.
        cues: class by class, `CUES` words after each other.
        neutral: the words of which items are filled.
    """

    labels: tuple[str, ...]
    cues: tuple[str, ...]
    neutral: tuple[str, ...]

    @classmethod
    def of(cls, words: list[str], classes: int, random: np.random.Generator) -> "Rule":
        """A rule over words of a vocabulary."""
        drawn = tuple(words[at] for at in random.choice(len(words), _words(classes), replace=False))
        cues = classes + classes * CUES
        return cls(drawn[:classes], drawn[classes:cues], drawn[cues:])

    def item(self, cue: int, random: np.random.Generator) -> str:
        """Words with a cue among them, at a place that chance picks."""
        words = [self.neutral[at] for at in random.choice(NEUTRAL, ITEM - 1, replace=False)]
        words.insert(int(random.integers(ITEM)), self.cues[cue])
        return " ".join(words)

    def label(self, cue: int) -> str:
        """Of the items that hold a cue."""
        return self.labels[cue // CUES]


@task("many_shot", score=first_word, group="in-context learning", binary=True)
def many_shot(source: Source, length: int, count: int, seed: int, *, classes: int = 4) -> list[Sample]:
    """The label of a new item, by a rule that the labelled items before it show.

    Args:
        classes: labels; every class is asked for equally often.
    """
    return _samples(source, length, count, seed, "many_shot", classes, asked=1)


@task("shared/many_shot", score=first_word, group="shared context")
def shared_many_shot(
    source: Source, length: int, count: int, seed: int, *, classes: int = 4, questions: int = 4
) -> list[Sample]:
    """The labels of several new items, one a question, over the same labelled items."""
    return _samples(source, length, count, seed, "shared/many_shot", classes, asked=questions)


def _samples(source: Source, length: int, count: int, seed: int, name: str, classes: int, asked: int) -> list[Sample]:
    within(name, "classes", classes, 2, 100)
    within(name, "questions", asked, 1)
    words, every = vocabulary(source, _words(classes), name), classes * CUES
    found = []
    for index in range(count):
        random = random_of(seed, name, length, index)
        rule = Rule.of(words, classes, random)
        # Of the cues of a class any may be asked; the classes take turns, over questions and samples.
        cues = [(index * asked + turn) % classes * CUES + int(random.integers(CUES)) for turn in range(asked)]
        items = [rule.item(cue, random) for cue in cues]
        questions = tuple(
            Question(
                f"\n\nItem: {item}\n", (rule.label(cue),), "Label:",
                new_tokens=room(source, rule.label(cue)), stop=("\n",),
            )
            for cue, item in zip(cues, items, strict=True)
        )  # fmt: skip
        shots: list[tuple[int, str]] = []

        def build(
            more: int, random=random, rule=rule, cues=cues, items=items, questions=questions, shots=shots
        ) -> Sample:
            while len(shots) < every + more:
                # Round after round of all cues: even the fewest shots show the one that is asked.
                for cue in random.permutation(every).tolist():
                    while (item := rule.item(cue, random)) in items:
                        pass
                    shots.append((cue, item))
            shown = shots[: every + more]
            lines = [f"Item: {item}\nLabel: {rule.label(cue)}" for cue, item in shown]
            marked = [at for at, (cue, _) in enumerate(shown) if cue in cues]
            context, evidence = joined(_TASK, lines, "\n\n", "", marked)
            return Sample(context, questions, evidence)

        found.append(filled(source, build, length, name))
    return found


def _words(classes: int) -> int:
    """Words that a rule takes."""
    return classes + classes * CUES + NEUTRAL
