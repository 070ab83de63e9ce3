"""One stage of training as frozen dataclasses: its losses, its optimizer, what it trains and in which precision."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from kvx.errors import BadInput
from kvx.section import Count, Positive, Range, Section, Share, Weight, Whole

Amount = Share | Whole
"""A float is a share of a stage's steps, an integer a number of steps."""

Remat = Literal["none", "dots", "full"]
"""What a layer's backward pass recomputes: nothing, so that all activations are kept; everything but the results of its
projections, attention's scores above all; or everything, so that only the layer's input is kept."""


WEIGHTS = ("ce", "kl", "reverse_kl", "js", "hidden", "relation")
"""Of a `LossSection`, those that weigh a loss of text."""


@dataclass(frozen=True)
class LossSection(Section):
    """Weights of the losses that are added (`kvx.train.losses`), each a mean per token.

    Attributes:
        ce: cross-entropy of the text.
        kl: KL(teacher || student) of the logits.
        reverse_kl: KL(student || teacher).
        js: Jensen-Shannon divergence.
        hidden: squared distance of hidden states after each layer.
        relation: MiniLM's relations of queries, keys and values in the last layer.
        temperature: of the three divergences.
        beta: of DPO.
        chunk: tokens whose logits exist at a time.
    """

    ce: Weight = 0.0
    kl: Weight = 1.0
    reverse_kl: Weight = 0.0
    js: Weight = 0.0
    hidden: Weight = 0.0
    relation: Weight = 0.0
    temperature: Positive = 1.0
    beta: Positive = 0.01
    chunk: Count = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(getattr(self, name) for name in WEIGHTS):
            raise BadInput(f"{', '.join(WEIGHTS[:-1])} and {WEIGHTS[-1]} are all 0; allowed: one of them above 0")


@dataclass(frozen=True)
class StageSection(Section):
    """One stage of training, with an optimizer of its own.

    Attributes:
        kind: "distill": the losses of `loss` on text; "dpo": preferences, against the student as the stage begins.
        tokens: to train on, padding included; or
        steps: of the optimizer: one of the two.
        batch: sequences (dpo: pairs) of a step, over all devices and accumulated parts.
        accumulate: parts that a batch is cut into, one after the other.
        learning_rate: its peak.
        schedule: after the warmup: "cosine" to 0; "constant"; "wsd": constant, then 1 - sqrt over the last `decay`.
        warmup: steps of linear growth from 0 (an integer), or their share (a float).
        decay: as warmup, of "wsd" alone.
        weight_decay: of AdamW.
        betas: of AdamW.
        clip: global norm of the gradient; None: as it is.
        loss: weights of the losses.
        train: "all"; "attention": what was converted; or a regular expression found in the parameters' paths.
        remat: which activations of a layer are recomputed in the backward pass, to save memory.
        compute_dtype: of the student's pass; its master weights are float32.
        ema: decay of a running mean of the weights, which is then what is judged and saved; None: none.
    """

    kind: Literal["distill", "dpo"] = "distill"
    tokens: Count | None = None
    steps: Count | None = None
    batch: Count = 8
    accumulate: Count = 1
    learning_rate: Positive = 8e-5
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup: Amount = 0.01
    decay: Amount = 0.1
    weight_decay: Weight = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    clip: Positive | None = 1.0
    loss: LossSection = LossSection()
    train: str = "all"
    remat: Remat = "full"
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    ema: Annotated[float, Range(0, 1, open_low=True, open_high=True)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.tokens is None) == (self.steps is None):
            raise BadInput(f"tokens={self.tokens} and steps={self.steps}; allowed: one of the two")
        if self.kind == "dpo" and self.steps is None:
            raise BadInput(f"tokens={self.tokens} of a dpo stage; allowed: steps")
        self._check_loss()
        if self.batch % self.accumulate:
            raise BadInput(f"accumulate={self.accumulate}; allowed: a divisor of batch={self.batch}")
        try:
            re.compile(self.train)
        except re.error as error:
            raise BadInput(f"train={self.train!r}, which is no regular expression: {error}") from None

    def _check_loss(self) -> None:
        """Nothing is set that this kind of stage does not read."""
        unread = ("beta",) if self.kind == "distill" else (*WEIGHTS, "temperature")
        default = LossSection()
        for name in unread:
            value = getattr(self.loss, name)
            if value != getattr(default, name):
                read = "beta in a dpo stage" if self.kind == "distill" else "beta and chunk"
                raise BadInput(f"loss.{name}={value} in a {self.kind} stage, which does not read it; allowed: {read}")

    def total_steps(self, sequence: int) -> int:
        """Steps of the optimizer.

        Args:
            sequence: tokens of a row.
        """
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None, "one of the two is there"
        return max(1, self.tokens // (self.batch * sequence))
