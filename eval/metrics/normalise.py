"""Answers made comparable: case, punctuation, articles and blanks do not count."""

# ruff: noqa: RUF001 (the Chinese marks are what is meant)

import re
import string

_ENGLISH = frozenset(string.punctuation)
_CHINESE = _ENGLISH | frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
)


def normalised(text: str) -> str:
    """An English answer as SQuAD compares it (Rajpurkar et al. 2016), which LongBench and others took over.

    In this order: lower case, without ASCII punctuation, without the words a, an and the, blanks as one blank each.
    """
    bare = "".join(letter for letter in text.lower() if letter not in _ENGLISH)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def normalised_zh(text: str) -> str:
    """A Chinese answer as LongBench compares it: lower case, without Chinese and ASCII punctuation, without blanks."""
    return "".join(letter for letter in text.lower() if letter not in _CHINESE and not letter.isspace())
