"""SnapKV (2024): the last prompt queries vote, votes are pooled along the sequence, each head keeps the top."""

from kvx.errors import BadInput
from kvx.parts.amounts import Slots, amount, one_of, whole
from kvx.parts.budgets import Uniform, check_protected
from kvx.parts.evict import Evict
from kvx.parts.scores import GROUPS, WindowAttention
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def snapkv(
    budget: int | float, window: int = 64, kernel: int = 5, pooling: str = "mean", group: str = "mean"
) -> Policy:
    """Li et al. 2024, "SnapKV: LLM Knows What You are Looking for Before Generation".

        a_j = pool_j(group_h(1/W sum_{i in last W} p_ij)),    keep the top C - W of the prompt and the window

    Once, after the prompt; generated tokens come on top. Parts: window attention, pooled / uniform / drop / after
    prefill.

    Args:
        budget: slots per KV head, window included, or a share of the prompt.
        window: how many of the last prompt tokens vote; they are kept.
        kernel: width of the pooling, odd; 1: none.
        pooling: "mean" (zeros beyond the ends count) or "max".
        group: reducer over the query heads of a KV head, before pooling: "mean", "max" or "sum".
    """
    score = window_votes(window, kernel, pooling, group)
    kept = amount(budget)
    check_protected(kept, window, f"window={window}")
    return Policy((Evict(score, Uniform(kept), recent=Slots(window)),))


def window_votes(window: object, kernel: object, pooling: object, group: object) -> WindowAttention:
    """SnapKV's score from checked hyperparameters; PyramidKV and Ada-KV rank by it too."""
    width = whole(kernel, "kernel", least=1)
    if width % 2 == 0:
        raise BadInput(f"kernel={kernel} is even; allowed: odd numbers, so that a token sits at the centre of its pool")
    return WindowAttention(
        whole(window, "window", least=1),
        width,
        one_of(pooling, "pooling", ("mean", "max")),
        one_of(group, "group", tuple(GROUPS)),
    )
