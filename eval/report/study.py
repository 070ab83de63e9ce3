"""What a results folder holds, read as one value: the page is a function of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvx.eval.records import COSTS, KEPT, RECORDS, Cost, Kept, Record, read
from kvx.eval.results_folder import config
from kvx.eval.summary import Row, summary


@dataclass(frozen=True)
class Study:
    """A job and what it found.

    Attributes:
        config: what was run, as the job wrote it.
        records: one a sample and policy.
        kept: what policies kept of the first prompt of a cell; may be empty.
        costs: time and memory; may be empty.
    """

    config: Mapping[str, Any]
    records: Sequence[Record]
    kept: Sequence[Kept] = ()
    costs: Sequence[Cost] = ()

    @classmethod
    def of(cls, folder: Path) -> "Study":
        """Everything in a results folder, finished or not.

        Raises:
            BadInput: no configuration there, one that is no table, or a line that is not a record, with its number.
        """
        return cls(
            config(folder),
            read(folder / RECORDS, Record),
            read(folder / KEPT, Kept),
            read(folder / COSTS, Cost),
        )

    @cached_property
    def rows(self) -> list[Row]:
        """One a cell and policy: means with their intervals."""
        return summary(self.records) if self.records else []

    @property
    def name(self) -> str:
        """What the job calls itself."""
        return str(self.config.get("name") or "Evaluation")
