"""RoCo (2024): evict the lowest mean attention, but only among tokens whose attention deviates little."""

from kvx.errors import BadInput
from kvx.parts.amounts import Share, Slots, amount, fraction, one_of, whole
from kvx.parts.budgets import BesidePrompt, Uniform, check_protected
from kvx.parts.evict import Evict
from kvx.parts.scores import ColumnMass, Deviation
from kvx.policies.registry import recipe
from kvx.policy import Policy

MODES = ("encoding_decoding", "encoding", "decoding")


@recipe
def roco(
    budget: int | float,
    mode: str = "encoding_decoding",
    share: float | None = None,
    sinks: int = 4,
    recent: int = 10,
) -> Policy:
    """Ren and Zhu 2024, "On the Efficacy of Eviction Policy for Key-Value Constrained Generative Language Model
    Inference".

        m_j = sum_i p_ij / c_j,    d_j = sqrt(max(sum_i p_ij^2 / c_j - m_j^2, 0)),    c_j queries at or after token j
        int(share C) slots to the largest d, the newest tokens first of all; among the others the lowest m leaves

    p is the mean over the query heads of a KV head, before squaring. Where the authors' code counts the slots whose d
    is small, C - int(share C) of C + 1, it protects one slot more than the share; here the share is what is protected.
    Its prefill in strides is `kvx.prefill(..., prefill_chunk=n, compress="chunk")`. Parts: mean column mass behind
    deviation / uniform, or beside the prompt / drop / after the prompt or chunk, every step.

    Args:
        budget: slots per KV head, or a share of the prompt.
        mode: "encoding_decoding": the total, generated tokens included; "encoding": of the prompt alone, once, and
            generated tokens come on top; "decoding": of the generated tokens, and the prompt comes on top, whole.
        share: of the budget, for the tokens whose attention deviates most; None: the code's 0.1 for mode "encoding",
            0.3 where it acts while decoding.
        sinks: first tokens kept for ever (in mode "decoding" the whole prompt is).
        recent: newest tokens, protected as if theirs was the largest deviation.
    """
    kept = amount(budget)
    one_of(mode, "mode", MODES)
    part = fraction((0.1 if mode == "encoding" else 0.3) if share is None else share, "share")
    if part == 1:
        raise BadInput(f"share={share!r} leaves no token to evict; allowed: a number from 0 to below 1")
    first = whole(sinks, "sinks", least=0) if mode != "decoding" else 0
    window = max(int(part * kept.count) if isinstance(kept, Slots) else 0, whole(recent, "recent", least=1))
    check_protected(kept, first + window + 1, f"sinks={first}, recent={recent}, share={part} and one to choose from")
    evict = Evict(
        ColumnMass(average="mean"),
        BesidePrompt(kept) if mode == "decoding" else Uniform(kept),
        sinks=Share(1.0) if mode == "decoding" else Slots(first),
        recent=Slots(recent),
        first=Deviation(),
        share=part,
        every=0 if mode == "encoding" else 1,
    )
    return Policy((evict,))
