"""How a process ends and what it leaves alone: signals, exit codes, global state, memory."""

import ctypes
import errno
import gc
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_separation import errors, process
from sae_separation.errors import Interrupted, RunFailed, WrongRequest

# ---- endings


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (WrongRequest("--x is wrong"), (2, "--x is wrong", False)),
        (RunFailed("at step 3"), (1, "at step 3", False)),
        (
            Interrupted(signal.SIGTERM, "at step 3"),
            (143, "interrupted by SIGTERM: at step 3", False),
        ),
        (MemoryError(), (1, "out of memory: take less", False)),
        (RunFailed("memory is short: lower it"), (1, "memory is short: lower it", False)),
        (
            OSError(errno.EIO, "Input/output error"),
            (1, "OSError: [Errno 5] Input/output error; mend that and give the same command again", False),
        ),
        (
            KeyError("x"),
            (1, "unexpected KeyError: 'x'; please report it with the lines above", True),
        ),
    ],
)
def test_every_error_has_an_exit_code_and_a_line(error, ended, monkeypatch):
    monkeypatch.setattr(errors, "address_space", lambda: None)
    assert errors.ending(error, began=True, take_less="take less") == ended


def test_a_line_holds_nothing_that_a_terminal_obeys():
    assert errors.plain("--lm größe: wrong") == "--lm größe: wrong"
    assert errors.plain("a\x1b[31m\n\ud800") == r"a\x1b[31m\n\ud800"


def test_while_libraries_are_imported_an_error_is_told_as_before_anything(capsys):
    errors.tell_uncaught(MemoryError, MemoryError(), None)
    line = capsys.readouterr().err
    assert line.startswith("error: out of memory") and "before anything was begun" in line
    errors.tell_uncaught(WrongRequest, WrongRequest("two\nlines"), None)
    assert capsys.readouterr().err == "error: two lines\n"


def test_a_lost_connection_stops_a_command_unless_it_is_ignored():
    always = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert errors.stops() == [*always, signal.SIGHUP]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert errors.stops() == always
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_before_anything_is_begun_ends_the_process_with_its_line(monkeypatch, capfd):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    errors.leave_at_once(signal.SIGINT, None)
    assert codes == [130]
    assert capfd.readouterr().err == "error: interrupted by SIGINT before anything was begun\n"


def test_a_signal_says_whether_anything_is_kept_and_waits_while_it_is_held():
    with process.signals:
        with pytest.raises(Interrupted) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.value.number, stop.value.message) == (
            signal.SIGTERM,
            "nothing was done yet; the same command starts",
        )
        process.signals.taken()
        process.signals.something_is_kept()
        reached = False
        with pytest.raises(Interrupted) as stop, process.signals.held():
            os.kill(os.getpid(), signal.SIGTERM)
            reached = True
        assert reached and stop.value.message.startswith("what is done is kept")


# ---- what is left alone


def test_global_state_is_afterwards_as_before_and_a_seed_counts_inside_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("KEPT", "1")
    folder = os.getcwd()

    def drawn() -> tuple:
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seeded() -> tuple:
        with process.global_state_kept(seed=7):
            return drawn()

    def state() -> tuple:
        numpy = np.random.get_state(legacy=False)
        assert isinstance(numpy, dict)
        return random.getstate(), numpy["state"]["key"].tolist(), torch.random.get_rng_state().tolist()

    before = state()
    with pytest.raises(KeyError), process.global_state_kept():
        drawn()
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        os.environ.update(KEPT="2", NEW="1")
        os.chdir(tmp_path)
        raise KeyError
    assert seeded() == seeded()
    assert state() == before
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert os.environ["KEPT"] == "1" and "NEW" not in os.environ and os.getcwd() == folder


# ---- memory


class Glibc:
    """Stands for the C library; what was called."""

    def __init__(self):
        self.calls = []

    def mallopt(self, *args):
        self.calls.append(args)

    def malloc_trim(self, pad):
        self.calls.append(("trim", pad))


def test_freed_memory_is_kept_and_given_back_by_glibc(monkeypatch):
    glibc = Glibc()
    monkeypatch.setattr(process, "libc", lambda: glibc)
    process.keep_freed_memory()
    assert (-3, 2**27) in glibc.calls, "M_MMAP_THRESHOLD, malloc.h"
    assert (-1, 2**31 - 1) in glibc.calls, "M_TRIM_THRESHOLD"
    glibc.calls.clear()
    process.return_freed_memory()
    assert glibc.calls == [("trim", 0)]
    for other in (None, object()):  # another system, another C library
        monkeypatch.setattr(process, "libc", lambda: other)
        process.keep_freed_memory()
        process.return_freed_memory()


def test_the_c_library_is_this_processs_own(monkeypatch):
    libc = process.libc()
    assert isinstance(libc, ctypes.CDLL) and libc.getpid() == os.getpid()
    monkeypatch.setattr(process.platform, "system", lambda: "Darwin")
    assert process.libc() is None


def test_a_collection_looks_at_what_is_made_later_alone():
    gc.unfreeze()
    try:
        process.make_collections_short()
        assert gc.get_freeze_count() > 10_000 and gc.get_count()[2] == 0
    finally:
        gc.unfreeze()


THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LARGE = """
import re, torch
from pathlib import Path
from sae_separation import process

process.tune_memory()
tensor = torch.ones(2**24)
print(re.search(r"AnonHugePages: +([0-9]+)", Path("/proc/self/smaps_rollup").read_text())[1])
"""


@pytest.mark.skipif(not THP.exists() or "[madvise]" not in THP.read_text(), reason="no pages on demand")
@pytest.mark.parametrize("said", [None, "0"])
def test_tensors_lie_in_large_pages_unless_the_user_says_no(said, monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    if said is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", said)
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 32 * 1024) == (said is None), "64 MB of ones, half of it at least"


def test_collections_wait_inside_and_go_on_as_before():
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), process.without_collections():
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()
    gc.disable()
    try:
        with process.without_collections():
            pass
        assert not gc.isenabled(), "a user who does without goes on doing so"
    finally:
        gc.enable()


def test_memory_left_is_the_least_of_what_limits_it(monkeypatch):
    import resource

    import psutil

    device, available = torch.device("cpu"), psutil.virtual_memory().available
    assert 0 < process.memory_left(device) < 1.1 * available
    limit = psutil.Process().memory_info().vms + 5_000_000
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, -1))
    assert process.memory_left(device) <= 5_000_000
