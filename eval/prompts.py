"""Samples as token ids: the chat template around them, the context apart from its questions, evidence as places."""

from dataclasses import dataclass
from typing import Any

from kvx.errors import BadInput
from kvx.eval.tasks.sample import Question, Sample

_MARK = "\x00content\x00"


@dataclass(frozen=True)
class Frame:
    """What stands around a prompt.

    Attributes:
        before: before the context; a chat template writes its special tokens here.
        after: between the question and the opening of the answer.
        between: between an answer and the next question.
        chat: whether this is a chat template's; else the tokenizer adds what begins a text.
    """

    before: str = ""
    after: str = ""
    between: str = ""
    chat: bool = False

    @classmethod
    def of(cls, tokenizer: Any, chat: bool) -> "Frame":
        """The frame of a model: its chat template around a user's message, or none.

        Raises:
            BadInput: `chat` for a model without a chat template.
        """
        if not chat:
            return cls()
        said = [{"role": role, "content": _MARK} for role in ("user", "assistant", "user")]
        pieces = tokenizer.chat(said).split(_MARK)
        if len(pieces) != 4:
            raise BadInput("chat=True, but the model's chat template changes what is said; allowed: chat=False")
        before, _, between, after = pieces
        return cls(before, after, between, True)

    def context(self, tokenizer: Any, sample: Sample) -> list[int]:
        """Ids of a sample's context, with what begins a text."""
        framed = self.chat and not sample.plain
        return tokenizer.encode((self.before if framed else "") + sample.context, add_special=not framed)

    def question(self, tokenizer: Any, sample: Sample, question: Question) -> list[int]:
        """Ids of a question and the opening of its answer."""
        after = self.after if not sample.plain else ""
        return tokenizer.encode(question.text + after + question.prefix, add_special=False)

    def turn(self, tokenizer: Any, sample: Sample, index: int) -> list[int]:
        """Ids that lead from the opening of one answer to that of the next: the right answer, and the next question."""
        answered, asked = sample.questions[index], sample.questions[index + 1]
        between, after = ("", "") if sample.plain else (self.between, self.after)
        # A prefix wants a blank before what it opens, unless that stands within quotes or brackets.
        joint = " " if answered.prefix and answered.prefix[-1] not in "\"'([{ \n" else ""
        return tokenizer.encode(
            joint + answered.answers[0] + between + asked.text + after + asked.prefix, add_special=False
        )

    def size(self, tokenizer: Any, sample: Sample) -> int:
        """Tokens up to where the longest of the questions is answered."""
        asked = max(len(self.question(tokenizer, sample, each)) for each in sample.questions)
        return len(self.context(tokenizer, sample)) + asked

    def places(self, tokenizer: Any, sample: Sample) -> list[tuple[int, int]]:
        """First and one past the last token of each piece of evidence, in the context; within a token of exact.

        Where a tokenizer joins a word with the blank before it, the token that holds the blank counts.
        """
        framed = self.chat and not sample.plain
        start = self.before if framed else ""

        def tokens(characters: int) -> int:
            return len(tokenizer.encode(start + sample.context[:characters].rstrip(), add_special=not framed))

        return [(tokens(first), tokens(last)) for first, last in sample.evidence]
