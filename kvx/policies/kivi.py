"""KIVI (2024): 2-bit codes, keys grouped per channel and values per token, behind a full-precision tail."""

from kvx.errors import BadInput
from kvx.kernels.quantize_pack import BITS
from kvx.parts.amounts import one_of, whole
from kvx.parts.quantize import Quantize
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def kivi(bits: int | None = 2, group: int = 32, residual: int = 128) -> Policy:
    """Liu et al. 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache".

        x^ = c s + m,  c = round((x - m) / s),  s = (max - min) / (2^b - 1)
        keys: a group is n tokens of one channel;    values: a group is n channels of one token

    The newest tokens stay exact: keys until R of them have come, values until R newer ones have. Nothing is evicted.
    Parts: no transform / channel x n tokens, token x n channels / uniform / by block (keys), one by one (values). After
    a selection, groups are n kept tokens in a row; after one that acts at every step (h2o), whole groups leave.

    Args:
        bits: 2, 3, 4 or 8; None: no codes, the full cache. The authors suggest 4 for models whose query heads share KV
            heads.
        group: n tokens of a channel, or channels of a token, that share a scale and a minimum; divides the head dim.
        residual: R, a multiple of `group`.
    """
    one_of(bits, "bits", (*BITS, None))
    whole(group, "group", least=1)
    if whole(residual, "residual", least=1) % group:
        raise BadInput(f"residual={residual} is not a multiple of group={group}; allowed: multiples of it")
    return Policy((Quantize(bits, group, residual),))
