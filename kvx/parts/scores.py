"""Scores: what a token is worth, per KV head, float32, high = keep (grid 1, first column).

A score names the evidence it reads, the statistics it keeps with each token, how a decode step updates them, and how
tokens rank. Query heads of a group reduce by a named reducer, before pooling.
"""

from typing import Any, ClassVar, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from kvx.context import Activations, Context, Spec
from kvx.errors import BadInput
from kvx.evidence import Evidence, Requests
from kvx.kernels.prefill_attention.columns import SUM, Column
from kvx.pytree import pytree, static
from kvx.tokens import Tokens

POOLED_SQUARE = Column(power=2, pooled=True)
"""Squares of the mean probability over a group, summed over the queries."""

GROUPS = {"mean": jnp.mean, "max": jnp.max, "sum": jnp.sum}
"""Reducers over the query heads of a KV head (axis 2 of evidence)."""


class Score(Protocol):
    """One notion of a token's worth.

    Class attributes:
        learns: it has arrays that `kvx.calibrate` fills.
    """

    learns: bool = False

    def observe(self, prefill: bool) -> Requests:
        """Evidence it reads."""
        return Requests()

    def stats(self, tokens: Tokens, evidence: Evidence | None, context: Context) -> dict[str, Shaped[Array, "B G T"]]:
        """Statistics of tokens after a prompt or chunk (evidence given), or of a token just decoded (None)."""
        return {}

    def update(self, stats: dict[str, Shaped[Array, "B G C"]], evidence: Evidence) -> dict[str, Shaped[Array, "B G C"]]:
        """Its own statistics after a decode step."""
        return {}

    def rank(self, tokens: Tokens, evidence: Evidence) -> Float[Array, "B G T"]:
        """The score."""
        ...

    def digest(self, activations: Activations) -> Any:
        """For `learns`: what calibration keeps of one layer's activations; traced, layer by layer."""
        return None

    def calibrate(self, digests: list[Any]) -> "Score":
        """With its learned arrays filled from every layer's digest (`kvx.calibrate`)."""
        return self

    def check(self, spec: Spec) -> None:
        """Refuse to run with arrays that are missing or do not fit the model (BadInput)."""


@pytree
class Recency(Score):
    """Position itself: the newest are worth most (StreamingLLM, windows)."""

    def rank(self, tokens: Tokens, evidence: Evidence) -> Float[Array, "B G T"]:
        # Relative to the newest, so that float32 stays exact however long the text.
        return (tokens.positions - evidence.seen[:, None, None]).astype(jnp.float32)


@pytree
class WindowAttention(Score):
    """Probability that the last `window` queries give a token, averaged, then pooled along the sequence.

    SnapKV (Li et al. 2024, section 4): a_j = 1/W sum_i p_ij, pooled over `kernel` neighbours outside the window.
    TOVA (Oren et al. 2024) is window 1, kernel 1, across the layer's heads.
    """

    window: int = static(64)
    kernel: int = static(1)
    pooling: str = static("mean")
    group: str = static("mean")

    def observe(self, prefill: bool) -> Requests:
        return Requests(rows=self.window)

    def rank(self, tokens: Tokens, evidence: Evidence) -> Float[Array, "B G T"]:
        votes = GROUPS[self.group](jnp.mean(evidence.last_rows(self.window), axis=-2), axis=2)
        if self.kernel == 1:
            return votes
        # Votes inside the window are not pooled into the prompt's: the window is kept whatever they are.
        outside = tokens.present & (tokens.positions < evidence.seen[:, None, None] - self.window)
        return pool(jnp.where(outside, votes, 0.0), self.kernel, self.pooling)


