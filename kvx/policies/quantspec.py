"""QuantSpec (2025): one 8-bit cache in two nibbles; the draft reads the upper ones, the verifier both."""

from kvx.errors import BadInput
from kvx.kernels.quantize_pack import BITS
from kvx.parts.amounts import one_of, whole
from kvx.parts.nest import Nest
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def quantspec(bits: int | None = 4, group: int = 128, gamma: int = 5) -> Policy:
    """Tiwari et al. 2025, "QuantSpec: Self-Speculative Decoding with Hierarchical Quantized KV Cache".

        u = round((x - m) / s),  m = min,  s = (max - min) / (2^b - 1);    l = round((x - m - u s) / (s / 2^b))
        draft: u s + m;    target: u s + l s / 2^b + m;    l from -2^(b - 1) to 2^(b - 1) - 1
        keys: a group is n tokens of one channel;    values: a group is n channels of one token

    Two exact buffers of n tokens hold the newest: when the second is full, the first is coded, so that at least n stay
    exact and rejected drafts never touch codes. (The authors' engine codes at the prompt only; the paper's text is
    followed. 2n + gamma entries are enough, one less than it takes.) `kvx.speculate` drafts with the upper nibbles and
    verifies with both; under `kvx.generate` it is an 8-bit cache. The authors also quantize the draft's weights; here
    both read the same.
    Parts: no transform / channel x n tokens, token x n channels / uniform, nested / by block.

    Args:
        bits: b = 2, 3, 4 or 8, the width of either code; None: no codes, the full cache.
        group: n tokens of a channel share a scale and a minimum, and n channels of a token (all of them, if there are
            fewer); divides wider heads.
        gamma: the most drafts that `kvx.speculate` may have verified at once; less than `group`.
    """
    one_of(bits, "bits", (*BITS, None))
    whole(group, "group", least=1)
    if whole(gamma, "gamma", least=0) >= group:
        raise BadInput(f"gamma={gamma} is not below group={group}; allowed: 0 to {group - 1}")
    return Policy((Nest(bits, group, gamma),))
