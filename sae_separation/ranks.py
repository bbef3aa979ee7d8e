"""The ranks of one command: processes that torchrun starts, each with an LM of its own and some of the SAEs.

    torchrun --nproc_per_node=2 experiment.py --out_dir run_0 run_1

    with ranks.met(): ...                        # every rank is there; afterwards this one has left
    for resid in ranks.shared(items, work, like):    # LM batches: each rank does its share, all get all
    owners = ranks.deal(len(seeds))              # which rank has which SAE
    late, due = ranks.agree(late, due)           # a decision that all take together; a signal stops all
    position = ranks.broadcast(position)         # what rank 0 knows
    parts = ranks.all_gather(value)              # what every rank knows
    code = ranks.tell(error)                     # one line for all, by the rank that knows best

Without torchrun there is one rank, all of these are at once what they are for one process, and
torch.distributed is not imported. Tensors travel by NCCL between GPUs and by gloo between CPUs, everything
else as JSON by gloo or through torchrun's store of keys. Nothing is pickled.

A rank that ends before the others ends all, with one line. A thread in each of them looks every second:
whether a process of this machine is there, whether one of another machine has written its mark within SILENT
seconds. It gives its process GRACE seconds to end by itself. What waits for another rank inside a collective
operation waits COLLECTIVE seconds at most: for one that hangs and does not die.
"""

import contextlib
import itertools
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from sae_separation import errors, process
from sae_separation.errors import Interrupted, RunFailed, WrongRequest

T = TypeVar("T")
R = TypeVar("R")

COLLECTIVE = 1800.0
MEETING = 600.0  # until every rank has begun: imports, on a busy machine
SILENT = 60.0
GRACE = 20.0  # torchrun kills what is left 30 s after it has asked it to end


class Lost(RunFailed):
    """The connection with another rank broke, or one has ended."""


class Place:
    """Which rank of how many this process is, and what connects it with the others once they have met."""

    def __init__(self, environment: Mapping[str, str]):
        started = "TORCHELASTIC_RUN_ID" in environment  # by torchrun; batch systems set RANK, too
        self.rank, self.size = (int(environment[n]) for n in ("RANK", "WORLD_SIZE")) if started else (0, 1)
        self.local = int(environment["LOCAL_RANK"]) if started else 0
        self.on_machine = int(environment["LOCAL_WORLD_SIZE"]) if started else 1
        self.store: Any = None  # torch.distributed.Store
        self.watch: Watch | None = None
        self.meetings, self.sayings = itertools.count(), itertools.count()
        self.turns = itertools.cycle(range(self.size))

    @property
    def many(self) -> bool:
        return self.size > 1

    @property
    def first(self) -> bool:
        """Rank 0 writes run folders and speaks."""
        return self.rank == 0


here = Place(os.environ)


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """From here on ranks but the first print no messages and no bars; inside, where all would say the same,
    no warnings either."""
    if here.first:
        yield
        return
    sys.stdout = nowhere = open(os.devnull, "w")
    os.environ["TQDM_DISABLE"] = "1"  # which tqdm reads as it is imported
    with contextlib.redirect_stderr(nowhere):
        yield


# ---- meeting and leaving


@contextlib.contextmanager
def met() -> Iterator[None]:
    """Inside, all ranks are connected. Raises RunFailed when one does not come."""
    if not here.many:
        yield
        return
    _connect()
    try:
        yield
    except BaseException:
        process.signals.ignore()  # torchrun's, which stops all when one has ended: first comes what is told
        _leave()
        raise
    _leave()
    import torch.distributed as dist

    dist.destroy_process_group()  # with a rank lost this might wait for it


def _connect():
    import torch
    import torch.distributed as dist

    stores: Any = dist  # whose list of names lacks them
    if torch.cuda.is_available():  # "cuda" means this one from here on
        torch.cuda.set_device(here.local % torch.cuda.device_count())
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and here.first
    wait = timedelta(seconds=MEETING)
    store = stores.TCPStore(address, port, is_master=hosts, wait_for_workers=False, timeout=wait)
    name = f"sae_separation {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    here.store = stores.PrefixStore(name, store)
    here.store.set(f"process {here.rank}", json.dumps([os.getpid(), platform.node()]))
    names = [f"process {rank}" for rank in range(here.size)]
    missing = names
    began = time.monotonic()
    while missing := [name for name in missing if not here.store.check([name])]:
        if time.monotonic() - began > MEETING:
            ranks = ", ".join(name.split()[1] for name in missing)
            raise RunFailed(f"rank {ranks} has not begun after {MEETING:.0f} s")
        time.sleep(0.05)
    processes = [tuple(json.loads(here.store.get(name))) for name in names]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    how = {"rank": here.rank, "world_size": here.size, "timeout": timedelta(seconds=COLLECTIVE)}
    with together():
        dist.init_process_group(backend, store=stores.PrefixStore("group", here.store), **how)
    here.watch = Watch(stores.PrefixStore(name, store.clone()), processes)
    here.watch.start()


