"""The tempered store: contexts that were read apart are attended under a temperature, their total mass damped."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvx.kernels.decode_attention import slot_logits, ungroup
from kvx.kernels.logits import partial_softmax, slot_probabilities, softmax_rows
from kvx.kernels.merge_partials import Partial
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.stores.dense import Dense
from kvx.stores.over_dense import OverDense

CONTEXT = "context"
"""The statistic that says of a slot whether its token belongs to a context."""


@pytree
class Tempered(OverDense):
    """A dense store that reads contexts and other tokens as two softmaxes (Yang et al. 2025, APE, section 4).

    With l the layer's logits, contexts C and other tokens O:

        L_c = log sum_C exp(l_j / T),   L_o = log sum_O exp(l_j),   (w_c, w_o) = softmax(S T L_c, L_o)

    The mix of the two outputs is one softmax over all slots, with l_j / T + (S T - 1) L_c for those of contexts: so
    values are read once, and the probabilities and the log-sum-exp are those of that softmax. All in float32.

    Several contexts may hold a token at the same position: nothing here tells slots by position.

    Attributes:
        inner: all slots; its statistics say which are a context's.
        temperature: T.
        scale: S.
    """

    inner: Dense
    temperature: float = static()
    scale: float = static()

    def read(self, query: Query) -> Partial:
        return ungroup(partial_softmax(self._logits(query), self.inner.tokens().attended_values), query.spec.group)

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        logits = self._logits(query)
        return slot_probabilities(logits.reshape(*lse.shape, -1), lse)

    def _logits(self, query: Query) -> Float[Array, "B G M C"]:
        """What the one softmax is over; M = R T, query heads and queries merged as `slot_logits` does."""
        logits = slot_logits(
            query.rotated, self.inner.tokens().rotated_keys, query.positions, self.inner.slots, **query.masking
        )
        context = self.inner.stats[CONTEXT][:, :, None]
        tempered = jnp.where(context, logits / self.temperature, -jnp.inf)
        _, mass = softmax_rows(tempered)
        # A query that sees no context has -inf, which minus infinity would make nan.
        mass = jnp.where(jnp.isfinite(mass), mass, 0.0)
        return jnp.where(context, tempered + (self.scale * self.temperature - 1) * mass[..., None], logits)
