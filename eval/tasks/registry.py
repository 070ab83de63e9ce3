"""The tasks by name: a generator of samples with its score, registered where it is written."""

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rich.console import Console
from rich.table import Table

from kvx.errors import BadInput, unknown
from kvx.eval.tasks.sample import Question, Sample

Score = Callable[[str, Question], float]
"""What an answer is worth, in [0, 1]: by its text, and by what the question counts as right."""


Make = Callable[..., Sequence[Sample]]
"""A task's generator: (source, length, count, seed, *, its own options) -> `count` samples whose prompts take at most
`length` tokens."""


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


def print_tasks(as_json: bool = False) -> None:
    """Every task with its options, on standard output."""
    found = [find(name) for name in names()]
    if as_json:
        content = [
            {"name": each.name, "group": each.group, "about": each.about, "options": list(each.options)}
            for each in found
        ]
        print(json.dumps(content, indent=2))
        return
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("task", "group", "options", "about"):
        shown.add_column(column, no_wrap=column in ("task", "group"))
    for each in found:
        options = ", ".join(
            name if parameter.default is parameter.empty else f"{name}={parameter.default!r}"
            for name, parameter in each.options.items()
        )
        shown.add_row(each.name, each.group, options, each.about)
    Console(width=None if Console().is_terminal else 170).print(shown)
