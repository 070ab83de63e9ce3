"""How many tokens an answer may take, by the tokenizer that writes it."""

from kvx.eval.tasks.source import Source

STEP = 8
"""Room comes in multiples of it, so that samples of a task seldom differ."""


def room(source: Source, answer: str) -> int:
    """Tokens for an answer: those of the right one, a quarter more, and a few words around it."""
    tokens = len(source.tokenizer.encode(answer, add_special=False))
    return -(-(tokens + tokens // 4 + STEP) // STEP) * STEP
