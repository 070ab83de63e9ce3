"""Claims about proposals: new, repeatable, and drawn to what did well."""

import math

from kvx.eval.search.proposals import Outcome, propose
from kvx.eval.search.space import Space

SPACE = Space.of(only=("snapkv", "tova", "kivi"))


def outcomes(good):
    """What 40 chance points say where snapkv is good and large budgets exceed the limit."""
    found = []
    for text, choice in propose(SPACE, [], set(), 40, seed=5).items():
        large = "budget=0.5" in text or "budget=0.71" in text
        found.append(Outcome(choice, None if large else float(good in text), 1.0 if large else -1.0))
    return found


def test_proposals_are_new_and_as_many_as_wanted():
    known = set(propose(SPACE, [], set(), 20, seed=0))
    more = propose(SPACE, [], known, 20, seed=0)
    assert len(known) == len(more) == 20 and known.isdisjoint(more)
    assert all(SPACE.at(choice) == text for text, choice in more.items())


def test_the_same_seed_and_outcomes_give_the_same_proposals_and_another_seed_others():
    known = outcomes("snapkv")
    assert list(propose(SPACE, known, set(), 8, seed=1)) == list(propose(SPACE, known, set(), 8, seed=1))
    assert list(propose(SPACE, known, set(), 8, seed=1)) != list(propose(SPACE, known, set(), 8, seed=2))


def test_what_did_well_and_fits_is_proposed_more_often_than_by_chance():
    def share(found):
        return sum("snapkv" in text and "0.5" not in text for text in found) / len(found)

    chance = share(propose(SPACE, [], set(), 32, seed=3))
    learned = share(propose(SPACE, outcomes("snapkv"), set(), 32, seed=3))
    assert learned > chance + 0.2


def test_what_cannot_be_is_an_outcome_too():
    (choice,) = propose(SPACE, [], set(), 1, seed=0).values()
    never = [Outcome(choice, None, math.inf)] * 20
    assert len(propose(SPACE, never, set(), 4, seed=0)) == 4


def test_a_space_that_is_used_up_gives_fewer():
    small = Space.of(only=("paged",))
    found = propose(small, [], set(), 10, seed=0)
    assert found.keys() == {"full", "paged", "paged(page=8)", "paged(page=32)"}
    assert propose(small, [], set(found), 3, seed=0) == {}
