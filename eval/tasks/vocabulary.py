"""The plain words of the filling text: what lists, labels and items of a task are made of."""

from kvx.errors import BadInput
from kvx.eval.tasks.source import Source

SHORTEST, LONGEST = 4, 9
"""Letters of a word. Shorter ones are mostly articles and prepositions, longer ones many tokens."""


def vocabulary(source: Source, least: int, task: str) -> list[str]:
    """Lower-case words of letters alone, each once, sorted.

    Args:
        least: words that the task draws.
        task: named in a refusal.

    Raises:
        BadInput: the text has fewer.
    """
    found = {word for word in source.words if SHORTEST <= len(word) <= LONGEST and word.isalpha() and word.islower()}
    if len(found) < least:
        raise BadInput(
            f"text={source.prose.name!r} has {len(found)} plain words in its first half; "
            f"allowed for task={task}: at least {least}"
        )
    return sorted(found)
