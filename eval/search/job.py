"""A search as a frozen dataclass: what is looked for, where, and how long."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvx.errors import BadInput
from kvx.eval.conditions import Conditions
from kvx.eval.job import FULL, EvalJob, FidelitySection, TaskSection
from kvx.eval.summary import FIDELITY
from kvx.eval.tasks.sample import Mode
from kvx.section import Count, Positive


@dataclass(frozen=True)
class SearchJob(Conditions):
    """A search for the policies that keep quality in the fewest bytes, under `Conditions`.

    Attributes:
        max_bytes_per_token: bytes that a prompt's cache may take, all layers and room for the answer included, divided
            by the task's length.
        model: a zoo name, a Hugging Face directory, or a .gguf file.
        task: of `kvx eval --tasks`; or "fidelity": divergence from the full cache along held-out documents.
        length: tokens of a prompt; of "fidelity", of those that are prefilled.
        samples: that those policies see which do well on fewer.
        mode: as of `kvx eval`.
        options: of the task's own.
        forced: for "fidelity": tokens of a document that go through the decode path.
        trials: policies within the limit that are run.
        only: methods of the registry that are searched; none: all.
        without: methods that are not.
        output: the results folder; None: results/search/TASK. Searches that differ in nothing but their limit, their
            trials and what is searched may share it, and what was run is not run again.
    """

    max_bytes_per_token: Positive
    model: str = "smollm2-135m-instruct"
    task: str = "passkey"
    length: Count = 2048
    samples: Count = 64
    mode: Mode = "agnostic"
    options: Mapping[str, Any] = field(default_factory=dict)
    forced: Count = 128
    trials: Count = 64
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    output: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_documents and (self.options or self.mode != "agnostic"):
            raise BadInput(f"task={FIDELITY} has neither options nor modes; allowed: length, forced and samples")
        self.evaluation()

    @property
    def on_documents(self) -> bool:
        """Whether divergence is measured, and not answers."""
        return self.task == FIDELITY

    @property
    def folder(self) -> str:
        """Where results go."""
        return f"results/search/{self.task}" if self.output is None else self.output

    def evaluation(self, policies: Sequence[str] = (FULL,)) -> EvalJob:
        """The evaluation of some policies on the same samples.

        Raises:
            BadInput: no such task, or options that it does not have.
        """
        return EvalJob(
            name=f"search/{self.task}",
            models=(self.model,),
            policies=tuple(policies),
            tasks=() if self.on_documents else (self._task(),),
            fidelity=FidelitySection(self.samples, self.length, self.forced)
            if self.on_documents
            else FidelitySection(),
            output=self.folder,
            **self.conditions,
        )

    def _task(self) -> TaskSection:
        return TaskSection(self.task, (self.length,), self.samples, (self.mode,), self.options)
