"""Text to token ids and back, and the chat template, of a checkpoint."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tokenizers

from kvx.errors import BadInput
from kvx.models.chat_template import render_chat
from kvx.models.checkpoint import Checkpoint


class Tokenizer:
    """A tokenizer; nothing of it changes after it was built.

    Attributes:
        specification: the content of its tokenizer.json.
        special: special tokens as text, "chat_template", "eos_token_ids", as in `Checkpoint.special`.
        vocabulary: one more than the largest token id.
        bos_id: the id of the begin-of-text token, None if there is none.
        eos_ids: ids that end generation.
    """

    def __init__(self, specification: Mapping[str, Any], special: Mapping[str, Any]):
        self.specification = specification
        self.special = special
        self._tokens = _built(specification)
        ids = self._tokens.get_vocab(with_added_tokens=True)
        self.vocabulary: int = max(ids.values(), default=-1) + 1
        self.bos_id: int | None = self._special_id("bos_token")
        self.eos_ids: tuple[int, ...] = self._ends()

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "Tokenizer":
        """The tokenizer of a checkpoint.

        Raises:
            BadInput: a checkpoint without one, or with one that the `tokenizers` package cannot build.
        """
        if checkpoint.tokenizer is None:
            raise BadInput("the checkpoint has no tokenizer, allowed are tokenizer.json or a GGUF file's token lists")
        return cls(checkpoint.tokenizer, checkpoint.special)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: special tokens written out in it ("<|im_start|>") become their ids.
            add_special: put the begin-of-text token first where the model wants one. Use False for what `chat` made:
                a template writes its special tokens itself.

        Raises:
            BadInput: not a text, or one with lone surrogates.
        """
        if not isinstance(text, str):
            raise BadInput(f"text is of type {type(text).__name__}, allowed is str")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadInput(f"text has a lone surrogate at character {error.start}, allowed is valid Unicode") from None
        with _refusing():
            ids = self._tokens.encode(text, add_special_tokens=add_special).ids
        wanted = add_special and self.special.get("add_bos_token") is True and self.bos_id is not None
        if wanted and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]  # tokenizer.json has no post-processor, tokenizer_config.json asks for the token
        return ids

    def decode(self, ids: Iterable[Any], skip_special: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: integers, or a one-dimensional integer array.
            skip_special: leave special tokens out.

        Raises:
            BadInput: an id that is not an integer in [0, vocabulary).
        """
        array = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
        if array.size == 0:
            return ""
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise BadInput(f"ids are of shape {array.shape} and dtype {array.dtype}, allowed is one row of integers")
        if array.min() < 0 or array.max() >= self.vocabulary:
            outside = array[(array < 0) | (array >= self.vocabulary)][0]
            raise BadInput(f"ids hold {outside}, allowed are 0 to {self.vocabulary - 1}")
        with _refusing():
            return self._tokens.decode(array.tolist(), skip_special_tokens=skip_special)

    @property
    def pieces(self) -> dict[str, int]:
        """The pieces that ordinary text is made of, and their ids: all but special and other added tokens."""
        added = {token["content"] for token in self.specification.get("added_tokens", ())}
        return {piece: index for piece, index in self._tokens.get_vocab().items() if piece not in added}

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` works."""
        return isinstance(self.special.get("chat_template"), str)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        render: Callable[[str, Mapping[str, Any]], str] = render_chat,
    ) -> str:
        """A conversation as the model's chat template writes it; encode it with `add_special=False`.

        Args:
            messages: dicts with "role" ("system", "user", "assistant") and "content".
            add_generation_prompt: end with the opening of the assistant's turn.
            render: what renders the template; a `ChatRenderer` is quicker for many conversations.

        Raises:
            BadInput: no chat template; messages without role or content; a template that fails or exceeds its limits.
        """
        if not self.has_chat_template:
            raise BadInput("the model has no chat template, allowed is plain text")
        messages = [dict(message) for message in messages]
        if not messages:
            raise BadInput("messages are empty, allowed are one or more")
        for index, message in enumerate(messages):
            if not isinstance(message.get("role"), str) or "content" not in message:
                raise BadInput(f"message {index} has keys {sorted(message)}, allowed are role (a text) and content")
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {name: self.special[name] for name in names if name in self.special}
        variables = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None, **tokens}
        return render(self.special["chat_template"], variables)

    def _special_id(self, name: str) -> int | None:
        token = self.special.get(name)
        return None if token is None else self._tokens.token_to_id(token)

    def _ends(self) -> tuple[int, ...]:
        ends = list(self.special.get("eos_token_ids", ()))
        if (end := self._special_id("eos_token")) is not None:
            ends.append(end)
        return tuple(dict.fromkeys(ends))


@contextmanager
def _refusing() -> Iterator[None]:
    """Turns a failure of the `tokenizers` package into a refusal: its input was a file that others wrote."""
    try:
        yield
    except BaseException as error:
        # The package's panics derive from BaseException directly.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise BadInput(f"the tokenizer's specification cannot be used: {reason}") from None


def _built(specification: Mapping[str, Any]) -> tokenizers.Tokenizer:
    with _refusing():
        tokens = tokenizers.Tokenizer.from_str(json.dumps(specification))
        # A file may ask for both; a prompt is never silently cut, nor filled up.
        tokens.no_truncation()
        tokens.no_padding()
        tokens.encode("a b")  # some faults show only when a text is encoded
    return tokens
