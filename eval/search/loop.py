"""The search: propose, size, run the affordable ones on a few samples, and give the better half more.

What runs policies is handed in (`Bench`), and every number that the search knows is a record that the bench made. So a
search that was interrupted is begun again from its records: it takes the same decisions, and runs only what is missing.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from kvx.errors import BadInput
from kvx.eval.job import FULL
from kvx.eval.records import Record
from kvx.eval.search.halving import promoted, rungs
from kvx.eval.search.proposals import Outcome, excess, propose
from kvx.eval.search.ranking import Point, frontier
from kvx.eval.search.space import Choice, Space

TOGETHER = 8
"""Candidates that are run at a time: they share every pass over a prompt."""

DRAWS = 8
"""Times as many points as wanted that are sized at most, before a round goes on with fewer."""


@runtime_checkable
class Bench(Protocol):
    """What runs policies, by their texts.

    Attributes:
        samples: how many there are.
        batch: of them, how many are run at a time.
        floor: quality of what knows nothing; no policy at it is on the frontier, however small.
    """

    samples: int
    batch: int
    floor: float

    def sizes(self, texts: Sequence[str]) -> Mapping[str, float | BadInput]:
        """Bytes that a prompt's cache takes, a token of the task's length; or why the model cannot have the policy."""
        ...

    def run(self, texts: Sequence[str], samples: Sequence[int]) -> Iterator[list[Record]]:
        """Records of these samples under every policy, some at a time, as they are known."""
        ...

    def quality(self, record: Record) -> float:
        """What is to be large."""
        ...

    def nbytes(self, record: Record) -> float:
        """Bytes of its cache, a token of the task's length."""
        ...


@dataclass
class Found:
    """What a search knows.

    Attributes:
        limit: bytes a token.
        counts: samples of each rung.
        floor: quality of what knows nothing.
        sized: bytes a token of every policy that was looked at, as measured where it was run; or why it cannot be.
        scores: quality by sample, of the policies that were run, in the order in which samples are spent.
        left_out: methods that were not searched, each with the reason.
    """

    limit: float
    counts: tuple[int, ...]
    floor: float
    sized: dict[str, float | BadInput] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def fitting(self) -> dict[str, float]:
        """Bytes a token of the policies within the limit, in the order in which they were found."""
        return {
            text: size for text, size in self.sized.items() if not isinstance(size, BadInput) and size <= self.limit
        }

    def nbytes(self, text: str) -> float:
        """Bytes a token of a policy that was run."""
        size = self.sized[text]
        assert not isinstance(size, BadInput), "what was refused is not run"
        return size

    @property
    def run(self) -> list[str]:
        """The policies within the limit that were run."""
        return [text for text in self.fitting if self.scores.get(text)]

    @property
    def finalists(self) -> list[Point]:
        """Those that were run on all samples."""
        return [
            Point(text, math.fsum(self.scores[text]) / self.counts[-1], self.nbytes(text))
            for text in self.run
            if len(self.scores[text]) == self.counts[-1]
        ]

    @property
    def frontier(self) -> list[Point]:
        """Of these, those above the floor that no other equals or beats in both quality and bytes, by rising bytes."""
        return [point for point in frontier(self.finalists) if point.quality > self.floor]


def search(
    space: Space,
    bench: Bench,
    limit: float,
    trials: int,
    *,
    seed: int = 0,
    records: Sequence[Record] = (),
    save: Callable[[Sequence[Record]], None] = lambda _: None,
    tell: Callable[[Found, str], None] = lambda *_: None,
) -> Found:
    """Look for the frontier below a limit.

    Args:
        space: what may be tried.
        bench: what runs it. The full cache is run with the others on every sample, as the reference.
        limit: bytes a token that a cache may take.
        trials: policies within the limit that are run; fewer where the space has fewer.
        seed: of the proposals.
        records: what is known from an earlier run of the same bench.
        save: is given new records as they are made.
        tell: hears what begins.

    Raises:
        BadInput: a limit that nothing fits in, before any policy is run.
    """
    return _Search(space, bench, limit, trials, seed, records, save, tell).run()


