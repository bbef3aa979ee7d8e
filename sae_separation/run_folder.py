"""The run folder: what the program writes there, who owns it, and what made it.

refuse_foreign(folder, seeds)                    # nothing is removed but WRITTEN
lock(folder)                                     # one process a run folder (flock)
write_result(folder, info)                       # final_info.json, and checksums of what a run left
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sae_separation import evals
from sae_separation.errors import WrongRequest
from sae_separation.files import (
    HALF_WRITTEN,
    Unusable,
    as_json,
    content_of,
    is_sealed,
    read_sealed,
    seal,
    sha256_of,
    write_json,
    write_whole,
)

FILES = (
    "config.json",
    "final_info.json",
    "warnings.json",
    "checksums.json",
    "train_log.jsonl",
    "tracking.jsonl",
)


SAE_FILES = ("cfg.json", "sae_weights.safetensors")


WRITTEN = {  # part of a run folder -> names of what the program writes into it. It removes nothing else
    ".": "|".join(map(re.escape, FILES)),
    "checkpoints": r"step_(\d{8,})\.safetensors",
    "eval": r"seed(\d+)_(metrics|SECTION)\.json",
    "evaluating": r"seed(\d+)_(metrics|SECTION)\.json",  # of a complete run, until all is measured
    "sae_seed*": "|".join(map(re.escape, SAE_FILES)),
}


def sae_folder(folder: Path, seed: int | str) -> Path:
    return folder / f"sae_seed{seed}"


def record_of(folder: Path, seed: int | str, part: str = "eval") -> Path:
    """What an SAE's files are and what was measured on them. It is there before the SAE is."""
    return folder / part / f"seed{seed}_metrics.json"


def is_complete(folder: Path) -> bool:
    return (folder / "final_info.json").exists()


def written(place: Path, part: str) -> list[Path]:
    """What the program wrote into a part of a run folder, or was writing (HALF_WRITTEN); links too."""
    names = WRITTEN[part].replace("SECTION", "|".join(row.section for row in evals.ROWS))
    name = re.compile(rf"({names})({re.escape(HALF_WRITTEN)})?")
    there = sorted(place.iterdir()) if place.is_dir() else []
    return [path for path in there if name.fullmatch(path.name) and (path.is_symlink() or path.is_file())]


