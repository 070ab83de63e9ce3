"""One learning curve: a start trained beside its teacher in a folder of its own, resumable, under settings it keeps."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os.path import isdir
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer
from rich.console import Console

import kvx
from kvx.destinations import replace_file
from kvx.mesh import Placement
from kvx.models.build import Model
from kvx.train.batch import Batch
from kvx.train.begun import check_begun, flat
from kvx.train.data.stream import SAMPLED, fingerprint
from kvx.train.interruption import Interruption
from kvx.train.job import CheckpointSection, EvaluateSection
from kvx.train.loop import Trainer
from kvx.train.mesh import row_share
from kvx.train.metrics import FILE, read
from kvx.train.objective import objective
from kvx.train.parameters import converted_layers
from kvx.train.stage import StageSection
from kvx.train.windows import Windows, held_out

KEPT = "setting.json"
"""In a curve's folder: what it was begun with."""

UNCONVERTED = "none"
"""The start that is the source itself: the control."""


@dataclass(frozen=True)
class Setting:
    """What all curves share, and what a curve that goes on may not change.

    Attributes:
        model: source and teacher, by name.
        stage: of training.
        length: tokens of a row.
        every: steps between evaluations.
        judged: tokens of held-out text.
        calibration: rows of the training text for conversions that read any, from its end.
        checkpoint: steps between checkpoints.
        teacher_dtype: of the teacher's pass.
    """

    model: str
    stage: StageSection
    length: int
    every: int
    judged: int
    calibration: int
    checkpoint: int
    teacher_dtype: str

    @property
    def steps(self) -> int:
        """Of a curve."""
        return self.stage.total_steps(self.length)


@dataclass(frozen=True)
class Bench:
    """Where curves are trained.

    Attributes:
        source: the teacher.
        train, judge: token ids, to learn from and to judge by.
        passkeys: batches by `kvx.train.recall.passkeys`; empty: none are asked for.
        setting: of all.
        placement: of the mesh.
        console: of the progress.
    """

    source: Model
    train: Integer[np.ndarray, "N"]
    judge: Integer[np.ndarray, "M"]
    passkeys: Sequence[Batch]
    setting: Setting
    placement: Placement
    console: Console

    def curve(self, start: str, seed: int, folder: Path, stop: Interruption) -> bool:
        """Train one start; whether it came to its end, now or before.

        Args:
            start: a recipe as text, "none", or the folder of a model that was converted before.
            seed: of the order of rows.

        Raises:
            BadInput: a folder whose curve was begun with another setting, by the first value that differs.
        """
        setting = self.setting
        texts = {"train": _of(self.train), "held_out": _of(self.judge), "passkey_batches": len(self.passkeys)}
        _claim(folder, {"start": start, "seed": seed, **asdict(setting), "texts": texts})
        if _is_over(folder, setting):
            return True
        student = self._converted(start)
        share, shares = row_share(self.placement)
        rows = setting.stage.batch
        judged = held_out(self.judge, setting.length, rows, setting.judged)
        trainer = Trainer(
            student,
            setting.stage,
            objective(setting.stage, self.placement),
            Windows(self.train, setting.length, rows, seed, share, shares),
            setting.steps,
            folder,
            teacher=self.source,
            teacher_dtype=setting.teacher_dtype,
            held_out=[batch.part(share, shares) for batch in judged],
            passkeys=[batch.part(share, shares) for batch in self.passkeys],
            placement=self.placement,
            checkpoint=CheckpointSection(every=setting.checkpoint, keep=1, best=False),
            evaluate=EvaluateSection(every=setting.every),
            converted=converted_layers(student),
            facts={"start": start, "seed": seed},
            stop=stop,
            tensorboard=False,
            console=self.console,
        )
        return trainer.run(resume=True).finished

    def _converted(self, start: str) -> Any:
        if start == UNCONVERTED:
            return self.source
        if isdir(start):
            return kvx.load(start)[0]
        from kvx.train.convert import convert, measure_moments, parse_recipe

        recipe = parse_recipe(start)
        moments = None
        if recipe.reads_text:
            length = self.setting.length
            rows = np.asarray(self.train[-self.setting.calibration * length :], np.int32).reshape(-1, length)
            moments = measure_moments(self.source, [rows[first : first + 8] for first in range(0, len(rows), 8)])
        return convert(self.source, recipe, moments)[0]


def folder_of(out: Path, start: str, seed: int) -> Path:
    """A curve's folder: readable, and no other start's."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", start).strip("-")[-60:]
    return out / f"{readable}-{hashlib.sha256(start.encode()).hexdigest()[:6]}-seed{seed}"


def _of(tokens: Integer[np.ndarray, "N"]) -> str:
    """What tells a text from others: its length, and samples of all of it."""
    return f"{len(tokens)} tokens, {fingerprint(np.array_split(tokens, SAMPLED[0]))}"


def _claim(folder: Path, facts: dict[str, Any]) -> None:
    """Keep what a curve is begun with, and refuse to go on with anything else."""
    kept = folder / KEPT
    if kept.exists():
        check_begun(kept, facts, f"the curve in {str(folder)!r}", "the same, or another folder for all curves")
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(kept, json.dumps(flat(facts), indent=1).encode())


def _is_over(folder: Path, setting: Setting) -> bool:
    """Whether the last step was judged; known before anything is converted."""
    lines = read(folder / FILE) if (folder / FILE).exists() else []
    return any("held_out" in line and int(line["step"]) >= setting.steps for line in lines)
