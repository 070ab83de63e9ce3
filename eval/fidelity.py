"""Fidelity: how far a policy's next-token distributions lie from the full cache's, along held-out documents.

python -m kvx.eval.fidelity --help
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.table import Table
from scipy.special import stdtrit

import kvx
from kvx.cache import KVCache
from kvx.decoder import Decoder
from kvx.errors import BadInput
from kvx.eval.shared_pass import prefill_each
from kvx.loop import decode
from kvx.progress import Steps
from kvx.prose import documents, prose

SEGMENT = 32
"""Decode steps whose distributions exist at a time: every policy's, over the whole vocabulary."""


@dataclass(frozen=True)
class Interval:
    """A mean over documents with its 95 % interval: Student's t, documents being what is drawn.

    Attributes:
        mean: over the documents.
        low, high: the interval's ends; the mean itself where there is one document.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Float[np.ndarray, "B"]) -> "Interval":
        """Of one number for each document."""
        mean, count = float(np.mean(values)), len(values)
        if count == 1:
            return cls(mean, mean, mean)
        half = float(stdtrit(count - 1, 0.975)) * float(np.std(values, ddof=1)) / math.sqrt(count)
        return cls(mean, mean - half, mean + half)

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Fidelity:
    """One policy's divergence from the full cache.

    Attributes:
        policy: its text.
        divergence: KL(full || policy) in nats, the mean over a document's forced steps, for each document.
        agreement: share of those steps at which the likeliest token is the full cache's, for each document.
        cache_bytes: a row's share of the batch's cache after the prompt, room for the forced tokens included.
        policy_bytes: of the policy's learned arrays, which are not in the cache.
    """

    policy: str
    divergence: tuple[float, ...]
    agreement: tuple[float, ...]
    cache_bytes: int
    policy_bytes: int

    @property
    def kl(self) -> Interval:
        """Mean divergence over the documents."""
        return Interval.of(np.asarray(self.divergence))

    def less_than(self, other: "Fidelity") -> Interval:
        """By how much this policy diverges less than another, document by document (paired)."""
        return Interval.of(np.asarray(other.divergence) - np.asarray(self.divergence))


def fidelity(
    model: Decoder,
    texts: Int[np.ndarray, "B T"],
    prompt: int,
    policies: Sequence[kvx.Policy],
    *,
    console: Console | None = None,
) -> list[Fidelity]:
    """KL(full || policy) of next-token distributions while documents are forced through the decode path.

    The distribution after the prompt does not count: it comes before any policy has been read. The policies walk
    through the documents side by side, `SEGMENT` steps at a time.

    Args:
        texts: one batch of documents, all of one length.
        prompt: tokens of each that are prefilled; the others are forced, one by one.
        policies: what to measure; the full cache need not be among them.

    Raises:
        BadInput: a prompt that leaves no token to force.
    """
    forced = texts[:, prompt:]
    if not 1 <= prompt < texts.shape[1]:
        raise BadInput(f"prompt={prompt} of documents of {texts.shape[1]} tokens; allowed: 1 to {texts.shape[1] - 1}")
    every = (kvx.policies.full(), *policies)
    caches = [cache for _, cache in prefill_each(model, texts[:, :prompt], every, forced.shape[1])]
    sizes = [cache.nbytes // len(texts) for cache in caches]
    apart, same = (np.zeros((len(every), len(texts))) for _ in range(2))
    starts = range(0, forced.shape[1], SEGMENT)
    with Steps(len(starts) * len(every), console) as steps:
        for start in starts:
            tokens = jnp.asarray(forced[:, start : start + SEGMENT], jnp.int32)
            reference = None
            for index, policy in enumerate(every):
                steps(f"steps {start + 1} to {start + tokens.shape[1]}: {policy.text}")
                scores, caches[index] = _forced(model, tokens, caches[index], policy)
                reference = scores if reference is None else reference
                divergence, agreement = _compare(reference, scores)
                apart[index] += np.asarray(divergence, np.float64)
                same[index] += np.asarray(agreement, np.float64)
    apart, same = apart / forced.shape[1], same / forced.shape[1]
    return [
        Fidelity(policy.text, tuple(apart[index].tolist()), tuple(same[index].tolist()), sizes[index], policy.nbytes)
        for index, policy in enumerate(every)
    ][1:]


@partial(jax.jit, donate_argnames="cache")
def _forced(
    model: Decoder, tokens: Int[Array, "B T"], cache: KVCache, policy: kvx.Policy
) -> tuple[Float[Array, "B T N"], KVCache]:
    """Log-probabilities after each of some tokens, fed one by one."""
    everyone = jnp.ones(tokens.shape[0], bool)

    def advance(cache, token):
        logits, cache = decode(model, token, cache, policy, everyone)
        return cache, jax.nn.log_softmax(logits)

    cache, scores = jax.lax.scan(advance, cache, tokens.T)
    return jnp.swapaxes(scores, 0, 1), cache


@jax.jit
def _compare(
    reference: Float[Array, "B T N"], scores: Float[Array, "B T N"]
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Sums over the steps: KL(reference || scores), and steps of one likeliest token."""
    divergence = jnp.sum(jnp.exp(reference) * (reference - scores), axis=-1)
    same = jnp.argmax(reference, axis=-1) == jnp.argmax(scores, axis=-1)
    return jnp.sum(divergence, axis=1), jnp.sum(same, axis=1, dtype=jnp.float32)


