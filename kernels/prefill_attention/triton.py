"""Prefill attention on NVIDIA GPUs: cuDNN for plain causal prompts, Pallas-Triton for other masks and statistics.

A first pass gives output and log-sum-exp; a second one streams over the keys for the statistics and is left out if
nobody asks. The backward pass is cuDNN's where the first pass was and only the output is differentiated, Triton's else.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.kernels.checks import triton_refusal
from kvx.kernels.prefill_attention import cudnn
from kvx.kernels.prefill_attention.columns import Column, votes_and_widths
from kvx.kernels.prefill_attention.gradient import Bound, Kept, Pullback, Result, Sight, row_terms
from kvx.kernels.prefill_attention.reach import lengthened, reaches, reaches_in_order

WIDTHS = (16, 32, 64, 128, 256)
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


@dataclass(frozen=True)
class Pass:
    """How one kernel is cut: tokens of a block of queries and of keys, warps of a program, stages of its loads."""

    query_block: int
    key_block: int
    warps: int
    stages: int

    def cut(self) -> dict[str, Any]:
        """As the kernels take it."""
        return {"blocks": (self.query_block, self.key_block), "warps": self.warps, "stages": self.stages}


@dataclass(frozen=True)
class Tuning:
    """All passes, and whether cuDNN may take the first.

    Attributes:
        ahead: in the pass over columns, form a block's products while the one before is mapped.
        interpret: run the kernels in Pallas' interpreter, on any platform: for tests.
    """

    forward: Pass = Pass(128, 64, 8, 3)
    columns: Pass = Pass(64, 128, 4, 3)
    backward: Pass = Pass(64, 64, 4, 2)
    cudnn: bool = True
    ahead: bool = False
    interpret: bool = False


def default_tuning(dim: int, size: int) -> Tuning:
    """By head dim and bytes of an element: what fits an sm_90, and was fastest on an H100."""
    if size == 4:
        # Full-precision products take no tensor cores; small tiles keep their operands in registers.
        narrow = Pass(32, 32, 4, 1)
        return Tuning(narrow, narrow, narrow)
    if dim > 128:
        return Tuning(Pass(64, 64, 8, 2), Pass(64, 64, 4, 2), Pass(32, 32, 4, 1))
    if dim > 64:
        return Tuning()
    return Tuning(Pass(128, 64, 4, 3), Pass(64, 128, 4, 2), Pass(64, 64, 4, 3))


CANDIDATES = tuple(
    Tuning(columns=Pass(*shape), ahead=ahead) for ahead in (False, True) for shape in (
        (128, 128, 8, 3), (128, 128, 8, 2), (64, 128, 4, 3), (64, 128, 4, 2), (128, 64, 4, 3), (64, 64, 4, 3),
        (64, 256, 8, 3), (128, 128, 4, 3),
    )
) + tuple(
    Tuning(forward=Pass(*shape), cudnn=False)
    for shape in ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3))
)  # fmt: skip
"""What a benchmark tries: cuts of the second pass behind cuDNN, then of the first pass without it."""


def refusal(queries: Array, keys: Array, values: Array, visibility: Any) -> str | None:
    """Why these arguments cannot be taken, if they cannot."""
    if reason := triton_refusal():
        return reason
    if visibility is not None:
        return "visibility is a table, and it takes None: labels that see their own and SHARED"
    for name, array in (("queries", queries), ("keys", keys), ("values", values)):
        if array.shape[-1] not in WIDTHS:
            return f"{name} have {array.shape[-1]} channels, and it takes {', '.join(map(str, WIDTHS))}"
        if array.dtype not in DTYPES or array.dtype != queries.dtype:
            return f"{name} are {array.dtype}, and it takes bfloat16, float16 or float32, the same for all three"
    return None


def prefill_attention(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B G S D"],
    values: Float[Array, "B G S V"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B G S"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    columns: tuple[Column, ...] = (),
    lengths: Int[Array, "B"] | None = None,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    visibility: None = None,
    tuning: Tuning | None = None,
) -> Result:
    """See `kvx.kernels.prefill_attention.prefill_attention`."""
    sight = Sight(query_positions, key_positions, lengths, segments, visibility)
    problem = _Problem.of(queries, keys, values, sight, scale, window, softcap, tuning)
    out, lse = problem.plainly()[0] if problem.plain else problem.generally()
    return problem.result(out, lse, columns)


def remembering(queries, keys, values, query_positions, key_positions, **options: Any) -> tuple[Result, Pullback]:
    """The same, and its pullback."""
    columns = options.pop("columns")
    sight = Sight(query_positions, key_positions, *(options.pop(name) for name in Sight._fields[2:]))
    problem = _Problem.of(queries, keys, values, sight, **options)
    (out, lse), fast = problem.plainly() if problem.plain else (problem.generally(), None)
    kept = Kept(queries, keys, values, out, lse)
    pullback = jax.tree_util.Partial(Bound(_pull, tuple(options.items())), kept, sight, fast)
    return problem.result(out, lse, columns), pullback


def _pull(kept: Kept, sight: Sight, fast: Any, d_out: Array, d_lse: Array | None, **options: Any):
    """From cotangents to cotangents."""
    d_out = d_out.astype(kept.values.dtype)
    if fast is not None and d_lse is None:
        return fast((d_out, jnp.zeros_like(kept.lse)))
    return _Problem.of(*kept[:3], sight, **options).backward(kept, d_out, d_lse)


@dataclass(frozen=True)
class _Problem:
    """The operands of one call, and how they are cut.

    Attributes:
        ordered: keys are the queries' own tokens, padding last, and causality says all: blocks in reach are arithmetic.
    """

    queries: Array
    keys: Array
    values: Array
    sight: Sight
    scale: float
    window: int | None
    softcap: float | None
    tuning: Tuning
    ordered: bool

    @classmethod
    def of(cls, queries, keys, values, sight, scale, window=None, softcap=None, tuning=None):
        tuning = tuning or default_tuning(queries.shape[-1], queries.dtype.itemsize)
        ordered = sight.segments is None and window is None and queries.shape[3] == keys.shape[2]
        return cls(queries, keys, values, sight, scale, window, softcap, tuning, ordered)

    @property
    def plain(self) -> bool:
        """Whether cuDNN takes it."""
        simple = self.ordered and self.softcap is None and self.tuning.cudnn
        return simple and cudnn.takes(self.queries, self.keys, self.values) and cudnn.available()

    def plainly(self):
        """Through cuDNN: (output, log-sum-exp), and the pullback of the output."""
        seen = (self.sight.query_positions >= 0)[:, None, None]

        def attend(queries, keys, values):
            out, lse = cudnn.attend(queries, keys, values, self.scale)
            return jnp.where(seen[..., None], out, 0), jnp.where(seen, lse, -jnp.inf)

        return jax.vjp(attend, self.queries, self.keys, self.values)

    def generally(self):
        """Through Triton: (output, log-sum-exp)."""
        from kvx.kernels.prefill_attention.triton_forward import forward

        cut = self.tuning.forward
        padded = self._padded(cut)
        out, lse = forward(
            padded._runs(cut)[0], padded.queries, padded.keys, padded.values, *padded.sight[:2], padded.sight.segments,
            **self._kernel(cut),
        )  # fmt: skip
        length = self.queries.shape[3]
        return out[:, :, :, :length], lse[:, :, :, :length]

    def result(self, out: Array, lse: Array, columns: tuple[Column, ...]) -> Result:
        """Output and log-sum-exp in float32, with the statistics."""
        found = {}
        for pooled in (False, True):
            some = tuple(column for column in columns if column.pooled is pooled)
            if some:
                found |= zip(some, self._statistics(lse, some), strict=True)
        return out.astype(jnp.float32), lse, {column: found[column] for column in columns}

    def _statistics(self, lse, columns):
        from kvx.kernels.prefill_attention.triton_columns import statistics

        cut = self.tuning.columns
        padded = self._padded(cut)
        positions = padded.sight.query_positions
        votes, widths = votes_and_widths(columns, positions, padded.sight.lengths)
        found = statistics(
            padded._runs(cut)[1], padded.queries, padded.keys, lengthened(lse, 3, padded.queries.shape[3], -jnp.inf),
            positions, padded.sight.key_positions, padded.sight.segments, votes, widths, columns=columns,
            ahead=self.tuning.ahead, **self._kernel(cut),
        )  # fmt: skip
        return [array[..., : self.keys.shape[2]] for array in found]

    def backward(self, kept: Kept, d_out: Array, d_lse: Array | None):
        """Through Triton: cotangents of queries, keys and values."""
        from kvx.kernels.prefill_attention.triton_backward import backward

        cut = self.tuning.backward
        padded = self._padded(cut)
        length = padded.queries.shape[3]
        found = backward(
            padded._runs(cut), padded.queries, padded.keys, padded.values, lengthened(d_out, 3, length, 0),
            lengthened(kept.lse, 3, length, -jnp.inf), lengthened(row_terms(kept, d_out, d_lse), 3, length, 0),
            padded.sight.query_positions, padded.sight.key_positions, padded.sight.segments, **self._kernel(cut),
        )  # fmt: skip
        sizes = (kept.queries.shape[3], kept.keys.shape[2], kept.keys.shape[2])
        return tuple(
            jax.lax.slice_in_dim(array, 0, size, axis=array.ndim - 2) for array, size in zip(found, sizes, strict=True)
        )

    def _runs(self, cut: Pass):
        """Blocks in reach, by arithmetic where the prompt is whole and in order."""
        query_positions, key_positions = self.sight[:2]
        if self.ordered:
            return reaches_in_order(query_positions, key_positions, cut.query_block, cut.key_block)
        return reaches(query_positions, key_positions, self.sight.segments, self.window, cut.query_block, cut.key_block)

    def _kernel(self, cut: Pass) -> dict[str, Any]:
        """What every kernel takes by name."""
        from kvx.kernels.prefill_attention.triton_tiles import Logits

        logits = Logits(self.scale, self.softcap)
        return {"logits": logits, "window": self.window, "interpret": self.tuning.interpret, **cut.cut()}

    def _padded(self, cut: Pass) -> "_Problem":
        """With lengths that are multiples of the blocks; nothing sees what is added. A whole prompt stays square."""
        length, total = self.queries.shape[3], self.keys.shape[2]
        to_length, to_total = length + -length % cut.query_block, total + -total % cut.key_block
        if self.ordered:
            largest = max(cut.query_block, cut.key_block)
            to_length = to_total = total + -total % largest
        segments = self.sight.segments
        if segments is not None:
            segments = (lengthened(segments[0], 1, to_length, 0), lengthened(segments[1], 1, to_total, 0))
        sight = self.sight._replace(
            query_positions=lengthened(self.sight.query_positions, 1, to_length, -1),
            key_positions=lengthened(self.sight.key_positions, 2, to_total, -1),
            segments=segments,
        )
        return replace(
            self,
            queries=lengthened(self.queries, 3, to_length, 0),
            keys=lengthened(self.keys, 2, to_total, 0),
            values=lengthened(self.values, 2, to_total, 0),
            sight=sight,
        )
