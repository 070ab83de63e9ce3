"""H2O, Heavy-Hitter Oracle (2023): recent tokens plus those with the largest accumulated attention."""

from kvx.parts.amounts import Amount, Share, Slots, amount, fraction, one_of, whole
from kvx.parts.budgets import Uniform, check_protected
from kvx.parts.evict import Evict
from kvx.parts.scores import GROUPS, ColumnMass
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def h2o(budget: int | float, recent: int | float = 0.5, average: str = "sum", group: str = "mean") -> Policy:
    """Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models".

        s_j = sum_i p_ij over all queries so far,    keep the top by s and the most recent

    After the prompt and after every step, where the lowest s outside the recent window leaves. The paper is
    multi-head only; here p is reduced over the query heads of a KV head. Parts: column mass / uniform / drop / after
    prefill, every step.

    Args:
        budget: slots per KV head, recent ones included, or a share of the prompt; the total, generated tokens included.
        recent: protected newest tokens: an int counts slots, a float is a share of the budget.
        average: "sum" as in the paper (favours old tokens), or "mean" over the queries that could see the token.
        group: reducer over the query heads of a KV head: "mean", "max" or "sum".
    """
    one_of(average, "average", ("sum", "mean"))
    one_of(group, "group", tuple(GROUPS))
    kept = amount(budget)
    window = share_of_budget(kept, recent)
    check_protected(kept, window.count if isinstance(window, Slots) else 1, f"recent={recent}")
    return Policy((Evict(ColumnMass(average, group), Uniform(kept), recent=window, every=1),))


def share_of_budget(budget: Amount, part: object, name: str = "recent") -> Amount:
    """A protected window given in slots or as a share of the budget, itself slots or a share of the prompt."""
    if isinstance(part, int) and not isinstance(part, bool):
        return Slots(whole(part, name, least=0))
    part = fraction(part, name)
    return Slots(int(part * budget.count)) if isinstance(budget, Slots) else Share(part * budget.share)
