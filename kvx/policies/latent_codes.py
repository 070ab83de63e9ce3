"""Latent codes: latents in few bits, rotary keys exact, as in FlashMLA's 8-bit cache; for latent attention."""

from kvx.kernels.quantize_pack import BITS
from kvx.parts.amounts import one_of, whole
from kvx.parts.code_latents import CodeLatents
from kvx.policies.registry import recipe
from kvx.policy import Policy
from kvx.stores.coded import Code


@recipe
def latent_codes(bits: int | None = 8, group: int | None = None) -> Policy:
    """DeepSeek 2025, FlashMLA's layout of a token: the latent in 8-bit codes with a scale a group, 16-bit rotary key.

        c^ = q s + m,  q = round((c - m) / s),  s = (max - min) / (2^b - 1) over n channels of one token's latent

    Uniform codes in place of the kernel's float8, so that fewer bits can be asked for. Layers with ordinary attention
    keep full precision, and a model that has only such is refused. Nothing is evicted.
    Parts: no transform / token x n channels / uniform / the rotary key is protected / immediate.

    Args:
        bits: 2, 3, 4 or 8; None: no codes, the full cache.
        group: n, channels that share a scale and a minimum; None: the whole latent, with 2 bits half of it. Latents
            from a singular value decomposition fall steeply from channel to channel and want small groups.
    """
    one_of(bits, "bits", (*BITS, None))
    return Policy((CodeLatents(Code(bits, None if group is None else whole(group, "group", least=1))),))
