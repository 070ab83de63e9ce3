"""Chinese text cut into words, by the package that the published scorers use."""

import logging
import warnings
from functools import cache
from typing import Any

from kvx.errors import BadInput


def segmented(text: str) -> list[str]:
    """The words of a Chinese text, punctuation and blanks among them.

    Raises:
        BadInput: the package jieba is missing.
    """
    return list(require_segmentation().cut(text, cut_all=False))


@cache
def require_segmentation() -> Any:
    """The package jieba; a task calls this before long work, so that its lack is not found out at the first score.

    Raises:
        BadInput: it is missing.
    """
    try:
        with warnings.catch_warnings():
            # Its source has escapes that newer Pythons warn of, and it imports a deprecated module.
            warnings.simplefilter("ignore")
            import jieba  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise BadInput(
            "Chinese tasks are scored by words and need the package jieba; allowed: pip install jieba"
        ) from None
    jieba.setLogLevel(logging.WARNING)
    return jieba
