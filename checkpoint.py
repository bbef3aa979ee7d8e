"""What keeps a run's work whole: what its folder holds, sealed JSON, checkpoints, one owner, signals.

    refuse_foreign(folder, seeds)                    # nothing is removed but WRITTEN
    own(folder)                                      # one process a run folder (flock)
    with signals: ... with signals.held(): ...       # a signal ends the process where the state is whole
    save(folder, step, tensors, facts)               # one safetensors file, whole or not at all; the last two stay
    newest_common({folder: made_by})                 # the newest state that all folders of a command hold
    write_result(folder, info)                       # final_info.json, and checksums of what a run left

A checkpoint is `checkpoints/step_XXXXXXXX.safetensors`: tensors, and in its header the other facts as JSON and a sha256 over both. torch is
imported where it is used, so that a locked folder is refused at once.
"""

import contextlib
import ctypes
import errno
import fcntl
import gc
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path

from errors import Interrupted, RunFailed, WrongRequest, stops

FORMAT = "orthogonal-sae-checkpoint-1"
KEPT = 2
LARGEST = 64 * 10**6  # bytes of a JSON file; what a run writes is far smaller

# ------------------------------------------------------------------------------ what a run folder holds

SECTIONS = {  # evaluation -> its name in the results
    "core": "core", "unlearning": "unlearning", "corpus": "corpus_unlearning", "geometry": "geometry",
}  # fmt: skip
FILES = ("config.json", "final_info.json", "warnings.json", "checksums.json", "train_log.jsonl")
SAE_FILES = ("cfg.json", "sae_weights.safetensors")
WRITTEN = {  # part of a run folder -> names of what the program writes into it. It removes nothing else
    ".": "|".join(map(re.escape, FILES)),
    "checkpoints": r"step_(\d{8,})\.safetensors",
    "eval": rf"seed(\d+)_(metrics|{'|'.join(SECTIONS.values())})\.json",
    "sae_seed*": "|".join(map(re.escape, SAE_FILES)),
}


def sae_folder(folder: Path, seed: int | str) -> Path:
    return folder / f"sae_seed{seed}"


def record_of(folder: Path, seed: int | str) -> Path:
    """What an SAE's files are and what was measured on them. It is there before the SAE is."""
    return folder / "eval" / f"seed{seed}_metrics.json"


def written(place: Path, part: str) -> list[Path]:
    """What the program wrote into a part of a run folder, or was writing (.tmp), by name; links too."""
    name = re.compile(rf"({WRITTEN[part]})(\.tmp)?")
    there = sorted(place.iterdir()) if place.is_dir() else []
    return [path for path in there if name.fullmatch(path.name) and (path.is_symlink() or path.is_file())]


def remove_part(place: Path, part: str):
    """Remove what the program wrote into a part of a run folder. Of a link, the link alone."""
    if place.is_symlink():
        place.unlink()
    for path in written(place, part):
        path.unlink(missing_ok=True)


def remove_folder(place: Path, part: str):
    """`remove_part`, and the part's folder when nothing else is in it."""
    remove_part(place, part)
    with contextlib.suppress(OSError):  # there is something else in it, or it is gone
        place.rmdir()


def remove_half_written(folder: Path):
    """Remove what a process was writing when it was killed."""
    for part in (".", "checkpoints", "eval"):
        for path in written(folder / part, part):
            if path.name.endswith(".tmp"):
                path.unlink(missing_ok=True)


def start_anew(folder: Path):
    """Remove what a run left in its folder, all but config.json, which is replaced.

    The process may be killed at any point of it: the result goes first, and an SAE's record after the SAE.
    """
    (folder / "checkpoints").mkdir(exist_ok=True)  # without it, Run.tell_restart says that they were lost
    (folder / "final_info.json").unlink(missing_ok=True)
    for record in written(folder / "eval", "eval"):
        if seed := re.fullmatch(r"seed(\d+)_metrics\.json", record.name):
            remove_folder(sae_folder(folder, seed[1]), "sae_seed*")
    for part in ("eval", "checkpoints"):
        remove_part(folder / part, part)
    for path in written(folder, "."):
        if path.name != "config.json":
            path.unlink(missing_ok=True)


