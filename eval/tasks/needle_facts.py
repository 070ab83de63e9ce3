"""Several needles that nobody could know: who left what where, in sentences that read like the prose around them.

Names, things and places are drawn for every sample. Facts that are not asked for are of the same kind, so that a cache
which keeps whatever stands out from the prose must keep them all.
"""

from dataclasses import dataclass

import numpy as np

from kvx.eval.metrics.string_match import match_part
from kvx.eval.tasks.haystack import Haystack
from kvx.eval.tasks.options import within
from kvx.eval.tasks.placing import even_depths
from kvx.eval.tasks.planting import planted
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.room import room
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, random_of

NAMES = (
    "Agnes", "Boris", "Clara", "Dmitri", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Klara", "Leon",
    "Maria", "Nora", "Oscar", "Paula", "Quentin", "Rosa", "Simon", "Teresa", "Ulrich", "Vera", "Walter", "Yara",
)  # fmt: skip
THINGS = (
    "anchor", "basket", "candle", "drum", "envelope", "flute", "glove", "hammer", "inkwell", "jacket", "kettle",
    "lantern", "mirror", "notebook", "oar", "parcel", "quilt", "rope", "saddle", "telescope", "umbrella", "violin",
    "whistle", "yardstick",
)  # fmt: skip
PLACES = (
    "attic", "bakery", "cellar", "dairy", "embassy", "forest", "garage", "harbour", "inn", "jail", "kitchen", "library",
    "market", "nursery", "orchard", "pharmacy", "quarry", "rectory", "stable", "theatre", "university", "vineyard",
    "windmill", "yacht",
)  # fmt: skip
"""None is part of another."""

_TASK = "Some people have left things in places. Read the text below, I will ask you where.\n\n"


@dataclass(frozen=True)
class Fact:
    """Who left what where."""

    name: str
    thing: str
    place: str

    @property
    def text(self) -> str:
        """The sentence that is hidden."""
        return f"{self.name} left the {self.thing} in the {self.place}."

    def question(self, source: Source) -> Question:
        """Where it was left."""
        return Question(
            f"\n\nWhere did {self.name} leave the {self.thing}?\n", (self.place,),
            f"{self.name} left the {self.thing} in the", new_tokens=room(source, self.place), stop=(".", "\n"),
        )  # fmt: skip


def facts_of(random: np.random.Generator, count: int) -> list[Fact]:
    """Facts that share no name, no thing and no place."""
    drawn = ([kind[at] for at in random.permutation(len(kind))[:count]] for kind in (NAMES, THINGS, PLACES))
    return [Fact(*each) for each in zip(*drawn, strict=True)]


@task("needle_facts", score=match_part, group="retrieval", binary=True)
def needle_facts(source: Source, length: int, count: int, seed: int, *, facts: int = 4) -> list[Sample]:
    """Where one of several people left something.

    Args:
        facts: sentences hidden, the one that is asked for included.
    """
    return _samples(source, length, count, seed, "needle_facts", facts, asked=1)


@task("shared/needle_facts", score=match_part, group="shared context")
def shared_needle_facts(
    source: Source, length: int, count: int, seed: int, *, facts: int = 8, questions: int = 4
) -> list[Sample]:
    """Where several people left something, one a question, over one text.

    Args:
        questions: as many as there are facts, or fewer.
    """
    return _samples(source, length, count, seed, "shared/needle_facts", facts, asked=questions)


def _samples(source: Source, length: int, count: int, seed: int, name: str, facts: int, asked: int) -> list[Sample]:
    within(name, "facts", facts, 1, len(NAMES))
    within(name, "questions", asked, 1, facts)
    found = []
    for index in range(count):
        random = random_of(seed, name, length, index)
        drawn = facts_of(random, facts)
        places = [*even_depths(random, index, count, asked), *random.random(facts - asked).tolist()]
        needles = [(depth, fact.text) for depth, fact in zip(places, drawn, strict=True)]
        questions = [fact.question(source) for fact in drawn[:asked]]
        build = planted(_TASK, Haystack.of(source, random), needles, questions, range(asked))
        found.append(source.largest(build, length, name))
    return found
