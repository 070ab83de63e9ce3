"""PagedAttention (2023) and Hydragen (2024): keys and values in pages, which copies of a cache share."""

from kvx.parts.amounts import whole
from kvx.parts.paging import Paging
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def paged(page: int = 16) -> Policy:
    """Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention"; Juravsky et
    al. 2024, "Hydragen: High-Throughput LLM Inference with Shared Prefixes".

        slot of a head's token t = table[t // p] p + t mod p
        softmax over prefix and suffix:  out = sum_i exp(lse_i - lse) out_i,  lse = log sum_i exp(lse_i)

    Exact: the full cache, or what a selection before it keeps, a table for every KV head, so that heads of different
    length take as many pages as they fill. `kvx.fork` shares pages between copies and reads them once for all. Parts:
    no selection / pages / append only.

    Args:
        page: p, slots.
    """
    return Policy((Paging(whole(page, "page", least=1)),))