def clear_complete(folder: Path):
    """Remove what a complete run needs no more: its checkpoints, and what was half written. A run that
    cannot be cleared is complete all the same."""
    try:
        remove_folder(folder / "checkpoints", "checkpoints")
        remove_half_written(folder)
    except OSError as error:
        why = f"is needed no more and cannot be removed: {error.strerror}"
        print(f"warning: {error.filename} {why}", file=sys.stderr)


def clear_left(folder: Path):
    """`clear_complete`, for a process that was killed before it; not while another one owns the folder."""
    if (folder / "checkpoints").is_dir() or any(path.name.endswith(".tmp") for path in written(folder, ".")):
        with contextlib.suppress(WrongRequest):  # another owner, or a folder that one may only read
            own(folder)
            if (folder / "final_info.json").exists():
                clear_complete(folder)
            disown(folder)


def is_settings(value) -> bool:
    """Whether an object is what this program, of any version, writes to config.json."""
    parts = [value.get(part) for part in ("requested", "config")] if isinstance(value, dict) else [None]
    return all(isinstance(part, dict) and {"arm", "seeds", "testbed"} <= set(part) for part in parts)


def refuse_place(folder: Path):
    """Raises WrongRequest where no run folder can be: a name that no folder can have, a file, a link that
    leads nowhere, no permission to write. Nothing is made."""
    said = f"--out_dir {folder}"
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in str(folder)):
        raise WrongRequest(f"--out_dir {str(folder)!r} holds a line break or another control character")
    if len(os.fsencode(folder.name)) > 200:
        raise WrongRequest(f"{said}: the folder's name is longer than 200 bytes; give a shorter one")
    try:
        for place in (folder, *folder.absolute().parents):
            if place.is_symlink() and not place.exists():
                raise WrongRequest(f"{said}: {place} is a link that leads nowhere; name another folder")
            if place.exists():
                break
    except OSError as error:
        raise WrongRequest(f"{said}: {error.strerror}; name another folder") from error
    if not place.is_dir():
        raise WrongRequest(f"{said}: {place} is a file; name a folder")
    if not os.access(place, os.W_OK | os.X_OK | (os.R_OK if place == folder else 0)):
        raise WrongRequest(f"{said}: {place} is not writable; name another folder")


def refuse_foreign(folder: Path, seeds: tuple[int, ...]):
    """Raises WrongRequest for a folder that holds other files and no run of this program, and for a run
    folder in which something else is where this program would write."""
    if not folder.is_dir():
        return
    settings = folder / "config.json"
    try:
        ours = is_settings(json.loads(settings.read_bytes()))
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        ours = False
    except OSError as error:
        raise WrongRequest(f"{settings} cannot be read: {error.strerror}; name another folder") from error
    if not ours:
        begun = {".lock", "config.json.tmp"}  # what may be there before config.json is
        for part in ("checkpoints", "eval"):
            begun |= {part} if (folder / part).is_dir() and not any((folder / part).iterdir()) else set()
        if foreign := sorted(p.name for p in folder.iterdir() if p.name not in begun or p.is_symlink()):
            names = ", ".join(map(repr, foreign[:3])) + (", ..." if len(foreign) > 3 else "")
            whose = "a config.json that is damaged or not" if settings.exists() else "no config.json"
            told = f"--out_dir {folder} holds {names} and {whose} of this program"
            rest = "nothing is removed or written there, nor with --overwrite; name a new or an empty folder"
            raise WrongRequest(f"{told}: {rest}")
    for path in (folder / name for name in FILES):
        if path.is_dir():
            raise WrongRequest(f"{path} is a folder, and this program would write a file there: move it")
    for place in (folder / "checkpoints", folder / "eval", *(sae_folder(folder, seed) for seed in seeds)):
        if (place.exists() or place.is_symlink()) and not place.is_dir():
            raise WrongRequest(f"{place} is no folder, and this program would make one there: move it")
    for seed in seeds:
        sae = sae_folder(folder, seed)
        there = [name for name in SAE_FILES if os.path.lexists(sae / name)]
        if there and not record_of(folder, seed).exists():
            told = f"{sae} holds {there[0]}, which is not known to be of this run"
            why = f"{record_of(folder, seed)} is not there"
            raise WrongRequest(f"{told} ({why}), and this program would write it: move that folder")


