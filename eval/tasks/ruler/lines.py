"""RULER's haystacks of lines: five short clauses over and over, or lines that look like needles."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvx.eval.tasks.ruler.interleave import interleave
from kvx.eval.tasks.source import Source

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
CLAUSES = tuple(re.split(r"(?<=\.) ", NOISE))


@dataclass(frozen=True)
class Lines:
    """Lines of filling text, measured in clauses.

    What is less than a line is filled with the clauses of the noise, in one last line: a whole line of two UUIDs is 3 %
    of a prompt of 2048 tokens.

    Attributes:
        line: the text of a line by its number, from 0 on; always the same.
        clauses: of the noise, that take about as many tokens as a line.
    """

    line: Callable[[int], str]
    clauses: int

    @classmethod
    def noise(cls) -> "Lines":
        """The same five clauses in every line."""
        return cls(lambda number: NOISE, len(CLAUSES))

    @classmethod
    def of(cls, source: Source, line: Callable[[int], str]) -> "Lines":
        """Of lines that all are about as long as the first."""
        tokens, noise = (len(source.tokenizer.encode(text + "\n", add_special=False)) for text in (line(0), NOISE))
        return cls(line, max(len(CLAUSES) * tokens // noise, 1))

    def hide(self, count: int, needles: Sequence[tuple[float, str]]) -> tuple[str, list[tuple[int, int]], list[float]]:
        """`count` clauses' worth of lines with needles as lines between them.

        Args:
            count: clauses.
            needles: the depth of each, in [0, 1), as a share of the lines that come before it, and its text.

        Returns:
            The text; each needle's first and one past its last character; and the depth that each came to.
        """
        whole, rest = divmod(count, self.clauses)
        lines = [self.line(number) for number in range(whole)]
        if rest:
            lines.append(" ".join(CLAUSES[at % len(CLAUSES)] for at in range(rest)))
        return interleave(lines, needles, "\n")
