"""The stage by which tokens leave the residual stream: after a layer, the last queries vote which ones go on."""

from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvx.buckets import LANE, round_up
from kvx.context import Context, Spec
from kvx.evidence import Evidence, Requests
from kvx.kernels.prefill_attention.columns import Column, share_of
from kvx.parts.ranking import top
from kvx.pytree import pytree, static
from kvx.stage import Stage
from kvx.tokens import Tokens

WIDTHS = 8
"""The residual stream takes at most this many widths, so that layers share compiled bodies; most of a width is used."""


@pytree
class Thin(Stage):
    """Of a layer's tokens, the last R + 1 go on, and of the C others as many as have the most votes.

        s_j = mean over heads and over the last R + 1 queries i of w_i p_ij,    w rises linearly from 1 to `rise`
        R = floor(recent * length),    k = floor(C * rate of the layer);    nothing leaves if k <= least

    The rate multiplies what earlier layers left. The votes are a column statistic of the attention that runs anyway.

    Attributes:
        recent: share of the prompt that votes, and always goes on.
        last: the rate falls from 1 in the first layer towards this.
        sinks: first tokens of the text that have every vote.
        least: others that are never cut below.
        rise: what the last query's vote counts for.
        interval: tokens leave after every so many layers.
    """

    recent: float = static()
    last: float = static()
    sinks: int = static(4)
    least: int = static(64)
    rise: float = static(1.2)
    interval: int = static(1)
    thins = True

    @property
    def vote(self) -> Column:
        """What the last queries say of every token."""
        return Column(last=self.recent, rise=self.rise)

    def observe(self, prefill: bool) -> Requests:
        return Requests(columns=frozenset({self.vote})) if prefill else Requests()

    def capacity(self, spec: Spec, layer: int) -> int:
        return _most(self, spec.layers, spec.shortest, spec.prompt)[layer]

    def remaining(self, spec: Spec, layer: int) -> int | None:
        if layer + 1 == spec.layers or layer % self.interval or cosine(self.last, spec.layers)[layer] == 1:
            return None
        width = round_up(self.capacity(spec, layer + 1), max(spec.prompt // WIDTHS, LANE))
        return min(width, spec.prompt)

    def thin(self, tokens: Tokens, evidence: Evidence, context: Context) -> Bool[Array, "B T"]:
        positions, present = tokens.positions[:, 0], tokens.present[:, 0]
        earlier = share_of(context.lengths, self.recent)
        recent = present & (positions >= (context.lengths - 1 - earlier)[:, None])
        others = present & ~recent
        rate = jnp.asarray(cosine(self.last, context.spec.layers))[context.layer]
        counts = self._left(jnp.sum(others, axis=1), rate, jnp)
        votes = jnp.mean(evidence.columns[self.vote], axis=(1, 2))
        return recent | top(jnp.where(positions < self.sinks, jnp.inf, votes), others, counts)

    def _left(self, others: Int[Any, "*rows"], rate: Float[Any, ""], module: Any) -> Int[Any, "*rows"]:
        """How many of the others go on; one float32 product, so that numpy's bound holds for every backend."""
        left = (others.astype("float32") * rate).astype("int32")
        return module.where((rate < 1) & (left > self.least), left, others)


def cosine(last: float, layers: int) -> Float[np.ndarray, "L"]:
    """(1 - last) (cos(pi l / L) + 1) / 2 + last: from 1 in the first layer towards `last`, float32."""
    fall = (np.cos(np.pi * np.arange(layers) / layers) + 1) / 2
    return ((1 - last) * fall + last).astype(np.float32)


@cache
def _most(stage: Thin, layers: int, shortest: int, prompt: int) -> tuple[int, ...]:
    """The most tokens of a row in every layer, over all lengths from `shortest` to `prompt`.

    Not those of the longest prompt: a shorter one may escape a cut by `least` that the longer one suffers.
    """
    lengths = np.arange(shortest, prompt + 1, dtype=np.int32)
    recent = share_of(lengths, stage.recent) + 1
    most = []
    for layer, rate in enumerate(cosine(stage.last, layers)):
        most.append(int(lengths.max()))
        if layer % stage.interval == 0:
            lengths = recent + stage._left(lengths - recent, rate, np)
    return tuple(most)
