"""What a job reads: the tokenizer, its texts and preferences, and the batches that are made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from kvx.errors import BadInput
from kvx.models.build import Model
from kvx.models.tokenizer import Tokenizer
from kvx.train.batch import Batch
from kvx.train.data import Encoding, Stream, held_out_batches, open_documents, open_pairs, pair_batches, text_batches
from kvx.train.data.documents import Documents
from kvx.train.data.pairs import Pair
from kvx.train.job import Job
from kvx.train.material_checks import check_pieces, check_room, check_row
from kvx.train.recall import passkeys, prompts
from kvx.train.shapes import check_config

TOGETHER = 4
"""Rows of a calibration batch."""

COUNTED = 1 << 19
"""Characters of training text, at most, whose tokens are counted; about a second's work."""

HIDING = 2_000_000
"""Characters of held-out text, at least, that passkeys are hidden in, if there are as many."""


@dataclass(frozen=True)
class Material:
    """Tokenizer and texts of a job.

    Attributes:
        job: whose they are.
        tokenizer: of the source.
        encoding: documents to ids.
        train, held_out: documents; empty where the job names none.
        pairs: of preferences.
        prompts: of the passkey workload, hidden in held-out text; empty where the job asks for none.
    """

    job: Job
    tokenizer: Tokenizer
    encoding: Encoding
    train: Documents
    held_out: Documents
    pairs: Sequence[Pair]
    prompts: Sequence[Any] = ()

    def tokens(self) -> int | None:
        """How many the training text has; None: it is text of more characters than are made into tokens to know that.

        Raises:
            BadInput: a document that cannot be made into tokens.
        """
        if (known := self.train.tokens) is not None:
            return known
        found, characters = 0, 0
        for index in range(len(self.train)):
            document = self.train[index]
            characters += len(document) if isinstance(document, np.ndarray) else len(str(document))
            if characters > COUNTED:
                return None
            found += len(self.encoding(document))
        return found

    def batches(self, stage: int, share: int = 0, shares: int = 1) -> Stream:
        """Endless batches of a stage, each stage in an order of its own.

        Args:
            share, shares: which part of every batch's rows is this process's, and how many parts there are.
        """
        data, section, seed = self.job.data, self.job.stages[stage], self.job.seed + stage
        rows: dict[str, int] = {"batch": section.batch, "seed": seed, "share": share, "shares": shares}
        if section.kind == "dpo":
            pairs = data.pairs
            return pair_batches(self.pairs, self.tokenizer, sequence=pairs.sequence, prompt=pairs.prompt, **rows)
        return text_batches(self.train, self.encoding, sequence=data.sequence, shuffle=data.shuffle, **rows)

    def judged(self, stage: int, share: int = 0, shares: int = 1) -> list[Batch]:
        """Held-out batches, as large as the parts that a stage's batches are cut into; none without held-out text."""
        section = self.job.stages[stage]
        if not self.held_out:
            return []
        return held_out_batches(
            self.held_out,
            self.encoding,
            sequence=self.job.data.sequence,
            batch=section.batch // section.accumulate,
            tokens=self.job.evaluate.tokens,
            share=share,
            shares=shares,
        )

    def passkeys(self, stage: int, share: int = 0, shares: int = 1) -> list[Batch]:
        """The prompts as rows, in batches as large as those of `judged`."""
        section = self.job.stages[stage]
        batches = passkeys(self.tokenizer, self.prompts, section.batch // section.accumulate) if self.prompts else []
        return [batch.part(share, shares) for batch in batches]

    def calibration(self) -> list[Int[np.ndarray, "B T"]]:
        """Full rows of the training text, in the order of the job's seed, for conversions that read some."""
        data = self.job.data
        stream = text_batches(
            self.train,
            self.encoding,
            sequence=data.sequence,
            batch=TOGETHER,
            seed=self.job.seed,
            shuffle=data.shuffle,
        )
        count = max(1, self.job.convert.calibration_tokens // (TOGETHER * data.sequence))
        return [next(stream).tokens for _ in range(count)]


def read_material(job: Job, source: Model) -> Material:
    """What a job reads, before any weight.

    Args:
        source: the model; its shapes are enough.

    Raises:
        BadInput: files that cannot be read, or hold no text; a broken line, by file and number; a tokenizer whose ids
            the model has no embedding for, or whose pieces are not the teacher's; shapes of another model; passkeys
            beyond the model's positions; less to judge by than a row.
    """
    from kvx.models.readers import read_checkpoint
    from kvx.models.zoo import resolve

    checkpoint = read_checkpoint(resolve(job.model))
    check_config(job.shapes, job.model, checkpoint.config, "shapes")
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    rows = source.embedding.table.shape[0]
    if tokenizer.vocabulary > rows:
        raise BadInput(
            f"the tokenizer of {job.model!r} has {tokenizer.vocabulary} tokens; allowed: at most {rows}, the model's "
            "vocabulary"
        )
    if job.teacher.model is not None:
        teachers = checkpoint if job.teacher.model == job.model else read_checkpoint(resolve(job.teacher.model))
        check_config(job.teacher.shapes, job.teacher.model, teachers.config, "teacher.shapes")
        if teachers is not checkpoint:
            check_pieces(job, tokenizer, Tokenizer.from_checkpoint(teachers))
    encoding, data = Encoding.of(tokenizer), job.data
    if data.document_end is not None and data.document_end >= encoding.vocabulary:
        raise BadInput(
            f"data.document_end={data.document_end}; allowed: 0 to {encoding.vocabulary - 1}, the vocabulary, or none"
        )
    end = encoding.end if data.document_end is None else data.document_end
    ids: dict[str, Any] = {"end": end, "dtype": data.tokens_dtype, "vocabulary": encoding.vocabulary}

    def texts(paths: Sequence[str], name: str) -> Documents:
        return open_documents(paths, name, field=data.field, **ids) if paths else Documents(())

    pairs = open_pairs(data.pairs.train, "data.pairs.train") if data.pairs.train else ()
    train, held_out, asked = texts(data.train, "data.train"), texts(data.held_out, "data.held_out"), job.evaluate
    for chat in (*train.first_chats, *held_out.first_chats):
        encoding(chat)  # refuses messages without a template
    if held_out and asked.policies:
        check_row(job, held_out, encoding)
    hidden: Sequence[Any] = ()
    if asked.passkey:
        hidden = prompts(tokenizer, _text(held_out, encoding, tokenizer), asked.passkey_length, asked.passkey, job.seed)
        check_room(job, tokenizer, hidden, source.max_positions)
    return Material(job, tokenizer, encoding, train, held_out, pairs, hidden)


def _text(documents: Sequence[Any], encoding: Encoding, tokenizer: Tokenizer) -> str:
    """The first documents, as many as hide keys well; chats as their template writes them, token ids decoded."""
    found, characters = [], 0
    for index in range(len(documents)):
        document = documents[index]
        found.append(document if isinstance(document, str) else tokenizer.decode(encoding(document)))
        characters += len(found[-1])
        if characters > HIDING:
            break
    return "\n\n".join(found)
