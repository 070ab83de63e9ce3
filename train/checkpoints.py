"""Checkpoints of a stage: arrays by orbax, in the background; facts beside them; a manifest over all, and what stays.

A checkpoint is a folder `step-00000100`:

    arrays/          every array of the state and of what is frozen, by name, sharded as it was
    data.json        where in the data: the same for all processes, so that another number of them may go on
    facts.json       step, held-out loss if it was measured there, the job, what the student is
    manifest.json    written last: a folder without it is unfinished and does not count

Whatever is random is drawn by seed and step (or by the data's state), so these are the generator's state.
"""

import json
import re
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from kvx.errors import BadInput
from kvx.train import manifest
from kvx.train.job import CheckpointSection
from kvx.train.processes import agreed, meet

PREFIX = "step-"
NONE = -1
"""In the place of a step: there is no checkpoint."""

STANDARD = CheckpointSection()


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        folder: made when it is first written to; on several machines, one that they share.
        section: how many stay, and whether the best does.
    """

    def __init__(self, folder: Path, section: CheckpointSection = STANDARD):
        self.folder, self.section = folder.absolute(), section
        self._writer: Any = None
        self._finishing: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, tree: Any, facts: Mapping[str, Any], data: Any) -> None:
        """Begin to write a checkpoint: returns once the arrays may change, and finishes in the background.

        Args:
            step: not yet saved.
            tree: any pytree of arrays.
            facts: of the run, as JSON holds them; "held_out" decides which is best.
            data: state of the data, as JSON holds it; the first process's is kept.
        """
        self.wait()
        folder = self._path(step)
        if jax.process_index() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / "facts.json").write_text(json.dumps({"step": step, **facts}, indent=1))
            (folder / "data.json").write_text(json.dumps(data))
        meet(f"{folder.name} is there")
        self._orbax.save(folder / "arrays", args=_orbax().args.StandardSave(_named(tree)))
        self._finishing = threading.Thread(target=self._finish, args=(folder,), name="checkpoint")
        self._finishing.start()

    def discard(self, step: int) -> int | None:
        """Remove the checkpoint of a step, if there is one, and tell the newest that stays; None: there is none."""
        self.wait()
        if jax.process_index() == 0 and step in self.steps():
            self._remove(step)
        meet("what is of no use is gone")
        return next(reversed(self.steps()), None)

    def wait(self) -> None:
        """Until what was begun is complete.

        Raises:
            whatever went wrong in the background.
        """
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Finish, and let go of threads."""
        self.wait()
        if self._writer is not None:
            if jax.process_index() == 0:
                self._prune(self.section.keep)
            self._writer.close()
            self._writer = None

    def steps(self) -> list[int]:
        """Steps of all finished checkpoints, whole or damaged, in order."""
        return [int(path.name.removeprefix(PREFIX)) for path in self._folders() if manifest.exists(path)]

    def newest(self) -> int | None:
        """The step of the newest finished checkpoint, once every file of it was checked; None: there is none.

        Raises:
            BadInput: a damaged file; names it, and the newest checkpoint before it that is whole.
        """
        damaged = f"{self.folder} holds a damaged checkpoint, which the first process names"
        found = agreed(lambda: NONE if (step := self._checked()) is None else step, damaged)
        return None if found == NONE else found

    def facts(self) -> dict[str, Any] | None:
        """What was kept with the newest finished checkpoint, of which this file alone is checked; None: there is none.

        Raises:
            BadInput: as `newest`.
        """
        step = self._checked("facts.json")
        return None if step is None else json.loads((self._path(step) / "facts.json").read_text())

    def restore(self, step: int, target: Any) -> tuple[Any, dict[str, Any], Any]:
        """A checkpoint that was checked.

        Args:
            step: of it.
            target: the tree that was saved, as shapes with the shardings that are wanted: any mesh will do.

        Returns:
            The tree, the facts, and the state of the data.
        """
        folder = self._path(step)
        leaves = self._orbax.restore(folder / "arrays", args=_orbax().args.StandardRestore(_named(target)))
        tree = jax.tree.unflatten(jax.tree.structure(target), [leaves[name] for name in _named(target)])
        return tree, *(json.loads((folder / f"{name}.json").read_text()) for name in ("facts", "data"))

    def clear_unfinished(self) -> None:
        """Remove what an interrupted run left half-written."""
        if jax.process_index() == 0:
            for path in self._folders():
                if not manifest.exists(path):
                    shutil.rmtree(path)
        meet("unfinished checkpoints are gone")

    @property
    def _orbax(self) -> Any:
        if self._writer is None:
            orbax = _orbax()
            self._writer = orbax.AsyncCheckpointer(orbax.StandardCheckpointHandler())
        return self._writer

    def _path(self, step: int) -> Path:
        return self.folder / f"{PREFIX}{step:08d}"

    def _folders(self) -> list[Path]:
        """Of checkpoints, in order; what a user has renamed is none."""
        return sorted(path for path in self.folder.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d{{8,}}", path.name))

    def _checked(self, only: str | None = None) -> int | None:
        steps = self.steps()
        if not steps:
            return None
        newest = self._path(steps[-1])
        try:
            manifest.check(newest, only)
        except manifest.Damage as damage:
            raise BadInput(f"checkpoint {damage}; {self._offer(steps[:-1])}") from None
        return steps[-1]

    def _offer(self, earlier: list[int]) -> str:
        for step in reversed(earlier):
            try:
                manifest.check(self._path(step))
            except manifest.Damage:
                continue
            return f"allowed: resume from step {step}, the newest that is whole, by moving later ones away"
        return "and none before it is whole: allowed is to begin anew in another folder"

    def _finish(self, folder: Path) -> None:
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                manifest.write(folder)
                # The newest may yet turn out to be spoiled, and then the ones before it are what is kept.
                self._prune(self.section.keep + 1)
        except BaseException as error:
            self._failure = error

    def _prune(self, keep: int) -> None:
        steps = self.steps()
        stay = set(steps[-keep:])
        judged = {step: loss for step in steps if (loss := self._held_out(step)) is not None}
        if self.section.best and judged:
            stay.add(min(judged, key=lambda step: judged[step]))
        for step in set(steps) - stay:
            self._remove(step)

    def _remove(self, step: int) -> None:
        # Without its manifest a folder is unfinished, so that a kill half way through leaves nothing damaged.
        (self._path(step) / manifest.NAME).unlink()
        shutil.rmtree(self._path(step))

    def _held_out(self, step: int) -> float | None:
        return json.loads((self._path(step) / "facts.json").read_text()).get("held_out")


def _orbax() -> Any:
    import orbax.checkpoint

    return orbax.checkpoint


def _named(tree: Any) -> dict[str, Any]:
    """Arrays by their paths: a checkpoint knows no class of ours."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