# ------------------------------------------------------------------------------------------------ files


class Unusable(Exception):
    """A file that cannot be used: one line that names it and says why."""


REMEDIES = {
    errno.ENOSPC: "free disk space", errno.EDQUOT: "free disk space", errno.EFBIG: "raise the file size limit (ulimit -f)",
    errno.ENOENT: "its folder was removed: restore it", errno.EACCES: "restore the permission to write", errno.EPERM: "restore the permission to write",
    errno.EROFS: "the file system became read-only",
}  # fmt: skip


class CannotWrite(RunFailed):
    """The disk, not the work, is at fault."""


@contextlib.contextmanager
def writing(path: Path):
    """Inside, a file that cannot be written raises CannotWrite with its path, the cause and the remedy."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None) or next((n for n in REMEDIES if os.strerror(n) in str(error)), None)
        cause = str(error) if number is None else os.strerror(number)
        raise CannotWrite(f"{path} cannot be written: {cause}; {REMEDIES.get(number, 'see to it')}, then the same command goes on from the last checkpoint") from error


def sync(path: Path):
    """Have what a file holds, or what a folder lists, on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_whole(path: Path, content: bytes):
    """Written beside, synced and renamed. Raises CannotWrite, also when the folder is gone: it is not made anew."""
    beside = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            beside.unlink(missing_ok=True)  # a link of that name is removed, and what it leads to stays
            with beside.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
            sync(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise


def as_json(value, indent: int | None = 1) -> bytes:
    """Strict JSON."""
    return (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode()


def write_json(path: Path, value, indent: int | None = 1):
    """Strict JSON, whole or not at all."""
    write_whole(path, as_json(value, indent))


def seal(value: dict) -> dict:
    """The object with the sha256 of its own JSON."""
    return value | {"sha256": hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()}


def provenance() -> dict:
    """Versions, hardware and the commit that made a run."""
    from importlib.metadata import version

    import torch

    packages = ("torch", "nnsight", "transformers", "datasets", "numpy", "sae-bench", "sae-lens")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
            "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads(), "gpus": gpus},
            "git": commit_of_code()}  # fmt: skip


def commit_of_code() -> str:
    """The commit; "-dirty" where code differs from it (run folders are no code); "unknown: " and the reason
    where git does not tell."""

    def git(*args) -> subprocess.CompletedProcess:
        here = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, errors="replace")

    try:
        described = git("describe", "--always")
        changed = git("diff", "--quiet", "HEAD", "--", "*.py", "requirements.txt", "micro_pythia")
    except FileNotFoundError:
        return "unknown: git is not installed"
    except OSError as error:
        return f"unknown: git cannot be started ({error.strerror})"
    for done in (described, changed):
        if done.returncode > 1 or done.returncode < 0 or not described.stdout.strip():
            return f"unknown: {(done.stderr.strip() or f'git ends with {done.returncode}').splitlines()[0]}"
    return described.stdout.strip() + ("-dirty" if changed.returncode else "")


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


def files_of(folder: Path) -> dict[str, str]:
    """sha256 of every file of an exported SAE that is there."""
    return {name: sha256_of(folder / name) for name in SAE_FILES if (folder / name).exists()}


def write_result(out_dir: Path, info: dict):
    """final_info.json, last; just before it, in checksums.json, its sha256 and that of every file behind it that is not sealed."""
    content = as_json(info)
    details = written(out_dir / "eval", "eval")
    details = [path for path in details if not path.name.endswith(("_metrics.json", ".tmp"))]
    behind = [out_dir / "warnings.json", out_dir / "train_log.jsonl", *details]
    files = {str(p.relative_to(out_dir)): sha256_of(p) for p in behind} | {"final_info.json": hashlib.sha256(content).hexdigest()}
    write_json(out_dir / "checksums.json", seal({"files": files}))
    write_whole(out_dir / "final_info.json", content)


