"""Quest (2024): keep everything, bound each page's score for the query, read only the top pages."""

from kvx.errors import BadInput
from kvx.parts.amounts import Slots, amount, one_of, whole
from kvx.parts.sparse_read import SparseRead
from kvx.policies.knorm import layer_list
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def quest(budget: int | float, page: int = 16, group: str = "max", skip: tuple[int, ...] = (0, 1)) -> Policy:
    """Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference".

        bound_j = sum_d max(q_d high_jd, q_d low_jd),    read the top pages by bound and the newest token's page

    Nothing is evicted: resident bytes grow, bytes read per step do not. Parts: page bounds / current query / top k /
    forced last page.

    Args:
        budget: slots read per KV head and step, in whole pages, the newest token's page included; or a share of the
            prompt.
        page: slots a page.
        group: one choice a KV head by the "max" or "mean" of its query heads' bounds (the paper is multi-head only).
        skip: layers read whole; they do not count in the budget.
    """
    whole(page, "page", least=1)
    kept = amount(budget)
    if isinstance(kept, Slots) and kept.count < page:
        raise BadInput(f"budget={kept.count} is smaller than one page; allowed: at least page={page}")
    return Policy((SparseRead(kept, page, one_of(group, "group", ("max", "mean")), layer_list(skip)),))
