"""StreamingLLM (2023): a few sinks plus a sliding window, with positions renumbered inside the cache."""

from kvx.parts.amounts import Slots, amount, whole
from kvx.parts.budgets import Uniform, check_protected
from kvx.parts.evict import Evict
from kvx.parts.renumber import Renumber
from kvx.parts.scores import Recency
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def streaming_llm(budget: int | float, sinks: int = 4, renumber: bool = True) -> Policy:
    """Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks".

        keep positions [0, sinks) and the last C - sinks;    slot j of the cache is rotated at position j

    After the prompt and after every step, so that generation goes on for ever in constant memory. Parts: recency /
    uniform / drop / every step; renumbered positions.

    Args:
        budget: slots per KV head, sinks included, or a share of the prompt; the total, generated tokens included.
        sinks: first tokens kept for ever.
        renumber: rotate keys and queries by their place in the cache (the paper); False keeps true positions, as many
            baselines do.
    """
    kept = amount(budget)
    check_protected(kept, whole(sinks, "sinks", least=0) + 1, f"sinks={sinks} and the newest token")
    stages = (Evict(Recency(), Uniform(kept), sinks=Slots(sinks), every=1),)
    return Policy((*stages, Renumber()) if renumber else stages)
