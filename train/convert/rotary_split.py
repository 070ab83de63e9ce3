"""Which part of a layer's keys keeps its rotation: pairs chosen per head, or averaged over heads (two rules).

A split divides each logit in a rotary and a content part. The rotary part goes on being rotated, at a frequency per
pair; the content part is not rotated any more, so that keys can be rebuilt from a latent:

    logit_h = scale (Re sum_j conj(rotary_query_h,j x) rotary_key_b(h),j x' exp(-i theta_j (t - t'))
                     + (content_query_h x)^T lift_h content_key x')

What is cached of the first part is the rotary key; of the second, later, a latent from which content_key and the
values follow. Nothing is compressed yet: apart from rotations that are left out, a split is exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Complex, Float, Int

from kvx.errors import BadInput
from kvx.models.rope_frequencies import rope_frequencies, rope_settings, with_plain_rope_factors
from kvx.train.convert.moments import Moments
from kvx.train.convert.source import Source, as_channels


@dataclass(frozen=True)
class RotarySplit:
    """Rows of both parts, as matrices of the normed input with a last channel of ones.

    Attributes:
        rotary_query: complex rows of each query head, one for each pair it reads.
        rotary_key: of each block of the rotary key; query head h reads block h // (H / blocks).
        frequencies: radians per position of each pair.
        magnitude: factor on cos and sin.
        content_query: unrotated rows of each query head.
        content_key: unrotated rows, N in all, that all heads share.
        lift: takes the shared rows to what each head's content query meets.
    """

    rotary_query: Complex[np.ndarray, "H P X"]
    rotary_key: Complex[np.ndarray, "blocks P X"]
    frequencies: Float[np.ndarray, "blocks P"]
    magnitude: float
    content_query: Float[np.ndarray, "H C X"]
    content_key: Float[np.ndarray, "N X"]
    lift: Float[np.ndarray, "H C N"]

    @property
    def rotary(self) -> int:
        """Rotary channels that are cached for each token."""
        return 2 * self.frequencies.size


@dataclass(frozen=True)
class Widths:
    """What a split comes to, whatever the weights are.

    Attributes:
        content: unrotated channels of a query head.
        blocks: of the rotary key.
        rows: content keys that all heads share.
    """

    content: int
    blocks: int
    rows: int


@runtime_checkable
class Split(Protocol):
    """A rule that splits a layer's attention."""

    @property
    def rotary(self) -> int:
        """Channels of the rotary key."""
        ...

    def widths(self, kv_heads: int, head_dim: int) -> Widths:
        """Of a layer's split; raises BadInput for a rotary width that such heads do not have."""
        ...

    @property
    def reads_text(self) -> bool:
        """Whether it needs moments."""
        ...

    def __call__(self, source: Source, moments: Moments | None) -> RotarySplit:
        """The split of one layer; `moments` may be None for rules that look at weights only."""
        ...


