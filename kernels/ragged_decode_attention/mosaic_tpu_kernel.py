"""The TPU kernel of one list of rows: an online softmax over its blocks, each copied ahead into the other buffer.

Pages are copied one by one, as many as a block has; of a run a block is one copy. While a list's last block is computed
the first of the next list is already on its way, since heads of different length may be a block or two each.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvx.kernels.logits import capped

LOWEST = -1e30
"""A finite stand-in for the logit of what is not seen: -inf - -inf is nan."""


def kernel(
    lengths_ref: Any,
    starts_ref: Any,
    *refs: Any,
    names: tuple[str, ...],
    per_half: int,
    page: int,
    rows: int,
    block: int,
    tile: int,
    positions: Any,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """One grid step: a list. `names` are those of the operands, whose refs come before the outputs' and the buffers."""
    given = dict(zip(names, refs[: len(names)], strict=True))
    out_ref, lse_ref, *buffers, arrived, turn_ref = refs[len(names) :]
    sources = [given[name] for name in ("keys", "values") if name in given]
    if "key_positions" in given:
        *buffers, positions_buffer = buffers
    step = pl.program_id(1)
    one = pl.program_id(0) * per_half + step
    pages = block // page
    parts = positions.pieces // pages if "key_positions" in given else 0

    def past_edge(which: Any) -> Any:
        return lax.rem(starts_ref[which], jnp.int32(tile))

    def span(which: Any) -> Any:
        """Rows from the first that is copied to the list's last."""
        length = lengths_ref[which]
        return length if "table" in given else jnp.where(length > 0, past_edge(which) + length, 0)

    def blocks(which: Any) -> Any:
        return pl.cdiv(span(which), block)

    def copy_positions(own: Any, first: Any, slot: Any, index: Any, act: Any) -> None:
        source, buffer = positions.around(given["key_positions"], own, first), positions_buffer.at[slot, index]
        act(pltpu.make_async_copy(source, buffer, arrived.at[slot]))

    def each_copy(which: Any, turn: Any, slot: Any, table_ref: Any, act: Any) -> None:
        """`act` on every copy of block `turn`; none for a block that the list does not have."""
        if table_ref is None:

            @pl.when(turn < blocks(which))
            def _() -> None:
                first = pl.multiple_of(_first_row(starts_ref[which], turn, block, tile, rows), tile)
                for source, buffer in zip(sources, buffers, strict=True):
                    act(pltpu.make_async_copy(source.at[pl.ds(first, block)], buffer.at[slot], arrived.at[slot]))
                if "key_positions" in given:
                    copy_positions(starts_ref[which], first, slot, 0, act)

            return
        count = jnp.clip(pl.cdiv(lengths_ref[which], page) - turn * pages, 0, pages)

        @pl.loop(0, count)
        def _(index: Any) -> None:
            number = table_ref[0, turn * pages + index]
            for source, buffer in zip(sources, buffers, strict=True):
                act(pltpu.make_async_copy(source.at[number], buffer.at[slot, index], arrived.at[slot]))
            for part in range(parts):
                row = number * page + part * positions.piece
                copy_positions(row, row, slot, index * parts + part, act)

    def start(which: Any, turn: Any, slot: Any, table_ref: Any) -> None:
        each_copy(which, turn, slot, table_ref, lambda copy: copy.start())

    table_ref, next_table_ref = given.get("table"), given.get("next_table")

    @pl.when(step == 0)
    def _() -> None:
        turn_ref[0] = 0
        start(one, 0, 0, table_ref)

    base, turns = turn_ref[0], blocks(one)

    def start_following(slot: Any) -> None:
        @pl.when(step + 1 < per_half)
        def _() -> None:
            start(one + 1, 0, slot, next_table_ref)

    @pl.when(turns == 0)
    def _() -> None:
        start_following(base)

    queries = given["queries"][...]

    def loop(turn: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        slot = lax.rem(base + turn, 2)

        @pl.when(turn + 1 < turns)
        def _() -> None:
            start(one, turn + 1, 1 - slot, table_ref)

        @pl.when(turn + 1 == turns)
        def _() -> None:
            start_following(1 - slot)

        each_copy(one, turn, slot, table_ref, lambda copy: copy.wait())
        keys = buffers[0][slot].reshape(block, -1)
        values = buffers[-1][slot].reshape(block, -1)
        if table_ref is None:
            first_row = _first_row(starts_ref[one], turn, block, tile, rows)
            first = first_row - starts_ref[one]
            done = jnp.where(turn > 0, turn * block - past_edge(one), 0)
        else:
            first, done = turn * block, 0

        def held(shape: tuple[int, int], axis: int) -> Any:
            """Slots of this list; a block that was moved to end at the last row brings some again."""
            slots = first + lax.broadcasted_iota(jnp.int32, shape, axis)
            return (slots >= done) & (slots < lengths_ref[one])

        seen = held((queries.shape[0], block), 1)
        logits = capped(scale * _dot(queries, keys, 1), softcap)
        if "key_positions" in given:

            def offset(index: int) -> Any:
                if table_ref is None:
                    return positions.offset(starts_ref[one], first_row)
                number = table_ref[0, jnp.minimum(turn * pages + index // parts, table_ref.shape[1] - 1)]
                row = jnp.maximum(number, 0) * page + index % parts * positions.piece
                return positions.offset(row, row)

            here = positions.in_order(positions_buffer.at[slot], offset)
            of_queries = given["query_positions"][...]
            seen = seen & (here >= 0) & (here <= of_queries)
            if window is not None:
                seen = seen & (of_queries - here < window)
        # What a buffer holds beyond the list may be anything, and 0 * nan is nan.
        values = jnp.where(held(values.shape, 0), values, jnp.zeros_like(values))
        top, total, mean = carry
        logits = jnp.where(seen, logits, LOWEST)
        higher = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(logits - higher), 0.0)
        kept = jnp.exp(top - higher)
        mean = mean * kept + _dot(weights.astype(values.dtype), values, 0)
        return higher, total * kept + jnp.sum(weights, axis=1, keepdims=True), mean

    many = queries.shape[0]
    nothing = (
        jnp.full((many, 1), LOWEST, jnp.float32),
        jnp.zeros((many, 1), jnp.float32),
        jnp.zeros(out_ref.shape, jnp.float32),
    )
    top, total, mean = lax.fori_loop(0, turns, loop, nothing)
    turn_ref[0] = lax.rem(base + turns, 2)
    divisor = jnp.where(total > 0, total, 1.0)
    out_ref[...] = mean / divisor
    lse_ref[...] = jnp.where(total > 0, top + jnp.log(divisor), -jnp.inf)


def _first_row(start: Any, step: Any, block: int, tile: int, rows: int) -> Any:
    """First row of a block of a run: at a tile's edge at or before it, and never so late that it ends past the last."""
    return jnp.minimum(start - lax.rem(start, jnp.int32(tile)) + step * block, rows - block)


def _dot(left: Any, right: Any, contract: int) -> Any:
    """left (m, k) times right, contracted over its axis `contract`, float32."""
    exact = lax.Precision.HIGHEST if right.dtype == jnp.float32 else lax.Precision.DEFAULT
    if left.dtype != right.dtype:
        dtype = jnp.promote_types(left.dtype, right.dtype)
        left, right = left.astype(dtype), right.astype(dtype)
        exact = lax.Precision.HIGHEST
    dims = (((1,), (contract,)), ((), ()))
    return lax.dot_general(left, right, dims, precision=exact, preferred_element_type=jnp.float32)
