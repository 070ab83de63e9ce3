"""Claims about a run's mesh: sizes, what lies where, which rows a process brings, and what is refused."""

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kvx.errors import BadInput
from kvx.mesh import Placement
from kvx.train.job import MeshSection
from kvx.train.mesh import GATHERED, check_batch, make_placement, row_share, share_of_rows


def placement(**axes):
    return make_placement(MeshSection(**axes))


def test_one_axis_takes_what_the_others_leave():
    assert dict(placement(fsdp=2, tensor=2).mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}


def test_axes_that_do_not_make_up_the_devices_are_refused():
    with pytest.raises(BadInput, match=r"mesh data=3 .*; allowed: axes whose product is that of 8 devices"):
        placement(data=3)


def test_one_table_says_where_weights_activations_and_caches_lie():
    where = placement(data=2, fsdp=2, tensor=2)
    assert where.sharding((64, 2, 96), ("embed", None, "mlp")).spec == PartitionSpec("fsdp", None, "tensor")
    assert where.sharding((8, 32, 64), ("rows", "sequence", None)).spec == PartitionSpec(("data", "fsdp"), "sequence")
    assert where.sharding((8, 2, 32, 16), ("rows", "kv_heads")).spec == PartitionSpec(("data", "fsdp"), "tensor")
    gathered = Placement(where.mesh, GATHERED)
    assert gathered.sharding((64, 2, 96), ("embed", None, "mlp")).spec == PartitionSpec(None, None, "tensor")


def test_rows_that_not_all_of_their_axes_divide_are_split_by_those_that_do():
    assert placement(data=2, fsdp=4).sharding((6, 32), ("rows",)).spec == PartitionSpec("data")


def test_heads_take_the_sequence_axis_while_they_attend():
    where = placement(data=2, tensor=2, sequence=2)
    assert where.sharding((4, 32, 8, 16), ("rows", None, "attention_heads")).spec == PartitionSpec(
        ("data", "fsdp"), None, ("tensor", "sequence")
    )


@pytest.mark.parametrize(
    ("parts", "expected"),
    [(4, [(0, 2), (1, 2)]), (2, [(0, 2), (1, 2)]), (1, [(0, 1), (0, 1)])],
)
def test_a_process_brings_the_rows_of_its_devices(parts, expected):
    """Four devices each of two processes; where both hold the same rows, both bring them."""
    owners = (np.arange(8) // 4).reshape(parts, -1).tolist()
    assert [share_of_rows(owners, process) for process in range(2)] == expected
    assert row_share(placement(tensor=2)) == (0, 1)


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    where = placement(data=2, fsdp=2, sequence=2)
    check_batch(where, 8, 2, 32)
    with pytest.raises(BadInput, match=r"batch=12 with accumulate=2; allowed: a multiple of 8, .* data=2 and fsdp=2"):
        check_batch(where, 12, 2, 32)
    with pytest.raises(BadInput, match="sequence=31 tokens; allowed: a multiple of sequence=2"):
        check_batch(where, 8, 1, 31)
