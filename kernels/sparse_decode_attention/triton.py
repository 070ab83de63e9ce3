"""The sparse read on a GPU: what was chosen is a list of pages like any other, or of single rows."""

from kvx.kernels.ragged_decode_attention.triton import CANDIDATES, Tuning, attend, refusal

__all__ = ["CANDIDATES", "Tuning", "attend", "refusal"]
