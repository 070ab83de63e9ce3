"""MiniCache (2024): neighbouring deep layers share one direction a token, and keep a norm each."""

from kvx.parts.amounts import fraction, one_of
from kvx.parts.pair_up import PairUp
from kvx.policies.registry import recipe
from kvx.policy import Policy
from kvx.stores.directions import Blend


@recipe
def minicache(
    start: float = 0.5, t: float = 0.6, gamma: float | None = 0.05, cap: float = 0.05, apart: str = "distinct"
) -> Policy:
    """Liu et al. 2024, "MiniCache: KV Cache Compression in Depth Dimension for Large Language Models".

        e = sin((1 - t) w) / sin(w) x/|x| + sin(t w) / sin(w) y/|y|,    x^ = |x| e,    y^ = |y| e
        apart: cos w - min < gamma (max - min)

    x, y are the vectors of the upper and the lower layer of a pair at one token and KV head, w the angle between them;
    keys and values each for themselves. The most distant pairs of the prompt are kept as they are. A token that is
    decoded is seen exactly by both layers, and merges when the next one comes (apart only if its two vectors are
    opposite and a row is free). No token leaves, so there is no budget; with 16-bit keys of 128 channels a pair takes
    0.52 of two layers, and what is kept apart on top. Bytes read per step are not saved, since each of the two layers
    reads the shared directions. All rests on neighbouring layers being alike, head by head: a model whose cosines are
    near 0, as SmolLM2-135M's are, loses much.

    Where the paper leaves its formula: least and greatest are per head and row (a peer's are over the batch); the
    printed rule keeps the closest pairs apart, against its text and figure, and is `apart="alike"`; rows are bounded by
    `cap`; near w = 0 the weights are 1 - t and t (a peer mixes vectors of different length there). Norms are float32.
    Parts: slerp / two layers / kept apart by range / after prefill, every step.

    Args:
        start: share of the layers that are left as they are; 1.0 leaves all.
        t: from 0, the upper layer's direction, to 1, the lower layer's.
        gamma: share of each head's range of cosines within which pairs stay apart; None: all pairs do, lossless.
        cap: pairs kept apart at most, as a share of the tokens.
        apart: "distinct" pairs, or the "alike" of the printed rule: angle - min < gamma (max - min).
    """
    if gamma is not None:
        gamma = fraction(gamma, "gamma")
    ends = one_of(apart, "apart", ("distinct", "alike"))
    blend = Blend(fraction(t, "t"), gamma, fraction(cap, "cap"), ends)
    return Policy((PairUp(blend, fraction(start, "start")),))
