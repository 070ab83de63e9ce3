"""Which values the search tries, by a parameter's name and annotation.

A parameter without a row keeps its default, as does one whose default is not among the values of its row: the name then
means something else.
"""

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Grid:
    """The values of one parameter.

    Attributes:
        values: what may be tried.
        ordered: whether neighbours are alike: numbers, from fewer bytes to more where that is known; else choices.
    """

    values: tuple[Any, ...]
    ordered: bool = True

    def index(self, value: Any) -> int | None:
        """Where a value stands; None if it is not tried. 1 is not 1.0, as in policies."""
        found = [at for at, each in enumerate(self.values) if type(each) is type(value) and each == value]
        return found[0] if found else None


def _grid(*values: Any) -> Grid:
    return Grid(values)


def _choice(*values: Any) -> Grid:
    return Grid(values, ordered=False)


SHARES = Grid(tuple(float(f"{2 ** (-step / 2):.2g}") for step in range(10, 0, -1)))
"""Shares of a prompt, each the square root of two times the one before: 1/32 to 0.71."""

Key = tuple[str, type | types.UnionType | types.GenericAlias]

RANGES: Mapping[Key, Grid] = {
    # How much is kept.
    ("budget", int | float): SHARES,
    ("high", int | float): SHARES,
    ("buffer", int): _grid(64, 256, 1024, 4000),
    ("ratio", int | None): _grid(32, 16, 10, 5, 3),
    ("start", float): _grid(0.25, 0.5, 0.75),
    ("cap", float): _grid(0.02, 0.05, 0.1),
    ("rate", float): _grid(0.5, 0.6, 0.7, 0.8, 0.9),
    ("recovery", float): _grid(0.5, 0.7, 0.8, 0.9, 0.95, 0.98),
    ("frequent", float): _grid(0.05, 0.1, 0.2, 0.3, 0.4),
    ("local", float): _grid(0.05, 0.1, 0.2, 0.3, 0.4),
    ("skip", tuple[int, ...]): _grid((), (0,), (0, 1), (0, 1, -1)),
    # How it is shared out.
    ("floor", float): _grid(0.1, 0.2, 0.4, 0.7),
    ("beta", int): _grid(2, 5, 10, 20, 40),
    ("tau1", float): _grid(0.4, 0.7, 1.0, 1.6, 2.5),
    ("tau2", float): _grid(0.4, 0.7, 1.0, 1.6, 2.5),
    # How tokens are scored.
    ("window", int): _grid(8, 16, 32, 64),
    ("kernel", int): _grid(1, 3, 5, 7, 13),
    ("pooling", str): _choice("mean", "max"),
    ("group", str): _choice("mean", "max"),
    ("heads", str): _choice("mean", "max"),
    ("average", str): _choice("sum", "mean"),
    ("score", str): _choice("snapkv", "h2o"),
    ("host", str): _choice("recency", "h2o"),
    ("across", str): _choice("layer", "head"),
    ("mode", str): _choice("encoding_decoding", "encoding"),
    # What is protected.
    ("recent", int | float): _grid(0.1, 0.25, 0.5, 0.75),
    ("recent", float): _grid(0.1, 0.2, 0.4),
    ("recent", int): _grid(0, 4, 10, 32),
    # How it is stored.
    ("bits", int | None): _grid(2, 3, 4, 8),
    ("group", int): _grid(16, 32, 64, 128),
    ("group", int | None): _choice(None, 16, 32, 64),
    ("residual", int): _grid(32, 64, 128),
    ("balance", bool): _choice(True, False),
    ("page", int): _grid(8, 16, 32),
    ("rank", int): _grid(32, 64, 96, 160),
    ("t", float): _grid(0.5, 0.6, 0.7),
    # How it is read.
    ("renumber", bool): _choice(True, False),
    ("every_step", bool): _choice(True, False),
}
"""What is tried. Seeds, sinks, and what only one model or kernel wants keep the defaults of their papers."""
