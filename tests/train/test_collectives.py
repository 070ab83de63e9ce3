"""Claims about the count of collectives: by kind, loops by their turns, bytes of what each yields."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from kvx.train.collectives import Traffic, traffic

TEXT = """
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(f32[] %a, f32[] %b)
}

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %g = bf16[64,16]{1,0} all-gather(bf16[8,16]{1,0} %x), dimensions={0}
  %s = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(bf16[8,4]{1,0} %y), dimensions={0}
  %d = bf16[32,4]{1,0} all-gather-done(%s)
  %e = ((bf16[8,4]{1,0:T(8,128)(2,1)}, f32[2]{0}), (bf16[64,4]{1,0:T(8,128)}, f32[16]{0})) all-gather-start(%y, %z)
  %f = (f32[16]{0}, f32[8]{0}) all-reduce-start(f32[16]{0} %p, f32[8]{0} %q), to_apply=%add
  %k = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(f32[4]{0} %p), source_target_pairs={{0,1}}
}

%cond (p: (s32[], f32[8,16])) -> pred[] {
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

%counted (p: (s32[], f32[8,16])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %five), direction=LT, metadata={op_name="while"}
}

%start (x: f32[8]) -> (f32[8], f32[64], u32[]) {
  %g1 = f32[64]{0} all-gather(%x), channel_id=7, dimensions={0}, frontend_attributes={chain_id="0"}
}

%beside (x: f32[8]) -> (f32[16], f32[8]) {
  %g2 = f32[64]{0} all-gather(%x), channel_id=7, dimensions={0}, frontend_attributes={chain_id="0"}
}

%done (x: f32[8]) -> f32[64] {
  %g3 = f32[64]{0} all-gather(%x), channel_id=7, dimensions={0}, frontend_attributes={chain_id="0"}
}

%chain (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %a = (f32[8]{0}, f32[64]{0}, u32[]) fusion(%x), kind=kCustom, calls=%start
  %b = (f32[16]{0}, f32[8]{0}) fusion(%a), kind=kOutput, calls=%beside
  %c = f32[64]{0} fusion(%b), kind=kCustom, calls=%done
}

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %w = (s32[], f32[8,16]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %r = (f32[8,16]{1,0}, f32[]) all-reduce(f32[8,16]{1,0} %a, f32[] %b), to_apply=%add
}
"""


def test_a_loop_that_counts_to_a_constant_turns_as_often_and_a_collective_in_pieces_is_one():
    """As a TPU's program says it: no trip count, and one gather written where it starts, runs and ends."""
    entry = "  %w = (s32[], f32[8,16]) while(%t), condition=%counted, body=%chain\n}"
    text = TEXT[: TEXT.index("  %w = ")] + entry
    assert traffic(text) == {"all-gather": Traffic(5, 5 * 64 * 4)}


def test_a_collective_in_a_loop_counts_by_the_loops_turns():
    assert traffic(TEXT) == {
        "all-gather": Traffic(9, 3 * (64 * 16 * 2 + 32 * 4 * 2 + 64 * 4 * 2 + 16 * 4)),
        "all-reduce": Traffic(4, 8 * 16 * 4 + 4 + 3 * (16 + 8) * 4),
        "collective-permute": Traffic(3, 3 * 4 * 4),
    }


def test_it_reads_what_xla_writes():
    """Five products of a matrix that lies in rows: a gather in each turn of a loop, or one of all before it."""
    mesh = jax.make_mesh((8,), ("x",))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), ()))

    def loop(x, weights):
        return jax.lax.scan(lambda x, w: (x @ jax.lax.with_sharding_constraint(w, whole), None), x, weights)[0]

    shapes = jax.ShapeDtypeStruct((4, 16), jnp.float32, sharding=whole), jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)
    split = NamedSharding(mesh, PartitionSpec(None, *rows.spec))
    compiled = jax.jit(loop, in_shardings=(whole, split)).lower(*shapes).compile()
    assert traffic(compiled.as_text())["all-gather"].bytes == 5 * 16 * 16 * 4
