"""Budgets: how many slots each layer and head gets (grid 1, second column). Sinks and windows are included."""

from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvx.context import Context, Spec
from kvx.errors import BadInput
from kvx.evidence import Evidence, Requests
from kvx.parts.amounts import Amount, Slots
from kvx.parts.ranking import ranks
from kvx.pytree import pytree, static
from kvx.tokens import Tokens


class Budget(Protocol):
    """Splits an amount over layers and heads; the total over them is conserved.

    Class attributes:
        decides: "layer", or "end" for a split that needs every layer's measure.
        grows: `grown` knows no end; `capacity` then covers the prompt and the room after it.
    """

    decides: str = "layer"
    grows: bool = False

    def observe(self) -> Requests:
        """Evidence that the measure of a layer reads."""
        return Requests()

    def measure(self, tokens: Tokens, evidence: Evidence) -> Any:
        """What a layer contributes to the split over layers."""
        return None

    def allocate(self, measures: list[Any], spec: Spec, lengths: Int[Array, "B"], ends: Int[Array, "B"]) -> list[Any]:
        """Each layer's part of the split; it comes back to `counts` as `context.plan`. `ends` as in `Stage.plan`."""
        return [None] * len(measures)

    def capacity(self, spec: Spec, layer: int) -> int:
        """The most slots one head of this layer may get at any admissible prompt length; bounds a static shape."""
        ...

    def counts(self, scores: Float[Array, "B G T"], mask: Bool[Array, "B G T"], context: Context) -> Int[Array, "B G"]:
        """Slots per row and head. `scores` are +inf on protected tokens."""
        ...

    def recent(self, amount: Amount | None, sinks: Int[Array, "B"], context: Context) -> Int[Array, "B"]:
        """How many of the newest tokens this layer protects, beside `sinks` first ones."""
        lengths = context.lengths
        return jnp.zeros_like(lengths) if amount is None else amount.of(lengths, context.spec.prompt)

    def grown(self, counts: Int[Array, "B G"], evidence: Evidence) -> Int[Array, "B G"]:
        """The counts once more, at a decode step: a budget may grow with the text."""
        return counts

    def part(self, share: float, counts: Int[Array, "B G"], sinks: Int[Array, "B"]) -> Int[Array, "B G"]:
        """Whole slots in a share of the budget, by the counts that came of it beside `sinks` protected first tokens."""
        return jnp.floor(share * counts + 1e-6).astype(jnp.int32)

    def at_least(self, counts: Int[Array, "B G"], protected: Int[Array, "B G"]) -> Int[Array, "B G"]:
        """Counts once more: with a share of a short prompt the protected tokens may outnumber the budget, and win."""
        return jnp.maximum(counts, protected)


@pytree
class Uniform(Budget):
    """The same for every layer and head."""

    amount: Amount = static()

    def capacity(self, spec: Spec, layer: int) -> int:
        return self.amount.most(spec.prompt)

    def counts(self, scores: Float[Array, "B G T"], mask: Bool[Array, "B G T"], context: Context) -> Int[Array, "B G"]:
        counts = self.amount.of(context.lengths, context.spec.prompt)
        return jnp.broadcast_to(counts[:, None], mask.shape[:2])


@pytree
class BesidePrompt(Budget):
    """For generated tokens alone: the prompt comes on top, whole, protected as sinks (`Share(1.0)`)."""

    amount: Amount = static()

    def capacity(self, spec: Spec, layer: int) -> int:
        return spec.prompt + self.amount.most(spec.prompt)

    def counts(self, scores: Float[Array, "B G T"], mask: Bool[Array, "B G T"], context: Context) -> Int[Array, "B G"]:
        counts = context.lengths + self.amount.of(context.lengths, context.spec.prompt)
        return jnp.broadcast_to(counts[:, None], mask.shape[:2])

    def part(self, share: float, counts: Int[Array, "B G"], sinks: Int[Array, "B"]) -> Int[Array, "B G"]:
        # The sinks are the prompt.
        return jnp.floor(share * (counts - sinks[:, None]) + 1e-6).astype(jnp.int32)


@pytree
class LayerTable(Budget):
    """Slots per layer given outright, e.g. measured or searched profiles."""

    table: tuple[int, ...] = static()

    def capacity(self, spec: Spec, layer: int) -> int:
        if len(self.table) != spec.layers:
            raise BadInput(f"table has {len(self.table)} entries; allowed: one for each of the {spec.layers} layers")
        return self.table[layer]

    def counts(self, scores: Float[Array, "B G T"], mask: Bool[Array, "B G T"], context: Context) -> Int[Array, "B G"]:
        return jnp.broadcast_to(jnp.asarray(self.table, jnp.int32)[context.layer], mask.shape[:2])


