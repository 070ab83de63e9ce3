"""D2O, Dynamic Discriminative Operations (2024): layer budgets from attention variance, alike losers merged back."""

from kvx.parts.amounts import Slots, amount, fraction, one_of, whole
from kvx.parts.budgets import check_protected
from kvx.parts.evict import Evict
from kvx.parts.merging import MergeNearest
from kvx.parts.pool_up import ByVariance, PoolUp
from kvx.parts.scores import ColumnMass
from kvx.policies.h2o import share_of_budget
from kvx.policies.knorm import layer_list
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def d2o(
    budget: int | float,
    recent: int | float = 0.5,
    sinks: int = 4,
    alpha: float = 0.5,
    weights: str = "exp",
    skip: tuple[int, ...] = (0, 1, -1),
) -> Policy:
    """Wan et al. 2024, "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference".

        layer l gets softmax_l(-f_l) of the total, f_l the normalised variance of its column mass;
        a loser merges into the survivor of highest key cosine if that reaches a moving threshold

    After the prompt, when every layer's evidence is known, and after every step. Needs all layers' full keys and
    values until then: the peak is the full cache. Parts: column mass, sinks and recent / by layer (variance) / merge
    nearest / end of prefill, every step.

    Args:
        budget: slots per KV head averaged over the layers that are not skipped, or a share of the prompt; the total,
            generated tokens included.
        recent: protected newest tokens: an int counts slots, a float is a share of the budget; both of the average
            layer, the others protect in proportion to their slots.
        sinks: first tokens kept for ever.
        alpha: weight of the old threshold in its moving average.
        weights: merge weights "exp" (the paper) or "mean" (its code).
        skip: layers never compressed; they come on top of the budget.
    """
    kept = amount(budget)
    window = share_of_budget(kept, recent)
    protected = whole(sinks, "sinks", least=0) + (window.count if isinstance(window, Slots) else 0)
    check_protected(kept, protected, f"sinks={sinks} and recent={recent}")
    losers = MergeNearest(fraction(alpha, "alpha"), one_of(weights, "weights", ("exp", "mean")))
    layers, split = layer_list(skip), ByVariance(kept)
    evict = Evict(ColumnMass(), split, losers, sinks=Slots(sinks), recent=window, every=1, skip=layers)
    return Policy((evict, PoolUp(split, layers)))