def _leave():
    """Whatever it ends with, this rank is not lost."""
    assert here.watch
    here.watch.over.set()
    here.watch.join()
    with contextlib.suppress(RuntimeError):  # the store ended with the rank that held it, or with torchrun
        here.store.set(f"left {here.rank}", "")


class Watch(threading.Thread):
    """Looks for ranks that are lost, and for one that has said why all end. `processes`: id and machine of
    each rank."""

    def __init__(self, store: Any, processes: Sequence[tuple[int, str]]):
        super().__init__(daemon=True, name="ranks")
        self.store, self.processes, self.over = store, processes, threading.Event()
        self.marks: dict[int, tuple[bytes, float]] = {}  # the last one of each rank, and when it was new

    def run(self):
        ending = None
        for mark in itertools.count():
            if self.over.wait(1):
                return
            now = time.monotonic()
            with contextlib.suppress(RuntimeError):
                self.store.set(f"mark {here.rank}", str(mark))
            if ending is None and (self.lost() or self.is_told()):
                ending = now + GRACE
            if ending is not None and now > ending:
                if lost := self.lost():
                    _say_lost(lost, self)
                os._exit(1)

    def lost(self) -> list[int]:
        """The ranks that have ended and did not leave."""
        return [rank for rank in range(here.size) if rank != here.rank and self._is_lost(rank)]

    def _is_lost(self, rank: int) -> bool:
        number, machine = self.processes[rank]
        try:
            if self.store.check([f"left {rank}"]):
                return False
            gone = _has_ended(number) if machine == platform.node() else self._is_silent(rank)
            return gone and not self.store.check([f"left {rank}"])  # it may have left in between
        except RuntimeError:  # no store any more
            return machine == platform.node() and _has_ended(number)

    def _is_silent(self, rank: int) -> bool:
        name = f"mark {rank}"
        mark = self.store.get(name) if self.store.check([name]) else b""
        if mark != self.marks.get(rank, (None,))[0]:
            self.marks[rank] = mark, time.monotonic()
        return time.monotonic() - self.marks[rank][1] > SILENT

    def is_told(self) -> bool:
        """Whether a rank has said why all end; so it is when what connects them is gone."""
        try:
            return self.store.check(["told"])
        except RuntimeError:
            return True

    def name_of(self, rank: int) -> str:
        number, machine = self.processes[rank]
        return f"rank {rank} (process {number} on {machine})"


def _has_ended(number: int) -> bool:
    import psutil

    try:
        return psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# ---- telling why all end


def tell(error: BaseException, began: bool = True) -> int:
    """`errors.tell`, by one rank for all: by the one whose error it is, of several by rank 0. Where a rank
    has ended without a word, another one names it."""
    if here.watch is None:  # before they met, all ranks of a machine see the same
        if here.local:
            time.sleep(SILENT)  # torchrun ends it when the first has told
        return errors.tell(error, began, who=f"rank {here.rank}: " if here.local else "")
    watch, by_others = here.watch, isinstance(error, Lost | Interrupted)
    waits = 5.0 if isinstance(error, Lost) else 0.0 if by_others or here.first else 1.0
    until = time.monotonic() + waits
    while not (watch.is_told() or by_others and watch.lost()) and time.monotonic() < until:
        time.sleep(0.05)
    if by_others and (lost := watch.lost()):
        return _say_lost(lost, watch)
    if isinstance(error, Interrupted) and not here.first:
        return 128 + error.number  # rank 0 was stopped, too, or will be by torchrun
    if not _is_first_to_tell(watch):
        return 1
    return errors.tell(error, began, who="" if here.first else f"rank {here.rank}: ")


def _say_lost(lost: Sequence[int], watch: Watch) -> int:
    if _is_first_to_tell(watch):
        names = ", ".join(map(watch.name_of, lost))
        why = "ended without a word: killed, as happens where memory is short"
        errors.tell(
            RunFailed(f"{names} {why}; the same command goes on from the last checkpoint, if there is one")
        )
    return 1


def _is_first_to_tell(watch: Watch) -> bool:
    try:
        return watch.store.add("told", 1) == 1
    except RuntimeError:  # no store any more
        return here.rank == min(set(range(here.size)) - set(watch.lost()))


# ---- what ranks do together


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Inside, ranks wait for each other. Raises Lost where one no longer answers."""
    try:
        yield
    except RuntimeError as error:  # DistError is one
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Lost(f"the connection of the ranks broke ({first})") from error


def barrier():
    """Wait until every rank is here, however long it works. Raises Lost when one has ended."""
    if not here.many:
        return
    meeting = next(here.meetings)
    with together():
        here.store.set(f"meeting {meeting} {here.rank}", "")
        names = [f"meeting {meeting} {rank}" for rank in range(here.size)]
        _wait_for(names)


def _wait_for(names: list[str]):
    """Until all these keys are in the store. Python's signals come in between."""
    assert here.watch
    pause = 0.01
    while not here.store.check(names):
        if here.watch.lost() or here.watch.is_told():
            raise Lost("another rank has ended")
        time.sleep(pause)
        pause = min(1.2 * pause, 0.5)