class _Search:
    """One search; all it knows is which points were proposed, their sizes, and records."""

    def __init__(
        self,
        space: Space,
        bench: Bench,
        limit: float,
        trials: int,
        seed: int,
        records: Sequence[Record],
        save: Callable[[Sequence[Record]], None],
        tell: Callable[[Found, str], None],
    ):
        self.space, self.bench, self.trials, self.seed, self.save, self.tell = space, bench, trials, seed, save, tell
        self.known = {(each.policy, each.index): each for each in records}
        self.points: dict[str, Choice] = {}
        self.found = Found(limit, rungs(bench.batch, bench.samples), bench.floor)

    def run(self) -> Found:
        waiting = self._methods()
        while (missing := self.trials - len(self.found.run)) > 0:
            fresh = self._fresh(waiting, min(TOGETHER, missing))
            if not fresh:
                break
            self._measure(fresh, 0)
            self._promote()
        return self.found

    def _methods(self) -> list[str]:
        """Every method alone, as its paper has it: those that fit, in an order that chance picks.

        A method that the model can have neither with these values nor with the least is left out.
        """
        self.tell(self.found, "size every method")
        (full,) = self._size([self.space.point()])
        if isinstance(full, BadInput):
            raise full
        share = min(self.found.limit / full, 1.0)
        sizes = self._size([self.space.point(method, share=share) for method in self.space.methods])
        refused = {
            method.name: str(size)
            for method, size in zip(self.space.methods, sizes, strict=True)
            if isinstance(size, BadInput) and isinstance(self._size([self.space.point(method)])[0], BadInput)
        }
        # A smaller space has other points; what was sized is not sized again.
        self.space, self.points = self.space.but(refused), {}
        self.found.left_out = self.space.left_out
        self._size([self.space.point(method, share=share) for method in self.space.methods])
        if not self.found.fitting:
            self._check_limit()
        alone = [text for text in self.points if text in self.found.fitting]
        return [alone[index] for index in np.random.default_rng(self.seed).permutation(len(alone))]

    def _check_limit(self) -> None:
        """Refuse a limit that nothing fits in: no method with its least values, no chain of two such.

        One by one, since most limits are met soon.
        """
        space = self.space
        least = {method.name: space.point(method) for method in space.methods}
        for choice in least.values():
            self._size([choice])
            if self.found.fitting:
                return
        first = min(
            (method for method in space.selections if not method.alone),
            key=lambda method: self._order_of(least[method.name]),
            default=None,
        )
        for store in space.stores:
            if first is None:
                break
            self._size([space.point(first, store)])
            if self.found.fitting:
                return
        sizes = {text: size for text, size in self.found.sized.items() if not isinstance(size, BadInput)}
        text = min(sizes, key=lambda text: sizes[text])
        raise BadInput(
            f"max_bytes_per_token={self.found.limit:g} is below the smallest of {len(sizes)} policies that were sized, "
            f"{text}; allowed: at least {math.ceil(sizes[text])}"
        )

    def _order_of(self, choice: Choice) -> float:
        (size,) = self._size([choice])
        return math.inf if isinstance(size, BadInput) else size

    def _fresh(self, waiting: list[str], count: int) -> list[str]:
        """So many policies within the limit that were not run: of those that wait, then of what is proposed."""
        fresh, drawn = waiting[:count], 0
        del waiting[:count]
        while len(fresh) < count and drawn < DRAWS * TOGETHER:
            self.tell(self.found, "propose")
            proposed = propose(self.space, self._outcomes(), set(self.found.sized), count - len(fresh), self.seed)
            if not proposed:
                break
            self._size(list(proposed.values()))
            drawn += len(proposed)
            fresh += [text for text in proposed if text in self.found.fitting]
        return fresh

    def _outcomes(self) -> list[Outcome]:
        """What the estimator learns from; a policy that fits but was not run yet says nothing."""
        found = []
        for text, choice in self.points.items():
            size, scores = self.found.sized[text], self.found.scores.get(text)
            if isinstance(size, BadInput):
                found.append(Outcome(choice, None, math.inf))
            elif size > self.found.limit:
                found.append(Outcome(choice, None, excess(size, self.found.limit)))
            elif scores:
                found.append(Outcome(choice, math.fsum(scores) / len(scores), excess(size, self.found.limit)))
        return found

    def _size(self, choices: Sequence[Choice]) -> list[float | BadInput]:
        texts = [self.space.at(choice) for choice in choices]
        self.points |= dict(zip(texts, choices, strict=True))
        new = [text for text in texts if text not in self.found.sized]
        if new:
            self.found.sized |= self.bench.sizes(new)
        return [self.found.sized[text] for text in texts]

    def _promote(self) -> None:
        """The better half of every rung's candidates goes on, new or old."""
        counts = self.found.counts
        for rung in range(len(counts) - 1):
            scores = {text: self.found.scores[text] for text in self.found.run}
            going = promoted(scores, self.found.fitting, counts[rung], self.found.limit)
            going = [text for text in going if len(scores[text]) < counts[rung + 1]]
            for start in range(0, len(going), TOGETHER):
                self._measure(going[start : start + TOGETHER], rung + 1)

    def _measure(self, texts: list[str], rung: int) -> None:
        """Bring some policies up to a rung, and the full cache with them; what there are records of is not run."""
        counts = (0, *self.found.counts)
        samples = range(counts[rung], counts[rung + 1])
        texts = list(dict.fromkeys([FULL, *texts]))
        todo: dict[tuple[int, ...], list[str]] = {}
        for text in texts:
            todo.setdefault(tuple(index for index in samples if (text, index) not in self.known), []).append(text)
        self.tell(self.found, f"samples {counts[rung] + 1} to {counts[rung + 1]} for {len(texts) - 1}")
        for missing, group in todo.items():
            for records in self.bench.run(group, missing) if missing else ():
                self.save(records)
                self.known |= {(record.policy, record.index): record for record in records}
        # Not all that is known: an earlier run may have come further, and decisions must be those it took.
        for text in texts:
            spent = max(counts[rung + 1], len(self.found.scores.get(text, ())))
            records = [self.known[text, index] for index in range(spent)]
            self.found.scores[text] = [self.bench.quality(record) for record in records]
            self.found.sized[text] = max(self.bench.nbytes(record) for record in records)
