"""Statistics of a long list of numbers (SCBench's math.find, Li et al. 2025): every number of the context matters."""

from kvx.eval.metrics.numbers import first_number
from kvx.eval.tasks.filling import filled
from kvx.eval.tasks.options import within
from kvx.eval.tasks.placing import even_depths, interleave, joined
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.room import room
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, random_of

STATISTICS = ("largest", "smallest", "median", "second largest", "second smallest")
"""What is asked, in the order of the questions."""

LOWEST, HIGHEST = 100_000, 999_999
"""Numbers of six digits: none is part of another, and there are enough for any context."""

_TASK = "Memorise the list of numbers below. I will ask you about it.\n\n"


@task("shared/find_number", score=first_number, group="shared context")
def find_number(source: Source, length: int, count: int, seed: int, *, questions: int = 3) -> list[Sample]:
    """The largest, the smallest, the median and so on of a list of different numbers, one a question.

    Args:
        questions: the first so many of `STATISTICS`. The list has an odd number of members, so that its median is one.
    """
    name = "shared/find_number"
    within(name, "questions", questions, 1, len(STATISTICS))
    found = []
    for index in range(count):
        random = random_of(seed, name, length, index)
        at = even_depths(random, index, count, questions)
        drawn: dict[int, None] = {}

        def build(more: int, random=random, at=at, drawn=drawn) -> Sample:
            total = len(STATISTICS) + 2 * more
            while len(drawn) < total:
                drawn[int(random.integers(LOWEST, HIGHEST, endpoint=True))] = None
            numbers = list(drawn)[:total]
            low, high, middle = sorted(numbers)[:2], sorted(numbers)[-2:], sorted(numbers)[total // 2]
            right = (high[1], low[0], middle, high[0], low[1])[:questions]
            others = [str(number) for number in numbers if number not in right]
            lines, places = interleave([str(number) for number in right], others, at)
            context, evidence = joined(_TASK, lines, ", ", ".", places)
            asked = (_question(source, *each) for each in zip(STATISTICS, right, strict=False))
            return Sample(context, tuple(asked), evidence)

        found.append(filled(source, build, length, name))
    return found


def _question(source: Source, statistic: str, right: int) -> Question:
    return Question(
        f"\n\nWhat is the {statistic} number in the list above?\n", (str(right),),
        f"The {statistic} number is", new_tokens=room(source, str(right)), stop=(".", "\n"),
    )  # fmt: skip