def deal(n: int) -> list[int]:
    """Ranks for the next n SAEs, in turn. All ranks ask in the same order."""
    return list(itertools.islice(here.turns, n))


def broadcast(value: T) -> T:
    """Rank 0's value (JSON), on every rank."""
    if not here.many:
        return value
    name = f"saying {next(here.sayings)}"
    with together():
        if here.first:
            here.store.set(name, json.dumps(value))
            return value
        _wait_for([name])
        return json.loads(here.store.get(name))


def agree(*said: float) -> tuple[float, ...]:
    """The largest value of each that any rank says; of a condition, whether it is met anywhere. Raises
    Interrupted in every rank where a signal came to one: with signals held (process.signals) all of them stop
    at the same point."""
    if not here.many:
        return said
    import torch
    import torch.distributed as dist

    values = torch.tensor([process.signals.pending or 0, *said], dtype=torch.float64)
    with together():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    number, *most = values.tolist()
    if number:
        raise Interrupted(int(number), process.signals.state)
    return tuple(most)


class Pace:
    """Ranks that agree now and then: behind the steps of some two seconds, at the slowest rank's pace, and
    behind 25 at most. One process alone looks at every step."""

    def __init__(self, step: int):
        self.step, self.until, self.since = step, step, time.monotonic()

    def agree(self, step: int, *said: bool, between: Sequence[bool]) -> Sequence[float]:
        """As `agree`; what holds in between."""
        if not here.many:
            return said
        if step < self.until:
            return between
        seconds = (time.monotonic() - self.since) / max(1, step - self.step)
        *heard, slowest = agree(*said, seconds)
        self.step, self.since = step, time.monotonic()
        self.until = step + min(25, int(2 / max(slowest, 1e-3)) + 1)
        return heard


def held() -> contextlib.AbstractContextManager:
    """Inside, a signal stops all ranks where they `agree`; one process alone it stops as ever."""
    return process.signals.held() if here.many else contextlib.nullcontext()


def all_gather(value: T) -> list[T]:
    """The values (JSON) of all ranks, in order, on every rank."""
    if not here.many:
        return [value]
    import torch
    import torch.distributed as dist

    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = torch.zeros(here.size, dtype=torch.long)
    sizes[here.rank] = len(mine)
    with together():
        dist.all_reduce(sizes)
        parts = [torch.zeros(int(sizes.max()), dtype=torch.uint8) for _ in range(here.size)]
        parts[here.rank][: len(mine)] = mine
        dist.all_gather(parts, parts[here.rank].clone())
    return [json.loads(bytes(part[:n].numpy())) for part, n in zip(parts, sizes.tolist())]


def at_first(tensors: dict[str, Any], owner: int) -> dict[str, Any]:
    """A rank's tensors by name on rank 0, on the CPU where they travelled; its own on the owner. Only these
    two take part."""
    if owner == 0 or here.rank not in (0, owner):
        return tensors
    import torch
    import torch.distributed as dist
    from safetensors.torch import load, save

    with together():
        if here.rank == owner:
            content = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
            dist.send(torch.tensor([len(content)]), 0)
            dist.send(torch.frombuffer(bytearray(content), dtype=torch.uint8), 0)
            return tensors
        size = torch.zeros(1, dtype=torch.long)
        dist.recv(size, owner)
        received = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(received, owner)
    return load(bytes(received.numpy()))


def shared(items: Sequence[T], work: Callable[[T], Any], lengths: Sequence[int], like: Any) -> Iterator[Any]:
    """work(item) of all items in order, on every rank: a tensor of so many rows, otherwise as those of
    `like`. Each rank works on every size-th item."""
    if not here.many:
        yield from map(work, items)
        return
    import torch
    import torch.distributed as dist

    if like.is_cuda and here.on_machine > torch.cuda.device_count():
        what = f"{here.on_machine} processes on this machine and {torch.cuda.device_count()} GPUs"
        raise WrongRequest(f"{what}: give torchrun a --nproc_per_node of as many as there are")
    for start in range(0, len(items), here.size):
        agree()
        mine: Any = work(items[start + here.rank]) if start + here.rank < len(items) else None
        for owner, n in enumerate(lengths[start : start + here.size]):
            t = mine if owner == here.rank else like.new_empty(n, *like.shape[1:])
            with together():
                dist.broadcast(t, owner)
            yield t


def gathered(runs: Sequence[R], work: Callable[[R], list]) -> Iterator[tuple[R, list]]:
    """Each run with the list that work(run) gives, that of all ranks together: they meet when all of it is
    done."""
    if not here.many:
        for run in runs:
            yield run, work(run)
        return
    mine = [work(run) for run in runs]
    barrier()
    for run, *parts in zip(runs, *all_gather(mine)):
        yield run, sum(parts, [])
