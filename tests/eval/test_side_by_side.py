"""Claims about work that runs two at a time: its order, and where it must run alone."""

import threading
import time

import jax
import pytest

from kvx.eval.side_by_side import side_by_side
from kvx.mesh import place_model
from tests import tiny


class Counted:
    """Work that tells its threads and how much of it ran at once."""

    def __init__(self):
        self.lock, self.now, self.most, self.threads = threading.Lock(), 0, 0, set()

    def __call__(self, item, other):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.threads.add(threading.get_ident())
        time.sleep(0.02)
        with self.lock:
            self.now -= 1
        return item * other


def outcome(model, **options):
    work = Counted()
    found = list(side_by_side(model, work, range(6), iter(range(1, 7)), **options))
    assert found == [item * (item + 1) for item in range(6)]
    return work


def test_two_run_at_a_time_and_results_come_in_order():
    """Each waits until another runs beside it: one alone would wait in vain."""
    meet = threading.Barrier(2, timeout=60)
    found = list(side_by_side(tiny.model(), lambda item: (meet.wait(), item)[1], range(6)))
    assert found == list(range(6))


@pytest.mark.parametrize("timed", [False, True])
def test_on_a_mesh_or_timed_it_runs_alone_in_the_callers_thread(timed):
    """A second thread's programs would begin in another order on some device."""
    model = tiny.model()
    if not timed:
        model = place_model(model, jax.make_mesh((8,), ("data",)))
    work = outcome(model, timed=timed)
    assert work.most == 1 and work.threads == {threading.get_ident()}