def table(found: Sequence[Fidelity]) -> Table:
    """A row for each policy; the last column is paired with the first policy."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("policy", no_wrap=True)
    for column in ("KL from full, nats (95 %)", "top-1", "cache KiB", "maps KiB", "less than the first (paired)"):
        shown.add_column(column, justify="right", no_wrap=True)
    for each in found:
        shown.add_row(
            each.policy,
            str(each.kl),
            f"{np.mean(each.agreement):.1%}",
            f"{each.cache_bytes / 1024:.1f}",
            f"{each.policy_bytes / 1024:.1f}",
            "" if each is found[0] else str(each.less_than(found[0])),
        )
    return shown


def _command(
    policy: Annotated[list[str], typer.Option("--policy", "-p", help="A policy's text, or a file of kvx.save_policy.")],
    model: Annotated[str, typer.Option(help="A zoo name, a Hugging Face directory, or a .gguf file.")] = (
        "smollm2-135m-instruct"
    ),
    count: Annotated[int, typer.Option("--documents", help="Held-out documents.", min=1)] = 8,
    prompt: Annotated[int, typer.Option(help="Tokens of each that are prefilled.", min=1)] = 256,
    forced: Annotated[int, typer.Option(help="Tokens of each that are forced through the decode path.", min=1)] = 256,
    text: Annotated[
        Path | None, typer.Option(help="A folder of .txt or .md files. Default: Python's documentation, second half.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """How far policies lie from the full cache: mean KL(full || policy) over forced decode steps, by document.

    Examples:

        python -m kvx.eval.fidelity -p "h2o(budget=64)" -p "h2o(budget=68)" -p less.safetensors
    """
    from kvx.cli.policy_argument import policy_argument
    from kvx.compilation_cache import enable_compilation_cache

    chosen = [policy_argument(each) for each in policy]
    source = prose(text)
    enable_compilation_cache()
    decoder, tokenizer = kvx.load(model)
    texts = documents(tokenizer, source.held_out, count, prompt + forced)
    found = fidelity(decoder, texts, prompt, chosen)
    if as_json:
        print(json.dumps([{**asdict(each), "kl": asdict(each.kl)} for each in found], indent=2))
        return
    Console(width=None if Console().is_terminal else 170).print(table(found))


if __name__ == "__main__":
    from kvx.cli import run

    app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    app.command()(_command)
    run(app, "python -m kvx.eval.fidelity")
