"""PyramidInfer (2024): the prompt gets shorter from layer to layer, by a vote of its last tokens."""

from kvx.errors import BadInput
from kvx.parts.amounts import fraction, whole
from kvx.parts.cut_blocks import CutBlocks
from kvx.parts.thin import Thin
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def pyramidinfer(
    rate: float = 0.9,
    recent: float = 0.2,
    sinks: int = 4,
    least: int = 64,
    rise: float = 1.2,
    interval: int = 1,
    block: int | None = 16,
    share: float = 0.9,
    last: float = 0.1,
) -> Policy:
    """Yang et al. 2024, "PyramidInfer: Pyramid KV Cache Compression for High-throughput LLM Inference".

        rho(l) = (1 - rate) (cos(pi l / L) + 1) / 2 + rate,    R = floor(recent * prompt)
        after layer l, of the C tokens before the last R + 1, the floor(rho(l) C) with the most votes go on
        of each `block` generated tokens that leave the last R + 1, max(1, floor(block * share * rho(l))) stay, with
        `last` for `rate`

    Lost tokens leave the residual stream: later layers neither compute nor store them. The vote of a token is the
    probability it gets from the last R + 1 tokens, mean over heads, the later ones counting more. Blocks follow one
    another without a gap; by the released code's counter one token between two blocks would never be voted on.
    Parts: thin / cut blocks.

    Args:
        rate: towards what the share of tokens that go on falls (the paper's 7B and 8B: 0.9; 13B: 0.8; 70B: 0.9).
        recent: share of the prompt whose tokens vote and stay.
        sinks: first tokens that are kept.
        least: tokens before the recent ones that are never cut below.
        rise: weight of the last token's vote, that of the first being 1.
        interval: tokens leave after every so many layers (13B: 2; 70B: 3).
        block: generated tokens that are cut at a time; None: all stay.
        share: of a block, what stays in the first layer.
        last: towards what part of that the share falls.
    """
    rates = {"rate": rate, "recent": recent, "share": share, "last": last}
    rate, recent, share, last = (fraction(value, name) for name, value in rates.items())
    for name, value in (("rate", rate), ("recent", recent)):
        if value == 0 or (name == "recent" and value == 1):
            raise BadInput(f"{name}={value} is out of range; allowed: a share between 0 and 1")
    if isinstance(rise, bool) or not isinstance(rise, (int, float)) or not 0 < rise < float("inf"):
        raise BadInput(f"rise={rise!r} is out of range; allowed: a positive number")
    thin = Thin(
        recent,
        rate,
        whole(sinks, "sinks", least=0),
        whole(least, "least", least=0),
        float(rise),
        whole(interval, "interval", least=1),
    )
    if block is None:
        return Policy((thin,))
    return Policy((thin, CutBlocks(recent, whole(block, "block", least=2), share, last, float(rise))))
