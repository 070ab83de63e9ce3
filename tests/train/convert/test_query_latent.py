"""Claims about query latents: the sheets' decompositions of the source's own queries, at any rank."""

import jax.numpy as jnp
import numpy as np

from kvx.train.convert.recipes import transmla
from kvx.train.convert.source import as_pairs
from tests.train.convert import layers

CLOSE = 1e-4
"""float32 parameters that were multiplied out anew."""


def test_a_query_latent_of_principal_components_is_the_sheet_s():
    """TransMLA, step E: R_q of the source's query outputs, uncentred; rotary rows added per head afterwards."""
    name, rank, x = "llama-biases", 20, layers.inputs("llama-biases")
    source, moments = layers.source(name), layers.moments(name)
    build = transmla(24, 8, fold=2, query_rank=rank)
    split = build.split(source, moments[1])
    attention = build(layers.model(name), moments)[0].blocks[1].attention
    flat = source.query.reshape(-1, x.shape[1])
    _, axes = np.linalg.eigh(flat @ moments[1].inputs @ flat.T)
    kept = axes[:, -rank:]
    queries = (x @ flat.T @ kept @ kept.T).reshape(len(x), source.heads, -1)
    found = np.concatenate(attention.queries(jnp.asarray(x[None, :, :-1], jnp.float32))[::-1], axis=-1)[0]
    np.testing.assert_allclose(found[..., :16], queries, atol=CLOSE)
    # Turning the queries back into pairs: z = synthesis y on the key's side, conjugate on the query's.
    for head in range(source.heads):
        onto = np.linalg.lstsq(source.query_pairs[head].T, split.rotary_query[head].T)[0]
        np.testing.assert_allclose(
            found[:, head, 16:20] + 1j * found[:, head, 20:], as_pairs(queries[:, head].T).T @ onto, atol=CLOSE
        )