@pytree
class ColumnMass(Score):
    """Probability a token has received from all queries so far: summed (H2O), or averaged over those that could see it.

    H2O (Zhang et al. 2023, algorithm 1): s_j = sum_i p_ij. average="mean" divides by the number of queries at or
    after j, as kvpress's ObservedAttentionPress does.
    """

    average: str = static("sum")
    group: str = static("mean")

    def observe(self, prefill: bool) -> Requests:
        return Requests(columns=frozenset({SUM})) if prefill else Requests(rows=1)

    def stats(self, tokens: Tokens, evidence: Evidence | None, context: Context) -> dict[str, Shaped[Array, "B G T"]]:
        before = tokens.stats.get("mass", jnp.zeros(tokens.positions.shape, jnp.float32))
        return {"mass": before if evidence is None else before + GROUPS[self.group](evidence.columns[SUM], axis=2)}

    def update(self, stats: dict[str, Shaped[Array, "B G C"]], evidence: Evidence) -> dict[str, Shaped[Array, "B G C"]]:
        return {"mass": stats["mass"] + GROUPS[self.group](evidence.last_rows(1)[..., 0, :], axis=2)}

    def rank(self, tokens: Tokens, evidence: Evidence) -> Float[Array, "B G T"]:
        if self.average == "sum":
            return tokens.stats["mass"]
        return tokens.stats["mass"] / jnp.maximum(evidence.seen[:, None, None] - tokens.positions, 1)


@pytree
class Deviation(Score):
    """Standard deviation of the probability that a token received, over the queries at or after it.

    RoCo (Ren and Zhu 2024): with p the mean over a KV head's query heads and c the number of queries so far at or
    after the token, sqrt(max(sum p^2 / c - (sum p / c)^2, 0)); the difference of nearly equal numbers may round below
    0. Needs `ColumnMass(group="mean")` beside it, which keeps the sum.
    """

    def observe(self, prefill: bool) -> Requests:
        return Requests(columns=frozenset({POOLED_SQUARE})) if prefill else Requests(rows=1)

    def stats(self, tokens: Tokens, evidence: Evidence | None, context: Context) -> dict[str, Shaped[Array, "B G T"]]:
        before = tokens.stats.get("squares", jnp.zeros(tokens.positions.shape, jnp.float32))
        return {"squares": before if evidence is None else before + evidence.columns[POOLED_SQUARE][:, :, 0]}

    def update(self, stats: dict[str, Shaped[Array, "B G C"]], evidence: Evidence) -> dict[str, Shaped[Array, "B G C"]]:
        return {"squares": stats["squares"] + jnp.mean(evidence.last_rows(1)[..., 0, :], axis=2) ** 2}

    def rank(self, tokens: Tokens, evidence: Evidence) -> Float[Array, "B G T"]:
        count = jnp.maximum(evidence.seen[:, None, None] - tokens.positions, 1)
        mean = tokens.stats["mass"] / count
        return jnp.sqrt(jnp.maximum(tokens.stats["squares"] / count - mean**2, 0.0))


@pytree
class MeanPlusVariance(Score):
    """What the last `window` queries give a token and how much they disagree about it, pooled along the sequence.

    CAKE (Qin et al. 2025): pool_j(mean_h(mean_i p_ij + gamma Var_i p_ij)), the variance unbiased over the window; the
    window itself is not pooled in. At a decode step the one new row is all there is, and it has no variance.
    """

    window: int = static(32)
    gamma: float = static(200.0)
    kernel: int = static(5)

    def observe(self, prefill: bool) -> Requests:
        return Requests(rows=self.window if prefill else 1)

    def rank(self, tokens: Tokens, evidence: Evidence) -> Float[Array, "B G T"]:
        rows = evidence.last_rows(self.window)
        worth = jnp.mean(rows, axis=-2)
        if rows.shape[-2] > 1:
            worth = worth + self.gamma * jnp.var(rows, axis=-2, ddof=1)
        outside = tokens.present & (tokens.positions < evidence.seen[:, None, None] - self.window)
        worth = jnp.where(outside, jnp.mean(worth, axis=2), 0.0)
        if rows.shape[-2] > 1:  # a prompt, in order
            return pool(worth, self.kernel, "mean")
        return pool_in_order(worth, tokens.positions, self.kernel, "mean")


@pytree
class KeyNorm(Score):
    """Minus the Euclidean norm of the key, in float32 (Devoto et al. 2024); rotation does not change it."""

    def rank(self, tokens: Tokens, evidence: Evidence) -> Float[Array, "B G T"]:
        return -jnp.linalg.norm(tokens.keys.astype(jnp.float32), axis=-1)


