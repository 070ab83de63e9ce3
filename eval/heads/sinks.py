"""Attention sinks: how much attention a few positions collect, and what their keys, values and residuals look like.

Definitions, with A the attention of one query head after softmax over T tokens, counted from 0 here:

    alpha_k = 1 / (T - k) sum_{i >= k} A[i, k],
    Sink_k(eps) = 100 mean over texts, layers and heads of [alpha_k > eps]

of Gu et al. 2024, "When Attention Sink Emerges in Language Models"; and, with s the sink's position and z the logits,

    value-state drain ||V_t W_O[h]||,    residual-state peak ||x_t||,    sink mass mean_{n > s} A[n, s],
    sink logit gap z[n, s] - mean_{s < i < n} z[n, i]

of Guo et al. 2024, "Active-Dormant Attention Heads". No T x T array exists: column sums come with attention, and logits
are looked at for a block of queries at a time.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvx.decoder import AttentionSpec, Block, Decoder
from kvx.errors import BadInput
from kvx.evidence import Requests
from kvx.inputs import checked_prompt
from kvx.kernels.decode_attention import slot_logits
from kvx.kernels.prefill_attention.columns import SUM
from kvx.loop import attend, project
from kvx.parts.amounts import whole
from kvx.prefill import embed
from kvx.query import Query

QUERIES = 128
"""Queries whose logits exist at a time."""

ByHead = tuple[Float[np.ndarray, "B _"], ...]
ByToken = tuple[Float[np.ndarray, "B _ T"], ...]
"""For each text and head, and of each token; layer by layer, since layers may differ in their heads."""


@dataclass(frozen=True, eq=False)
class Sinks:
    """What attention does with each token of B texts of T tokens, L layers, H query heads and G KV heads.

    Attributes:
        sink: s, the position that gaps and sink masses are about.
        alpha: mean attention that a token receives from the queries at it or after it, by query head. The last tokens'
            are means of few queries: they say little.
        hidden: L2 norms of the residual stream: the first layer's input, and each layer's output.
        keys, values: L2 norms of what a cache holds (keys rotated), by KV head.
        drains: ||V_t W_O[h]||, what a token's value would add to the residual stream, by query head; before the norm
            that a model may have behind attention, without the output's bias.
        gaps: sink logit gap, mean over the queries that see the sink and a token between, by query head.
        masses: sink mass, by query head.
    """

    sink: int
    alpha: ByToken
    hidden: Float[np.ndarray, "M B T"]
    keys: ByToken
    values: ByToken
    drains: ByToken
    gaps: ByHead
    masses: ByHead

    def rate(self, token: int = 0, above: float = 0.3) -> float:
        """Sink_k(eps) in percent: the share of all heads of which a token receives more than `above`.

        Not an attention mass, and nothing without its eps and T: the figure that is quoted is Sink_1 (the first token)
        at 0.3 and 64.

        Args:
            token: k, counted from 0.
            above: eps, in (0, 1).

        Raises:
            BadInput: a token that is not there, or an eps that even attention spread evenly exceeds at this T.
        """
        length = self.hidden.shape[-1]
        if not 0 <= token < length:
            raise BadInput(f"token={token} of texts of {length} tokens; allowed: 0 to {length - 1}")
        even = float(np.sum(1 / np.arange(token + 1, length + 1)) / (length - token))
        if not even < above < 1:
            raise BadInput(
                f"above={above} at {length} tokens, where token {token} receives {even:.3f} of attention that is "
                "spread evenly; allowed: more than that and less than 1"
            )
        received = np.concatenate([layer[..., token].reshape(-1) for layer in self.alpha])
        return 100 * float(np.mean(received > above))

    def against_the_rest(self) -> dict[str, Float[np.ndarray, "_"]]:
        """The sink's norm over the others' mean norm: of "hidden" (L + 1), "keys", "values" and "drains" (L each)."""
        found = {"hidden": np.stack([self._ratio(norms) for norms in self.hidden])}
        for name in ("keys", "values", "drains"):
            found[name] = np.stack([self._ratio(norms) for norms in getattr(self, name)])
        return found

    @property
    def peaks(self) -> Float[np.ndarray, "L"]:
        """Residual-state peak: the sink's norm after each layer over the largest of the others, mean over texts."""
        others = np.delete(self.hidden[1:], self.sink, axis=-1).max(axis=-1)
        return (self.hidden[1:, :, self.sink] / others).mean(axis=-1)

    def _ratio(self, norms: Float[np.ndarray, "*n T"]) -> np.floating:
        return norms[..., self.sink].mean() / np.delete(norms, self.sink, axis=-1).mean()


