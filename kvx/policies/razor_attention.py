"""RazorAttention (2024): the whole past for retrieval heads; sinks, a buffer and one mean token for all others."""

from typing import Any

from kvx.errors import BadInput
from kvx.parts.amounts import Slots, fraction, whole
from kvx.parts.demote import Demote
from kvx.parts.evict import Evict
from kvx.parts.growing import Growing
from kvx.parts.head_classes import HeadClasses
from kvx.parts.mean_token import MeanToken
from kvx.parts.retrieval_heads import RetrievalHeads
from kvx.parts.scores import Recency
from kvx.policies.full import full
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def razor_attention(
    buffer: int = 4000,
    ratio: int | None = 5,
    sinks: int = 4,
    heads: tuple[tuple[int, int], ...] | None = None,
    induction: float = 0.14,
    echo: float = 0.01,
    compensate: bool = True,
    block: int = 2500,
    bos: int | None = None,
) -> Policy:
    """Tang et al. 2024, "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads".

        retrieval heads keep every token; others, at N tokens, the first `sinks` and the last max(buffer, N // ratio),
        and of the D between:    k_c = mean k, v_c = mean v,
        o = (|D| exp(q.k_c) v_c + sum_kept exp(q.k_j) v_j) / (|D| exp(q.k_c) + sum_kept exp(q.k_j))

    After the prompt and after every step, without looking at attention. Retrieval heads are the top `induction` and
    the top `echo` of all KV heads by how they read random text that repeats: `kvx.calibrate(policy, model)`, which
    needs no batches, finds them once and for all. Parts: head classes (full | recency / growing / mean token / after
    prefill, every step).

    With a share p of retrieval heads, a KV head has on average p N + (1 - p) (sinks + max(buffer, N // ratio) + 1)
    slots: the figure to compare with another method's budget.

    Args:
        buffer: newest tokens that the other heads keep at least.
        ratio: of the text to the buffer, once that is longer; None: the buffer never grows.
        sinks: first tokens that every head keeps.
        heads: the retrieval heads as (layer, KV head) pairs, which calibration fills in; () for none.
        induction: share of KV heads chosen by induction score (they read what came after an earlier copy).
        echo: share chosen by echo score (they read the earlier copy).
        compensate: False drops what leaves the buffer, without a mean token.
        block: random tokens of calibration, repeated four times; fewer where the model has fewer positions.
        bos: token id to put before them.
    """
    least = whole(buffer, "buffer", least=1)
    first = whole(sinks, "sinks", least=0)
    share = None if ratio is None else whole(ratio, "ratio", least=1)
    if not isinstance(compensate, bool):
        raise BadInput(f"compensate={compensate!r} is not offered; allowed: True, False")
    search = RetrievalHeads(
        fraction(induction, "induction"),
        fraction(echo, "echo"),
        whole(block, "block", least=2),
        bos=None if bos is None else whole(bos, "bos", least=0),
    )
    stream = Evict(Recency(), Growing(first, least, share), sinks=Slots(first), every=1)
    other = Policy((Demote(stream, MeanToken()),) if compensate else (stream,))
    named = None if heads is None else (_checked(heads),)
    return Policy((HeadClasses.of((full(), other), named, search if named is None else None),))


def _checked(heads: Any) -> tuple[tuple[int, int], ...]:
    """The heads in order, each once."""
    pairs = isinstance(heads, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in heads)
    if not pairs:
        raise BadInput(f"heads={heads!r} is not a tuple of (layer, KV head) pairs; allowed: ((0, 1), (3, 0)), or ()")
    found = [(whole(layer, "heads", least=0), whole(head, "heads", least=0)) for layer, head in heads]
    if len(set(found)) < len(found):
        raise BadInput(f"heads={heads!r} names a head twice; allowed: each once")
    return tuple(sorted(found))
