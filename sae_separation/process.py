"""The process: signals, global state, memory, private folders.

with signals: ... with signals.held(): ...       # a signal ends the process where the state is whole
"""

import contextlib
import ctypes
import fcntl
import gc
import os
import platform
import random
import re
import shutil
import signal
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

from sae_separation.errors import Interrupted, stops, tell


def remove_left(prefix: str):
    """Remove the private folders of processes that were killed."""
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}-of-*"):
        if not re.fullmatch(rf"{prefix}-of-\d+-\w{{8}}", left.name):
            continue
        with contextlib.suppress(OSError):  # locked, another user's, or just removed by another process
            file = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file).st_uid == os.geteuid():
                    shutil.rmtree(left)
            finally:
                os.close(file)


def private_folder(user: object, prefix: str) -> Path:
    """A temporary folder that is removed together with its `user`; what killed processes left is removed
    first.

    A folder gets the name by which it is looked for when its process holds the lock on it: one that is not
    locked has no owner.
    """
    remove_left(prefix)  # tempfile.TemporaryDirectory outlives a process that is killed
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}-"))
    file = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # without locks it keeps the name by which nobody looks for it
        fcntl.flock(file, fcntl.LOCK_EX)
        folder = folder.rename(folder.with_name(folder.name.replace(prefix, f"{prefix}-of-{os.getpid()}", 1)))
    weakref.finalize(user, _remove, folder, file)
    return folder


def _remove(folder: Path, lock: int):
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


class Signals:
    """Inside, the signals that stop a command (`stops`) raise Interrupted; inside `held`, at its end."""

    def __init__(self):
        self.depth, self.pending, self.before = 0, None, {}

    def __enter__(self):
        self.state = "nothing was done yet; the same command starts"
        for number in stops():
            self.before[number] = signal.signal(number, self._came)

    def __exit__(self, *_):
        self.pending = None
        for number in list(self.before):
            signal.signal(number, self.before.pop(number))

    def _came(self, number, frame):
        self.pending = number
        self._raise()

    def _raise(self):
        if self.pending and not self.depth:
            raise Interrupted(self.pending, self.state)

    def something_is_kept(self):
        """From now on there is a checkpoint to go on from."""
        self.state = "what is done is kept; the same command (without --overwrite) goes on"

    def taken(self):
        """Interrupted was caught. Until then it is raised anew at every end of `held`: Python drops what is
        raised in a __del__."""
        self.pending = None

    def ignore(self):
        """From here on and afterwards no signal stops the process: it is ending."""
        for number in self.before:
            signal.signal(number, signal.SIG_IGN)
        self.before.clear()
        self.pending = None

    @contextlib.contextmanager
    def held(self):
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
        self._raise()


signals = Signals()


@contextlib.contextmanager
def global_state_kept(seed: int | None = None):
    """Grad mode, default dtype, random states, environment and working folder are afterwards as before; with
    a `seed`, random numbers inside start from it."""
    import numpy as np
    import torch

    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    python, numpy = random.getstate(), np.random.get_state()
    environment, folder = dict(os.environ), os.getcwd()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed)
                torch.manual_seed(seed)
            yield
        finally:
            torch.set_grad_enabled(grad)
            torch.set_default_dtype(dtype)
            random.setstate(python)
            np.random.set_state(numpy)
            if os.environ != environment:
                os.environ.clear()
                os.environ.update(environment)
            os.chdir(folder)


def tune_memory():
    """For training on a CPU, before the first large tensor: `take_large_pages` and `keep_freed_memory`."""
    take_large_pages()
    keep_freed_memory()


def take_large_pages():
    """torch asks Linux for pages of 2 MB in place of 4 KB for tensors from 2 MB up, where the system gives
    them to who asks (/sys/kernel/mm/transparent_hugepage/enabled: madvise); before the first of them. A step
    reads rows all over W_dec and its gradients, and the processor holds the addresses of few pages. The same
    bits come out (notes.txt has what it gained). THP_MEM_ALLOC_ENABLE=0 leaves it."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory():
    """glibc gives every tensor of over 32 MB back to the system when it is freed, and takes the next one page
    by page: a third of a step at d_sae 16,384. From here on it keeps those of up to 128 MB; of larger ones
    kept, memory grew by a tenth over 10 million tokens."""
    # MALLOC_ARENA_MAX and the like are read as a process starts: they would need the user, or a second start
    c = libc()
    if c is not None and hasattr(c, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
        c.mallopt(M_ARENA_MAX, 1)
        c.mallopt(M_MMAP_THRESHOLD, 2**27)
        c.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def without_collections():
    """Inside, Python's garbage collector looks for nothing: imports leave little garbage, and looking through
    what they make takes a fifth of their time."""
    looks = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looks:
            gc.enable()


def make_collections_short():
    """Python's garbage collector takes what is garbage now, and from here on looks at what is made later
    alone: a whole collection then takes milliseconds, not a third of a second."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def return_freed_memory():
    """Give back what `keep_freed_memory` kept: between the LM's work and training, which can hardly use what
    the other leaves. (No variable of the environment does this.)"""
    c = libc()
    if c is not None and hasattr(c, "malloc_trim"):
        c.malloc_trim(0)


def libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.system() == "Linux" else None


def memory_left(device) -> float:
    """Bytes that this process may still take on the device."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    left = [psutil.virtual_memory().available]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        left.append(limit - psutil.Process().memory_info().vms)
    with contextlib.suppress(OSError, ValueError):  # a container's own limit (cgroup 2)
        most, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        left.append(most - used)
    return min(left)


def exit_code_of(run: Callable[[], object]) -> int:
    """Of a command's work, which signals stop with a message. But for 0, the last line on stderr says why."""
    try:
        with signals:
            run()
        return 0
    except (Exception, Interrupted) as error:
        return tell(error)