def recorded_sums(out_dir: Path) -> dict[str, str]:
    """What checksums.json says: name of a file -> sha256; older run folders have none. Raises Unusable."""
    path = out_dir / "checksums.json"
    files = (read_sealed(path) or {"files": {}}).get("files")
    if not isinstance(files, dict) or any(Path(n).is_absolute() or ".." in Path(n).parts for n in files):
        raise Unusable(f"{path} does not list files of its folder with their checksums")
    return files


def is_as_recorded(path: Path) -> bool:
    """Whether a file is the one that checksums.json beside it names, or that cannot be told."""
    try:
        return sha256_of(path) == recorded_sums(path.parent).get(path.name, sha256_of(path))
    except (Unusable, KeyError):
        return True  # `changed_files` names checksums.json


def read_run_json(path: Path, keys: set[str]) -> dict:
    """An object from a run folder. Raises WrongRequest when the file is not one that this program wrote."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WrongRequest(f"{path} cannot be read ({error}); name another folder, or --overwrite it") from error
    if not isinstance(value, dict) or not keys <= set(value) or not all(isinstance(value[k], dict) for k in keys):
        raise WrongRequest(f"{path} was not written by this program; name another folder, or --overwrite it")
    if "sha256" in value and not is_sealed(value) or not is_as_recorded(path):
        raise WrongRequest(f"{path} is not as it was written: its checksum is wrong; name another folder, or --overwrite it")
    return value


def changed_files(out_dir: Path) -> list[str]:
    """What of a complete run is not as it was written, one line each; an SAE that is not there is none of it."""
    told = []
    try:
        told += [f"{out_dir / name} is not as it was written: its checksum is wrong" for name, known in recorded_sums(out_dir).items() if sha256_of(out_dir / name) != known]
    except (Unusable, KeyError) as why:
        told.append(str(why))
    for path in sorted(out_dir.glob("eval/seed*_metrics.json")):
        try:
            seed = path.name.removesuffix("_metrics.json").removeprefix("seed")
            record, sae = read_sealed(path), sae_folder(out_dir, seed)
            if sae.is_dir() and files_of(sae) != record["files"]:
                told.append(f"{sae} is not as it was written: the checksum of a file is wrong")
        except (Unusable, KeyError) as why:
            told.append(str(why))
    return told


# ------------------------------------------------------------------------------------------------ checkpoints


@dataclass
class Position:
    """Where training stands: steps done, the stream's block and the batch in it that come next, seconds of training and of all work,
    checkpoints written, whether training is over, the names of the folders that are trained together, and passes begun over each text."""

    step: int = 0
    block: int = 0
    batch: int = 0
    train_seconds: float = 0.0
    used_seconds: float = 0.0
    written: int = 0
    over: bool = False
    together: tuple[str, ...] = ()
    passes: dict[str, int] = field(default_factory=dict)


def digest(tensors: dict, facts: str) -> str:
    """sha256 over the facts and over every tensor's name, type, shape and bytes."""
    import torch

    told = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        t = tensors[name].detach().contiguous()
        told.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        told.update(t.reshape(-1).view(torch.uint8).numpy())
    return told.hexdigest()


