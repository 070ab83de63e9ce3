"""LESS (2024): what leaves a sparse cache lives on in a linear attention of constant size, by trained feature maps."""

from kvx.parts.amounts import Slots, amount, one_of, whole
from kvx.parts.budgets import Uniform, check_protected
from kvx.parts.evict import Evict
from kvx.parts.feature_state import Absorb
from kvx.parts.scores import GROUPS, ColumnMass, Recency
from kvx.policies.h2o import share_of_budget
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def less(
    budget: int | float,
    host: str = "h2o",
    recent: int | float = 0.5,
    sinks: int = 4,
    features: int = 8,
    hidden: int = 512,
    group: str = "sum",
) -> Policy:
    """Dong et al. 2024, "Get More with LESS: Synthesizing Recurrence with KV Cache Compression for Efficient LLM
    Inference".

        H = sum_e psi(k_e) v_e^T,  z = sum_e psi(k_e)    over the tokens e that have left
        o = (phi(q) H + sum_j exp(l_j) v_j) / (phi(q) z + sum_j exp(l_j))    over the tokens j that are kept

    The prompt is attended exactly; the host then chooses what is kept, after the prompt and after every step, by the
    softmax over kept tokens alone. Train before use: `python -m kvx.train.less`. Parts: the host's / uniform / absorb
    / after prefill, every step.

    The reference's recent window counts the coming token; here as everywhere the budget is what is carried between
    steps.

    Args:
        budget: slots per KV head, recent ones and sinks included, or a share of the prompt; the total, generated
            tokens included. The state comes on top: 4 features (value dim + 1) bytes per KV head.
        host: "h2o" (heavy hitters by summed attention, and a recent window) or "lambda" (sinks and a recent window).
        recent: for "h2o": protected newest tokens; an int counts slots, a float is a share of the budget.
        sinks: for "lambda": first tokens kept for ever; the rest of the budget is recent.
        features: feature size of the maps (R in the paper).
        hidden: hidden units of the maps.
        group: for "h2o": reducer over the query heads of a KV head: "sum" as in the paper (multi-query), "mean", "max".
    """
    one_of(host, "host", ("h2o", "lambda"))
    one_of(group, "group", tuple(GROUPS))
    kept = amount(budget)
    losers = Absorb(features=whole(features, "features", least=1), hidden=whole(hidden, "hidden", least=1))
    first, window = whole(sinks, "sinks", least=0), share_of_budget(kept, recent)
    if host == "lambda":
        check_protected(kept, first + 1, f"sinks={sinks} and the newest token")
        return Policy((Evict(Recency(), Uniform(kept), losers, sinks=Slots(first), every=1),))
    check_protected(kept, window.count if isinstance(window, Slots) else 1, f"recent={recent}")
    return Policy((Evict(ColumnMass("sum", group), Uniform(kept), losers, recent=window, every=1),))