def attention_sinks(model: Decoder, texts: Int[np.ndarray, "B T"], *, sink: int = 0) -> Sinks:
    """Measure one batch of texts, all of exactly T tokens, with whatever the tokenizer puts in front of them.

    Args:
        texts: token ids; about 100 texts of 64 tokens for the figure that papers quote.
        sink: s, the position that gaps, masses and ratios are about.

    Raises:
        BadInput: ids that the model does not have, or fewer than three tokens from the sink on.
    """
    tokens, _ = checked_prompt(model, texts, None, (), 0)
    length = tokens.shape[1]
    whole(sink, "sink", least=0)
    if sink > length - 3:
        raise BadInput(f"sink={sink} of texts of {length} tokens; allowed: 0 to {length - 3}, with two tokens after it")
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    x = embed(model, tokens)
    hidden, layers = [_norms(x)], []
    for block in model.blocks:
        x, found = _layer(block, x, positions, sink=sink)
        hidden.append(_norms(x))
        layers.append(jax.device_get(found))
    alpha, keys, values, drains, gaps, masses = zip(*layers, strict=True)
    return Sinks(sink, alpha, np.stack(jax.device_get(hidden)), keys, values, drains, gaps, masses)


@partial(jax.jit, static_argnames="sink")
def _layer(
    block: Block, x: Float[Array, "B T E"], positions: Int[Array, "B T"], *, sink: int
) -> tuple[Float[Array, "B T E"], tuple[Array, ...]]:
    """A layer's output, and its alpha, key and value norms, drains, gaps and masses."""
    # Of latent attention, a cache holds one row a token; heads have values in the form for whole texts.
    form = block.expanded
    query, own = project(form, x, positions)
    drains = value_drains(form, own.attended_values, x)
    gaps, masses = sink_rows(query, own.rotated_keys, sink)
    after, held, evidence = attend(block, x, positions, requests=Requests(columns=frozenset({SUM})))
    sums = evidence.columns[SUM].reshape(len(x), -1, x.shape[1])
    alpha = sums / (x.shape[1] - jnp.arange(x.shape[1]))
    return after, (alpha, _norms(held.rotated_keys), _norms(held.attended_values), drains, gaps, masses)


def value_drains(form: Block, values: Float[Array, "B G T V"], x: Float[Array, "B T E"]) -> Float[Array, "B H T"]:
    """||V_t W_O[h]|| of every head and token: the output projection of one head's values at a time."""
    spec: AttentionSpec = form.spec
    spread = jnp.swapaxes(jnp.repeat(values, spec.group, axis=1), 1, 2)
    output = form.attention.output  # type: ignore[attr-defined]  # every block of kvx.models has one
    bias = output(jnp.zeros_like(spread[:1, :1]), x.dtype)

    def one(head: Int[Array, ""]) -> Float[Array, "B T"]:
        alone = jnp.where(jnp.arange(spec.heads)[:, None] == head, spread, 0)
        return _norms(output(alone, x.dtype) - bias)

    return jnp.swapaxes(jax.lax.map(one, jnp.arange(spec.heads)), 0, 1)


def sink_rows(
    query: Query, keys: Float[Array, "B G T D"], sink: int
) -> tuple[Float[Array, "B H"], Float[Array, "B H"]]:
    """Sink logit gap and sink mass of every query head, from rotated keys.

    A query counts for the gap if it sees the sink and at least one token between the sink and itself; for the mass if
    it comes after the sink, though a sliding window may hide it.
    """
    batch, _, _, length, _ = query.raw.shape
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), keys.shape[:3])
    size = min(QUERIES, length)
    missing = -length % size
    queries = jnp.pad(query.rotated, ((0, 0), (0, 0), (0, 0), (0, missing), (0, 0)))
    index = jnp.pad(jnp.arange(length, dtype=jnp.int32), (0, missing), constant_values=-1)

    def block(start: Int[Array, ""]) -> tuple[Array, Array, Array]:
        spots = jax.lax.dynamic_slice_in_dim(index, start, size)
        rows = jax.lax.dynamic_slice_in_dim(queries, start, size, axis=3)
        logits = slot_logits(rows, keys, jnp.broadcast_to(spots, (batch, size)), places, **query.masking)
        logits = logits.reshape(batch, query.spec.heads, size, length)
        at_sink = logits[..., sink]
        between = (jnp.arange(length) > sink) & (jnp.arange(length) < spots[:, None]) & jnp.isfinite(logits)
        count = jnp.sum(between, axis=-1)
        mean = jnp.sum(jnp.where(between, logits, 0.0), axis=-1) / jnp.maximum(count, 1)
        counts = jnp.isfinite(at_sink) & (count > 0)
        gap = jnp.sum(jnp.where(counts, at_sink - mean, 0.0), axis=-1)
        lse = jax.nn.logsumexp(logits, axis=-1)
        after = spots > sink
        mass = jnp.sum(jnp.where(after, jnp.exp(at_sink - jnp.where(after, lse, 0.0)), 0.0), axis=-1)
        return gap, jnp.sum(counts, axis=-1), mass

    gaps, counts, masses = jax.lax.map(block, jnp.arange(0, length + missing, size))
    total = jnp.maximum(jnp.sum(counts, axis=0), 1)
    return jnp.sum(gaps, axis=0) / total, jnp.sum(masses, axis=0) / (length - 1 - sink)


@jax.jit
def _norms(rows: Float[Array, "*n D"]) -> Float[Array, "*n"]:
    """L2 norms over the last axis, float32."""
    return jnp.linalg.norm(rows.astype(jnp.float32), axis=-1)
