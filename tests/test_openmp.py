"""How OpenMP's threads wait: spinning, and asleep on a busy machine; results are the same bits."""

import ctypes
import os
import threading
import time

import pytest
import torch

from sae_separation import openmp

SPINS = hasattr(openmp.libc(), "GOMP_parallel") and not any(n in os.environ for n in openmp.SET_BY_USERS)


def until(true) -> bool:
    """Whether it becomes true within a minute."""
    end = time.monotonic() + 60
    while not (now := true()) and time.monotonic() < end:
        time.sleep(0.02)
    return now


@pytest.fixture
def load(monkeypatch) -> list[float]:
    """What is seen of the machine's load: its last entry. Looked at fifty times a second."""
    seen = [0.0]
    monkeypatch.setattr(openmp.Load, "waiting", lambda self: seen[-1])
    monkeypatch.setattr(openmp, "INTERVAL", 0.02)
    return seen


@pytest.fixture
def two_threads():
    """Of torch, as on a machine of two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def spent_on_waiting() -> float:
    """Processor seconds of 20 empty parallel regions of two threads, and of the waits after them."""
    gomp, before = openmp.libc(), time.process_time()
    assert gomp
    for _ in range(20):
        gomp.GOMP_parallel(gomp.omp_get_thread_num, None, ctypes.c_uint(2), ctypes.c_uint(0))
        time.sleep(0.02)
    return time.process_time() - before


@pytest.mark.skipif(not SPINS or os.cpu_count() == 1, reason="OpenMP's threads do not spin here")
def test_threads_spin_alone_and_sleep_on_a_busy_machine(load, two_threads):
    spent_on_waiting()  # the second thread is there
    quiet = threads()
    with openmp.waits_follow_load():
        spent = spent_on_waiting()
        load.append(1.0)
        assert until(lambda: len(threads() - quiet) >= 3)  # who looks, whose team it is, and the team
        time.sleep(0.1)
        spent_when_busy = spent_on_waiting()
        load.append(0.0)
        assert until(lambda: len(threads() - quiet) == 1)
        spent_after = spent_on_waiting()
    assert until(lambda: threads() <= quiet)
    assert spent_when_busy < min(spent, spent_after) / 3, (spent, spent_when_busy, spent_after)


def test_results_are_the_same_bits_on_a_busy_machine(load, two_threads):
    def computed() -> list[torch.Tensor]:
        torch.manual_seed(0)
        x, w = torch.randn(4096, 128), torch.randn(128, 1024)
        f = torch.relu(x @ w)
        return [f, f.T @ x, f.sum(), f.softmax(1).std(0)]

    alone, quiet = computed(), threads()
    with openmp.waits_follow_load():
        load.append(1.0)
        assert not SPINS or until(lambda: len(threads() - quiet) >= 3)
        assert all(map(torch.equal, alone, computed()))


@pytest.mark.parametrize("name", openmp.SET_BY_USERS)
def test_what_the_user_set_stays(name, load, two_threads, monkeypatch):
    monkeypatch.setenv(name, "1")
    quiet = threading.active_count()
    with openmp.waits_follow_load():
        assert threading.active_count() == quiet


def test_a_thread_without_a_core_is_seen_to_wait():
    """Three threads that compute on one core: two wait at any time."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        over = threading.Event()

        def compute():
            while not over.is_set():
                torch.ones(100_000).sort()

        busy = [threading.Thread(target=compute) for _ in range(3)]
        for thread in busy:
            thread.start()
        seen = openmp.Load()
        time.sleep(0.5)
        waiting = seen.waiting()
        over.set()
        for thread in busy:
            thread.join()
    finally:
        os.sched_setaffinity(0, before)
    assert waiting > 0.5