def seeds_of(folder: Path) -> set[str] | None:
    """The seeds of the run that is there, as config.json names them; None where that cannot be read."""
    try:
        return set(map(str, json.loads((folder / "config.json").read_bytes())["config"]["seeds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_part(place: Path, part: str, seeds: set[str] | None = None):
    """Remove what the program wrote into a part of a run folder: of some `seeds`, where files are a seed's
    and seeds are given. Of a link, the link alone."""
    if place.is_symlink():
        place.unlink()
    for path in written(place, part):
        of = re.match(r"seed(\d+)_", path.name)
        if not (of and seeds) or of[1] in seeds:
            path.unlink(missing_ok=True)


def remove_folder(place: Path, part: str):
    """`remove_part`, and the part's folder when nothing else is in it."""
    remove_part(place, part)
    with contextlib.suppress(OSError):  # there is something else in it, or it is gone
        place.rmdir()


def remove_half_written(folder: Path):
    """Remove what a process was writing when it was killed."""
    for part in (".", "checkpoints", "eval", "evaluating"):
        for path in written(folder / part, part):
            if path.name.endswith(".tmp"):
                path.unlink(missing_ok=True)


def start_anew(folder: Path):
    """Remove what a run left in its folder, all but config.json, which is replaced.

    The process may be killed at any point of it: the result goes first, and an SAE's record after the SAE.
    """
    (folder / "checkpoints").mkdir(exist_ok=True)  # without it, Run.tell_restart says that they were lost
    for name in ("checksums.json", "final_info.json"):  # in this order: see refuse_lost_result
        (folder / name).unlink(missing_ok=True)
    for record in written(folder / "eval", "eval"):
        if seed := re.fullmatch(r"seed(\d+)_metrics\.json", record.name):
            remove_folder(sae_folder(folder, seed[1]), "sae_seed*")
    for part in ("eval", "checkpoints"):
        remove_part(folder / part, part, seeds_of(folder))
    remove_folder(folder / "evaluating", "evaluating")
    for path in written(folder, "."):
        if path.name != "config.json":
            path.unlink(missing_ok=True)


def clear_complete(folder: Path):
    """Remove what a complete run needs no more: its checkpoints, what was half written, and what an
    evaluation has measured and final_info.json now holds. A run that cannot be cleared is complete all the
    same."""
    try:
        for part in ("checkpoints", "evaluating"):
            remove_folder(folder / part, part)
        remove_half_written(folder)
    except OSError as error:
        why = f"is needed no more and cannot be removed: {error.strerror}"
        print(f"warning: {error.filename} {why}", file=sys.stderr)


def clear_left(folder: Path):
    """`clear_complete`, for a process that was killed before it; not while another one owns the folder, and
    not while an evaluation waits to be gone on with."""
    left = (folder / "checkpoints").is_dir() or any(p.name.endswith(".tmp") for p in written(folder, "."))
    if left and not (folder / "evaluating").is_dir():
        with contextlib.suppress(WrongRequest):  # another owner, or a folder that one may only read
            lock(folder)
            if is_complete(folder):
                clear_complete(folder)
            unlock(folder)


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


def refuse_same(said: tuple[str, ...]):
    """Raises WrongRequest where two of the folders are one, by links."""
    real = [os.path.realpath(folder) for folder in said]
    for i, folder in enumerate(real):
        if folder in real[:i]:
            raise WrongRequest(
                f"--out_dir {said[real.index(folder)]} and {said[i]} are the same folder: name two"
            )


def make(folder: Path):
    """Make a run's folder. Raises WrongRequest where none can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WrongRequest(
            f"--out_dir {folder} cannot be made: {error.strerror}; name another folder"
        ) from error


def refuse_lost_result(folder: Path):
    """Raises WrongRequest for a run that was complete and has lost its final_info.json: checksums.json is
    written just before that file, and checkpoints are removed after it. Training it again would remove what
    is left of it."""
    if (folder / "checksums.json").exists() and not written(folder / "checkpoints", "checkpoints"):
        why = f"--out_dir {folder} holds a complete run whose final_info.json is gone"
        raise WrongRequest(f"{why}: restore that file, or --overwrite to train it again")


def refuse_foreign(folder: Path, seeds: tuple[int, ...]):
    """Raises WrongRequest for a folder that holds other files and no run of this program, and for a run
    folder in which something else is where this program would write."""
    if not folder.is_dir():
        return
    if not holds_settings(folder):
        refuse_files_of_others(folder)
    for path in (folder / name for name in FILES):
        if path.is_dir():
            raise WrongRequest(f"{path} is a folder, and this program would write a file there: move it")
    parts = (folder / part for part in ("checkpoints", "eval", "evaluating"))
    for place in (*parts, *(sae_folder(folder, seed) for seed in seeds)):
        if place.is_symlink() or place.exists() and not place.is_dir():
            what = "a link" if place.is_symlink() else "no folder"
            raise WrongRequest(f"{place} is {what}, and this program would make a folder there: move it")
    for seed in seeds:
        sae = sae_folder(folder, seed)
        there = [name for name in SAE_FILES if os.path.lexists(sae / name)]
        if there and not record_of(folder, seed).exists():
            what = f"{sae} holds {there[0]}, which is not known to be of this run"
            why = f"{record_of(folder, seed)} is not there"
            raise WrongRequest(f"{what} ({why}), and this program would write it: move that folder")


def holds_settings(folder: Path) -> bool:
    """Whether a folder holds a config.json of this program. Raises WrongRequest where it cannot be read."""
    settings = folder / "config.json"
    try:
        return is_settings(json.loads(settings.read_bytes()))
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return False
    except OSError as error:
        raise WrongRequest(f"{settings} cannot be read: {error.strerror}; name another folder") from error


def refuse_files_of_others(folder: Path):
    """Raises WrongRequest for a folder that holds more than this program writes before config.json."""
    begun = {".lock", f"config.json{HALF_WRITTEN}"}
    for part in ("checkpoints", "eval"):
        begun |= {part} if (folder / part).is_dir() and not any((folder / part).iterdir()) else set()
    if foreign := sorted(p.name for p in folder.iterdir() if p.name not in begun or p.is_symlink()):
        names = ", ".join(map(repr, foreign[:3])) + (", ..." if len(foreign) > 3 else "")
        damaged = (folder / "config.json").exists()
        whose = "a config.json that is damaged or not" if damaged else "no config.json"
        why = f"--out_dir {folder} holds {names} and {whose} of this program"
        rest = "nothing is removed or written there, nor with --overwrite; name a new or an empty folder"
        raise WrongRequest(f"{why}: {rest}")


def has_sae(folder: Path, seed: int) -> bool:
    """Whether the exported SAE of a seed is there (it is not committed)."""
    return all((sae_folder(folder, seed) / name).exists() for name in SAE_FILES)


def refuse_without_saes(folder: Path, seeds: Sequence[int]):
    """Raises WrongRequest for a complete run whose exported SAEs are not there (they are not committed), or
    are not as they were written."""
    for seed in seeds:
        sae = sae_folder(folder, seed)
        if lacking := [name for name in SAE_FILES if not (sae / name).exists()]:
            why = f"{folder} is complete, and its SAEs are not there: {sae / lacking[0]} is missing"
            raise WrongRequest(f"{why}; bring it back, or train again into another folder")
        try:
            record = read_sealed(record_of(folder, seed))
        except Unusable as why:
            raise WrongRequest(f"{why}; bring it back, or train again into another folder") from why
        if record is None or files_of(sae) != record["files"]:
            why = f"{sae} is not as it was written: the checksum of a file is wrong"
            raise WrongRequest(f"{why}; bring it back, or train again into another folder")


def provenance() -> dict:
    """Versions, hardware and the commit that made a run."""
    return made_on() | {"git": commit_of_code()}


def made_on() -> dict:
    """Versions and hardware, on which the bits of results depend."""
    from importlib.metadata import version

    import torch

    packages = ("torch", "nnsight", "transformers", "datasets", "numpy", "sae-bench", "sae-lens")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = {"machine": platform.machine(), "cpu": processor(), "threads": torch.get_num_threads()}
    return {
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "hardware": hardware | {"gpus": gpus},
    }


def processor() -> str:
    """The CPU, as far as the system tells, and which vector instructions torch uses on it: with others, sums
    are rounded otherwise."""
    import torch

    told = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", told.read_text()) if told.exists() else None
    return f"{named[1] if named else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def commit_of_code() -> str:
    """The commit; "-dirty" where code differs from it (run folders are no code); "unknown: " and the reason
    where git does not tell."""

    def git(*args) -> subprocess.CompletedProcess:
        here = Path(__file__).parent.parent
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, errors="replace")

    try:
        if git("ls-files", "--error-unmatch", "experiment.py").returncode == 1:
            return "unknown: the repository around the code does not track it"
        described = git("describe", "--always")
        changed = git(
            "diff", "--quiet", "HEAD", "--", "*.py", "requirements.txt", "micro_pythia", "smollm2_taught"
        )
    except FileNotFoundError:
        return "unknown: git is not installed"
    except OSError as error:
        return f"unknown: git cannot be started ({error.strerror})"
    for done in (described, changed):
        if done.returncode > 1 or done.returncode < 0 or not described.stdout.strip():
            return f"unknown: {(done.stderr.strip() or f'git ends with {done.returncode}').splitlines()[0]}"
    return described.stdout.strip() + ("-dirty" if changed.returncode else "")


def files_of(folder: Path) -> dict[str, str]:
    """sha256 of every file of an exported SAE that is there."""
    sums = {name: sha256_of(folder / name) for name in SAE_FILES}
    return {name: known for name, known in sums.items() if known is not None}


def sealed_by_checksums(folder: Path) -> list[Path]:
    """The files behind final_info.json that do not carry a checksum of their own."""
    details = written(folder / "eval", "eval")
    details = [path for path in details if not path.name.endswith(("_metrics.json", ".tmp"))]
    return [folder / "warnings.json", folder / "train_log.jsonl", *details]


def write_result(out_dir: Path, info: dict):
    """Write final_info.json, last; just before it, in checksums.json, its sha256 and that of every file
    behind it that is not sealed."""
    content = as_json(info)
    files = {str(p.relative_to(out_dir)): sha256_of(p) for p in sealed_by_checksums(out_dir)} | {
        "final_info.json": hashlib.sha256(content).hexdigest()
    }
    write_json(out_dir / "checksums.json", seal({"files": files}))
    write_whole(out_dir / "final_info.json", content)


def renew(out_dir: Path, contents: dict[str, bytes]):
    """Replace files of a complete run, by name. Whenever the process is killed, every file is as
    checksums.json says: while they are replaced it has both sums of each. Raises CannotWrite; WrongRequest
    where it is damaged."""
    try:
        recorded = recorded_sums(out_dir)
    except Unusable as why:
        raise WrongRequest(f"{why}; bring it back, or train again into another folder") from why
    if not recorded:  # an older run folder
        recorded = {str(p.relative_to(out_dir)): {sha256_of(p)} for p in sealed_by_checksums(out_dir)}
    there = {name: sha256_of(out_dir / name) for name in recorded | contents}
    files = {
        name: there[name] if there[name] in sums else min(filter(None, sums))
        for name, sums in recorded.items()
    }
    new = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    new = {name: known for name, known in new.items() if not name.endswith("_metrics.json")}  # sealed
    before = {name: there[name] for name in new}
    write_json(out_dir / "checksums.json", seal({"files": files | new, "before": before}))
    for name, content in contents.items():
        write_whole(out_dir / name, content)
    write_json(out_dir / "checksums.json", seal({"files": files | new}))


def recorded_sums(out_dir: Path) -> dict[str, set[str | None]]:
    """What checksums.json says: name of a file -> its sha256, or those before and after a replacement that
    was not finished (None: it was not there); older run folders have none. Raises Unusable."""
    path = out_dir / "checksums.json"
    said = read_sealed(path) or {"files": {}}
    files, before = said.get("files"), said.get("before", {})
    if not isinstance(files, dict) or any(Path(n).is_absolute() or ".." in Path(n).parts for n in files):
        raise Unusable(f"{path} does not list files of its folder with their checksums")
    return {name: {known, before.get(name, known)} for name, known in files.items()}


def is_as_recorded(path: Path) -> bool:
    """Whether a file is the one that checksums.json beside it names, or that is not known."""
    try:
        return sha256_of(path) in recorded_sums(path.parent).get(path.name, {sha256_of(path)})
    except (Unusable, KeyError):
        return True  # `changed_files` names checksums.json


RESTORE = "restore that file, or name another folder (experiment.py --overwrite makes the run anew)"


def read_run_json(path: Path, keys: set[str]) -> dict:
    """An object from a run folder. Raises WrongRequest when the file is not one that this program wrote."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WrongRequest(f"{path} cannot be read ({error}); {RESTORE}") from error
    if (
        not isinstance(value, dict)
        or not keys <= set(value)
        or not all(isinstance(value[k], dict) for k in keys)
    ):
        raise WrongRequest(f"{path} was not written by this program; {RESTORE}")
    if "sha256" in value and not is_sealed(value) or not is_as_recorded(path):
        raise WrongRequest(f"{path} is not as it was written: its checksum is wrong; {RESTORE}")
    return value


def details_of(folder: Path, seed: int, section: str) -> dict:
    """What a section of an SAE's evaluation has written beside its metrics; empty where there is none.
    Raises WrongRequest where it is not as it was written."""
    path = folder / "eval" / f"seed{seed}_{section}.json"
    if not path.exists():
        return {}
    name, known = str(path.relative_to(folder)), sha256_of(path)
    try:
        if known not in recorded_sums(folder).get(name, {known}):
            raise Unusable(f"{path} is not as it was written: its checksum is wrong")
        return json.loads(content_of(path))
    except (Unusable, OSError, ValueError) as why:
        raise WrongRequest(f"{why}; bring it back, or evaluate again with --evals {section}") from why


def changed_files(out_dir: Path) -> list[str]:
    """What of a complete run is not as it was written, one line each; an SAE may be gone."""
    messages = []
    try:
        sums = recorded_sums(out_dir)
        if not sums and "sha256" in read_run_json(out_dir / "config.json", {"config"}):
            lost = f"{out_dir / 'checksums.json'} is missing"
            messages.append(f"{lost}: whether the results were changed is not known")
        for name, known in sums.items():
            if not (out_dir / name).exists() and None not in known:
                messages.append(f"{out_dir / name} is missing")
            elif sha256_of(out_dir / name) not in known:
                messages.append(f"{out_dir / name} is not as it was written: its checksum is wrong")
    except (Unusable, WrongRequest, KeyError) as why:
        messages.append(str(why))
    for path in sorted(out_dir.glob("eval/seed*_metrics.json")):
        try:
            seed = path.name.removesuffix("_metrics.json").removeprefix("seed")
            record, sae = read_sealed(path), sae_folder(out_dir, seed)
            if record and sae.is_dir() and files_of(sae) != record["files"]:
                messages.append(f"{sae} is not as it was written: the checksum of a file is wrong")
        except (Unusable, KeyError) as why:
            messages.append(str(why))
    return messages


_owned: dict[Path, int] = {}


def lock(folder: Path):
    """Make this process the folder's owner until `unlock` or its death. Raises WrongRequest, naming the
    present owner, or what stands in the lock's place."""
    # filelock's lock (flock, too) names no owner, takes any file for its own, and leaves it behind
    path = (folder / ".lock").absolute()
    while path not in _owned:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            why = f"{path}, by which one process owns a run folder, cannot be opened: {error.strerror}"
            raise WrongRequest(f"{why}; remove it if it is not in use, or name another folder") from error
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
            raise WrongRequest(
                f"{folder} is being worked on by {owner}: wait for it, or name another folder"
            ) from None
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


def unlock(*folders: Path):
    """Give up some folders, or every one."""
    for path in [(folder / ".lock").absolute() for folder in folders] or list(_owned):
        file = _owned.pop(path)
        with contextlib.suppress(OSError):
            if _is_at(path, file):
                path.unlink()
        os.close(file)
