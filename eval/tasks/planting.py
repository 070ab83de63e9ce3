"""Sentences hidden in prose, with questions about some of them: a family of samples that grows word by word."""

from collections.abc import Callable, Sequence

from kvx.eval.tasks.haystack import Haystack
from kvx.eval.tasks.sample import Question, Sample


def planted(
    task: str,
    hay: Haystack,
    needles: Sequence[tuple[float, str]],
    questions: Sequence[Question],
    answering: Sequence[int],
) -> Callable[[int], Sample]:
    """What `Source.largest` looks through: the sample of each number of words.

    Args:
        task: the instruction, which stands before the prose.
        needles: the depth of each sentence, and its text.
        answering: which of them the answers rest on; their places are the evidence, the first one's depth is the
            sample's where there is one question.
    """

    def build(words: int) -> Sample:
        text, spans, found = hay.hide(words, needles)
        evidence = tuple((len(task) + spans[at][0], len(task) + spans[at][1]) for at in answering)
        depth = found[answering[0]] if answering and len(questions) == 1 else None
        return Sample(task + text, tuple(questions), evidence, depth)

    return build
