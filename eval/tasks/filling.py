"""A prompt that is filled to its length: whole lines of a task first, then words of prose in front of them."""

from collections.abc import Callable
from dataclasses import replace

from kvx.eval.tasks.haystack import Haystack
from kvx.eval.tasks.sample import Sample
from kvx.eval.tasks.source import Source


def filled(source: Source, build: Callable[[int], Sample], length: int, task: str) -> Sample:
    """The largest of a family of samples whose prompt fits, opened with as many words of prose as still fit.

    A line of a list may be a few dozen tokens, so that lines alone would leave a short prompt several per cent short.

    Args:
        build, length, task: as `Source.largest` has them.

    Raises:
        BadInput: even the smallest sample does not fit.
    """
    whole, hay = source.largest(build, length, task), Haystack(source.words, 0)

    def opened(words: int) -> Sample:
        if not words:
            return whole
        opening = " ".join(hay.take(words)) + "\n\n"
        evidence = tuple((first + len(opening), last + len(opening)) for first, last in whole.evidence)
        return replace(whole, context=opening + whole.context, evidence=evidence)

    return source.largest(opened, length, task)
