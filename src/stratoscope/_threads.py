"""How torch's threads share a machine that does other work as well.

OpenMP's threads spin while they wait for each other. On a machine whose cores are taken they spin
in the place of the thread they wait for, and everything becomes many times slower. So, before torch
is first imported, threads are told to sleep while they wait, and the command line takes as many as
there are free cores. What the user has set (any of `OMP_*`, `GOMP_*`, `KMP_*`) is left as it is.
"""

from __future__ import annotations

import os
import sys
import time

_BUSY = (1, 3, 6, 7, 8)  # user, system, irq, softirq, steal; `nice` work gives way by itself


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait; without effect once torch is loaded."""
    if not _chosen("WAIT_POLICY", "SPINCOUNT", "BLOCKTIME"):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def use_free_cores(seconds: float = 0.15) -> None:
    """Give torch as many threads as cores are free now; without effect once torch is loaded.

    seconds: how long the machine is watched. Does nothing where there is no /proc/stat.
    """
    if _chosen("NUM_THREADS"):
        return
    before = _busy()
    time.sleep(seconds)
    busy = [(b - a) / (seconds * os.sysconf("SC_CLK_TCK")) for a, b in zip(before, _busy())]
    if busy:
        free = len(busy) - round(sum(min(share, 1.0) for share in busy))
        os.environ["OMP_NUM_THREADS"] = str(max(1, free))


def _chosen(*endings: str) -> bool:
    """Whether torch is loaded already, or the user has set such a variable."""
    return "torch" in sys.modules or any(
        name.startswith(("OMP_", "GOMP_", "KMP_")) and name.endswith(endings) for name in os.environ
    )


def _busy() -> list[int]:
    """Clock ticks that each of this process's cores has worked for anybody; empty where unknown."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            rows = [line.split() for line in file if line.startswith("cpu")]
        ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return []
    return [sum(int(row[field]) for field in _BUSY) for row in rows if row[0] in ours]
