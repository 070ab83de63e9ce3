"""Answering: a batch of samples under many policies, whose caches come from one pass over the prompts.

Three modes (SCBench's distinction). "agnostic": the context alone is read and compressed; each question goes through
the decode path on a copy of that cache. "aware": the question stands at the end of the prompt, so that a policy may use
it; several questions are several passes. "turns": the first question stands at the end of the prompt; each later one
follows the right answers of those before, on the cache that they went through, and what was generated is dropped.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

import kvx
from kvx.buckets import round_up
from kvx.cache import KVCache
from kvx.decoder import Decoder
from kvx.eval.prompts import Frame
from kvx.eval.shared_pass import prefill_each
from kvx.eval.side_by_side import side_by_side
from kvx.eval.stopwatch import Stopwatch
from kvx.eval.tasks.sample import Mode, Question, Sample

PIECE = 32
"""Widths of prompts, and room for questions and answers, are multiples of it: few compiled programs, and bytes that are
not much more than what is needed."""


@dataclass(frozen=True)
class Batch:
    """Samples as token ids, of fixed shapes over all batches of a cell.

    Attributes:
        samples: the rows.
        contexts: ids of each row's context.
        questions: ids of each row's questions, each with the opening of its answer.
        turns: ids of each row's right answer to a question followed by the next question.
        places: first and one past the last token of each piece of each row's evidence.
        width: tokens that prompts are padded to.
        room: tokens that a cache must take beyond its prompt.
    """

    samples: tuple[Sample, ...]
    contexts: list[list[int]]
    questions: list[list[list[int]]]
    turns: list[list[list[int]]]
    places: list[list[tuple[int, int]]]
    width: int
    room: int


@dataclass(frozen=True)
class Answered:
    """A batch under one policy.

    Attributes:
        texts: (row, question) answers.
        likelihoods: (row, question) mean log-probability a token of the first right answer; None where none was asked.
        cache: as it was once the (first) prompt was compressed.
        steps: decode steps that its answers took, those that read questions included.
        decode: seconds of all answers.
        compiled: whether they hold compilation.
    """

    texts: list[list[str]]
    likelihoods: list[list[float | None]]
    cache: KVCache
    steps: int
    decode: float
    compiled: bool


def batches(tokenizer: Any, frame: Frame, samples: Sequence[Sample], size: int, mode: Mode) -> list[Batch]:
    """Samples in batches of one size; the last is filled up with repetitions of its first row."""
    contexts = [frame.context(tokenizer, sample) for sample in samples]
    questions = [[frame.question(tokenizer, sample, each) for each in sample.questions] for sample in samples]
    turns = [
        [frame.turn(tokenizer, sample, index) for index in range(len(sample.questions) - 1)] if mode == "turns" else []
        for sample in samples
    ]
    places = [frame.places(tokenizer, sample) for sample in samples]
    aware = mode != "agnostic"
    longest = max(
        len(context) + (max(map(len, asked)) if aware else 0)
        for context, asked in zip(contexts, questions, strict=True)
    )
    room = max(
        max(len(ids) + _answer(tokenizer, question) for ids, question in zip(asked, sample.questions, strict=True))
        + sum(map(len, later))
        for asked, sample, later in zip(questions, samples, turns, strict=True)
    )
    found = []
    for start in range(0, len(samples), size):
        rows = [*range(start, min(start + size, len(samples)))]
        rows += [start] * (size - len(rows))
        found.append(
            Batch(
                tuple(samples[row] for row in rows),
                [contexts[row] for row in rows],
                [questions[row] for row in rows],
                [turns[row] for row in rows],
                [places[row] for row in rows],
                round_up(longest, PIECE),
                round_up(room, PIECE),
            )
        )
    return found


def answer(
    decoder: Decoder,
    tokenizer: Any,
    batch: Batch,
    mode: Mode,
    policies: Sequence[kvx.Policy],
    *,
    timed: bool = False,
    by_layer: bool = False,
    watch: Stopwatch | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[tuple[kvx.Policy, Answered]]:
    """Every policy's answers, as each is done.

    Args:
        timed: one policy is decoded at a time, so that its time is its own.
        by_layer: compile single layers instead of whole decode steps.
        watch: its phase "prefill" grows by the passes over the prompts.
        tell: hears what begins.
    """
    watch = watch or Stopwatch()
    count = len(batch.samples[0].questions)
    passes = range(count) if mode == "aware" else range(1)
    starts = []
    for index in passes:
        tell("prefill")
        prompts = batch.contexts
        if mode != "agnostic":
            prompts = [ids + asked[index][:-1] for ids, asked in zip(batch.contexts, batch.questions, strict=True)]
        with watch.phase("prefill"):
            tokens, lengths = _padded(prompts, batch.width)
            caches = [cache for _, cache in prefill_each(decoder, tokens, policies, batch.room, lengths)]
            jax.block_until_ready(caches)
        starts.append(caches)

    def one(at: int) -> Answered:
        clock = Stopwatch()
        with clock.phase("decode") as stretch, kvx.layer_by_layer(by_layer):
            caches = [caches[at] for caches in starts]
            row = _Asking(decoder, tokenizer, batch, policies[at])
            texts, likelihoods = row.ask(mode, caches)
        return Answered(texts, likelihoods, starts[0][at], row.steps, stretch.wall, not stretch.warm)

    yield from zip(policies, side_by_side(decoder, one, range(len(policies)), timed=timed), strict=True)


@dataclass
class _Asking:
    """One policy's way through the questions of a batch."""

    decoder: Decoder
    tokenizer: Any
    batch: Batch
    policy: kvx.Policy
    steps: int = 0

    def ask(self, mode: Mode, caches: list[KVCache]) -> tuple[list[list[str]], list[list[float | None]]]:
        texts: list[list[str]] = [[] for _ in self.batch.samples]
        likelihoods: list[list[float | None]] = [[] for _ in self.batch.samples]
        cache = caches[0]
        for index in range(len(self.batch.samples[0].questions)):
            if mode == "aware":
                cache = caches[index]
            given = [asked[index] if mode == "agnostic" else asked[index][-1:] for asked in self.batch.questions]
            if mode == "turns" and index:
                given = [turn[index - 1][-1:] for turn in self.batch.turns]
            said, sure = self._question(index, given, _copy(cache))
            for row, (text, value) in enumerate(zip(said, sure, strict=True)):
                texts[row].append(text)
                likelihoods[row].append(value)
            if mode == "turns" and index + 1 < len(self.batch.samples[0].questions):
                onward = [last + turn[index][:-1] for last, turn in zip(given, self.batch.turns, strict=True)]
                tokens, lengths = _padded(onward)
                self.steps += int(lengths.max())
                _, cache = kvx.prefill(
                    self.decoder, tokens, self.policy, lengths, cache=_copy(cache) if index == 0 else cache
                )
        return texts, likelihoods

    def _question(self, index: int, given: list[list[int]], cache: KVCache) -> tuple[list[str], Sequence[float | None]]:
        asked = [sample.questions[index] for sample in self.batch.samples]
        if asked[0].kind == "generate":
            return self._generated(asked, given, cache), [None] * len(asked)
        tokens, lengths = _padded(given)
        self.steps += int(lengths.max())
        logits, cache = kvx.prefill(self.decoder, tokens, self.policy, lengths, cache=cache)
        if asked[0].kind == "likelihood":
            sums, counts = self._scored([question.answers[0] for question in asked], cache, logits)
            return [""] * len(asked), (sums / counts).tolist()
        most = max(len(question.choices) for question in asked)
        totals = np.full((len(asked), most), -np.inf)
        for choice in range(most):
            texts = [question.choices[min(choice, len(question.choices) - 1)] for question in asked]
            sums, _ = self._scored(texts, _copy(cache), logits)
            totals[:, choice] = np.where([choice < len(question.choices) for question in asked], sums, -np.inf)
        best = totals.argmax(axis=1)
        return [question.choices[at] for question, at in zip(asked, best, strict=True)], [None] * len(asked)

    def _generated(self, asked: list[Question], given: list[list[int]], cache: KVCache) -> list[str]:
        tokens, lengths = _padded(given)
        # Marks that end every row, wherever they come, save steps. White space may also open an answer.
        ends = [mark for mark in asked[0].stop if mark.strip() and all(mark in each.stop for each in asked)]
        stop = [ids[0] for mark in ends if len(ids := self.tokenizer.encode(mark, add_special=False)) == 1]
        result = kvx.generate(
            self.decoder,
            tokens,
            policy=self.policy,
            lengths=lengths,
            cache=cache,
            max_new_tokens=max(question.new_tokens for question in asked),
            stop=sorted({*stop, *self.tokenizer.eos_ids}),
        )
        # The newest token of a row is not fed.
        self.steps += int(max(lengths + np.asarray(result.lengths))) - 1
        rows = np.asarray(result.tokens).tolist()
        texts = [self.tokenizer.decode([token for token in row if token >= 0]) for row in rows]
        return [_cut(text, question.stop) for text, question in zip(texts, asked, strict=True)]

    def _scored(
        self, texts: list[str], cache: KVCache, logits: Any
    ) -> tuple[Float[np.ndarray, "B"], Int[np.ndarray, "B"]]:
        """Log-probability of each row's text, and its tokens; the cache is donated."""
        tokens, lengths = _padded([self.tokenizer.encode(text, add_special=False) for text in texts])
        self.steps += tokens.shape[1]
        scores, _ = kvx.teacher_forced(self.decoder, jnp.asarray(tokens), cache, self.policy, logits)
        inside = np.arange(tokens.shape[1]) < lengths[:, None]
        return np.where(inside, np.asarray(scores, np.float64), 0.0).sum(axis=1), lengths


def _padded(rows: list[list[int]], width: int | None = None) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Rows as one array, right-padded, and their lengths."""
    lengths = np.asarray([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), max(lengths) if width is None else width), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return tokens, lengths


def _copy(cache: KVCache) -> KVCache:
    """A cache of its own, each array in the memory that it lies in: what is decoded with is donated."""
    arrays, tree = jax.tree.flatten(cache)
    return jax.tree.unflatten(tree, jax.device_put(arrays, [array.sharding for array in arrays], may_alias=False))


def _answer(tokenizer: Any, question: Question) -> int:
    """The most tokens that an answer feeds."""
    if question.kind == "generate":
        return question.new_tokens
    scored = question.choices if question.kind == "choose" else question.answers[:1]
    return max(len(tokenizer.encode(text, add_special=False)) for text in scored)


def _cut(text: str, stop: Sequence[str]) -> str:
    """An answer without what follows its end; a mark before anything was said ends nothing."""
    said = len(text) - len(text.lstrip())
    ends = [at for mark in stop if (at := text.find(mark, said + 1)) >= 0]
    return text[: min(ends)] if ends else text
