"""Documents as token ids: what a tokenizer makes of text and of chats, and ids that were made before."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from kvx.errors import BadInput
from kvx.models.chat_template import ChatRenderer
from kvx.models.tokenizer import Tokenizer
from kvx.train.data.documents import check_messages


@dataclass(frozen=True)
class Encoding:
    """How documents become token ids.

    Attributes:
        tokenizer: None where all documents are token ids already.
        vocabulary: ids are below it.
        end: the token that ends a document; None: none does.
        render: writes out the tokenizer's chat template.
    """

    tokenizer: Tokenizer | None
    vocabulary: int
    end: int | None = None
    render: Callable[..., str] = field(default_factory=ChatRenderer, repr=False)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Encoding":
        """By a tokenizer; documents end with its first end-of-text token."""
        return cls(tokenizer, tokenizer.vocabulary, tokenizer.eos_ids[0] if tokenizer.eos_ids else None)

    def __call__(self, record: Any) -> Int[np.ndarray, "N"]:
        """A document's ids: begin-of-text where the model wants it, the text, and the end; none of an empty text.

        Args:
            record: a text; a list of messages, which the chat template writes out; or token ids, taken as they are.

        Raises:
            BadInput: text without a tokenizer, messages that are none or have no template, ids outside the vocabulary.
        """
        if isinstance(record, np.ndarray):
            return self._known(record)
        if not record:
            return np.zeros(0, np.int32)
        if self.tokenizer is None:
            raise BadInput("a document is text, and there is no tokenizer; allowed: .npy or .bin files of token ids")
        if isinstance(record, str):
            ids = self.tokenizer.encode(record)
        else:
            check_messages(record)
            text = self.tokenizer.chat(record, add_generation_prompt=False, render=self.render)
            ids = self.tokenizer.encode(text, add_special=False)
        if self.end is not None and ids[-1:] != [self.end]:
            ids.append(self.end)
        return np.asarray(ids, np.int32)

    def _known(self, ids: Integer[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
            raise BadInput(f"token ids reach {int(ids.max())}; allowed: 0 to {self.vocabulary - 1}, the vocabulary")
        return ids.astype(np.int32)
