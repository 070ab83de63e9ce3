"""TOVA, Token Omission Via Attention (2024): drop whatever the newest query attends to least."""

from kvx.parts.amounts import Slots, amount, one_of, whole
from kvx.parts.budgets import Uniform, check_protected
from kvx.parts.evict import Evict
from kvx.parts.scores import WindowAttention
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def tova(budget: int | float, across: str = "layer", recent: int = 0) -> Policy:
    """Oren et al. 2024, "Transformers are Multi-State RNNs".

        a_j = mean over all query heads of p_ij, i the newest query;    the lowest a leaves

    After the prompt and after every step. No window and no sinks: the newest token itself may leave, after it has been
    attended to. Parts: window attention (W = 1, all heads) / uniform / drop / after prefill, every step.

    Args:
        budget: slots per KV head, or a share of the prompt; the total, generated tokens included.
        across: "layer": one ranking for all heads, as in the paper; "head": each KV head by its own query heads.
        recent: newest tokens that are protected; the paper has none, kvpress protects one.
    """
    one_of(across, "across", ("layer", "head"))
    kept = amount(budget)
    check_protected(kept, whole(recent, "recent", least=0), f"recent={recent}")
    return Policy((Evict(WindowAttention(window=1), Uniform(kept), recent=Slots(recent), across=across, every=1),))
