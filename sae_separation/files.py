"""Files written whole or not at all; JSON, and tensors in safetensors, that carry their own checksum."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_separation.errors import RunFailed

LARGEST = 64 * 10**6  # bytes of a JSON file; what a run writes is far smaller


def gigabytes(n: float) -> str:
    """So many bytes, for a message."""
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


class Unusable(Exception):
    """A file that cannot be used: one line that names it and says why."""


REMEDIES = {
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "free disk space",
    errno.EFBIG: "raise the file size limit (ulimit -f)",
    errno.ENOENT: "its folder was removed: restore it",
    errno.EACCES: "restore the permission to write",
    errno.EPERM: "restore the permission to write",
    errno.EROFS: "the file system became read-only",
}


class CannotWrite(RunFailed):
    """The disk, not the work, is at fault."""


def cause_and_remedy(error: BaseException | None) -> tuple[str, str]:
    """Why a file could not be written, and what to do about it."""
    numbers = (n for n in REMEDIES if os.strerror(n) in str(error))  # safetensors' errors have a text alone
    number: int | None = getattr(error, "errno", None) or next(numbers, None)
    cause = str(error) if number is None else os.strerror(number)
    return cause, "see to it" if number is None else REMEDIES.get(number, "see to it")


@contextlib.contextmanager
def writing(path: Path):
    """Inside, a file that cannot be written raises CannotWrite with its path, the cause and the remedy."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        cause, remedy = cause_and_remedy(error)
        why = f"{cause}; {remedy}, then the same command goes on from the last checkpoint"
        raise CannotWrite(f"{path} cannot be written: {why}") from error


def sync(path: Path):
    """Have what a file holds, or what a folder lists, on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


HALF_WRITTEN = ".sae.tmp"  # ends the name of a file while it is written; no one else names a file so


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Inside, a file is written at the path that is given, beside `path`; then it is synced and renamed.
    Raises CannotWrite, also when the folder is gone: it is not made anew."""
    beside = path.with_name(path.name + HALF_WRITTEN)
    with writing(path):
        try:
            beside.unlink(missing_ok=True)  # a link of that name is removed, and what it leads to stays
            yield beside
            sync(beside)
            os.replace(beside, path)
            sync(path.parent)
        except Exception:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise


def write_whole(path: Path, content: bytes):
    """These bytes, whole or not at all. Raises CannotWrite."""
    with whole(path) as beside, beside.open("xb") as file:
        file.write(content)


def as_json(value, indent: int | None = 1) -> bytes:
    """Strict JSON; without an indent the shortest."""
    separators = (",", ":") if indent is None else None
    return (json.dumps(value, indent=indent, allow_nan=False, separators=separators) + "\n").encode()


def write_json(path: Path, value, indent: int | None = 1):
    """Strict JSON, whole or not at all."""
    write_whole(path, as_json(value, indent))


def seal(value: dict) -> dict:
    """The object with the sha256 of its own JSON."""
    return value | {"sha256": hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()}


def is_sealed(value: dict) -> bool:
    """Whether an object read back is what `seal` returned."""
    return value == seal({k: v for k, v in value.items() if k != "sha256"})


def content_of(path: Path) -> bytes:
    """Bytes of a JSON file. Raises OSError; and ValueError for a folder, a pipe or a device (which may keep a
    reader waiting for ever) and for more than LARGEST bytes."""
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"larger than {LARGEST // 10**6} MB")
    return content


def read_sealed(path: Path) -> dict | None:
    """A sealed object; None if there is no such file. Raises Unusable when it is not as it was written."""
    try:
        value = json.loads(content_of(path))
        whole = isinstance(value, dict) and is_sealed(value)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise Unusable(f"{path} is damaged: {error}") from error
    if not whole:
        raise Unusable(f"{path} is not as it was written: its checksum is wrong")
    return value


def sha256_of(path: Path) -> str | None:
    """Of a regular file's bytes; None if there is none or it cannot be read."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


# ---- tensors: torch is imported where it is used, so that a locked folder is refused at once


def digest(tensors: dict, facts: str) -> str:
    """sha256 over the facts and over every tensor's name, type, shape and bytes."""
    import torch

    hashed = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        t = tensors[name].detach().contiguous()
        hashed.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        hashed.update(t.reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def header(form: str, tensors: dict, facts: dict) -> dict[str, str]:
    """The header of a safetensors file: the format's name, the facts as JSON, and `digest`."""
    said = json.dumps(facts, allow_nan=False)
    return {"format": form, "facts": said, "sha256": digest(tensors, said)}


@contextlib.contextmanager
def opened(path: Path, form: str, what: str, framework: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """Inside, a safetensors file with such a `header`, and that; `what` it is to be. Raises Unusable for
    another file, and for what cannot be read inside."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as file:
            known = file.metadata() or {}
            if known.get("format") != form:
                raise Unusable(f"{path} is not {what} of this version of the program")
            yield file, known
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise Unusable(
            f"{path} is damaged: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error


def read_tensors(path: Path, form: str, what: str) -> tuple[dict, dict]:
    """Tensors (on the CPU, and no views of the file) and facts of a file, as `opened`. Raises Unusable."""
    with opened(path, form, what, "pt") as (file, known):
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        if digest(tensors, known["facts"]) != known["sha256"]:
            raise Unusable(f"{path} is damaged: its checksum is wrong")
        return tensors, json.loads(known["facts"])


def read_facts(path: Path, form: str, what: str) -> dict:
    """Its facts alone, without torch; whether it is whole is not looked at. Raises Unusable."""
    with opened(path, form, what, "np") as (_, known):
        return json.loads(known["facts"])
