"""The training loop of one stage: steps, evaluations, checkpoints, and every way a run can end.

The loop knows nothing of attention, conversions or losses: it drives a `kvx.train.step.Step` over an iterator of
batches. Each process brings its own rows. Numbers of a step are read while the next one runs, and always before a
checkpoint is written. They tell of the weights that the step began with: a checkpoint whose next step fails is thrown
away, so that what stays has been seen to work.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from rich.console import Console

from kvx.decoder import Decoder
from kvx.errors import BadInput
from kvx.mesh import Placement
from kvx.train.batch import Batch
from kvx.train.checkpoints import Checkpoints
from kvx.train.evaluation import Judge
from kvx.train.flops import peak, training_flops
from kvx.train.interruption import Interruption
from kvx.train.job import CheckpointSection, EvaluateSection
from kvx.train.mesh import make_placement
from kvx.train.metrics import Metrics
from kvx.train.objective import text_loss
from kvx.train.parameters import Arrays, Frame, cast
from kvx.train.recall import recalled
from kvx.train.stage import StageSection
from kvx.train.step import Objective, Step, TrainState, abstract


@runtime_checkable
class Batches(Protocol):
    """An endless iterator of batches that can say where it is, and go back there."""

    def __next__(self) -> Any:
        """This process's rows of the next batch: a pytree of arrays whose first axis is rows."""
        ...

    def get_state(self) -> Any:
        """Where it is, as JSON holds it; the same on every process."""
        ...

    def set_state(self, state: Any) -> None:
        """Go there."""
        ...


class Diverged(BadInput):
    """A loss or a gradient that is not finite."""


@dataclass(frozen=True)
class Outcome:
    """What a run leaves.

    Attributes:
        student: trained weights in float32, or their running mean; the others as they were trained beside.
        step: steps taken.
        finished: False: told to stop before the stage was over; a checkpoint waits.
        stopped: told to stop, be it after the last step.
        held_out: its loss at the end of a stage that evaluates, nats per token.
    """

    student: Any
    step: int
    finished: bool
    stopped: bool
    held_out: float | None


