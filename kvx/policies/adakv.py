"""Ada-KV (2024): the heads of a layer compete for its slots, by any score that is comparable across heads."""

from kvx.parts.amounts import Slots, amount, fraction, one_of
from kvx.parts.budgets import Compete, check_protected
from kvx.parts.evict import Evict
from kvx.parts.flatten import Flatten
from kvx.parts.scores import ColumnMass
from kvx.policies.registry import recipe
from kvx.policies.snapkv import window_votes
from kvx.policy import Policy


@recipe
def adakv(
    budget: int | float,
    floor: float = 0.2,
    score: str = "snapkv",
    window: int = 64,
    kernel: int = 5,
    pooling: str = "mean",
    group: str = "mean",
) -> Policy:
    """Feng et al. 2024, "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation".

        n_g = number of head g's tokens among the G C highest scores of the layer, each head's best floor C assured

    Once, after the prompt. Heads end with different lengths, stored flat, so that the bytes are really saved. Parts:
    any probability score / compete over heads / drop / after prefill.

    Args:
        budget: slots per KV head averaged over a layer's heads, window included, or a share of the prompt.
        floor: share of the budget that every head is assured; 1 is the uniform budget.
        score: "snapkv" (pooled votes of the window) or "h2o" (column mass).
        window, kernel, pooling, group: as in `snapkv`; the window is protected in both cases.
    """
    kept = amount(budget)
    check_protected(kept, window, f"window={window}")
    votes = window_votes(window, kernel, pooling, group)
    chosen = votes if one_of(score, "score", ("snapkv", "h2o")) == "snapkv" else ColumnMass("sum", group)
    split = Compete(kept, fraction(floor, "floor"))
    return Policy((Evict(chosen, split, recent=Slots(window)), Flatten(split)))
