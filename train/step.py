"""The training step: one compiled, donated program of both models' passes, the losses, and the optimizer's update.

Weights that train are float32 masters, cast to the compute dtype inside; all others are kept in that dtype and have
neither gradients nor optimizer state. A batch may be cut into parts whose gradients are added: every loss is a mean
over counted tokens (or pairs), so the parts are added by their counts, and n parts give what one batch gives.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from kvx.decoder import Decoder
from kvx.mesh import Placement
from kvx.pytree import pytree
from kvx.train.mesh import GATHERED, row_share
from kvx.train.optimizer import optimizer, place_state, schedule
from kvx.train.parameters import Arrays, Frame, cast
from kvx.train.stage import StageSection


@pytree
class TrainState:
    """What a step changes.

    Attributes:
        step: steps taken in this stage.
        trained: float32 master weights of what trains.
        optimizer: its state.
        average: their running mean; None: none is kept.
    """

    step: Any
    trained: Arrays
    optimizer: Any
    average: Arrays | None = None


@runtime_checkable
class Objective(Protocol):
    """What a stage minimises."""

    def __call__(
        self, student: Decoder, teacher: Decoder | None, batch: Any
    ) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The loss, how many tokens or pairs it is the mean of, and its terms, each such a mean."""
        ...


@dataclass(frozen=True, eq=False)
class Step:
    """A stage's step on a mesh.

    Attributes:
        frame: of the student.
        names: of the parameters that train.
        stage: its optimizer, dtype and accumulation.
        total: steps of the stage.
        objective: what it minimises.
        placement: where everything lies.
        teacher: frame of the teacher; None: the objective needs none.
    """

    frame: Frame
    names: Collection[str]
    stage: StageSection
    total: int
    objective: Objective
    placement: Placement
    teacher: Frame | None = None

    def begin(self, arrays: Arrays) -> tuple[TrainState, Arrays]:
        """The state before the first step, and what stays frozen, on the mesh.

        Args:
            arrays: of the student; they may be shapes, and then so is the result.
        """
        trained = cast({name: array for name, array in arrays.items() if name in self.names}, self.names, jnp.float32)
        others = {name: array for name, array in arrays.items() if name not in self.names}
        frozen = cast(others, self.frame.parameters - set(self.names), self.dtype)
        place = partial(self.frame.placed, self.placement)
        trained = place(trained)
        if any(isinstance(array, jax.ShapeDtypeStruct) for array in trained.values()):
            return self._placed(jax.eval_shape(self._initial, trained)), place(frozen)
        # Placed inside, since moments that are born whole on every device may be more than one holds.
        return jax.jit(lambda arrays: self._placed(self._initial(arrays)))(trained), place(frozen)

    def __call__(
        self, state: TrainState, frozen: Arrays, teacher: Arrays | None, batch: Any
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """One step; the state that is handed in is used up.

        Returns:
            The next state, and "loss", its terms, "gradient_norm", "learning_rate" and "counted".
        """
        return self.jitted(state, frozen, teacher, batch)

    @cached_property
    def jitted(self) -> Any:
        """The jitted function, to call or to lower."""
        return jax.jit(self._advance, donate_argnums=0)

    @property
    def dtype(self) -> np.dtype:
        """Of the student's pass."""
        return jnp.dtype(self.stage.compute_dtype)

    def student(self, state: TrainState, frozen: Arrays) -> Arrays:
        """The student's arrays as they are judged and saved: trained ones in float32, the running mean if there is."""
        return {**frozen, **(state.trained if state.average is None else state.average)}

    def place_batch(self, batch: Any) -> Any:
        """A process's rows of a batch as part of the whole one, on the mesh."""

        share, shares = row_share(self.placement)

        def put(array: Any) -> Array:
            array = np.asarray(array)
            first, shape = share * len(array), (shares * len(array), *array.shape[1:])

            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None, "an array that has rows is asked for by them"
                start, stop, _ = index[0].indices(shape[0])
                return array[start - first : stop - first, *index[1:]]

            return jax.make_array_from_callback(shape, self.placement.sharding(shape, ("rows", "sequence")), part)

        return jax.tree.map(put, batch)

    def model(self, frame: Frame, arrays: Arrays) -> Any:
        """A model inside the step: everything but its layers, which gather their own weights, is gathered at once."""
        gather = Placement(self.placement.mesh, GATHERED)
        ends = {name: array for name, array in arrays.items() if not name.startswith("blocks.")}
        return frame.model({**arrays, **frame.placed(gather, ends)})

    def _initial(self, trained: Arrays) -> TrainState:
        # The state is donated at every step, and what it begins with belongs to others (a teacher, the caller).
        trained = jax.tree.map(jnp.copy, trained)
        average = None if self.stage.ema is None else jax.tree.map(jnp.copy, trained)
        return TrainState(jnp.int32(0), trained, optimizer(self.stage, self.total).init(trained), average)

    def _placed(self, state: TrainState) -> TrainState:
        place = partial(self.frame.placed, self.placement)
        return TrainState(
            self.placement.put(state.step, ()),
            place(state.trained),
            place_state(state.optimizer, self.frame.axes, self.placement),
            None if state.average is None else place(state.average),
        )

    def _advance(
        self, state: TrainState, frozen: Arrays, teacher: Arrays | None, batch: Any
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        gradients, measures = self.gradients(state.trained, frozen, teacher, batch)
        changes, inner = optimizer(self.stage, self.total).update(gradients, state.optimizer, state.trained)
        trained: Any = optax.apply_updates(state.trained, changes)
        average: Any = state.average
        if average is not None and self.stage.ema is not None:
            average = optax.incremental_update(trained, average, 1 - self.stage.ema)
        measures["gradient_norm"] = optax.tree.norm(gradients)
        measures["learning_rate"] = schedule(self.stage, self.total)(state.step)
        return self._placed(TrainState(state.step + 1, trained, inner, average)), measures

    def gradients(
        self, trained: Arrays, frozen: Arrays, teacher: Arrays | None, batch: Any
    ) -> tuple[Arrays, dict[str, Float[Array, ""]]]:
        """Float32 gradients of what trains, before clipping, and the loss, its terms and how much they count."""
        guide = None if self.teacher is None or teacher is None else self.model(self.teacher, teacher)

        def loss(trained: Arrays, part: Any) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
            student = self.model(self.frame, {**frozen, **cast(trained, self.names, self.dtype)})
            mean, count, terms = self.objective(student, guide, part)
            sums = {name: term * count for name, term in {"loss": mean, **terms}.items()}
            return mean * count, {**sums, "counted": count}

        def add(total: Any, part: Any) -> tuple[Any, None]:
            (_, sums), gradients = jax.value_and_grad(loss, has_aux=True)(trained, part)
            gradients = self.frame.placed(self.placement, gradients)
            return jax.tree.map(jnp.add, total, (gradients, sums)), None

        parts = self._cut(batch)
        shapes = jax.eval_shape(lambda part: loss(trained, part)[1], jax.tree.map(lambda array: array[0], parts))
        nothing = jax.tree.map(jnp.zeros_like, (trained, shapes))
        (gradients, sums), _ = jax.lax.scan(add, nothing, parts)
        counted = sums.pop("counted")
        mean = 1 / jnp.maximum(counted, 1)
        gradients = jax.tree.map(lambda array: array * mean, gradients)
        return gradients, {name: total * mean for name, total in sums.items()} | {"counted": counted}

    def _cut(self, batch: Any) -> Any:
        """The batch as parts one after the other, each of every n-th row, so that no row changes its device."""
        count = self.stage.accumulate

        def cut(array: Array) -> Array:
            parts = jnp.moveaxis(array.reshape(-1, count, *array.shape[1:]), 1, 0)
            return self.placement.put(parts, (None, "rows", "sequence"))

        return jax.tree.map(cut, batch)


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of arrays."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), tree)