@dataclass
class Trainer:
    """One stage of training.

    Attributes:
        student: the model to train; its arrays are not used up.
        stage: what to do.
        objective: what to minimise.
        batches: of text, or of preferences.
        steps: of the whole stage.
        folder: of the stage: metrics, checkpoints.
        teacher: frozen; None: the objective needs none.
        teacher_dtype: of its pass.
        held_out: batches to judge by, the same on every run; empty: nothing is judged.
        passkeys: batches by `kvx.train.recall.passkeys`, asked whenever held-out text is judged.
        placement: of the mesh; None: all devices along "data".
        converted: layers that train="attention" means; None: all.
        facts: about the run, kept with every checkpoint, as JSON holds them.
        stop: what tells it to stop.
        tensorboard: write its files too.
        console: of the progress; None: standard error.
    """

    student: Any
    stage: StageSection
    objective: Objective
    batches: Batches
    steps: int
    folder: Path
    teacher: Any = None
    teacher_dtype: str = "bfloat16"
    held_out: Sequence[Any] = ()
    passkeys: Sequence[Any] = ()
    placement: Placement = field(default_factory=make_placement)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    converted: Collection[int] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    stop: Interruption = field(default_factory=Interruption)
    tensorboard: bool = True
    console: Console | None = None

    def __post_init__(self) -> None:
        self.frame = Frame(self.student)
        names = self.frame.chosen(self.stage.train, self.converted)
        guide = None if self.teacher is None else Frame(self.teacher)
        self.step = Step(self.frame, names, self.stage, self.steps, self.objective, self.placement, guide)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.checkpoint)
        self.judge = Judge(self.step, text_loss, self.held_out)
        self.recall = Judge(self.step, recalled, self.passkeys)

    def run(self, resume: bool = False) -> Outcome:
        """Train to the end of the stage, or until told to stop.

        Args:
            resume: go on from the newest checkpoint, if there is one; a finished stage is only read.

        Raises:
            BadInput: checkpoints in the way of a new run; a damaged checkpoint.
            Diverged: a loss or gradient that is not finite; the last checkpoint's weights still gave finite ones.
        """
        if not resume and self.checkpoints.steps():
            raise BadInput(f"{self.checkpoints.folder} holds checkpoints; allowed: resume=True, or another folder")
        newest = self.checkpoints.newest()
        self.checkpoints.clear_unfinished()
        state, frozen = self.step.begin(self.frame.arrays(self.student))
        teacher = self._teacher()
        if newest is not None:
            (state, frozen), facts, data = self.checkpoints.restore(newest, abstract((state, frozen)))
            self.batches.set_state(data)
            if newest >= self.steps:
                return Outcome(self._model(state, frozen), newest, True, False, facts["held_out"])
        try:
            return self._run(newest or 0, state, frozen, teacher)
        finally:
            self.checkpoints.close()

    def _run(self, start: int, state: TrainState, frozen: Arrays, teacher: Arrays | None) -> Outcome:
        metrics: Metrics | None = None
        waiting: tuple[int, dict[str, Any]] | None = None
        held_out, step, stopped = None, start, False
        try:
            with self.stop:
                while step < self.steps:
                    batch = self.step.place_batch(next(self.batches))
                    if metrics is None:
                        metrics = self._metrics(batch).open(start)
                        if start == 0:
                            self._evaluate(0, state, frozen, teacher, metrics)
                    state, numbers = self.step(state, frozen, teacher, batch)
                    step += 1
                    self._read(waiting, metrics)
                    waiting = (step, numbers)
                    last, stopped = step == self.steps, self.stop.after(step)
                    judges = last or step % self.evaluate.every == 0
                    saves = last or stopped or step % self.checkpoint.every == 0
                    if judges or saves:
                        self._read(waiting, metrics)
                        waiting = None
                    if judges:
                        held_out = self._evaluate(step, state, frozen, teacher, metrics)
                    if saves:
                        facts = {**self.facts, "held_out": held_out if judges else None}
                        self.checkpoints.save(step, (state, frozen), facts, self.batches.get_state())
                    if stopped:
                        break
        finally:
            if metrics is not None:
                metrics.close()
        self.checkpoints.wait()
        return Outcome(self._model(state, frozen), step, step >= self.steps, stopped or self.stop.over, held_out)

    def _read(self, waiting: tuple[int, dict[str, Any]] | None, metrics: Metrics) -> None:
        """Wait for a step's numbers, and write them down.

        Raises:
            Diverged: they are not finite.
        """
        if waiting is None:
            return
        step, found = waiting
        numbers = {name: float(value) for name, value in found.items()}
        for name in ("loss", "gradient_norm"):
            self._refuse(name, numbers[name], step, step - 1)
        metrics.step(step, numbers)

    def _refuse(self, name: str, number: float, step: int, weights: int) -> None:
        """End the run over a number that is not finite.

        Args:
            weights: the step whose weights it was found with; their checkpoint is of no use to anyone.
        """
        if math.isfinite(number):
            return
        good = self.checkpoints.discard(weights)
        kept = "none" if good is None else f"step {good} in {self.checkpoints.folder}"
        raise Diverged(
            f"{name}={number} at step {step}; allowed: a finite number; the last good checkpoint is {kept}, and a "
            f"lower learning_rate than {self.stage.learning_rate:g} may go on from it"
        )

    def _evaluate(
        self, step: int, state: TrainState, frozen: Arrays, teacher: Arrays | None, metrics: Metrics
    ) -> float | None:
        if not self.held_out:
            return None
        loss = self.judge.student(self.step.student(state, frozen))
        self._refuse("held_out", loss, step, step)
        numbers = {"held_out": loss, "perplexity": math.exp(min(loss, 700.0))}
        if teacher is not None:
            numbers["teacher_held_out"] = self.judge.teacher(teacher)
        if self.passkeys:
            numbers["passkey"] = self.recall.student(self.step.student(state, frozen))
            if teacher is not None:
                numbers["teacher_passkey"] = self.recall.teacher(teacher)
        metrics.evaluation(step, numbers)
        return loss

    def _teacher(self) -> Arrays | None:
        guide = self.step.teacher
        if guide is None:
            return None
        arrays = cast(guide.arrays(self.teacher), guide.parameters, jnp.dtype(self.teacher_dtype))
        return guide.placed(self.placement, arrays)

    def _metrics(self, batch: Any) -> Metrics:
        # A pair is two rows of tokens.
        texts = jax.tree.leaves(batch, is_leaf=lambda node: isinstance(node, Batch))
        tokens, length = sum(text.tokens.size for text in texts), texts[0].tokens.shape[1]
        sizes = {name: math.prod(array.shape) for name, array in self.frame.arrays(self.student).items()}
        share = sum(sizes[name] for name in self.step.names) / sum(sizes[name] for name in self.frame.parameters)
        devices = self.placement.mesh.devices
        each = peak(devices.flat[0])
        return Metrics(
            self.folder,
            self.steps,
            tokens,
            training_flops(self.student, share, self.teacher, length),
            None if each is None else each * devices.size,
            self.console,
            self.tensorboard,
        )

    def _model(self, state: TrainState, frozen: Arrays) -> Decoder:
        return self.frame.model(self.step.student(state, frozen))
