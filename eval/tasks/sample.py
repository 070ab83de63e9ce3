"""What a task asks: a context, questions about it, and where in the context their answers lie."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["generate", "choose", "likelihood"]
"""How a question is answered: greedily generated text; the likeliest of its choices; or not at all, its first answer's
log-probability being what is measured."""

Mode = Literal["agnostic", "aware", "turns"]
"""When a cache is compressed: before any question is seen; with the (first) question at the prompt's end; or likewise,
later questions following the right answers of those before, as in a conversation."""


@dataclass(frozen=True)
class Question:
    """One question about a context.

    Attributes:
        text: what follows the context: the question, with the instruction that belongs to it. It is encoded apart from
            the context, so that both orders of compression see equal tokens.
        answers: what counts as right, for the task's score; a text each.
        prefix: the opening of the answer, which the model continues; after the chat template where there is one.
        kind: how it is answered.
        choices: for "choose": the continuations to choose from; the answers are among them.
        new_tokens: for "generate": the most tokens of an answer.
        stop: for "generate": texts that end an answer, once something was said; they are cut off.
        facts: what else the task's score needs (classes, the names of functions, ...).
    """

    text: str
    answers: tuple[str, ...]
    prefix: str = ""
    kind: Kind = "generate"
    choices: tuple[str, ...] = ()
    new_tokens: int = 32
    stop: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One prompt: a context and what is asked about it.

    Attributes:
        context: what a cache holds before a question comes; instructions that stand before the question belong to it.
        questions: one; or several over one context, equally many in every sample of a task.
        evidence: first and one past the last character, in the context, of each place that the answers rest on.
        depth: share of the filling text that comes before the (first) evidence; None where there is no such place.
        plain: never in a chat template, even where the job asks for it.
    """

    context: str
    questions: tuple[Question, ...]
    evidence: tuple[tuple[int, int], ...] = ()
    depth: float | None = None
    plain: bool = False
