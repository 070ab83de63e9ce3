"""The sparse read on a TPU: what was chosen is a list of pages like any other, of whole tiles of slots."""

from kvx.kernels.ragged_decode_attention.mosaic_tpu import Tuning, attend, refusal

__all__ = ["Tuning", "attend", "refusal"]