@pytree
class Pyramid(Budget):
    """Falls linearly from the bottom to the top layer (PyramidKV, Cai et al. 2024, section 3.2).

    With base = C - W: top = base / beta, bottom = 2 base - top, both clamped so that no layer asks for more than the
    S - W tokens there are; layer l gets W + bottom - l (bottom - top) / (L - 1), rounded by largest remainder, so that
    the sum over layers is L C exactly (the released code floors the step and overshoots). Prompts shorter than 2 base
    get C in every layer, as in the released code.
    """

    amount: Amount = static()
    window: int = static()
    beta: int = static(20)

    def capacity(self, spec: Spec, layer: int) -> int:
        lengths = np.arange(max(spec.shortest, 1), spec.prompt + 1)
        counts = self.table(lengths, np.array([self.amount.most(int(length)) for length in lengths]), spec.layers, np)
        return int(np.max(np.minimum(counts[layer], lengths)))

    def counts(self, scores: Float[Array, "B G T"], mask: Bool[Array, "B G T"], context: Context) -> Int[Array, "B G"]:
        spec = context.spec
        table = self.table(context.lengths, self.amount.of(context.lengths, spec.prompt), spec.layers, jnp)
        return jnp.broadcast_to(table[context.layer][:, None], mask.shape[:2])

    def table(self, lengths, budgets, layers: int, xp):
        """(L, B) whole slots per layer for prompts of `lengths` and an average budget each, in integers throughout."""
        base = xp.maximum(budgets - self.window, 0)
        steps = max(layers - 1, 1)
        steepest = 2 * self.beta - 1 if layers > 1 else self.beta  # a single layer has no line to fall along
        bottom = xp.minimum(steepest * base, self.beta * xp.maximum(lengths - self.window, 0))
        top = 2 * self.beta * base - bottom
        index = xp.arange(layers)[:, None]
        scaled = steps * bottom - index * (bottom - top)  # over beta * steps
        floors = scaled // (self.beta * steps)
        remainders = scaled % (self.beta * steps)
        missing = layers * base - xp.sum(floors, axis=0)
        larger = xp.sum(remainders[None] > remainders[:, None], axis=1)
        earlier = xp.sum(
            (remainders[None] == remainders[:, None]) & (index < index.T)[..., None].swapaxes(0, 1), axis=1
        )
        falling = floors + (larger + earlier < missing)
        return self.window + xp.where(lengths < 2 * base, base, falling)


@pytree
class Compete(Budget):
    """Heads compete: a layer's G C slots go to the highest scores of all its heads (Ada-KV, Feng et al. 2024).

    Every head is first assured its own best int(floor * C) tokens, then the highest scores over all heads fill the
    rest (the rule of kvpress's AdaKVPress; the paper's integer rounding loses slots). Scores must be comparable across
    heads: probabilities are, norms are not.
    """

    amount: Amount = static()
    floor: float = static(0.2)

    def capacity(self, spec: Spec, layer: int) -> int:
        return self.amount.most(spec.prompt) * spec.attention.kv_heads

    def total(self, spec: Spec) -> int:
        """The most slots all heads of a layer get together."""
        return min(self.amount.most(spec.prompt), spec.prompt) * spec.attention.kv_heads

    def counts(self, scores: Float[Array, "B G T"], mask: Bool[Array, "B G T"], context: Context) -> Int[Array, "B G"]:
        budgets = self.amount.of(context.lengths, context.spec.prompt)[:, None]
        batch, heads, length = scores.shape
        scores = jnp.where(mask, scores, -jnp.inf)
        assured = jnp.maximum(1, jnp.floor(self.floor * budgets + 1e-6).astype(jnp.int32)) if self.floor > 0 else 0
        safe = jnp.where(mask & (ranks(scores) < jnp.asarray(assured)[..., None]), jnp.inf, scores)
        places = ranks(safe.reshape(batch, heads * length)).reshape(scores.shape)
        return jnp.sum(mask & (places < heads * budgets[..., None]), axis=-1)


def check_protected(amount: Amount, protected: int, what: str) -> None:
    """Refuse a budget in slots that its protected slots alone would exceed; in a share they win in a short row.

    Raises:
        BadInput: budget below `protected`.
    """
    if isinstance(amount, Slots) and amount.count < protected:
        raise BadInput(
            f"budget={amount.count} is smaller than its protected slots ({what}); allowed: at least {protected}"
        )