@pytree
class Projection(Score):
    """Dot product of the rotated key with a calibrated direction per layer and KV head (Q-Filters, Godey et al. 2025).

    Attributes:
        directions: positive along the bulk of the head's queries; None until calibrated.
    """

    directions: Float[Array, "L G D"] | None = None
    learns: ClassVar[bool] = True

    def digest(self, activations: Activations) -> Float[Array, "G D"]:
        # Not normalised again: heads that disagree make a shorter filter, as in the paper.
        return jnp.mean(query_directions(activations.queries), axis=1)

    def calibrate(self, digests: list[Float[Array, "G D"]]) -> "Projection":
        if len(shapes := {digest.shape for digest in digests}) > 1:
            raise BadInput(
                f"q_filters keeps the directions of all layers in one array, but theirs are of shapes {sorted(shapes)};"
                " allowed: models whose layers have heads alike"
            )
        return Projection(jnp.stack(digests))

    def check(self, spec: Spec) -> None:
        wanted = (spec.layers, spec.attention.kv_heads, spec.attention.key_dim)
        if self.directions is None:
            raise BadInput(
                "q_filters is not calibrated: its directions are None; allowed: kvx.calibrate(policy, model, batches) "
                "first, or kvx.load_policy(path)"
            )
        if self.directions.shape != wanted:
            raise BadInput(
                f"q_filters was calibrated for another model: its directions have shape {self.directions.shape}; "
                f"allowed: {wanted} (layers, KV heads, head dim)"
            )

    def stats(self, tokens: Tokens, evidence: Evidence | None, context: Context) -> dict[str, Shaped[Array, "B G T"]]:
        assert self.directions is not None, "checked when the policy is used"
        direction = self.directions[context.layer]
        scored = jnp.einsum("bgtd,gd->bgt", tokens.rotated_keys.astype(jnp.float32), direction)
        return {"projection": scored}

    def rank(self, tokens: Tokens, evidence: Evidence) -> Float[Array, "B G T"]:
        return tokens.stats["projection"]


def query_directions(queries: Float[Array, "*heads N D"]) -> Float[Array, "*heads D"]:
    """The unit direction along which each head's queries lie, pointing the way most of them do.

    The first right singular vector of the uncentred queries (centring would remove the mean, which is the signal),
    as the top eigenvector of their D x D second moment; its sign by majority, then by the sum where votes tie.
    """
    queries = queries.astype(jnp.float32)
    moment = jnp.einsum("...nd,...ne->...de", queries, queries, precision="highest") / queries.shape[-2]
    direction = jnp.linalg.eigh(moment)[1][..., -1]
    along = jnp.einsum("...nd,...d->...n", queries, direction)
    votes, total = jnp.sum(jnp.sign(along), axis=-1), jnp.sum(along, axis=-1)
    sign = jnp.where(jnp.where(votes == 0, total, votes) < 0, -1.0, 1.0)
    return direction * sign[..., None]


def pool(scores: Float[Array, "B G T"], kernel: int, pooling: str) -> Float[Array, "B G T"]:
    """Smooth along the sequence at equal length: "mean" counts the zeros beyond the ends, "max" ignores them."""
    half = kernel // 2
    fill = 0.0 if pooling == "mean" else -jnp.inf
    padded = jnp.pad(scores, ((0, 0), (0, 0), (half, half)), constant_values=fill)
    shifted = jnp.stack([padded[..., offset : offset + scores.shape[-1]] for offset in range(kernel)])
    return jnp.mean(shifted, axis=0) if pooling == "mean" else jnp.max(shifted, axis=0)


def pool_in_order(
    scores: Float[Array, "B G T"], positions: Int[Array, "B G T"], kernel: int, pooling: str
) -> Float[Array, "B G T"]:
    """Smooth over neighbours by true position, for slots that are in any order."""
    order = jnp.argsort(jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max), axis=-1)
    pooled = pool(jnp.take_along_axis(scores, order, axis=-1), kernel, pooling)
    return jnp.put_along_axis(jnp.zeros_like(pooled), order, pooled, axis=-1, inplace=False)
