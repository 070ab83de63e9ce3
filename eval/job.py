"""An evaluation job as frozen dataclasses: what `configs/eval/*.toml` say, section by section, with their defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import kvx
from kvx.errors import BadInput
from kvx.eval.conditions import Conditions
from kvx.eval.tasks.registry import find
from kvx.eval.tasks.sample import Mode
from kvx.section import Count, Range, Section, Whole

BUDGET = "{budget}"
FULL = "full"


@dataclass(frozen=True)
class TaskSection(Section):
    """One task at some lengths.

    Attributes:
        name: of `kvx eval --tasks`.
        lengths: tokens of a prompt, question included.
        samples: at each length.
        modes: "agnostic": the context is compressed before any question is seen; "aware": with the question in the
            prompt; "turns": a conversation, for tasks of several questions.
        options: of the task's own.
    """

    name: str
    lengths: tuple[Count, ...] = (2048,)
    samples: Count = 50
    modes: tuple[Mode, ...] = ("agnostic", "aware")
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        find(self.name).check(self.options)
        for name in ("lengths", "modes"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise BadInput(f"{name}={list(values)}; allowed: one or more, each once")

    @property
    def text(self) -> str:
        """The task with its options, as records name it; where a user's files lie is nobody else's business."""
        options = ", ".join(f"{key}={value}" for key, value in self.options.items() if key != "path")
        return f"{self.name}({options})" if options else self.name


@dataclass(frozen=True)
class FidelitySection(Section):
    """Divergence from the full cache along held-out documents, forced through the decode path.

    Attributes:
        documents: how many; none: this is left out.
        prompt: tokens of each that are prefilled.
        forced: tokens of each that go through the decode path.
        most: k of the recall of the k most attended tokens; 0: attention is not looked at.
    """

    documents: Whole = 0
    prompt: Count = 512
    forced: Annotated[int, Range(2)] = 128
    most: Whole = 32


@dataclass(frozen=True)
class CostSection(Section):
    """Time and memory, measured apart from the tasks.

    Attributes:
        lengths: prompt lengths in tokens; none: this is left out.
        batches: prompts at a time.
        steps: decode steps that are timed.
    """

    lengths: tuple[Count, ...] = ()
    batches: tuple[Count, ...] = (1,)
    steps: Count = 16


@dataclass(frozen=True)
class EvalJob(Conditions):
    """An evaluation, under `Conditions`.

    Attributes:
        name: of the job, and of its results folder.
        models: zoo names, Hugging Face directories, or .gguf files.
        policies: texts as `kvx policies` describes them, or files of `kvx.save_policy`; "{budget}" in one stands for
            every one of `budgets`. The full cache is always among them, as the reference.
        budgets: what "{budget}" stands for.
        tasks: what is asked.
        fidelity: divergence from the full cache.
        cost: time and memory.
        together: policies that share one pass over a prompt at most, since all their caches exist at once; None: all.
        by_layer: compile single layers instead of whole decode steps (`kvx.layer_by_layer`): what a grid of many
            policies and short answers wants; false where answers are long. Costs are always those of whole steps.
        output: the results folder; None: results/NAME.
    """

    name: str
    models: tuple[str, ...] = ("smollm2-135m-instruct",)
    policies: tuple[str, ...] = (FULL,)
    budgets: tuple[float | int, ...] = ()
    tasks: tuple[TaskSection, ...] = ()
    fidelity: FidelitySection = FidelitySection()
    cost: CostSection = CostSection()
    together: Annotated[int, Range(1)] | None = None
    by_layer: bool = True
    output: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models or len(set(self.models)) < len(self.models):
            raise BadInput(f"models={list(self.models)}; allowed: one or more, each once")
        if not self.tasks and not self.fidelity.documents and not self.cost.lengths:
            raise BadInput("tasks, fidelity.documents and cost.lengths are all empty; allowed: one of them at least")
        if any(BUDGET in text for text in self.policies) and not self.budgets:
            raise BadInput(f"budgets=[] with policies that say {BUDGET}; allowed: one budget or more")
        pairs = [(task.text, length) for task in self.tasks for length in task.lengths]
        if twice := {pair for pair in pairs if pairs.count(pair) > 1}:
            text, length = min(twice)
            raise BadInput(f"task {text!r} is given twice at length={length}; allowed: once, with all its modes")

    @property
    def folder(self) -> str:
        """Where results go."""
        return f"results/{self.name}" if self.output is None else self.output

    def chosen(self) -> list[kvx.Policy]:
        """The policies, budgets filled in, the full cache first.

        Raises:
            BadInput: text that is no policy, or one policy twice.
        """
        from kvx.cli.policy_argument import policy_argument

        texts = [
            text.replace(BUDGET, str(budget))
            for text in self.policies
            for budget in (self.budgets if BUDGET in text else (None,))
        ]
        found = [policy_argument(text) for text in texts]
        known = [policy.text for policy in found]
        if twice := {text for text in known if known.count(text) > 1}:
            raise BadInput(f"policy {min(twice)!r} is given twice; allowed: once")
        return sorted(
            [*([] if FULL in known else [kvx.policies.full()]), *found], key=lambda policy: policy.text != FULL
        )
