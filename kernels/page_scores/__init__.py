"""Page scores: how large the logit of any key of a page can be, from the minimum and maximum of its keys."""

from functools import partial
from typing import Any

from jaxtyping import Array, Float

from kvx.kernels.checks import check_shape
from kvx.kernels.implementations import KERNELS, choose
from kvx.kernels.over_mesh import KV_HEADS, ROWS, over_mesh
from kvx.kernels.page_scores import mosaic_tpu, reference, triton, xla

GROUPS = ("max", "mean")
"""How the queries of a KV head share one score."""


def page_scores(
    queries: Float[Array, "B G R T D"],
    bounds: Float[Array, "B G P E"],
    *,
    group: str = "max",
    implementation: str | None = None,
    tuning: Any = None,
) -> Float[Array, "B G P"]:
    """Upper bound of each page's unscaled logits (Quest, Tang et al. 2024, equation 2), reduced over a head's queries.

        sum_d max(q_d high_d, q_d low_d) = relu(q) . high - relu(-q) . low = [-relu(-q), relu(q)] . [low, high]

    so that with both bounds in one row it is one product, and every byte of them is read once.

    Args:
        queries: rotated.
        bounds: minima of a page's keys, and behind them their maxima: E = 2 D; +inf and -inf for an empty page.
        group: "max" or "mean" over the R query heads and T queries of a KV head.
        implementation: "reference", "xla", "mosaic_tpu", "triton"; None: the best that takes these arguments on the
            platform compiled for.
        tuning: the implementation's own `Tuning`, or None.

    Returns:
        Scores, float32; -inf for an empty page.

    Raises:
        ValueError: bounds of another width, an unknown group, or a named implementation that cannot take the arguments.
    """
    check_shape("bounds", bounds, (*queries.shape[:2], None, None))
    if bounds.shape[-1] != 2 * queries.shape[-1]:
        raise ValueError(
            f"bounds have {bounds.shape[-1]} channels, allowed are {2 * queries.shape[-1]}, twice the queries'"
        )
    if group not in GROUPS:
        raise ValueError(f"group is {group!r}, allowed are {', '.join(GROUPS)}")
    modules = {"reference": reference, "xla": xla, "mosaic_tpu": mosaic_tpu, "triton": triton}

    def refusal(name: str) -> str | None:
        return modules[name].refusal(queries, bounds) if name in KERNELS else None

    def run(module: Any) -> Float[Array, "B G P"]:
        options = {"tuning": tuning} if isinstance(tuning, getattr(module, "Tuning", ())) else {}
        scores = partial(module.scores, group=group, **options)
        return over_mesh(scores, [ROWS + KV_HEADS] * 2, ROWS + KV_HEADS)(queries, bounds)

    # XLA splits what it knows by itself.
    plain = partial(xla.scores, queries, bounds, group)
    offered = {name: plain if each is xla else partial(run, each) for name, each in modules.items()}
    return choose("page_scores", implementation, offered, refusal)()
