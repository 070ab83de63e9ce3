"""The stage that stores latents in few bits (grid 2), for models with latent attention."""

from collections.abc import Mapping

from jaxtyping import Array, Bool

from kvx.context import Context, Spec
from kvx.decoder import AttentionSpec
from kvx.evidence import Evidence
from kvx.pytree import pytree, static
from kvx.stage import Stage
from kvx.stores.coded import Code
from kvx.stores.coded_latent import CodedLatent
from kvx.stores.dense import Dense
from kvx.tokens import Tokens


@pytree
class CodeLatents(Stage):
    """Latents by token x n channels, written as tokens come; rotary keys, and layers without latents, stay as they are.

    Attributes:
        code: how a latent is written; no bits: the full-precision cache.
    """

    code: Code = static()
    stores = True

    def objection(self, layers: Mapping[int, AttentionSpec]) -> str | None:
        if any(attention.latent for attention in layers.values()):
            return None
        return "codes latents, but no layer of the model has latent attention; allowed: a model that has"

    def capacity(self, spec: Spec, layer: int) -> None:
        """No limit; refuses latents that do not divide into groups and words.

        Raises:
            BadInput: naming the hyperparameter.
        """
        if spec.attention.latent:
            self.code.check(spec.attention.value_dim, "latents")

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> CodedLatent | Dense:
        if self.code.bits is None or not context.spec.attention.latent:
            return Dense.pack(tokens.with_form(rotated=True), mask, capacity)
        return CodedLatent.pack(tokens, mask, capacity, code=self.code)