@dataclass(frozen=True)
class ChosenPairs:
    """Each KV head keeps some of its own pairs, at their own frequencies (MHA2MLA, Ji et al. 2025, section 3.1).

    "norm" keeps, per KV head, the pairs of largest sum over the group of mean ||q_j|| mean ||k_j||; "high" those that
    turn fastest, "low" slowest, "uniform" every (D / rotary)-th one.

    Attributes:
        rotary: channels of the rotary key, all KV heads together: the paper's r times G.
        choice: "norm", "high", "low" or "uniform".
    """

    rotary: int
    choice: str = "norm"

    def __post_init__(self):
        if self.choice not in ("norm", "high", "low", "uniform"):
            raise BadInput(f"choice={self.choice!r} is unknown; allowed: norm, high, low, uniform")

    @property
    def reads_text(self) -> bool:
        """Whether it needs moments."""
        return self.choice == "norm"

    def widths(self, kv_heads: int, head_dim: int) -> Widths:
        """Each KV head's own block, and what is left of it."""
        most = kv_heads * head_dim
        if self.rotary % (2 * kv_heads) or not 0 <= self.rotary <= most:
            raise BadInput(f"rotary={self.rotary} is out of range; allowed: multiples of {2 * kv_heads} up to {most}")
        pairs, count = head_dim // 2, self.rotary // 2 // kv_heads
        if self.choice == "uniform" and count and pairs % count:
            raise BadInput(f"choice='uniform' with {count} pairs a head; allowed: divisors of {pairs}")
        rest = head_dim - self.rotary // kv_heads
        return Widths(rest, kv_heads, kv_heads * rest)

    def __call__(self, source: Source, moments: Moments | None) -> RotarySplit:
        """Raises BadInput for a width that the heads do not have."""
        heads, rest = source.kv_heads, self.widths(source.kv_heads, source.head_dim).content
        kept, other = self._choose(source, moments)
        owner = np.arange(source.heads) // source.group
        query, key = source.query_pairs, source.key_pairs
        content = as_channels(np.stack([key[g, other[g]] for g in range(heads)]))
        lift = np.zeros((source.heads, rest, source.kv_heads, rest))
        lift[np.arange(source.heads), :, owner] = np.eye(rest) * source.magnitude**2
        return RotarySplit(
            rotary_query=np.stack([query[h, kept[owner[h]]] for h in range(source.heads)]),
            rotary_key=np.stack([key[g, kept[g]] for g in range(heads)]),
            frequencies=source.frequencies[kept],
            magnitude=source.magnitude,
            content_query=as_channels(np.stack([query[h, other[owner[h]]] for h in range(source.heads)])),
            content_key=content.reshape(heads * rest, content.shape[-1]),
            lift=lift.reshape(source.heads, rest, heads * rest),
        )

    def _choose(self, source: Source, moments: Moments | None) -> tuple[Int[np.ndarray, "G K"], Int[np.ndarray, "G R"]]:
        """Indices of the pairs that each KV head keeps and of the others, ascending."""
        pairs, count = source.head_dim // 2, self.rotary // 2 // source.kv_heads
        if self.choice == "norm":
            strength = pair_strength(source, needed(moments, "choice='norm'"))
        elif self.choice == "uniform":
            strength = np.zeros((source.kv_heads, pairs))
            strength[:, :: pairs // max(count, 1)] = 1
        else:
            strength = np.tile(np.arange(pairs) * (1 if self.choice == "low" else -1.0), (source.kv_heads, 1))
        order = np.argsort(-strength, axis=1, kind="stable")  # in a tie the faster pair stays
        return np.sort(order[:, :count], axis=1), np.sort(order[:, count:], axis=1)


def pair_strength(source: Source, moments: Moments) -> Float[np.ndarray, "G P"]:
    """Sum over a group's query heads of mean ||q_j|| mean ||k_j|| for every pair j (MHA2MLA's 2-norm)."""
    queries = moments.query_norms.reshape(source.kv_heads, source.group, -1)
    return np.sum(queries, axis=1) * moments.key_norms


@dataclass(frozen=True)
class SharedMean:
    """The last channels of each head, keys averaged over KV heads, neighbours paired anew (X-EcoMLA, Li et al. 2025).

    Checkpoints pair channel j with j + D / 2, so the pairs of the source are torn apart, and the frequencies are new
    ones: the start has no meaningful code of positions, which training has to learn again. Content queries meet the
    first D - rotary rows of each key head, but the whole keys are factorised.

    Attributes:
        rotary: channels of the rotary key, even, 0 to D.
    """

    rotary: int
    reads_text = False

    def widths(self, kv_heads: int, head_dim: int) -> Widths:
        """Whole keys are factorised, though queries meet only what does not rotate."""
        return Widths(head_dim - check_even(self.rotary, head_dim), 1, kv_heads * head_dim)

    def __call__(self, source: Source, moments: Moments | None = None) -> RotarySplit:
        """Raises BadInput for a width that the heads do not have."""
        content = self.widths(source.kv_heads, source.head_dim).content
        frequencies, magnitude = fresh_frequencies(source.config, self.rotary)
        key = np.mean(source.key[:, content:], axis=0)[None]
        query = source.query[:, content:]
        owner = np.arange(source.heads) // source.group
        lift = np.zeros((source.heads, content, source.kv_heads, source.head_dim))
        lift[np.arange(source.heads), :, owner, :content] = np.eye(content)
        return RotarySplit(
            rotary_query=query[:, 0::2] + 1j * query[:, 1::2],
            rotary_key=key[:, 0::2] + 1j * key[:, 1::2],
            frequencies=frequencies[None],
            magnitude=magnitude,
            content_query=source.query[:, :content],
            content_key=source.key.reshape(-1, source.key.shape[-1]),
            lift=lift.reshape(source.heads, content, source.key[..., 0].size),
        )


def fresh_frequencies(config: Mapping[str, Any], rotary: int) -> tuple[Float[np.ndarray, "P"], float]:
    """base^(-2i / rotary) and the factor on cos and sin, as X-EcoMLA's code makes them.

    A source with scaled frequencies gets YaRN instead, with the source's factor and DeepSeek's 4096 original positions.
    """
    settings = rope_settings(with_plain_rope_factors(config), base=10_000.0)
    plain = {"rope_theta": settings["rope_theta"], "max_position_embeddings": settings["context"]}
    if settings["rope_type"] != "default":
        scaling = {"rope_type": "yarn", "original_max_position_embeddings": 4096}
        plain["rope_scaling"] = scaling | {"factor": settings.get("factor")}
    frequencies, magnitude = rope_frequencies(plain, rotary, base=10_000.0)
    return frequencies.astype(np.float64), magnitude


def check_even(rotary: int, most: int) -> int:
    """The width, if it is even and the heads have it.

    Raises:
        BadInput: it is not, or they do not.
    """
    if rotary % 2 or not 0 <= rotary <= most:
        raise BadInput(f"rotary={rotary} is out of range; allowed: even numbers from 0 to {most}")
    return rotary


def needed(moments: Moments | None, why: str) -> Moments:
    """The moments, where a rule cannot do without.

    Raises:
        BadInput: there are none.
    """
    if moments is None:
        raise BadInput(f"moments=None, but {why} needs them; allowed: what measure_moments returns")
    return moments