def path_of(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}.safetensors"


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, usable or not, in order."""
    there = written(folder / "checkpoints", "checkpoints")
    found = (re.fullmatch(WRITTEN["checkpoints"], path.name) for path in there)
    return sorted(int(m[1]) for m in found if m)


def save(folder: Path, step: int, tensors: dict, facts: dict):
    """Write one checkpoint; the last KEPT stay. Raises RunFailed, the older ones intact."""
    from safetensors.torch import save as to_bytes

    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    told = json.dumps(facts, allow_nan=False)
    write_whole(path_of(folder, step), to_bytes(tensors, {"format": FORMAT, "facts": told, "sha256": digest(tensors, told)}))
    for old in steps_in(folder)[:-KEPT]:
        path_of(folder, old).unlink(missing_ok=True)


def read(folder: Path, step: int, made_by: str) -> tuple[dict, dict]:
    """Tensors (on the CPU) and facts of a checkpoint whose facts["made_by"] is `made_by`. Raises Unusable."""
    from safetensors import SafetensorError, safe_open

    path = path_of(folder, step)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise Unusable(f"{path} is not a checkpoint of this program")
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        if digest(tensors, header["facts"]) != header["sha256"]:
            raise Unusable(f"{path} is damaged: its checksum is wrong")
        facts = json.loads(header["facts"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise Unusable(f"{path} is damaged: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    if facts.get("made_by") != made_by:
        raise Unusable(f"{path} was made with other settings, LM or text")
    return tensors, facts


def newest_common(made_by: dict[Path, str]) -> list[tuple[dict, dict]] | None:
    """Tensors and facts of the newest step for which every folder (with what its runs are `made_by`) holds a usable checkpoint;
    newer ones are removed.

    None to start anew: there is no checkpoint, or a first one that was not yet in every folder. Every unusable checkpoint is
    told on one line. Raises WrongRequest when there are checkpoints and none will do: nothing is thrown away unasked.
    """
    there = {folder: steps_in(folder) for folder in made_by}
    if not any(there.values()):
        return None
    told, found = [], None

    def usable(*wanted: tuple[Path, int]) -> list[tuple[dict, dict]] | None:
        try:
            return [read(folder, step, made_by[folder]) for folder, step in wanted]
        except Unusable as why:
            told.append(str(why))
            print(f"warning: {why}")

    for common in sorted(set.intersection(*map(set, there.values())), reverse=True):
        found = usable(*((folder, common) for folder in made_by))
        if found:
            break
    else:  # a first checkpoint that was being written when the process died may be missing in some folders, and little is lost
        common = -1
        newest = None if told else usable(*((folder, steps[-1]) for folder, steps in there.items() if steps))
        together = sorted(folder.name for folder in made_by)
        if newest is None or any(facts["position"]["written"] > 1 or facts["position"]["together"] != together for _, facts in newest):
            stands = ", ".join(f"{folder} at {'no step' if not steps else f'step {steps[-1]}'}" for folder, steps in there.items())
            raise WrongRequest(f"no step has a usable checkpoint in every folder: {'; '.join(told) or stands}; give the folders as they were begun together, or --overwrite")
    for folder, steps in there.items():
        for step in steps:
            if step > common:
                path_of(folder, step).unlink()
    return found


# ------------------------------------------------------------------------------------------------ one owner a folder

_owned: dict[Path, int] = {}


def own(folder: Path):
    """Make this process the folder's owner until `disown` or its death. Raises WrongRequest, naming the
    present owner, or what stands in the lock's place."""
    path = (folder / ".lock").absolute()
    while path not in _owned:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            told = f"{path}, by which one process owns a run folder, cannot be opened: {error.strerror}"
            raise WrongRequest(f"{told}; remove it if it is not in use, or name another folder") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(path, file):  # its last owner removed it just now
                os.close(file)
                continue
            if not stat.S_ISREG(os.fstat(file).st_mode) or not OWNER.fullmatch(os.pread(file, 1000, 0)):
                why = "was not written by this program"
                raise WrongRequest(f"{path} {why}: remove it, or name another folder")
            os.ftruncate(file, 0)
            now = time.strftime("%Y-%m-%d %H:%M:%S %z")
            os.pwrite(file, f"process {os.getpid()} on {platform.node()} since {now}\n".encode(), 0)
        except BlockingIOError:
            owner = os.pread(file, 1000, 0).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise WrongRequest(f"{folder} is being worked on by {owner}: wait for it, or name another folder") from None
        except BaseException:
            os.close(file)
            raise
        _owned[path] = file


