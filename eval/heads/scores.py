"""What each head reads: earlier copies of the present token in random text, and sinks or neighbours in real text."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvx.context import Activations
from kvx.decoder import Block, Decoder
from kvx.errors import BadInput
from kvx.evidence import Requests
from kvx.inputs import checked_prompt
from kvx.kernels.prefill_attention.columns import Column
from kvx.loop import attend, project
from kvx.parts.amounts import whole
from kvx.parts.retrieval_heads import RetrievalHeads
from kvx.prefill import embed


def retrieval_scores(model: Decoder, search: RetrievalHeads, seed: int = 0) -> list[Float[Array, "2 G"]]:
    """Induction and echo scores of every layer's KV heads (RazorAttention), which `search.choose` ranks.

    Raises:
        BadInput: the model has not enough positions for two tokens a block.
    """
    text = search.probe(model.vocabulary, model.max_positions, seed)
    if len(text) < 2 * search.repeats:
        raise BadInput(
            f"block={search.block} repeated {search.repeats} times leaves {len(text)} tokens in the model's "
            f"{model.max_positions} positions; allowed: two tokens a block or more"
        )
    tokens, _ = checked_prompt(model, text[None], None, (), 0)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    x, found = embed(model, tokens), []
    for block in model.blocks:
        found.append(_digest(block, x, positions, search))
        x, _, _ = attend(block, x, positions)
    return found


@jax.jit
def _digest(
    block: Block, x: Float[Array, "1 T E"], positions: Int[Array, "1 T"], search: RetrievalHeads
) -> Float[Array, "2 G"]:
    """A layer's scores; of latent attention one for the row that all its heads read, the highest."""
    query, tokens = project(block, x, positions)
    values = tokens.attended_values[0]
    return search.digest(Activations(query.rotated[0], tokens.rotated_keys[0], values, block.spec))


def streaming_shares(
    model: Decoder, texts: Int[np.ndarray, "B T"], sinks: int, recent: int
) -> tuple[list[Float[np.ndarray, "H"]], list[Float[np.ndarray, "H"]]]:
    """Of a query head's attention, the share that goes to the first tokens, and to those or the newest ones.

    With A the attention, means over the queries i that have more than `sinks` + `recent` tokens to see of

        sum_{j < sinks} A[i, j]        and        sum_{j < sinks or i - j < recent} A[i, j]

    What is missing from the second to 1 is what a streaming head (StreamingLLM; DuoAttention, Xiao et al. 2024) would
    lose; how much the model's output depends on that, attention alone does not tell. Both come from column sums: of all
    those queries, and of those that are near.

    Args:
        texts: one batch of real text.
        sinks: first tokens.
        recent: newest tokens, the query's own included.

    Returns:
        The two shares by layer.

    Raises:
        BadInput: texts of `sinks` + `recent` tokens or fewer, in which every token is one or the other.
    """
    tokens, lengths = checked_prompt(model, texts, None, (), 0)
    length = tokens.shape[1]
    whole(sinks, "sinks", least=0)
    whole(recent, "recent", least=1)
    if sinks + recent >= length:
        raise BadInput(
            f"sinks={sinks} and recent={recent} in texts of {length} tokens; allowed: together less than the text"
        )
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    x, first, local = embed(model, tokens), [], []
    for block in model.blocks:
        x, shares = _shares(block, x, positions, lengths, sinks=sinks, recent=recent)
        for found, share in zip((first, local), shares, strict=True):
            found.append(np.asarray(share))
    return first, local


@partial(jax.jit, static_argnames=("sinks", "recent"))
def _shares(
    block: Block,
    x: Float[Array, "B T E"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    *,
    sinks: int,
    recent: int,
) -> tuple[Float[Array, "B T E"], tuple[Float[Array, "H"], Float[Array, "H"]]]:
    batch, length, _ = x.shape
    counted = length - sinks - recent
    # Half a query more, so that rounding loses none.
    last = (counted - 0.5) / length
    every, near = Column(last=last), Column(near=recent / length, last=last)
    x, _, evidence = attend(block, x, positions, lengths=lengths, requests=Requests(columns=frozenset({every, near})))
    total, close = (evidence.columns[column].reshape(batch, -1, length) for column in (every, near))
    first = jnp.sum(total[..., :sinks], axis=-1)
    # None of these queries is so early that a first token is among its newest.
    local = first + jnp.sum(close, axis=-1)
    return x, (jnp.mean(first / counted, axis=0), jnp.mean(local / counted, axis=0))
