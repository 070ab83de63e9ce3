"""What fidelity finds for one policy: numbers by document and step, and by layer and query head."""

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from kvx.eval.statistics import Interval

Heads = tuple[Float[np.ndarray, "B _"], ...]
"""A number for each document and query head, layer by layer; layers may differ in their heads."""


@dataclass(frozen=True)
class Stretch:
    """A part of the text, all documents as one.

    Attributes:
        first, last: true positions of the tokens fed.
        divergence: mean KL(full || policy) after them, in nats.
        perplexity: of the tokens that follow them.
    """

    first: int
    last: int
    divergence: float
    perplexity: float


@dataclass(frozen=True, eq=False)
class Fidelity:
    """One policy beside the full cache, over B documents of which the last T tokens were forced one by one.

    Attributes:
        policy: its text.
        start: true position of the first forced token.
        divergences: KL(full || policy) in nats of the distributions after each forced token.
        agreements: 1 where both have the same likeliest token.
        surprisals: -log p, in nats, that the policy's distribution gives the text's next token; none after the last.
        distances: squared L2 distance of a head's attention output from the full cache's for the same query, summed
            over the steps.
        sizes: squared L2 norm of the full cache's, likewise.
        found, asked: of the tokens that the full cache's run attends to most, how many the policy's store held and
            read, and how many there were, summed over the steps. These four are empty if attention was not looked at.
        cache_bytes: a row's share of the batch's cache after the prompt, room for the forced tokens included.
        bf16_bytes: of a full cache in bfloat16, likewise.
        bytes_read: of the cache in a decode step, a row's share.
        policy_bytes: of the policy's learned arrays, which are not in the cache.
    """

    policy: str
    start: int
    divergences: Float[np.ndarray, "B T"]
    agreements: Float[np.ndarray, "B T"]
    surprisals: Float[np.ndarray, "B S"]
    distances: Heads
    sizes: Heads
    found: Heads
    asked: Heads
    cache_bytes: int
    bf16_bytes: int
    bytes_read: int
    policy_bytes: int

    @property
    def divergence(self) -> Float[np.ndarray, "B"]:
        """Mean KL(full || policy) over a document's forced steps, in nats."""
        return self.divergences.mean(axis=1)

    @property
    def agreement(self) -> Float[np.ndarray, "B"]:
        """Share of a document's steps at which the likeliest token is the full cache's."""
        return self.agreements.mean(axis=1)

    @property
    def perplexity(self) -> Float[np.ndarray, "B"]:
        """exp of a document's mean surprisal; the first forced token, which no policy had a part in, does not count."""
        return np.exp(self.surprisals.mean(axis=1))

    @property
    def attention_errors(self) -> Float[np.ndarray, "B L"]:
        """||out - full|| / ||full|| of a layer's attention output: all heads and steps of a document as one vector."""
        layers = zip(self.distances, self.sizes, strict=True)
        return np.stack([_root(distance.sum(axis=1), size.sum(axis=1)) for distance, size in layers], axis=1)

    @property
    def attention_error(self) -> Float[np.ndarray, "B"]:
        """Mean over the layers."""
        return self.attention_errors.mean(axis=1)

    @property
    def recall(self) -> Float[np.ndarray, "B"]:
        """Share of the most attended tokens that were held and read: a document's steps, layers and query heads."""
        found, asked = (np.sum([each.sum(axis=1) for each in layers], axis=0) for layers in (self.found, self.asked))
        return found / asked

    @property
    def head_errors(self) -> list[Float[np.ndarray, "H"]]:
        """Relative L2 error of each query head's attention output, over all documents and steps; by layer."""
        layers = zip(self.distances, self.sizes, strict=True)
        return [_root(distance.sum(axis=0), size.sum(axis=0)) for distance, size in layers]

    @property
    def head_recalls(self) -> list[Float[np.ndarray, "H"]]:
        """Recall of each query head, over all documents and steps; by layer."""
        return [found.sum(axis=0) / asked.sum(axis=0) for found, asked in zip(self.found, self.asked, strict=True)]

    @property
    def kl(self) -> Interval:
        """Mean divergence over the documents."""
        return Interval.of(self.divergence)

    def less_than(self, other: "Fidelity") -> Interval:
        """By how much this policy diverges less than another, document by document (paired)."""
        return Interval.of(other.divergence - self.divergence)

    def measures(self) -> dict[str, Float[np.ndarray, "B"]]:
        """What a record tells beside the divergence, for each document."""
        seen = {"agreement": self.agreement, "perplexity": self.perplexity}
        if self.asked:
            seen |= {"top_k_recall": self.recall, "attention_error": self.attention_error}
        return seen

    def by_position(self, bins: int) -> list[Stretch]:
        """Divergence and perplexity along the text, in at most `bins` equal stretches of it."""
        steps = self.surprisals.shape[1]
        edges = [int(edge) for edge in np.linspace(0, steps, min(bins, steps) + 1)]
        return [
            Stretch(
                self.start + low,
                self.start + high - 1,
                float(self.divergences[:, low:high].mean()),
                float(np.exp(self.surprisals[:, low:high].mean())),
            )
            for low, high in pairwise(edges)
        ]

    def as_json(self, bins: int) -> dict[str, Any]:
        """All of it but single steps, as JSON can hold it."""
        attention: dict[str, Any] = {}
        if self.asked:
            attention = {
                "layers": self.attention_errors.mean(axis=0).tolist(),
                "head_errors": [heads.tolist() for heads in self.head_errors],
                "head_recalls": [heads.tolist() for heads in self.head_recalls],
            }
        return {
            "policy": self.policy,
            "kl": asdict(self.kl),
            "divergence": self.divergence.tolist(),
            **{name: values.tolist() for name, values in self.measures().items()},
            **attention,
            "by_position": [asdict(each) for each in self.by_position(bins)],
            "cache_bytes": self.cache_bytes,
            "bf16_bytes": self.bf16_bytes,
            "bytes_read": self.bytes_read,
            "policy_bytes": self.policy_bytes,
        }


def _root(squares: Shaped[np.ndarray, "*n"], whole: Shaped[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """sqrt(squares / whole); 0 where both are."""
    return np.sqrt(squares / np.where(whole > 0, whole, 1.0))
