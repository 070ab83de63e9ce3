"""The tile of 128 slots that holds a block is fetched, changed and put back, for many heads at once.

Of a head's C slots that moves 256, in place of the passes over all in which XLA turns an array about for a scatter.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int, Shaped

from kvx.kernels.implementations import LANES

TILES_BYTES = 2**21
"""Of the tiles that are in flight together."""


def refusal(array: Shaped[Array, "B G D C"], size: int) -> str | None:
    """Why the kernel cannot take the arguments; None if it can."""
    if array.dtype.itemsize not in (2, 4):
        return f"array has dtype {array.dtype}, the kernel takes those of 16 and 32 bits"
    tile = 32 // array.dtype.itemsize, LANES
    # Codes of 2 bits of a narrow head are 4 rows of words, its ranges may be 1: memory has tiles as small as those.
    low = array.dtype.itemsize == 4 and array.shape[2] in (1, 2, 4)
    if (array.shape[2] % tile[0] and not low) or array.shape[3] % tile[1]:
        return f"heads of the array have shape {array.shape[2:]}, the kernel takes whole tiles of {tile}"
    return f"rows have blocks of {size} slots, the kernel takes divisors of {LANES}" if LANES % size else None


def write_lanes(
    array: Shaped[Array, "B G D C"], blocks: Int[Array, "B G m"], rows: Shaped[Array, "B G m D n"]
) -> Shaped[Array, "B G D C"]:
    """See `kvx.kernels.write_lanes.write_lanes`; a block after the other, since two may lie in one tile."""
    batch, heads, width, slots = array.shape
    size, count = rows.shape[4], batch * heads
    flat = array.reshape(count, width, slots)
    for index in range(blocks.shape[2]):
        # A block fills the tile by repetition, so that it stands wherever in the tile it belongs.
        filled = jnp.tile(rows[:, :, index].reshape(count, width, size), (1, 1, LANES // size))
        starts = blocks[:, :, index].reshape(-1).astype(jnp.int32) * size
        flat = _write(flat, starts, filled, size)
    return flat.reshape(array.shape)


def _write(flat: Shaped[Array, "L D C"], starts: Int[Array, "L"], filled: Shaped[Array, "L D 128"], size: int) -> Array:
    """One block a head."""
    count, width, _ = flat.shape
    most = max(TILES_BYTES // (width * LANES * flat.dtype.itemsize), 1)
    share = next(heads for heads in range(min(count, most), 0, -1) if count % heads == 0)
    return pl.pallas_call(
        partial(_kernel, size=size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(count // share,),
            in_specs=[
                pl.BlockSpec((share, width, LANES), lambda step, _: (step, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[pltpu.VMEM((share, width, LANES), flat.dtype), pltpu.SemaphoreType.DMA((share,))],
        ),
        out_shape=jax.ShapeDtypeStruct(flat.shape, flat.dtype),
        input_output_aliases={2: 0},
        name="write_lanes",
    )(starts, filled, flat)


def _kernel(starts, filled, _, array, tiles, arrived, *, size: int) -> None:
    """One share of the heads; the array is its own output. A head that writes nothing moves nothing."""
    share, _, lanes = tiles.shape
    first, slots = pl.program_id(0) * share, array.shape[2]

    def moving(index, out: bool):
        start = starts[first + index]
        tile = pl.ds(pl.multiple_of(start - jax.lax.rem(start, lanes), lanes), lanes)
        here, there = tiles.at[index], array.at[first + index, :, tile]
        source, target = (here, there) if out else (there, here)
        return pltpu.make_async_copy(source, target, arrived.at[index])

    def each(action):
        def one(index, _):
            pl.when(starts[first + index] < slots)(lambda: action(index))
            return 0

        jax.lax.fori_loop(0, share, one, 0)

    def change(index):
        moving(index, False).wait()
        start = starts[first + index]
        lane = start - jax.lax.rem(start, lanes) + jax.lax.broadcasted_iota(jnp.int32, tiles.shape[1:], 1)
        # In 32 bits, which every chip can choose among.
        wide = tiles.dtype if tiles.dtype.itemsize == 4 else jnp.float32
        old, new = tiles[index].astype(wide), filled[index].astype(wide)
        tiles[index] = jnp.where((lane >= start) & (lane < start + size), new, old).astype(tiles.dtype)
        moving(index, True).start()

    each(lambda index: moving(index, False).start())
    each(change)
    each(lambda index: moving(index, True).wait())
