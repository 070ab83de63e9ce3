"""ShadowKV (2024): low-rank keys before rotation, values on the host, landmarks choose which chunks come back."""

from kvx.errors import BadInput
from kvx.parts.amounts import Slots, amount, whole
from kvx.parts.shadowing import Shadowing
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def shadowkv(budget: int | float, rank: int = 160, chunk: int = 8, outliers: int = 48, local: int = 4) -> Policy:
    """Sun et al. 2024, "ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference".

        K = U_r B,    m_j = mean of the c rotated keys of chunk j,    u_j = min_i cos(m_j, k_i)
        s_j = max_h softmax_j(scale q_h . m_j),    read the top b / c chunks by s: keys RoPE(U_r B), values copied

    The factors are of the keys before rotation, of all KV heads side by side. The o chunks of the smallest u, the last
    l whole ones with what follows them, and generated tokens are exact and always read. Nothing is evicted: values move
    to the host. A chunk that was read at the step before is still there. A head whose chunks the budget all holds is
    exact. The model's own scale enters s (the authors' code always divides by sqrt(128)). Parts: low rank over one
    prompt, joint heads, before rotation / landmarks / current query / softmax, max over the group / top k / host.

    After a selection that keeps different tokens a head (snapkv), a row of the factored matrix joins different tokens:
    right at full rank, but less alike than one token's keys.

    Args:
        budget: tokens of chosen chunks read per KV head and step, in whole chunks, or a share of the prompt; outliers,
            the local rest and generated tokens come on top.
        rank: of the factors, at most KV heads times head dim.
        chunk: c.
        outliers: o, chunks a KV head.
        local: l, chunks.
    """
    whole(chunk, "chunk", least=1)
    kept = amount(budget)
    if isinstance(kept, Slots) and kept.count < chunk:
        raise BadInput(f"budget={kept.count} is smaller than one chunk; allowed: at least chunk={chunk}")
    return Policy(
        (
            Shadowing(
                kept,
                whole(rank, "rank", least=1),
                chunk,
                whole(outliers, "outliers", least=0),
                whole(local, "local", least=0),
            ),
        )
    )
