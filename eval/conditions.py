"""Under which conditions models are measured: what an evaluation and a search say alike."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from kvx.section import Count, Section, Whole


@dataclass(frozen=True, kw_only=True)
class Conditions(Section):
    """Samples, batches, and the model's dtype.

    Attributes:
        seed: of samples, calibration and proposals.
        batch: samples at a time; on several devices a multiple of their number is run.
        chat: write prompts in the model's chat template.
        dtype: of weights and cache; None: float32 on a CPU, bfloat16 on accelerators.
        text: a folder of .txt or .md files for haystacks, calibration and held-out documents; None: Python's
            documentation.
        calibration: texts and their length in tokens, for policies that learn.
    """

    seed: Whole = 0
    batch: Count = 4
    chat: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    text: str | None = None
    calibration: tuple[Count, Count] = (4, 1024)

    @property
    def conditions(self) -> dict[str, Any]:
        """They, by name, for another job under the same ones."""
        return {field.name: getattr(self, field.name) for field in fields(Conditions)}
