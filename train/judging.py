"""How a trained student does with its own cache: perplexity through the decode path, and passkeys, policy by policy."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from rich.console import Console

import kvx
from kvx.decoder import Decoder
from kvx.progress import Steps
from kvx.prose import prose
from kvx.train.data import held_out_batches
from kvx.train.material import Material

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


def judge(model: Decoder, material: Material, console: Console) -> tuple[Verdict, ...]:
    """The verdicts of a job's policies; none without held-out text."""
    job, tokenizer = material.job, material.tokenizer
    if not material.held_out or not job.evaluate.policies:
        return ()
    from kvx.eval.perplexity import perplexities
    from kvx.eval.readying import ready

    policies = [kvx.parse_policy(text) for text in job.evaluate.policies]
    # Those that learn do so on other text than they are judged by.
    policies = ready(policies, model, tokenizer, prose(), CALIBRATION, job.seed)
    rows = _rows(material)
    with Steps(len(policies) + job.evaluate.passkey, console) as steps:
        measured = perplexities(model, rows, job.data.sequence // 2, policies)
        sizes = []
        for policy in policies:
            steps(f"perplexity: {policy.text}")
            sizes.append(next(measured))
        shares = _passkeys(model, material, policies, steps)
    return tuple(
        Verdict(policy.text, size[0], size[1], shares.get(policy.text))
        for policy, size in zip(policies, sizes, strict=True)
    )


def _rows(material: Material) -> Int[np.ndarray, "B T"]:
    """Rows of held-out text without padding; there is one, `read_material` made sure."""
    sequence = material.job.data.sequence
    batches = held_out_batches(material.held_out, material.encoding, sequence=sequence, batch=1, tokens=ROWS * sequence)
    return np.concatenate([batch.tokens for batch in batches if batch.mask.all()])


def _passkeys(model: Decoder, material: Material, policies: list[kvx.Policy], steps: Steps) -> dict[str, float]:
    """Share of keys found, by a policy's text; the question is part of the prompt."""
    from kvx.eval.answering import answer, batches
    from kvx.eval.prompts import Frame
    from kvx.eval.tasks.registry import find

    samples, tokenizer, score = material.prompts, material.tokenizer, find("passkey").score
    if not samples:
        return {}
    shares = dict.fromkeys((policy.text for policy in policies), 0.0)
    for number, batch in enumerate(batches(tokenizer, Frame(), samples, 1, "aware"), 1):
        steps(f"passkeys: {number} of {len(samples)}")
        for policy, answered in answer(model, tokenizer, batch, "aware", policies):
            shares[policy.text] += score(answered.texts[0][0], batch.samples[0].questions[0]) / len(samples)
    return shares
