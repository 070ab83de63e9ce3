"""L2-norm (2024): keep the keys with the smallest Euclidean norm."""

from kvx.parts.amounts import amount, whole
from kvx.parts.budgets import Uniform
from kvx.parts.evict import Evict
from kvx.parts.scores import KeyNorm
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def knorm(budget: int | float, skip: tuple[int, ...] = ()) -> Policy:
    """Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression".

        s_j = -||k_j||_2,    keep the top C

    Once, after the prompt. Needs no attention at all: the free baseline. With normalised keys (Qwen3, Gemma 3) norms
    are nearly equal and the rule is close to random. Parts: key norm / uniform / drop / after prefill.

    Args:
        budget: slots per KV head, or a share of the prompt, in the layers that are not skipped.
        skip: layers left whole; the paper's language modelling runs skip (0, 1).
    """
    return Policy((Evict(KeyNorm(), Uniform(amount(budget)), skip=layer_list(skip)),))


def layer_list(layers: tuple, name: str = "skip") -> tuple[int, ...]:
    """Checked layer indices; negative ones count from the top."""
    return tuple(whole(layer, name, least=-1000) for layer in layers)
