"""How OpenMP's threads wait for one another: spinning where the cores are theirs, asleep on a busy machine.

    with waits_follow_load(): ...

Threads wait between parallel regions, and at the barrier that ends each. libgomp (of torch's wheels for
Linux) spins 300,000 times, some milliseconds, before it sleeps: waking up takes longer than most waits.
Beside other processes a thread spins while the one that it waits for has no core: training falls to a fifth,
and beside another that spins to nothing. How long to spin libgomp is told as it is loaded (GOMP_SPINCOUNT),
but it spins at most 100 times while it manages more threads than there are cores. So threads that only sleep
are added to its own for as long as the machine is busy. No number depends on it: parallel regions keep their
threads.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from ctypes import CDLL, c_uint
from pathlib import Path

from sae_separation.errors import address_space
from sae_separation.process import libc

SET_BY_USERS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
INTERVAL = 0.5  # seconds between two looks
# Threads of this process that were ready and had no core, on average over an interval, from which on the
# machine is busy, and under which it no longer is.
BUSY, QUIET = 0.1, 0.05


@contextlib.contextmanager
def waits_follow_load() -> Iterator[None]:
    """Inside, OpenMP's threads spin little while this process's threads wait for cores. Nothing is done where
    the user has said how to wait, with one thread, without libgomp, and under `ulimit -v`: libgomp ends the
    process where a thread cannot be made."""
    import torch

    gomp, n_threads = libc(), torch.get_num_threads()
    told = any(name in os.environ for name in SET_BY_USERS) or address_space() is not None
    if told or n_threads == 1 or gomp is None or not hasattr(gomp, "GOMP_parallel"):
        yield
        return
    over, team = threading.Event(), max(2, gomp.omp_get_num_procs() - n_threads + 2)
    watch = threading.Thread(target=_watch, args=(over, gomp, team), daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()


def _watch(over: threading.Event, gomp: CDLL, team: int):
    """Have so many threads more in libgomp whenever the machine is busy, until it is not."""
    load = Load()
    while not over.wait(INTERVAL):
        if load.waiting() > BUSY:
            busy = threading.Thread(target=_add_threads, args=(over, gomp, team, load), daemon=True)
            busy.start()
            busy.join()


def _add_threads(over: threading.Event, gomp: CDLL, team: int, load: "Load"):
    """This thread has a team of OpenMP's own while the machine is busy, whose threads sleep and end with
    it."""
    gomp.GOMP_parallel(gomp.omp_get_thread_num, None, c_uint(team), c_uint(0))
    while not over.wait(INTERVAL) and load.waiting() > QUIET:
        pass


class Load:
    """How much the threads of this process have to wait for cores, as Linux counts it."""

    def __init__(self):
        self.at, self.waited = time.monotonic(), waited_for_cores()

    def waiting(self) -> float:
        """Threads that were ready and had no core, on average since the last call."""
        at, waited = time.monotonic(), waited_for_cores()
        seconds = sum(of_thread - self.waited.get(name, 0.0) for name, of_thread in waited.items())
        share = seconds / (at - self.at)
        self.at, self.waited = at, waited
        return share


def waited_for_cores() -> dict[str, float]:
    """Seconds that each thread of this process was ready to run and had no core."""
    seconds = {}
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # it has just ended
            seconds[thread.parent.name] = int(thread.read_text().split()[1]) / 1e9
    return seconds
