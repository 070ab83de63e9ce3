"""A tiny training run for tests: a random student beside a random teacher on random text, on any mesh.

    python -m tests.train.tiny_runs FOLDER STEPS [key=value ...]

is one run in a process of its own, for tests that kill it.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from kvx.train.job import CheckpointSection, EvaluateSection, MeshSection
from kvx.train.loop import Trainer
from kvx.train.mesh import make_placement, row_share
from kvx.train.objective import objective
from kvx.train.parameters import Frame
from kvx.train.processes import join_processes
from kvx.train.stage import LossSection, StageSection
from kvx.train.step import Step
from kvx.train.windows import Windows, held_out
from tests import tiny

LENGTH = 24
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "vocab_size": 96}


def text(count=4000, seed=0):
    """Tokens that can be learned: each follows from the one before, but for one in four."""
    random = np.random.default_rng(seed)
    tokens = np.zeros(count, np.int64)
    follows = random.permutation(96)
    for i in range(1, count):
        tokens[i] = random.integers(96) if random.random() < 0.25 else follows[tokens[i - 1]]
    return tokens.astype(np.uint16)


def models():
    """Student and teacher."""
    return tiny.model(**SMALL), tiny.model(**SMALL, rope_theta=1e5)


def stage(**changes):
    """Fast learning in float32."""
    values = {"steps": 50, "batch": 8, "learning_rate": 3e-3, "warmup": 2, "compute_dtype": "float32"}
    return StageSection(**{**values, "loss": LossSection(ce=0.5, kl=1.0, chunk=64), "remat": "none", **changes})


def mesh(devices=8, **axes):
    """A mesh of the first devices."""
    return make_placement(MeshSection(**axes), jax.devices()[:devices])


def one_device():
    """A mesh of one."""
    return mesh(1)


@dataclass(frozen=True)
class Squares:
    """Weights are to be the first token of each row that counts: an objective that compiles at once."""

    def __call__(self, student, teacher, batch):
        """Mean over the rows, of those that count, of the distance of the student's down projections."""
        goal, counts = 0.01 * batch.tokens[:, 0, None, None], batch.mask[:, 0]
        far = sum(jnp.mean((block.mlp.down.kernel[...] - goal) ** 2, axis=(1, 2)) for block in student.blocks)
        count = jnp.sum(counts, dtype=jnp.float32)
        return jnp.sum(jnp.where(counts, far, 0.0)) / jnp.maximum(count, 1), count, {}


@dataclass(frozen=True)
class Cliff:
    """Adam raises every weight by its learning rate in each step; beyond a mean of 0.25 the loss is no number."""

    def __call__(self, student, teacher, batch):
        """Of as many rows as there are."""
        mean = jnp.mean(student.blocks[0].mlp.down.kernel[...])
        return 0.0 * jnp.log(0.25 - mean) - mean, jnp.float32(len(batch.tokens)), {}


def make_step(section, placement, converted=None, minimised=None, pair=None):
    """The step, its state and what is frozen, and the teacher's arrays, of the tiny models or of another pair."""
    student, teacher = pair or models()
    frame, guide = Frame(student), Frame(teacher)
    names = frame.chosen(section.train, converted)
    aim = minimised or objective(section, placement)
    step = Step(frame, names, section, section.total_steps(LENGTH), aim, placement, guide)
    state, frozen = step.begin(frame.arrays(student))
    return step, state, frozen, guide.placed(placement, guide.arrays(teacher))


def curve(section, placement, steps=None, packed=False, pair=None):
    """Losses of a run without a loop around it; packed rows hold two documents."""
    step, state, frozen, teacher = make_step(section, placement, pair=pair)
    windows, losses = Windows(text(), LENGTH, section.batch), []
    for _ in range(steps or section.steps):
        batch = next(windows)
        if packed:
            second = np.arange(LENGTH) >= LENGTH // 3
            batch = replace(batch, segments=batch.segments + second, packed=True)
        state, numbers = step(state, frozen, teacher, step.place_batch(batch))
        losses.append(numbers["loss"])
    return np.array([float(loss) for loss in losses])


class Slow(Windows):
    """Batches that take their time, so that a signal finds the run half way."""

    seconds = 0.0

    def __next__(self):
        time.sleep(self.seconds)
        return super().__next__()


def trainer(folder, steps, *, placement=None, every=4, keep=3, seconds=0.0, evaluate=True, minimised=None, **changes):
    """The loop around it."""
    student, teacher = models()
    placement = placement or mesh(len(jax.devices()))
    share, shares = row_share(placement)
    section = stage(steps=steps, **changes)
    batches = Slow(text(), LENGTH, section.batch, 0, share, shares)
    batches.seconds = seconds
    judged = held_out(text(seed=0)[-800:], LENGTH, 8, 400) if evaluate else []
    return Trainer(
        student,
        section,
        minimised or objective(section, placement),
        batches,
        steps,
        Path(folder),
        teacher=teacher,
        teacher_dtype="float32",
        held_out=[batch.part(share, shares) for batch in judged],
        placement=placement,
        checkpoint=CheckpointSection(every=every, keep=keep),
        evaluate=EvaluateSection(every=2 * every),
        facts={"seed": 0},
        tensorboard=False,
        console=Console(quiet=True),
    )


if __name__ == "__main__":
    folder, steps, *pairs = sys.argv[1:]
    options = dict(pair.split("=") for pair in pairs)
    join_processes()
    run = trainer(folder, int(steps), seconds=float(options.get("seconds", 0)), every=int(options.get("every", 4)))
    outcome = run.run(resume=True)
    print(f"stopped at {outcome.step}, finished {outcome.finished}")
