"""Kinds of tokens: what a token id says about a token without any model, for policies that keep tokens by kind."""

from jaxtyping import Array, Int, Int8

ORDINARY = 0
SPECIAL = 1
"""Begin of text, role marks, padding: written by templates, not by people."""
PUNCTUATION = 2


def kinds_of(table: Int8[Array, "N"], ids: Int[Array, "*shape"]) -> Int8[Array, "*shape"]:
    """The kind of each id by a table over the vocabulary (`kvx.models.token_kinds`); unknown ids are ordinary."""
    return table.at[ids].get(mode="fill", fill_value=ORDINARY)
