"""How a command ends when it does not end well: one line, last on stderr, and an exit code."""

import contextlib
import errno
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import TextIO


class WrongRequest(Exception):
    """What was asked cannot be done as asked: one line, exit code 2, nothing written."""


class RunFailed(Exception):
    """A run that began and cannot go on: one line, exit code 1, no final_info.json."""


class Interrupted(BaseException):
    """A signal came that stops a command. `message` says where the work stands."""

    def __init__(self, number: int, message: str):
        self.number, self.message = number, message


def address_space() -> int | None:
    """Bytes of it that this process may have (ulimit -v); None for any number."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def address_limit() -> str:
    """`address_space` for a message; empty where there is no limit."""
    limit = address_space()
    return "" if limit is None else f" (ulimit -v allows {limit / 1e9:.1f} GB of address space: raise it)"


def is_out_of_memory(error: BaseException | None) -> bool:
    """An allocation that failed, on the CPU, on CUDA or where a library was loaded, in the forms that there
    are for it; also as the cause of another error."""
    if error is None or isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return error is not None
    forms = ["allocate memory", "out of memory", "bad_alloc", "failed to map segment"]
    forms += [] if address_space() is None else ["start new thread"]
    said = "" if isinstance(error, WrongRequest | RunFailed) else str(error).lower()
    return any(form in said for form in forms) or is_out_of_memory(error.__cause__)


TRAIN_LESS = (
    "lower --batch_size, --d_sae, --buffer_tokens, or the number of --seeds or run folders; with more memory"
    " the same command goes on"
)


def ending(error: BaseException, began: bool, take_less: str) -> tuple[int, str, bool]:
    """Exit code and line of a command that ended in `error`, and whether nobody expected that; `began`:
    whether everything was imported; `take_less`: what makes do with less memory."""
    if isinstance(error, Interrupted):
        return (
            128 + error.number,
            f"interrupted by {signal.Signals(error.number).name}: {error.message}",
            False,
        )
    ours = isinstance(error, WrongRequest | RunFailed)
    if is_out_of_memory(error) and not (ours and "memory" in str(error)):  # which says what to do
        rest = f": {take_less}" if began else " before anything was begun: with more the same command starts"
        return 1, f"out of memory{address_limit()}{rest}", False
    if ours:
        return 2 if isinstance(error, WrongRequest) else 1, str(error), False
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):
        return 1, f"torch.compile failed ({text}): leave out --compile, or mend what it needs", False
    if isinstance(error, OSError | UnicodeError):
        return 1, f"{type(error).__name__}: {text}; mend that and give the same command again", False
    return 1, f"unexpected {type(error).__name__}: {text}; please report it with the lines above", True


def plain(text: str) -> str:
    """One line: what is not printable (line ends, terminal escapes, lone surrogates) as Python writes it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def tell(error: BaseException, began: bool = True, take_less: str = TRAIN_LESS, who: str = "") -> int:
    """Write the last line of a command that ended in `error` to stderr, after the traceback of what nobody
    expected; its exit code. `began`, `take_less`: as `ending` takes them. `who`: which of several
    processes."""
    code, line, unexpected = ending(error, began, take_less)
    if unexpected:
        traceback.print_exception(error)
    print(f"error: {who}{plain(' '.join(line.splitlines()))}", file=sys.stderr)
    return code


def tell_uncaught(kind: type, error: BaseException, trace):
    """For sys.excepthook: `tell`, while libraries are imported. Python then ends with exit code 1."""
    tell(error, began=False)


def warn_of_lost_stdout(error: OSError):
    """What a run prints is not what it was started for: stderr is told, and the run goes on."""
    text = f"warning: stdout cannot be written ({error.strerror}): the rest of it is left out"
    print(text, file=sys.stderr)


class Output:
    """A text stream that stays open: what cannot be written is dropped, and `lost` called once with the
    error."""

    def __init__(self, stream: TextIO, number: int, lost: Callable[[OSError], None] | None = None):
        self._stream, self._number, self._lost = stream, number, lost

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
            if self._lost:
                self._lost(error)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def keep_output_open(stdout_lost: Callable[[OSError], None] = warn_of_lost_stdout):
    """From here on writing to stdout and stderr does not fail: not when a reader (`| head`) or a terminal
    goes away, a disk is full, a stream was closed from the start, or its encoding lacks a character.
    `stdout_lost` is called once when stdout can no longer be written; what it raises, the writer raises."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # or the next file that is opened would take its place
            os.open(os.devnull, os.O_RDWR)
    for name, number, lost in (("stdout", 1, stdout_lost), ("stderr", 2, None)):
        stream = getattr(sys, name) or open(number, "w", closefd=False)
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Output(stream, number, lost))


def stops() -> list[signal.Signals]:
    """The signals that stop a command. SIGUSR1 is what batch systems are asked to send before a time limit.
    Under nohup, which ignores it, SIGHUP (a connection lost) is none."""
    kept = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *([] if kept else [signal.SIGHUP])]


def leave_at_once(number, frame):
    """A signal handler for the time before anything is begun. Of torchrun's processes on a machine the first
    says so."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK") == "0":
        said = f"error: interrupted by {signal.Signals(number).name} before anything was begun\n"
        with contextlib.suppress(OSError):
            os.write(2, said.encode())
    os._exit(128 + number)


def begin():
    """From here on whatever ends the process ends with its exit code and one line."""
    keep_output_open()
    sys.excepthook = tell_uncaught
    for number in stops():
        signal.signal(number, leave_at_once)


def finish(code: int):
    """Exit with this code, now that all is written and told: a signal only ends the process sooner."""

    def leave(number, frame):
        os._exit(code)

    sys.stdout.flush()
    for number in stops():
        signal.signal(number, leave)
    sys.exit(code)
