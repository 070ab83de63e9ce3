"""HashEvict (2024): before attention, the cached key whose hash is farthest from the query's makes room."""

from kvx.parts.amounts import amount, whole
from kvx.parts.budgets import check_protected
from kvx.parts.overwrite import Overwrite
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def hashevict(budget: int | float, bits: int = 16, sinks: int = 4, recent: int = 10, seed: int = 0) -> Policy:
    """Liu et al. 2024, "HashEvict: A Pre-Attention KV Cache Eviction Strategy using Locality-Sensitive Hashing".

        h(x) = 1[R x > 0], R (bits, D) of i.i.d. N(0, 1);    argmax_j |h(q) xor h(k_j)| leaves, before q attends

    Two codes differ in a share angle / pi of their bits, so the key at the widest angle leaves; its length plays no
    part, and no probabilities are needed. Distances add over the query heads of a KV head (our choice: the paper's
    models are not the source). q and k are hashed as they meet, after rotation. Also the prompt's tokens are worked
    through one by one. Parts: hash distance / uniform / drop / before every step.

    Args:
        budget: slots per KV head, or a share of the prompt; the total, the fresh token included.
        bits: length of a code; 4 bytes a slot for every 32 begun.
        sinks: first tokens kept for ever.
        recent: newest tokens that are protected.
        seed: of R, one matrix a layer.
    """
    kept = amount(budget)
    first, last = whole(sinks, "sinks", least=0), whole(recent, "recent", least=0)
    check_protected(kept, first + last + 1, f"sinks={sinks}, recent={recent} and one to overwrite")
    bits, seed = whole(bits, "bits", least=1), whole(seed, "seed", least=0, most=2**32 - 1)
    return Policy((Overwrite(kept, bits, first, last, seed),))
