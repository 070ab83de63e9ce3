"""CaM, Cache Merging (2024): before a token leaves, its value is spread over the next ones, by chance."""

from kvx.parts.amounts import Slots, amount, one_of, whole
from kvx.parts.budgets import Uniform, check_protected
from kvx.parts.evict import Evict
from kvx.parts.merge_forward import MergeForward
from kvx.parts.renumber import Renumber
from kvx.parts.scores import ColumnMass, Recency
from kvx.policies.h2o import share_of_budget
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def cam(
    budget: int | float,
    host: str = "recency",
    width: int = 32,
    sinks: int = 4,
    recent: int | float = 0.5,
    across: str = "head",
    every: int = 1,
    renumber: bool = False,
    seed: int = 0,
) -> Policy:
    """Zhang et al. 2024, "CaM: Cache Merging for Memory-efficient LLMs Inference".

        v_j += b v_i / m for the m kept tokens j after i,    b ~ Bernoulli(clip(A_i / mean A_j, 0, 1))

    whenever a token i leaves while decoding; keys stay, and after the prompt nothing merges. Which token leaves is the
    host's rule: the oldest of the recent ones, or the least mass. Parts: recency or column mass / uniform / merge
    forward / every n steps.

    Args:
        budget: slots per KV head, or a share of the prompt; the total, generated tokens included.
        host: "recency": sinks and the newest (StreamingLLM); "h2o": the largest accumulated attention as well.
        width: kept tokens that share a value; the paper's code 16 or 32, kvpress 32.
        sinks: first tokens kept for ever.
        recent: for "h2o", protected newest tokens: an int counts slots, a float is a share of the budget.
        across: for "h2o", "head": every KV head ranks for itself; "layer": one ranking, the mean over heads.
        every: tokens that leave together, once a head holds so many too many; the paper 1, kvpress 512.
        renumber: rotate by place in the cache, as the paper's streaming code does.
        seed: of the coins.
    """
    kept = amount(budget)
    one_of(host, "host", ("recency", "h2o"))
    one_of(across, "across", ("head", "layer"))
    first = whole(sinks, "sinks", least=0)
    window = share_of_budget(kept, recent) if host == "h2o" else Slots(1)
    protected = first + (window.count if isinstance(window, Slots) else 1)
    newest = f"recent={recent}" if host == "h2o" else "the newest token"
    check_protected(kept, protected, f"sinks={sinks} and {newest}")
    together = whole(every, "every", least=1)
    evict = Evict(
        ColumnMass() if host == "h2o" else Recency(),
        Uniform(kept),
        MergeForward(whole(width, "width", least=1), together, whole(seed, "seed", least=0, most=2**32 - 1)),
        sinks=Slots(first),
        recent=window,
        across=across,
        every=together,
    )
    return Policy((evict, Renumber()) if renumber else (evict,))
