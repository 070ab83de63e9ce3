"""The tile of 128 slots that holds the one is fetched, changed and put back, for many heads at once.

Of a cache of C slots that moves 256 / C, in place of the two passes with which XLA turns it about for a scatter.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

LANES = 128
HEADS_BYTES = 2**21
"""Of the tiles that are in flight together."""


def refusal(array: Float[Array, "B G D C"]) -> str | None:
    """Why the kernel cannot take the array; None if it can."""
    if array.dtype not in (jnp.bfloat16, jnp.float32):
        return f"array has dtype {array.dtype}, the kernel takes bfloat16 and float32"
    tile = 32 // array.dtype.itemsize, LANES
    if array.shape[2] % tile[0] or array.shape[3] % tile[1]:
        return f"heads of the array have shape {array.shape[2:]}, the kernel takes whole tiles of {tile}"
    return None


def write_lane(
    array: Float[Array, "B G D C"], slot: Int[Array, "B G"], row: Float[Array, "B G D"]
) -> Float[Array, "B G D C"]:
    """See `kvx.kernels.write_lane.write_lane`."""
    batch, heads, width, slots = array.shape
    count = batch * heads
    most = max(HEADS_BYTES // (width * LANES * array.dtype.itemsize), 1)
    share = next(size for size in range(min(count, most), 0, -1) if count % size == 0)
    written = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(count // share,),
            in_specs=[
                pl.BlockSpec((share, width, 1), lambda step, _: (step, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[pltpu.VMEM((share, width, LANES), array.dtype), pltpu.SemaphoreType.DMA((share,))],
        ),
        out_shape=jax.ShapeDtypeStruct((count, width, slots), array.dtype),
        input_output_aliases={2: 0},
        name="write_lane",
    )(slot.reshape(-1).astype(jnp.int32), row.reshape(count, width, 1), array.reshape(count, width, slots))
    return written.reshape(array.shape)


def _kernel(slots, row_ref, _, array_ref, tiles, arrived) -> None:
    """One share of the heads; the array is its own output."""
    share, _, lanes = tiles.shape
    first = pl.program_id(0) * share

    def start(index):
        """First slot of a head's tile; of the last one, where the slot is beyond the end and nothing is written."""
        slot = jnp.minimum(slots[first + index], array_ref.shape[2] - 1)
        return pl.multiple_of(slot - jax.lax.rem(slot, lanes), lanes)

    def moving(index, out: bool):
        here, there = tiles.at[index], array_ref.at[first + index, :, pl.ds(start(index), lanes)]
        ends = (here, there) if out else (there, here)
        return pltpu.make_async_copy(*ends, arrived.at[index])

    def change(index, _):
        moving(index, False).wait()
        lane = start(index) + jax.lax.broadcasted_iota(jnp.int32, tiles.shape[1:], 1)
        # In 32 bits, which every chip can choose among.
        old, new = tiles[index].astype(jnp.float32), row_ref[index].astype(jnp.float32)
        tiles[index] = jnp.where(lane == slots[first + index], new, old).astype(tiles.dtype)
        moving(index, True).start()
        return 0

    def each(action):
        jax.lax.fori_loop(0, share, lambda index, _: action(index) or 0, 0)

    each(lambda index: moving(index, False).start())
    jax.lax.fori_loop(0, share, change, 0)
    each(lambda index: moving(index, True).wait())
