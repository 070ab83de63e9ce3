"""MiKV (2024): what an eviction policy would drop is kept in 2 to 4 bits instead."""

from kvx.errors import BadInput
from kvx.kernels.quantize_pack import BITS
from kvx.parts.amounts import Slots, amount, one_of, whole
from kvx.parts.budgets import Uniform
from kvx.parts.demote import Demote, LowBits
from kvx.parts.evict import Evict
from kvx.parts.scores import GROUPS, ColumnMass
from kvx.policies.h2o import share_of_budget
from kvx.policies.registry import recipe
from kvx.policy import Policy
from kvx.stores.coded import Code


@recipe
def mikv(
    high: int | float = 0.25,
    bits: int | None = 2,
    group: int | None = None,
    recent: int | float = 0.5,
    balance: bool = True,
    average: str = "sum",
    heads: str = "mean",
) -> Policy:
    """Yang et al. 2024, "No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision
    Quantization".

        s_j = sum_i p_ij,    the top by s and the most recent at full precision, the rest as round((x - m) / a)
        beta_c = sqrt(max_t |q_tc| / max_t |k_tc|) from the prompt;    keys are coded times beta, queries read over beta

    Every token is kept. After every step the lowest s outside the recent window moves to low bits, for good. Parts:
    column mass / uniform / low bits / after prefill, every step; balance / token x n channels / uniform / none / the
    host's choice / immediate.

    Args:
        high: full-precision slots per KV head, recent ones included, or a share of the prompt.
        bits: of each number in the low tier: 2, 3, 4 or 8; None leaves it exact.
        group: channels that share a scale and a minimum; None: a head's, with 2 bits half of them.
        recent: newest tokens that stay at full precision: an int counts slots, a float is a share of `high`.
        balance: move the outliers of key channels to the queries before coding.
        average: "sum" as in the paper (favours old tokens), or "mean" over the queries that could see the token.
        heads: reducer of s over the query heads of a KV head: "mean", "max" or "sum".
    """
    one_of(average, "average", ("sum", "mean"))
    one_of(heads, "heads", tuple(GROUPS))
    one_of(bits, "bits", (*BITS, None))
    if not isinstance(balance, bool):
        raise BadInput(f"balance={balance!r} is not offered; allowed: True, False")
    kept = amount(high, "high")
    window = share_of_budget(kept, recent)
    if isinstance(kept, Slots) and isinstance(window, Slots) and window.count > kept.count:
        raise BadInput(f"recent={recent} protects more slots than high={high} has; allowed: at most {high}")
    channels = None if group is None else whole(group, "group", least=1)
    host = Evict(ColumnMass(average, heads), Uniform(kept), recent=window, every=1)
    return Policy((Demote(host, LowBits(Code(bits, channels), balance)),))
