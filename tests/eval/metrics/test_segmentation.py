"""Claims about Chinese words: where they end, and what is said where the package is missing."""

import sys

import pytest

from kvx.errors import BadInput
from kvx.eval.metrics.segmentation import require_segmentation, segmented


def test_words_join_to_the_text():
    pytest.importorskip("jieba")
    assert segmented("我来到北京清华大学") == ["我", "来到", "北京", "清华大学"]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    require_segmentation.cache_clear()
    with pytest.raises(BadInput, match="pip install jieba"):
        segmented("北京")
    require_segmentation.cache_clear()
