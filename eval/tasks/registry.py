"""The tasks by name: a generator of samples with its score, registered where it is written."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from kvx.errors import BadInput, unknown
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source

Score = Callable[[str, Question], float]
"""What an answer is worth, in [0, 1]: by its text, and by what the question counts as right."""


class Make(Protocol):
    """A task's generator."""

    def __call__(self, source: Source, length: int, count: int, seed: int, **options: Any) -> Sequence[Sample]:
        """`count` samples; their prompts take at most `length` tokens."""
        ...


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: what a configuration calls it.
        make: its generator; keyword parameters without a default must be given as options.
        score: of one answer.
        group: what a report shows it under.
        binary: whether a score is 0 or 1: its interval is then Wilson's.
    """

    name: str
    make: Make
    score: Score
    group: str
    binary: bool = False

    @property
    def about(self) -> str:
        """One line."""
        return (inspect.getdoc(self.make) or "").split("\n")[0]

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """What may be given beside length, count and seed."""
        parameters = inspect.signature(self.make).parameters
        return {name: each for name, each in parameters.items() if each.kind is inspect.Parameter.KEYWORD_ONLY}

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options that it does not have, and the lack of those it must have.

        Raises:
            BadInput: with the option's name.
        """
        known = self.options
        for name in options:
            if name not in known:
                raise unknown(f"option of task {self.name}", name, known)
        for name, parameter in known.items():
            if parameter.default is inspect.Parameter.empty and name not in options:
                raise BadInput(f"task {self.name} needs the option {name}; allowed: {parameter.annotation}")


_TASKS: dict[str, Task] = {}


def task(name: str, *, score: Score, group: str, binary: bool = False) -> Callable[[Make], Make]:
    """Register a generator as a task.

    Args:
        name: lower case; the members of a suite as "suite/member".
    """

    def registered(make: Make) -> Make:
        assert name not in _TASKS, f"task {name} is registered twice"
        _TASKS[name] = Task(name, make, score, group, binary)
        return make

    return registered


def find(name: str) -> Task:
    """The task of a name.

    Raises:
        BadInput: an unknown name, with the nearest suggested.
    """
    _load()
    if name not in _TASKS:
        raise unknown("task", name, list(_TASKS))
    return _TASKS[name]


def names() -> list[str]:
    """All names, sorted."""
    _load()
    return sorted(_TASKS)


@cache
def _load() -> None:
    """Import every module of this package, which registers its tasks."""
    import kvx.eval.tasks as package

    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
