"""What a student and its teacher know along the way: means over the same batches at every evaluation."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

from kvx.decoder import Decoder
from kvx.mesh import Placement
from kvx.train.parameters import Arrays, Frame, cast
from kvx.train.step import Step


@runtime_checkable
class Measure(Protocol):
    """A number of a model over a batch: `kvx.train.objective.text_loss`, `kvx.train.recall.recalled`."""

    def __call__(
        self, model: Decoder, batch: Any, placement: Placement | None = None, /
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The number, and how many tokens or rows it is the mean of."""
        ...


class Judge:
    """Batches to judge by.

    Args:
        step: how both models lie and compute.
        measure: what is asked.
        batches: this process's rows of each, the same at every evaluation; at least one.
    """

    def __init__(self, step: Step, measure: Measure, batches: Sequence[Any]):
        self._step, self._measure, self._batches = step, measure, batches
        self._teacher: float | None = None

    def student(self, arrays: Arrays) -> float:
        """Of the student's arrays, computed in the dtype that it trains in."""
        return self._mean(self._student, arrays)

    def teacher(self, arrays: Arrays) -> float:
        """Of the teacher, which does not change: computed once."""
        if self._teacher is None:
            self._teacher = self._mean(self._guide, arrays)
        return self._teacher

    @cached_property
    def _placed(self) -> list[Any]:
        return [self._step.place_batch(batch) for batch in self._batches]

    @cached_property
    def _student(self) -> Any:
        step = self._step
        return jax.jit(
            lambda arrays, batch: self._sums(step.frame, cast(arrays, step.frame.parameters, step.dtype), batch)
        )

    @cached_property
    def _guide(self) -> Any:
        frame = self._step.teacher
        assert frame is not None, "a teacher is judged only in a stage that has one"
        return jax.jit(lambda arrays, batch: self._sums(frame, arrays, batch))

    def _sums(self, frame: Frame, arrays: Arrays, batch: Any) -> tuple[Any, Any]:
        mean, count = self._measure(self._step.model(frame, arrays), batch, self._step.placement)
        return mean * count, count

    def _mean(self, sums: Any, arrays: Arrays) -> float:
        found = [sums(arrays, batch) for batch in self._placed]
        return math.fsum(float(total) for total, _ in found) / math.fsum(float(count) for _, count in found)
