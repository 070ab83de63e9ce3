"""Cost measured and told from programs: bytes of a cache by kind, the peak of a prefill, times of prefill and step."""

from kvx.eval.cost.measured import costs, lap

__all__ = ["costs", "lap"]
