"""Q-Filters (2025): score keys by their projection on one calibrated query direction per head."""

from kvx.parts.amounts import Slots, amount, whole
from kvx.parts.budgets import Uniform, check_protected
from kvx.parts.evict import Evict
from kvx.parts.scores import Projection
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def q_filters(budget: int | float, window: int = 64, every_step: bool = True) -> Policy:
    """Godey et al. 2025, "Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression".

        s_j = f_g . k_j,    f_g = mean over the group of +-v_1(Q_h), the first right singular vector of the head's
        rotated queries, signed so that most queries project positively

    After the prompt and after every step. Calibrate before use: `kvx.calibrate(policy, model, batches)`. Parts:
    projection / uniform + window / drop / after prefill, every step.

    Args:
        budget: slots per KV head, window included, or a share of the prompt; the total, generated tokens included.
        window: newest tokens that are protected.
        every_step: False decides once, after the prompt (kvpress).
    """
    kept = amount(budget)
    check_protected(kept, whole(window, "window", least=0), f"window={window}")
    return Policy((Evict(Projection(), Uniform(kept), recent=Slots(window), every=int(every_step)),))
