"""PyramidKV (2024): SnapKV's votes with a budget that falls linearly from the bottom layer to the top."""

from kvx.parts.amounts import Slots, amount, whole
from kvx.parts.budgets import LayerTable, Pyramid, check_protected
from kvx.parts.evict import Evict
from kvx.policies.registry import recipe
from kvx.policies.snapkv import window_votes
from kvx.policy import Policy


@recipe
def pyramidkv(
    budget: int | float,
    window: int = 64,
    kernel: int = 5,
    pooling: str = "mean",
    group: str = "mean",
    beta: int = 20,
    table: tuple[int, ...] | None = None,
) -> Policy:
    """Cai et al. 2024, "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling".

        n_l = W + bottom - l (bottom - top) / (L - 1),    top = (C - W) / beta,    bottom = 2 (C - W) - top

    Once, after the prompt. Parts: window attention, pooled / pyramid over layers / drop / after prefill.

    Args:
        budget: slots per KV head averaged over layers, window included, or a share of the prompt.
        window, kernel, pooling, group: as in `snapkv`.
        beta: slope; 1 is SnapKV.
        table: slots of each layer outright (windows included) instead of the linear fall; `budget` is then unused.
    """
    kept = amount(budget)
    check_protected(kept, window, f"window={window}")
    split = Pyramid(kept, window, whole(beta, "beta", least=1)) if table is None else LayerTable(tuple(table))
    return Policy((Evict(window_votes(window, kernel, pooling, group), split, recent=Slots(window)),))
