"""How a trained student does with its own cache: perplexity through the decode path, and passkeys, policy by policy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.console import Console

import kvx
from kvx.decoder import Decoder
from kvx.models.tokenizer import Tokenizer
from kvx.progress import Steps
from kvx.prose import Prose, prose
from kvx.train.data import Encoding, held_out_batches
from kvx.train.job import Job

ROWS = 4
"""Of held-out text, judged in one batch; half of each is the prompt."""

CALIBRATION = (4, 1024)
"""Texts, and their length in tokens, for policies that learn."""


@dataclass(frozen=True)
class Verdict:
    """A policy's part.

    Attributes:
        policy: its text.
        perplexity: of the second half of each row, under a cache of the first.
        cache_bytes: of that batch after its prompts.
        passkey: share of keys that were found; None: none was asked for.
    """

    policy: str
    perplexity: float
    cache_bytes: int
    passkey: float | None


def judge(
    model: Decoder, tokenizer: Tokenizer, held_out: Sequence[Any], job: Job, console: Console
) -> tuple[Verdict, ...]:
    """The verdicts of a job's policies; none without held-out text.

    Args:
        held_out: documents.
    """
    if not held_out or not job.evaluate.policies:
        return ()
    from kvx.eval.perplexity import perplexities
    from kvx.eval.readying import ready

    policies = [kvx.parse_policy(text) for text in job.evaluate.policies]
    # Those that learn do so on other text than they are judged by.
    policies = ready(policies, model, tokenizer, prose(), CALIBRATION, job.seed)
    rows = _rows(held_out, tokenizer, job.data.sequence)
    with Steps(len(policies) + job.evaluate.passkey, console) as steps:
        measured = perplexities(model, rows, job.data.sequence // 2, policies)
        sizes = []
        for policy in policies:
            steps(f"perplexity: {policy.text}")
            sizes.append(next(measured))
        shares = _passkeys(model, tokenizer, held_out, job, policies, steps)
    return tuple(
        Verdict(policy.text, size[0], size[1], shares.get(policy.text))
        for policy, size in zip(policies, sizes, strict=True)
    )


def _rows(held_out: Sequence[Any], tokenizer: Tokenizer, sequence: int) -> Int[np.ndarray, "B T"]:
    """Rows of held-out text without padding."""
    encoding = Encoding.of(tokenizer)
    batches = held_out_batches(held_out, encoding, sequence=sequence, batch=1, tokens=ROWS * sequence)
    whole = [batch.tokens for batch in batches if batch.mask.all()]
    return np.concatenate(whole or [batches[0].tokens])


def _passkeys(
    model: Decoder, tokenizer: Tokenizer, held_out: Sequence[Any], job: Job, policies: list[kvx.Policy], steps: Steps
) -> dict[str, float]:
    """Share of keys found, by a policy's text; the question is part of the prompt."""
    from kvx.eval.answering import answer, batches
    from kvx.eval.prompts import Frame
    from kvx.eval.tasks.registry import find
    from kvx.eval.tasks.source import Source

    count, task, frame = job.evaluate.passkey, find("passkey"), Frame()
    if not count:
        return {}
    text = Prose("held-out text", "\n\n".join(_texts(held_out, tokenizer)))
    samples = task.make(Source(tokenizer, text, frame), job.evaluate.passkey_length, count, job.seed)
    shares = dict.fromkeys((policy.text for policy in policies), 0.0)
    for number, batch in enumerate(batches(tokenizer, frame, samples, 1, "aware"), 1):
        steps(f"passkeys: {number} of {count}")
        for policy, answered in answer(model, tokenizer, batch, "aware", policies):
            shares[policy.text] += task.score(answered.texts[0][0], batch.samples[0].questions[0]) / count
    return shares


def _texts(held_out: Sequence[Any], tokenizer: Tokenizer) -> list[str]:
    """Documents as text; those that are token ids are decoded."""
    texts = (held_out[index] for index in range(len(held_out)))
    return [each if isinstance(each, str) else tokenizer.decode(each) for each in texts]
