"""How a command ends when it does not end well: one line, last on stderr, and an exit code."""

import contextlib
import errno
import os
import resource
import signal
import sys
import traceback


class WrongRequest(Exception):
    """What was asked cannot be done as asked: one line, exit code 2, nothing written."""


class RunFailed(Exception):
    """A run that began and cannot go on: one line, exit code 1, no final_info.json."""


class Interrupted(BaseException):
    """A signal came that stops a command. `told` says where the work stands."""

    def __init__(self, number: int, told: str):
        self.number, self.told = number, told


def address_space() -> int | None:
    """Bytes of it that this process may have (ulimit -v); None for any number."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def is_out_of_memory(error: BaseException | None) -> bool:
    """An allocation that failed, on the CPU, on CUDA or where a library was loaded, in the forms that there
    are for it; also as the cause of another error."""
    if error is None or isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return error is not None
    forms = ["allocate memory", "out of memory", "bad_alloc", "failed to map segment"]
    forms += [] if address_space() is None else ["start new thread"]
    said = "" if isinstance(error, WrongRequest | RunFailed) else str(error).lower()
    return any(form in said for form in forms) or is_out_of_memory(error.__cause__)


def ending(error: BaseException, began: bool) -> tuple[int, str, bool]:
    """Exit code and line of a command that ended in `error`, and whether nobody expected that; `began`:
    whether everything was imported."""
    if isinstance(error, Interrupted):
        return 128 + error.number, f"interrupted by {signal.Signals(error.number).name}: {error.told}", False
    told_so = isinstance(error, WrongRequest | RunFailed) and "memory" in str(
        error
    )  # and where, and what to do
    if is_out_of_memory(error) and not told_so:
        limit = address_space()
        limited = (
            "" if limit is None else f" (ulimit -v allows {limit / 1e9:.1f} GB of address space: raise it)"
        )
        if not began:
            return (
                1,
                f"out of memory{limited} before anything was begun: with more the same command starts",
                False,
            )
        lower = "lower --batch_size, --d_sae, --buffer_tokens, or the number of --seeds or run folders"
        return 1, f"out of memory{limited}: {lower}; with more memory the same command goes on", False
    if isinstance(error, WrongRequest | RunFailed):
        return 2 if isinstance(error, WrongRequest) else 1, str(error), False
    told = (str(error).strip() or type(error).__name__).splitlines()[0]
    if any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):
        return 1, f"torch.compile failed ({told}): leave out --compile, or mend what it needs", False
    if isinstance(error, OSError | UnicodeError):
        return 1, f"{type(error).__name__}: {told}; mend that and give the same command again", False
    return 1, f"unexpected {type(error).__name__}: {told}; please report it with the lines above", True


def tell(error: BaseException, began: bool = True) -> int:
    """Write the last line of a command that ended in `error` to stderr, after the traceback of what nobody
    expected; its exit code."""
    code, line, unexpected = ending(error, began)
    if unexpected:
        traceback.print_exception(error)
    print(f"error: {' '.join(line.splitlines())}", file=sys.stderr)
    return code


def tell_uncaught(kind: type, error: BaseException, trace):
    """For sys.excepthook: `tell`, while libraries are imported. Python then ends with exit code 1."""
    tell(error, began=False)


class Output:
    """A text stream that a run does not depend on: what cannot be written is dropped, stderr told once."""

    def __init__(self, stream, number: int):
        self._stream, self._number = stream, number

    def write(self, text: str) -> int:
        self._do(self._stream.write, text)
        return len(text)

    def flush(self):
        self._do(self._stream.flush)

    def _do(self, act, *args):
        try:
            act(*args)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._number)  # also for what is in buffers still, and for what libraries write
            os.close(nowhere)
            if self._number == 1:
                print(
                    f"warning: stdout cannot be written ({error.strerror}): the rest of it is left out",
                    file=sys.stderr,
                )

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def keep_output_open():
    """From here on writing to stdout and stderr never fails: not when a reader (`| head`) or a terminal goes
    away, a disk is full, a stream was closed from the start, or its encoding lacks a character."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # or the next file that is opened would take its place
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name) or open(number, "w", closefd=False)
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Output(stream, number))


def stops() -> list[signal.Signals]:
    """The signals that stop a command. Under nohup, which ignores it, SIGHUP (a connection lost) is none."""
    kept = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if kept else [signal.SIGHUP])]


def leave_at_once(number, frame):
    """A signal handler for the time before anything is begun."""
    with contextlib.suppress(OSError):
        os.write(
            2, f"error: interrupted by {signal.Signals(number).name} before anything was begun\n".encode()
        )
    os._exit(128 + number)
