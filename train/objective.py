"""What a stage minimises: the pass of student and teacher over a batch, and the weighted sum of a job's losses."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvx.decoder import Decoder
from kvx.mesh import Placement
from kvx.train.forward import Pass, run
from kvx.train.losses import LOGIT_LOSSES, hidden_loss, log_probabilities, logit_losses, next_tokens
from kvx.train.preferences import dpo_loss
from kvx.train.relations import relation_loss
from kvx.train.stage import LossSection, Remat, StageSection
from kvx.train.step import Objective

RELATED = ("queries", "keys", "values")


def objective(stage: StageSection, placement: Placement | None = None) -> Objective:
    """Of a stage, on a mesh."""
    kind = Preference if stage.kind == "dpo" else Distillation
    return kind(stage.loss, placement, stage.remat)


def needs_teacher(stage: StageSection) -> bool:
    """Whether it compares the student with another model."""
    loss = stage.loss
    return stage.kind == "dpo" or any((loss.kl, loss.reverse_kl, loss.js, loss.hidden, loss.relation))


@dataclass(frozen=True)
class Distillation:
    """The losses of text, each times its weight; all are means over the same positions.

    Attributes:
        loss: weights and settings.
        placement: of the mesh.
        remat: of the student's layers.
    """

    loss: LossSection
    placement: Placement | None = None
    remat: Remat = "none"

    def __call__(
        self, student: Decoder, teacher: Decoder | None, batch: Any
    ) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Float[Array, ""]]]:
        """See `kvx.train.step.Objective`."""
        targets, counted = next_tokens(batch.tokens, batch.segments, batch.mask)
        mine = self._run(student, batch, self.remat)
        guide = None if teacher is None else jax.lax.stop_gradient(self._run(teacher, batch, "none"))
        names = [name for name in LOGIT_LOSSES if getattr(self.loss, name)]
        terms = logit_losses(
            mine.last,
            student.unembed,
            targets,
            counted,
            names,
            None if guide is None else guide.last,
            None if teacher is None else teacher.unembed,
            temperature=self.loss.temperature,
            chunk=_chunk(self.loss, self.placement),
        )
        if guide is not None and mine.hidden is not None and guide.hidden is not None:
            terms["hidden"] = hidden_loss(mine.hidden, guide.hidden, counted)
        if guide is not None and mine.heads is not None and guide.heads is not None:
            related = [
                relation_loss(getattr(mine.heads, part), getattr(guide.heads, part), batch.segments, counted)
                for part in RELATED
            ]
            terms["relation"] = sum(related[1:], related[0])
        weighted: list[Array] = [getattr(self.loss, name) * term for name, term in terms.items()]
        total = sum(weighted, jnp.float32(0))
        return total, jnp.sum(counted, dtype=jnp.float32), terms

    def _run(self, model: Decoder, batch: Any, remat: Remat) -> Pass:
        return run(
            model,
            batch.tokens,
            batch.segments if batch.packed else None,
            batch.positions,
            placement=self.placement,
            remat=remat,
            hidden=self.loss.hidden > 0,
            heads=self.loss.relation > 0,
        )


@dataclass(frozen=True)
class Preference:
    """DPO: the student against the teacher, which is the student as the stage began; a mean over pairs."""

    loss: LossSection
    placement: Placement | None = None
    remat: Remat = "none"

    def __call__(
        self, student: Decoder, teacher: Decoder | None, batch: Any
    ) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Float[Array, ""]]]:
        """See `kvx.train.step.Objective`."""
        assert teacher is not None, "preferences are learned against a reference"
        policy = self._answer(student, batch.chosen, self.remat), self._answer(student, batch.rejected, self.remat)
        reference = self._answer(teacher, batch.chosen, "none"), self._answer(teacher, batch.rejected, "none")
        losses, margins = dpo_loss(*policy, *reference, self.loss.beta)
        right = jnp.mean((margins > 0).astype(jnp.float32))
        pairs = jnp.float32(losses.shape[0])
        return jnp.mean(losses), pairs, {"margin": jnp.mean(margins), "preferred": right}

    def _answer(self, model: Decoder, texts: Any, remat: Remat) -> Float[Array, "B"]:
        """log-probability of each row's answer given its prompt."""
        targets, counted = next_tokens(texts.tokens, texts.segments, texts.mask)
        last = run(model, texts.tokens, texts.segments, texts.positions, placement=self.placement, remat=remat).last
        found = log_probabilities(last, model.unembed, targets, chunk=_chunk(self.loss, self.placement))
        return jnp.sum(jnp.where(counted, found, 0.0), axis=1)


def text_loss(
    model: Decoder, batch: Any, placement: Placement | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of a batch of text in nats per token, and how many tokens count."""
    loss, count, _ = Distillation(LossSection(ce=1.0, kl=0.0), placement)(model, None, batch)
    return loss, count


def _chunk(loss: LossSection, placement: Placement | None) -> int:
    """The job's chunk is what one device holds; rows lie on several."""
    if placement is None:
        return loss.chunk
    shape = placement.mesh.shape
    return loss.chunk * shape["data"] * shape["fsdp"]
