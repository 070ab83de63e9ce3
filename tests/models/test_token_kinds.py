"""Claims about kinds of tokens: special ids by the tokenizer's word, punctuation by Unicode's."""

import numpy as np

from kvx.kinds import ORDINARY, PUNCTUATION, SPECIAL
from kvx.models.token_kinds import token_kinds
from kvx.models.tokenizer import Tokenizer

WORDS = ("<s>", "</s>", "<|role|>", ".", " ,", "?!", " ", "a", "a.", "3", "+")


def tokenizer():
    """Whole words of a small byte-level vocabulary."""
    vocabulary = {word.replace(" ", "Ġ"): place for place, word in enumerate(WORDS)}
    specification = {
        "version": "1.0",
        "added_tokens": [
            {"id": place, "content": content, "special": special, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}
            for place, content, special in ((0, "<s>", True), (2, "<|role|>", True), (10, "+", False))
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }  # fmt: skip
    return Tokenizer(specification, {"bos_token": "<s>", "eos_token": "</s>"})


def test_every_id_has_its_kind():
    kinds = dict(zip(WORDS, token_kinds(tokenizer()), strict=True))
    assert [name for name, kind in kinds.items() if kind == SPECIAL] == ["<s>", "</s>", "<|role|>"]
    assert [name for name, kind in kinds.items() if kind == PUNCTUATION] == [".", " ,", "?!"]
    assert kinds[" "] == kinds["a."] == kinds["3"] == kinds["+"] == ORDINARY


def test_there_is_one_for_every_id_of_the_vocabulary():
    kinds = token_kinds(tokenizer())
    assert kinds.shape == (11,) and kinds.dtype == np.int8
