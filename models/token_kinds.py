"""Which token ids of a tokenizer are special, and which are punctuation."""

import unicodedata

import numpy as np
from jaxtyping import Int8

from kvx.kinds import ORDINARY, PUNCTUATION, SPECIAL
from kvx.models.tokenizer import Tokenizer


def token_kinds(tokenizer: Tokenizer) -> Int8[np.ndarray, "N"]:
    """The kind of every token id, for `Policy.with_kinds`.

    Special: what the tokenizer's file calls so, and the ids that begin and end a text. Punctuation: ids whose text,
    blanks around it aside, is punctuation by Unicode's categories (P*) throughout, so that "," and " ," both count. A
    mark spelled as several tokens ("[INST]") is found only if those are.
    """
    kinds = np.full(tokenizer.vocabulary, ORDINARY, np.int8)
    for token in range(tokenizer.vocabulary):
        text = tokenizer.decode([token], skip_special=False).strip()
        if text and all(unicodedata.category(character).startswith("P") for character in text):
            kinds[token] = PUNCTUATION
    added = tokenizer.specification.get("added_tokens", ())
    special = {token["id"] for token in added if token.get("special")} | set(tokenizer.eos_ids)
    if tokenizer.bos_id is not None:
        special.add(tokenizer.bos_id)
    kinds[sorted(token for token in special if token < tokenizer.vocabulary)] = SPECIAL
    return kinds