OWNER = re.compile(rb"(process \d+ on .* since .*\n)?")  # nothing: of a process that was killed then


def _is_at(path: Path, file: int) -> bool:
    """Whether the file that is open is the one at the path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def disown(*folders: Path):
    """Give up some folders, or every one."""
    for path in [(folder / ".lock").absolute() for folder in folders] or list(_owned):
        file = _owned.pop(path)
        with contextlib.suppress(OSError):
            if _is_at(path, file):
                path.unlink()
        os.close(file)


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
    """A temporary folder that is removed together with its `user`; what killed processes left is removed first.

    A folder gets the name by which it is looked for when its process holds the lock on it: one that is not locked has no owner.
    """
    remove_left(prefix)
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}-"))
    file = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # where there are no locks it keeps the name by which nobody looks for it
        fcntl.flock(file, fcntl.LOCK_EX)
        folder = folder.rename(folder.with_name(folder.name.replace(prefix, f"{prefix}-of-{os.getpid()}", 1)))
    weakref.finalize(user, _remove, folder, file)
    return folder


def _remove(folder: Path, lock: int):
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


# ------------------------------------------------------------------------------------------------ signals


class Signals:
    """Inside, SIGTERM, SIGINT and SIGHUP (`stops`) raise Interrupted; inside `held`, at its end."""

    def __init__(self):
        self.depth, self.pending, self.before = 0, None, {}

    def __enter__(self):
        self.told = "nothing was done yet; the same command starts"
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
            raise Interrupted(self.pending, self.told)

    def something_is_kept(self):
        """From now on there is a checkpoint to go on from."""
        self.told = "what is done is kept; the same command (without --overwrite) goes on"

    def taken(self):
        """Interrupted was caught. Until then it is raised anew at every end of `held`: Python drops what is raised in a __del__."""
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


# ------------------------------------------------------------------------------------------------ global state, numbers, memory


@contextlib.contextmanager
def global_state_kept(seed: int | None = None):
    """Grad mode, default dtype, random states, environment and working folder are afterwards as before; with a `seed`, random
    numbers inside start from it."""
    import numpy as np
    import torch

    grad, dtype, python, numpy = torch.is_grad_enabled(), torch.get_default_dtype(), random.getstate(), np.random.get_state()
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


def offenders(name: str, values) -> str | None:
    """Which entries of a tensor are not finite, and where it is largest; None when all are finite."""
    import torch

    bad = ~torch.isfinite(values)
    if not bad.any():
        return None
    place = lambda flat: "[" + ", ".join(str(int(i)) for i in torch.unravel_index(flat, values.shape)) + "]"  # noqa: E731
    if not values.dim():
        return f"{name} = {values.item()}"
    first = ", ".join(f"{place(i)} = {values.flatten()[i].item()}" for i in bad.flatten().nonzero()[:3, 0])
    rest = values.detach().abs().masked_fill(bad, 0)
    return f"{name} not finite in {int(bad.sum())} of {bad.numel()} entries ({first}; largest finite {rest.max().item():.3g} at {place(rest.argmax())})"


def keep_freed_memory():
    """glibc gives every tensor of over 32 MB back to the system when it is freed, and takes the next one page by page: a third of a step at
    d_sae 16,384. From here on it keeps those of up to 128 MB; of larger ones kept, memory grew by a tenth over 10 million tokens."""
    if hasattr(libc(), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
        libc().mallopt(M_ARENA_MAX, 1)
        libc().mallopt(M_MMAP_THRESHOLD, 2**27)
        libc().mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def make_collections_short():
    """Python's garbage collector takes what is garbage now, and from here on looks at what is made later alone: a whole collection then takes
    milliseconds, not a third of a second."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def return_freed_memory():
    """Give back what `keep_freed_memory` kept: between the LM's work and training, which can hardly use what the other leaves."""
    if hasattr(libc(), "malloc_trim"):
        libc().malloc_trim(0)


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
        left.append(int(Path("/sys/fs/cgroup/memory.max").read_text()) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return min(left)
