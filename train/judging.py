"""How a trained student does with its own cache: perplexity through the decode path, and passkeys, policy by policy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.console import Console

import kvx
from kvx.decoder import Decoder
from kvx.models.token_kinds import token_kinds
from kvx.models.tokenizer import Tokenizer
from kvx.progress import Steps
from kvx.prose import Prose
from kvx.train.data import Encoding, held_out_batches
from kvx.train.job import Job

ROWS = 4
"""Of held-out text, judged in one batch; half of each is the prompt."""


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

    policies = [kvx.parse_policy(text) for text in job.evaluate.policies]
    if any(policy.by_kind for policy in policies):
        policies = [policy.with_kinds(token_kinds(tokenizer)) for policy in policies]
    rows = _rows(held_out, tokenizer, job.data.sequence)
    found = []
    with Steps(2 * len(policies), console) as steps:
        measured = perplexities(model, rows, job.data.sequence // 2, policies)
        for policy in policies:
            steps(f"perplexity: {policy.text}")
            perplexity, nbytes, _ = next(measured)
            steps(f"passkey: {policy.text}")
            share = _passkey(model, tokenizer, held_out, job, policy) if job.evaluate.passkey else None
            found.append(Verdict(policy.text, perplexity, nbytes, share))
    return tuple(found)


def _rows(held_out: Sequence[Any], tokenizer: Tokenizer, sequence: int) -> Int[np.ndarray, "B T"]:
    """Rows of held-out text without padding."""
    encoding = Encoding.of(tokenizer)
    batches = held_out_batches(held_out, encoding, sequence=sequence, batch=1, tokens=ROWS * sequence)
    whole = [batch.tokens for batch in batches if batch.mask.all()]
    return np.concatenate(whole or [batches[0].tokens])


def _passkey(model: Decoder, tokenizer: Tokenizer, held_out: Sequence[Any], job: Job, policy: kvx.Policy) -> float:
    """Share of keys found; the question is part of the prompt."""
    from kvx.eval.passkey import ANSWER, passkeys, spread

    prose = Prose("held-out text", "\n\n".join(_texts(held_out, tokenizer)))
    count, length = job.evaluate.passkey, job.evaluate.passkey_length
    right = 0
    for prompt in passkeys(tokenizer, prose, length, spread(count), job.seed):
        tokens = np.asarray([prompt.tokens], np.int32)
        answer = kvx.generate(model, tokens, policy=policy, max_new_tokens=ANSWER)
        right += prompt.correct(tokenizer.decode(np.asarray(answer.tokens)[0]))
    return right / count


def _texts(held_out: Sequence[Any], tokenizer: Tokenizer) -> list[str]:
    """Documents as text; those that are token ids are decoded."""
    texts = (held_out[index] for index in range(len(held_out)))
    return [each if isinstance(each, str) else tokenizer.decode(each) for each in texts]
