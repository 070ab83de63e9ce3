"""Copy and reverse: a list of words, hidden in prose, to be said again in its order or from its end."""

import re
from collections.abc import Callable

from kvx.eval.tasks.haystack import Haystack
from kvx.eval.tasks.options import within
from kvx.eval.tasks.planting import planted
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.room import room
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, random_of, spread
from kvx.eval.tasks.vocabulary import vocabulary

_TASK = "A list of words is hidden in the text below. Memorise it. I will ask you for it after the text.\n\n"
_OPENING = "The list of words is:"  # of the sentence, and of the answer


def word_accuracy(answer: str, question: Question) -> float:
    """1 less the word error rate, 0 at least: what one slip costs does not depend on where it happens.

    The word error rate is the least number of words to insert, delete or replace, over the words of the right list.
    """
    said, right = (re.findall(r"\w+", text.casefold()) for text in (answer, question.answers[0]))
    row = list(range(len(said) + 1))  # edits from the first words of `right` to every beginning of `said`
    for taken, word in enumerate(right, 1):
        diagonal, row[0] = row[0], taken
        for at, other in enumerate(said, 1):
            diagonal, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, diagonal + (word != other))
    return max(0.0, 1 - row[-1] / len(right))


@task("copy", score=word_accuracy, group="sequence")
def copy(source: Source, length: int, count: int, seed: int, *, items: int = 16) -> list[Sample]:
    """A list of words, said again.

    Args:
        items: words of the list.
    """
    asked = "Repeat the list of words from the text above in the same order, from the first word to the last."
    return _samples(source, length, count, seed, "copy", items, asked, _OPENING, list)


@task("reverse", score=word_accuracy, group="sequence")
def reverse(source: Source, length: int, count: int, seed: int, *, items: int = 16) -> list[Sample]:
    """A list of words, said from its end.

    Args:
        items: words of the list.
    """
    asked = "Repeat the list of words from the text above in reverse order, from the last word to the first."
    opening = "The list of words in reverse order is:"
    return _samples(source, length, count, seed, "reverse", items, asked, opening, lambda words: words[::-1])


def _samples(
    source: Source,
    length: int,
    count: int,
    seed: int,
    name: str,
    items: int,
    asked: str,
    opening: str,
    order: Callable[[list[str]], list[str]],
) -> list[Sample]:
    within(name, "items", items, 1)
    words, found = vocabulary(source, items, name), []
    for index in range(count):
        random = random_of(seed, name, length, index)
        drawn = [words[at] for at in random.choice(len(words), items, replace=False)]
        right = " ".join(order(drawn))
        question = Question(f"\n\n{asked}\n", (right,), opening, new_tokens=room(source, right), stop=(".", "\n"))
        needle = (spread(index, count), f"{_OPENING} {' '.join(drawn)}.")
        build = planted(_TASK, Haystack.of(source, random), [needle], [question], [0])
        found.append(source.largest(build, length, name))
    return found
