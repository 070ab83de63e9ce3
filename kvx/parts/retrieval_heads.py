"""The search for retrieval heads: KV heads that look back at earlier copies of the present token, on random text."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvx.context import Activations
from kvx.kernels.prefill_attention import prefill_attention
from kvx.pytree import pytree, static


@pytree
class RetrievalHeads:
    """Echo and induction heads (RazorAttention, Tang et al. 2024, section 3.2).

    On `repeats` copies of a block of n random tokens, with P the attention of one query head and i a token of any copy
    but the first, d copies back:

        echo = mean_i sum_d P[i, i - d n],    induction = mean_i sum_d P[i, i - d n + 1]

    the probability that goes to the same token, and to the one that came after it. A KV head scores the maximum over
    its query heads, since it is kept if any of them retrieves. Chosen are the highest induction scores and the highest
    echo scores among all heads of the model. (The released forms divide by the whole square or by other counts; only
    ranks matter.)

    Attributes:
        induction: share of the model's KV heads to choose by induction.
        echo: share to choose by echo; both round up.
        block: tokens in a block; less where so many copies do not fit the model's positions.
        repeats: copies.
        bos: a token id to put before them; None: nothing.
    """

    induction: float = static(0.14)
    echo: float = static(0.01)
    block: int = static(2500)
    repeats: int = static(4)
    bos: int | None = static(None)

    def probe(self, vocabulary: int, longest: int, seed: int) -> Int[np.ndarray, "T"]:
        """The text: distinct tokens in a block, where the vocabulary has enough."""
        front = [] if self.bos is None else [self.bos]
        block = min(self.block, (longest - len(front)) // self.repeats)
        drawn = np.random.default_rng(seed).choice(vocabulary, block, replace=vocabulary < block)
        return np.asarray([*front, *np.tile(drawn, self.repeats)], np.int32)

    def digest(self, activations: Activations) -> Float[Array, "2 G"]:
        """Induction and echo scores of a layer's KV heads, from the diagonals alone: no S x S array exists."""
        queries, keys, spec = activations.queries, activations.keys, activations.spec
        start, length = int(self.bos is not None), keys.shape[1]
        block = (length - start) // self.repeats
        lse = _log_sums(activations)

        def given(back: int, first: int) -> Float[Array, "G R"]:
            """Summed probability that tokens from `first` on give to the one so many places back."""
            if spec.window is not None and back >= spec.window:
                return jnp.zeros(queries.shape[:2], jnp.float32)
            pairs = (queries[:, :, first:], keys[:, first - back : length - back])
            logits = spec.scale * jnp.einsum("grtd,gtd->grt", *pairs, preferred_element_type=jnp.float32)
            if spec.softcap is not None:
                logits = spec.softcap * jnp.tanh(logits / spec.softcap)
            return jnp.sum(jnp.exp(logits - lse[:, :, first:]), axis=-1)

        rows = length - start - block
        earlier = [(copies * block, start + copies * block) for copies in range(1, self.repeats)]
        induction = sum(given(back - 1, first) for back, first in earlier) / rows
        echo = sum(given(back, first) for back, first in earlier) / rows
        return jnp.max(jnp.stack([induction, echo]), axis=-1)

    def choose(self, digests: list[Float[Array, "2 G"]]) -> tuple[tuple[int, int], ...]:
        """(layer, KV head) of every retrieval head, in order; in a tie the lower one."""
        heads = [(layer, head) for layer, scores in enumerate(digests) for head in range(scores.shape[1])]
        induction, echo = np.concatenate([np.asarray(scores) for scores in digests], axis=1)
        chosen: set[Any] = set()
        for share, scores in ((self.induction, induction), (self.echo, echo)):
            count = math.ceil(share * len(heads) - 1e-9)
            # By index and not by the value of the last one in, which ties would share.
            chosen |= {heads[index] for index in np.argsort(-scores, kind="stable")[:count]}
        return tuple(sorted(chosen))


def _log_sums(activations: Activations) -> Float[Array, "G R T"]:
    """Log-sum-exp of every token's causal attention."""
    queries, keys, spec = activations.queries[None], activations.keys[None], activations.spec
    positions = jnp.arange(keys.shape[2], dtype=jnp.int32)
    # Values of one channel, since nobody reads the output.
    values = jnp.zeros((*keys.shape[:3], 1), keys.dtype)
    masking = {"scale": spec.scale, "window": spec.window, "softcap": spec.softcap}
    spots = jnp.broadcast_to(positions, keys.shape[:3])
    return prefill_attention(queries, keys, values, positions[None], spots, **masking)[1][0]
