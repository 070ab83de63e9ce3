"""Two policies at a time where nothing is timed, since one compiles on one core while the other computes."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kvx.decoder import Decoder
from kvx.mesh import placement_of

Found = TypeVar("Found")

WORKERS = 2


def side_by_side(
    model: Decoder, work: Callable[..., Found], *items: Iterable[object], timed: bool = False
) -> Iterator[Found]:
    """`map`, with two pieces of work at a time.

    One after the other, in the caller's thread, where time is taken or the model is on a mesh: two threads start
    their programs in one order on this device and in another on that, and each then waits for what is behind the other.

    Args:
        model: what the work runs.
        work: of one item of each kind.
        items: may be made as they are asked for.
        timed: nothing else is to run.
    """
    if timed or placement_of(model) is not None:
        yield from map(work, *items)
        return
    with ThreadPoolExecutor(WORKERS) as pool:
        yield from pool.map(work, *items)
