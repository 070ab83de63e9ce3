"""CAKE (2025): layers share a budget by entropy and variance of their attention, cascading through the prefill."""

import math
from typing import Any

from kvx.errors import BadInput
from kvx.parts.amounts import amount, whole
from kvx.parts.budgets import check_protected
from kvx.parts.cascade import Cascade
from kvx.parts.scores import MeanPlusVariance
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def cake(
    budget: int | float,
    window: int = 32,
    tau1: float = 1.0,
    tau2: float = 1.0,
    gamma: float = 200.0,
    kernel: int = 5,
) -> Policy:
    """Qin et al. 2025, "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences" (ICLR).

        b_l = P_l / sum_k P_k (C - W) L,    P_l = H_l^(1/tau1) V_l^(1/tau2)
        I_j = pool_j(mean_h(mean_i p_ij + gamma Var_i p_ij)),    keep the top b_l and the window

    over the last W queries i; earlier layers are cut again when the next one arrives, so that prefill holds the budget
    and one full layer. While decoding, the token to which the newest query gives least leaves. Parts: mean plus
    variance, pooled / by layer, cascading / drop / in the prefill, every step.

    The paper's (tau1, tau2) for C = 1024 and C = 128:

        Llama-3.1-8B      1.6, 0.4    1.6, 0.6
        Llama-2-7B        1.9, 1.8    0.9, 2.3
        Llama-2-13B       0.5, 0.4    1.8, 2.0
        Mistral-7B-v0.3   0.8, 0.5    1.0, 0.8
        Qwen2.5-7B        1.5, 0.6    0.4, 0.6

    Three departures from the released code: prompts between C and C + W are cut like longer ones (there they are left
    whole for one step, over the budget); preferences are summed over a row, never over the batch; neighbours are
    pooled by position while decoding, where the code pools in whatever order its last cut left.

    Args:
        budget: slots per KV head averaged over layers, window included, or a share of the prompt; the total, generated
            tokens included.
        window: last queries that vote, at least 2; the newest tokens, always kept.
        tau1, tau2: how much entropy and variance say; larger says less.
        gamma: weight of the variance.
        kernel: width of the pooling, odd; 1: none.
    """
    kept = amount(budget)
    check_protected(kept, whole(window, "window", least=2), f"window={window}")
    width = whole(kernel, "kernel", least=1)
    if width % 2 == 0:
        raise BadInput(f"kernel={kernel} is even; allowed: odd numbers, so that a token sits at the centre of its pool")
    score = MeanPlusVariance(window, _number(gamma, "gamma", zero=True), width)
    return Policy((Cascade(score, kept, _number(tau1, "tau1"), _number(tau2, "tau2")),))


def _number(value: Any, name: str, zero: bool = False) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not zero):
        raise BadInput(
            f"{name}={value!r} is out of range; allowed: a finite number {'of at least' if zero else 'above'} 0"
        )
    return float(value)
