"""Compiled programs of a long job, let go before there are more of them than a process may hold.

XLA maps every program into memory by itself, a few pieces each, and Linux gives a process 65530 of them
(vm.max_map_count): many policies times many shapes come to more, and then compilation crashes.
"""

import gc
from pathlib import Path

import jax

SHARE = 0.5
"""Of the mappings that a process may have; what is compiled until the next look takes some more."""


def make_room(share: float = SHARE) -> bool:
    """Let go of all compiled programs if the process has used up this share of its mappings; whether it did.

    What is needed again is compiled again, or comes from the persistent cache. Systems that do not tell are left alone.
    """
    held, most = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    if not (held.exists() and most.exists()):
        return False
    with held.open("rb") as lines:
        count = sum(1 for _ in lines)
    if count <= share * int(most.read_text()):
        return False
    jax.clear_caches()
    gc.collect()
    return True
