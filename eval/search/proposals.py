"""Proposals: the next points to try, by a tree-structured Parzen estimator over everything that is known so far.

Two objectives, quality and bytes, and the limit as a constraint: a candidate at half the limit with the same score is
worth more, and all of the frontier below the limit is found in one search; one objective under the constraint would
find one end of it. What was refused or is too large guides the estimator too, by how far it is from allowed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna

from kvx.eval.search.ranges import Grid
from kvx.eval.search.space import Choice, Space

RANDOM = 16
"""Outcomes before the estimator is asked; until then chance proposes."""

CHANCE = 0.2
"""Part of the proposals that chance makes for ever (BOHB, Falkner et al. 2018): the estimator alone, once a method did
well, hardly looks at others again."""

TRIES = 4
"""Times more points than wanted that are drawn before the space counts as used up."""


@dataclass(frozen=True)
class Outcome:
    """What is known of one point.

    Attributes:
        choice: the point.
        quality: mean so far, higher is better; None: it was not run.
        excess: log2 of its bytes over the limit, at most 0 where it fits; infinite where it cannot be.
    """

    choice: Choice
    quality: float | None
    excess: float


def propose(space: Space, outcomes: Sequence[Outcome], known: set[str], count: int, seed: int) -> dict[str, Choice]:
    """Up to `count` new policies' texts, each with its point.

    A function of its arguments alone: the estimator is built anew from the outcomes, so that a search which was
    interrupted goes on as if it had not been. Values of ordered grids are numbers to it, others categories.

    Args:
        outcomes: in the order in which they were found.
        known: texts that are not wanted again.
        count: how many.
        seed: of every chance.

    Returns:
        Fewer than `count` where the space has hardly any left.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    number = int(np.random.SeedSequence([seed, len(outcomes)]).generate_state(1)[0])
    study = optuna.create_study(
        directions=["maximize", "minimize"],
        sampler=optuna.samplers.TPESampler(seed=number, n_startup_trials=RANDOM),
    )
    for outcome in outcomes:
        _tell(study, space, outcome)
    random, found = np.random.default_rng(number), {}
    for _ in range(TRIES * count):
        # Trials that are never told count as running, and the estimator keeps away from them.
        text, choice = _drawn(space, random) if random.random() < CHANCE else _asked(study.ask(), space)
        if text not in known and text not in found:
            found[text] = choice
        if len(found) == count:
            break
    return found


def _drawn(space: Space, random: np.random.Generator) -> tuple[str, Choice]:
    """A point by chance alone."""
    choice: dict[str, int] = {}

    def pick(name: str, grid: Grid) -> object:
        choice[name] = int(random.integers(len(grid.values)))
        return grid.values[choice[name]]

    return space.draw(pick), choice


def _tell(study: optuna.Study, space: Space, outcome: Outcome) -> None:
    study.enqueue_trial(dict(outcome.choice))
    trial = study.ask()
    _asked(trial, space)
    trial.set_constraint("bytes", outcome.excess)
    if outcome.quality is None:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    else:
        study.tell(trial, [outcome.quality, outcome.excess])


def _asked(trial: optuna.Trial, space: Space) -> tuple[str, Choice]:
    """A trial's policy and point."""
    choice: dict[str, int] = {}

    def pick(name: str, grid: Grid) -> object:
        last = len(grid.values) - 1
        index = trial.suggest_int(name, 0, last) if grid.ordered else trial.suggest_categorical(name, range(last + 1))
        choice[name] = int(index)
        return grid.values[choice[name]]

    text = space.draw(pick)
    return text, choice


def excess(nbytes: float, limit: float) -> float:
    """What an outcome says of bytes: 0 at the limit, one more for every doubling."""
    return math.log2(nbytes / limit)
