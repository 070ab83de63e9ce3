"""Arithmetic chains with a known answer, written out step by step: long answers, which eviction while decoding hurts.

The context is dense: worked examples, as many as fit, of which nearly every token shows how to answer (the stand-in for
few-shot GSM8K of "Can LLMs Maintain Fundamental Abilities under KV Cache Compression?", 2025). `long_arithmetic` is its
LG-GSM8K, after LongGenBench (Liu et al. 2024): many questions in the context, all answered in one output.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from kvx.eval.metrics.numbers import extracted, final_number
from kvx.eval.tasks.filling import filled
from kvx.eval.tasks.options import within
from kvx.eval.tasks.placing import joined
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.room import room
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, random_of

AMOUNT, FACTOR, MOST = 20, 3, 200
"""The most that a step adds or takes away, the most that it multiplies by, and the largest number multiplied up to."""

_TASK = "Work out every question step by step, as in the examples below.\n\n"


@dataclass(frozen=True)
class Chain:
    """Steps from a number to a result, which never leave the whole numbers from 0 on.

    Attributes:
        start: the first number.
        steps: "+", "-" or "*", and by how much.
    """

    start: int
    steps: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, random: np.random.Generator, steps: int) -> "Chain":
        """A chain of so many steps."""
        start = value = int(random.integers(1, 100))
        found = []
        for _ in range(steps):
            allowed = ["+"] + ["-"] * (value > 0) + ["*"] * (0 < FACTOR * value <= MOST)
            sign = allowed[int(random.integers(len(allowed)))]
            most = {"+": AMOUNT, "-": min(AMOUNT, value), "*": FACTOR}[sign]
            amount = int(random.integers(2 if sign == "*" else 1, most, endpoint=True))
            found.append((sign, amount))
            value = _result(value, sign, amount)
        return cls(start, tuple(found))

    @property
    def result(self) -> int:
        """Where it ends."""
        value = self.start
        for sign, amount in self.steps:
            value = _result(value, sign, amount)
        return value

    @property
    def asked(self) -> str:
        """The question in words."""
        words = {"+": "Add {}.", "-": "Subtract {}.", "*": "Multiply by {}."}
        steps = " ".join(words[sign].format(amount) for sign, amount in self.steps)
        return f"Start with {self.start}. {steps} What is the result?"

    @property
    def worked(self) -> str:
        """The answer, step by step."""
        said, value = [], self.start
        for sign, amount in self.steps:
            after = _result(value, sign, amount)
            said.append(f"{value} {sign} {amount} = {after}.")
            value = after
        return f"{' '.join(said)} The answer is {value}."


def share_of_results(answer: str, question: Question) -> float:
    """Right results over questions, each looked for behind its own "Answer n:"; what comes twice counts once."""
    said, right = _by_number(question.prefix + answer), _by_number(question.prefix + question.answers[0])
    return sum(said.get(number) == result for number, result in right.items()) / len(right)


@task("arithmetic", score=final_number, group="arithmetic", binary=True)
def arithmetic(source: Source, length: int, count: int, seed: int, *, steps: int = 8) -> list[Sample]:
    """A chain of steps written out, after as many worked examples as fit.

    Args:
        steps: of every chain, the examples' too.
    """
    within("arithmetic", "steps", steps, 1)
    found = []
    for index in range(count):
        random = random_of(seed, "arithmetic", length, index)
        chain = Chain.of(random, steps)
        question = Question(
            f"\n\nQuestion: {chain.asked}\n", (chain.worked,), "Answer:",
            new_tokens=room(source, chain.worked), stop=("\n\n", "\nQuestion"),
        )  # fmt: skip
        found.append(_after_examples(source, length, "arithmetic", random, [chain], [], question))
    return found


@task("long_arithmetic", score=share_of_results, group="arithmetic")
def long_arithmetic(
    source: Source, length: int, count: int, seed: int, *, questions: int = 10, steps: int = 4
) -> list[Sample]:
    """Several chains, all answered in one long output.

    Args:
        questions: chains to answer (LongGenBench: 35 problems).
        steps: of every chain, the examples' too.
    """
    within("long_arithmetic", "questions", questions, 1, 1000)
    within("long_arithmetic", "steps", steps, 1)
    found = []
    for index in range(count):
        random = random_of(seed, "long_arithmetic", length, index)
        chains = [Chain.of(random, steps) for _ in range(questions)]
        opening = "Answer 1:"
        right = "\n".join(f"Answer {number}: {chain.worked}" for number, chain in enumerate(chains, 1))
        right = right.removeprefix(opening).lstrip()
        question = Question(
            f"\n\nAnswer all questions from 1 to {questions} in their order, each on a line of its own.\n", (right,),
            opening, new_tokens=room(source, right), stop=(f"Answer {questions + 1}:", "\nQuestion"),
        )  # fmt: skip
        asked = [f"Question {number}: {chain.asked}" for number, chain in enumerate(chains, 1)]
        found.append(_after_examples(source, length, "long_arithmetic", random, chains, asked, question))
    return found


def _after_examples(
    source: Source,
    length: int,
    name: str,
    random: np.random.Generator,
    chains: Sequence[Chain],
    asked: Sequence[str],
    question: Question,
) -> Sample:
    """As many worked examples as fit, none of them a chain that is asked for, and then the lines that are."""
    examples: list[Chain] = []

    def build(more: int) -> Sample:
        shown = 1 + more
        while len(examples) < shown:
            if (chain := Chain.of(random, len(chains[0].steps))) not in chains:
                examples.append(chain)
        lines = [*(f"Question: {each.asked}\nAnswer: {each.worked}" for each in examples[:shown]), *asked]
        context, evidence = joined(_TASK, lines, "\n\n", "", range(shown, len(lines)))
        return Sample(context, (question,), evidence)

    return filled(source, build, length, name)


def _by_number(text: str) -> dict[int, Decimal | None]:
    """The last number of what follows each "Answer n:", up to the next; the first such answer counts."""
    parts = re.split(r"Answer (\d+):", text)
    found: dict[int, Decimal | None] = {}
    for number, answer in zip(parts[1::2], parts[2::2], strict=True):
        found.setdefault(int(number), extracted(answer))
    return found


def _result(value: int, sign: str, amount: int) -> int:
    return {"+": value + amount, "-": value - amount, "*": value * amount}[sign]
