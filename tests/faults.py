"""The fault campaign: break a run in every way we know, and count what came of it.

    python tests/faults.py                  # all, 60 kills; writes tests/faults.json and faults.md
    python tests/faults.py --only kills --kills 200

Every trial is a real process that runs experiment.main on the embedded LM, forked from one that has
imported what it needs and read the LM, so that many fit into minutes. After each fault that may be
survived, the same command is given again and what it writes is compared, byte for byte and without times,
with what an undisturbed command wrote. Instants are chosen in processor time of the trial, so that they
are as random on a busy machine.
"""

import argparse
import collections
import contextlib
import ctypes
import faulthandler
import fnmatch
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads, also torch's, do not survive a fork
import torch

import experiment
from sae_separation import checkpoint, run_folder, testbeds
from sae_separation.errors import leave_at_once, stops, tell
from sae_separation.evals import geometry
from sae_separation.evals.evaluator import Evaluator

STEPS, BATCH = 160, 512
SETTINGS = (
    "--tokens",
    STEPS * BATCH,
    "--d_sae",
    256,
    "--batch_size",
    BATCH,
    "--target_l0",
    8,
    "--buffer_tokens",
    16_384,
    "--testbed=micro",
    "--seeds",
    0,
    1,
    "--checkpoint_seconds",
    0,
)
GEOMETRY, CORE = ("--evals", "geometry"), ("--evals", "core", "geometry")
RNG = random.Random(0)
LOAD = testbeds.load
NUMBERS = itertools.count()  # of trials


class Trial:
    """One process: the command, in `folder`, with stdout and stderr together in a file beside it."""

    def __init__(self, folder: Path, runs=("run_1",), extra=GEOMETRY, prepare=lambda: None):
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder.with_name(
            f"{folder.name}_{next(NUMBERS)}.txt"
        )  # not in it: its disk may be full
        argv = [str(a) for a in ("--out_dir", *(folder / r for r in runs), *SETTINGS, *extra)]
        self.started, self.pid = time.monotonic(), os.fork()
        if self.pid:
            self.ended = None
            return
        code = 99
        try:
            faulthandler.register(signal.SIGUSR2, all_threads=True)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the campaign may run under nohup
            for number in stops():
                signal.signal(number, leave_at_once)
            output = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            prepare()
            command, configs = experiment.unfinished(*experiment.parse_command(argv))
            code = experiment.main(command, configs) if configs else 0
        except Exception as error:
            code = tell(error, began=False)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def used(self) -> float:
        """Seconds of processor time so far."""
        ticks = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    def poll(self) -> int | None:
        """Exit code (negative: the signal that killed it); None while it runs."""
        if self.ended is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self.seconds, self.cpu = time.monotonic() - self.started, self.used()
            self.queued = (
                int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[1]) / 1e9
            )  # seconds it could have run, but others did
            _, status, self.usage = os.wait4(self.pid, 0)
            self.ended = os.waitstatus_to_exitcode(status)
        return self.ended

    def runs_for(self, cpu: float) -> bool:
        """Whether it still runs after it has had so many seconds of the processor (and some hundredths, at
        random)."""
        while self.poll() is None:
            if self.used() >= cpu:
                time.sleep(RNG.uniform(0, 0.03))
                return self.poll() is None
            time.sleep(0.002)
        return False

    def wait(self, cpu=300.0, wall=3600.0) -> int | None:
        """Exit code; one that hangs is made to tell where, and is killed: None."""
        while self.poll() is None:
            if self.used() > cpu or time.monotonic() - self.started > wall:
                os.kill(self.pid, signal.SIGUSR2)
                time.sleep(2)
                self.end()
                return None
            time.sleep(0.002)
        return self.ended

    def end(self, number=signal.SIGKILL) -> int | None:
        """Send the signal and wait."""
        os.kill(self.pid, number)
        return self.wait()

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    @property
    def last(self) -> str:
        return (self.text.strip().splitlines() or [""])[-1]


def results(folder: Path):
    """What a complete run is, without times; None if it is not complete."""
    if not (folder / "final_info.json").exists():
        return None
    info = json.loads((folder / "final_info.json").read_text())
    for part in info["training"].values():
        del part["train_seconds"], part["tokens_per_second"]
    for section in info.values():
        section.pop("made_by", None)
    return (
        info,
        (folder / "train_log.jsonl").read_bytes(),
        {p.name + p.parent.name: p.read_bytes() for p in folder.glob("sae_seed*/*")},
        (folder / "warnings.json").read_bytes(),
    )


def same(folder: Path, alone: Path, runs=("run_1",)) -> bool:
    return all(results(folder / r) is not None and results(folder / r) == results(alone / r) for r in runs)


def half_written(folder: Path, pattern="*.tmp") -> set:
    """Files that are being written, or were when a process was killed; each writing is another."""
    found = set()
    for parent, _, names in os.walk(folder):  # rglob fails when a folder goes while it looks
        for path in (Path(parent, name) for name in fnmatch.filter(names, pattern)):
            with contextlib.suppress(FileNotFoundError):
                found.add((path, path.stat().st_mtime_ns))
    return found


def phase(trial: Trial, folder: Path, before: set) -> str:
    """What a killed process was at."""
    if writing := half_written(folder) - before:
        return (
            "writing a checkpoint"
            if any(path.name.startswith("step_") for path, _ in writing)
            else "writing settings, log or results"
        )
    if list(folder.rglob("final_info.json")):
        return "between two runs' results"
    return next(
        (
            name
            for name, bar in (("evaluation", "evaluating:"), ("training", "training:"))
            if bar in trial.text
        ),
        "set-up",
    )


def left_by_others(trial: Trial) -> list:
    """Private folders of SAEBench that are not of this trial."""
    return [
        p
        for p in Path(tempfile.gettempdir()).glob("saebench-*")
        if not p.name.startswith(f"saebench-of-{trial.pid}-")
    ]


FOREIGN = """notes.json mine.tmp deep/er/x.tmp deep/er/config.json step_00000001.safetensors sae/cfg.json link
checkpoints/mine.safetensors checkpoints/x.tmp checkpoints/old/step_00000001.safetensors
eval/notes.json eval/x.json.tmp eval/seed0_notes.json""".split()


def put(folder: Path):
    """Other people's files: some bytes each, and a link to one of them."""
    for name in FOREIGN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name == "link":
            (folder / name).symlink_to("notes.json")
        else:
            (folder / name).write_bytes(RNG.randbytes(1000))


def bytes_below(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder; of a link, where it leads."""
    below = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {path: os.readlink(path).encode() if path.is_symlink() else path.read_bytes() for path in below}


def theirs(folder: Path) -> dict[Path, bytes]:
    """What `put` put into the folders of a folder."""
    place = {path: str(Path(*path.relative_to(folder).parts[1:])) for path in bytes_below(folder)}
    return {path: content for path, content in bytes_below(folder).items() if place[path] in FOREIGN}


def tells_the_truth(trial: Trial, folder: Path) -> bool:
    """Whether what the last line of an interrupted command says of the work is so."""
    kept = [*folder.rglob("step_*.safetensors"), *folder.rglob("final_info.json")]
    if any(said in trial.last for said in ("what is done is kept", "goes on from there")):
        return bool(kept)
    return not kept and any(
        said in trial.last for said in ("nothing was done yet", "before anything was begun")
    )


class Campaign:
    def __init__(self, scratch: Path, kills: int):
        self.scratch, self.kills, self.rows, self.n = scratch, kills, [], 0
        self.alone: dict[tuple, tuple[Path, float]] = {}

    def folder(self) -> Path:
        self.n += 1
        return self.scratch / f"{self.n:04d}"

    def undisturbed(self, runs=("run_1",), extra=GEOMETRY) -> tuple[Path, float]:
        """A folder with what the command writes when left alone, and its seconds of processor time."""
        if (runs, extra) not in self.alone:
            trial = Trial(folder := self.folder(), runs, extra)
            assert trial.wait() == 0, trial.text
            self.alone[runs, extra] = folder, trial.cpu
        return self.alone[runs, extra]

    def row(self, fault: str, tried: int, good: int, outcome: str):
        self.rows.append({"fault": fault, "tried": tried, "as it should": good, "outcome": outcome})
        print(f"| {fault} | {tried} | {good} | {outcome} |", flush=True)

    def stopped(self, at: int | None = None, runs=("run_1",), **options) -> Path:
        """A folder whose run was interrupted twice by SIGTERM, so that it holds two checkpoints."""
        folder = self.folder()
        for step in (at or STEPS // 3, 2 * STEPS // 3):
            trial = Trial(
                folder,
                runs,
                prepare=lambda: do_at(step, lambda *_: os.kill(os.getpid(), signal.SIGTERM)),
                **options,
            )
            assert trial.wait() == 143, trial.text
        return folder

    # ---- interruption

    def kills_at_random(self):
        """Every command is killed up to six times, twice of these while it writes a checkpoint or a
        result, and then left alone."""
        phases, ends, good, left = collections.Counter(), 0, 0, self.kills
        forms = [(("run_1",), GEOMETRY), (("run_1", "run_6"), CORE), (("run_2", "run_8"), GEOMETRY)]
        while left:
            runs, extra = forms[ends % len(forms)]
            alone, cpu = self.undisturbed(runs, extra)
            folder, kills = self.folder(), 0
            for wanted in (None, None, "step_*.tmp", None, None, "*.json.sae.tmp")[:left]:
                before = half_written(folder)
                trial = Trial(folder, runs, extra)
                if not self.killed(trial, RNG.uniform(0.1, 1.0) * cpu, folder, wanted):
                    break
                kills += 1
                phases[phase(trial, folder, before)] += 1
            ok = trial.ended in (0, -signal.SIGKILL)
            again = Trial(folder, runs, extra)
            ok = again.wait() == 0 and same(folder, alone, runs) and not left_by_others(again) and ok
            if not ok:
                print(trial.text, again.text, left_by_others(again))
            good, left, ends = good + ok * kills, left - kills, ends + 1
            shutil.rmtree(folder)
        where = ", ".join(f"{name} {n}" for name, n in phases.most_common())
        self.row(
            "SIGKILL at a random instant",
            self.kills,
            good,
            f"{ends} commands, killed again and again, end with the same bytes as one left alone and leave no"
            f" temporary folder; killed in: {where}",
        )

    @staticmethod
    def killed(trial: Trial, cpu: float, folder: Path, wanted: str | None) -> bool:
        """Kill the trial after so many seconds, or then as soon as a `wanted` file is being written; False
        if it ends before."""
        if not trial.runs_for(cpu):
            return False
        there = half_written(folder, wanted) if wanted else set()
        while wanted and trial.poll() is None and not half_written(folder, wanted) - there:
            pass
        return trial.poll() is None and trial.end() == -signal.SIGKILL

    def signals(self):
        runs = ("run_1", "run_6")
        alone, cpu = self.undisturbed(runs, CORE)
        codes = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGUSR1: 138}
        for number, code in codes.items():
            good, tries = 0, 8
            for i in range(tries):
                loads = i < tries // 4  # the LM, which the other trials find loaded
                trial = Trial(
                    folder := self.folder(),
                    runs,
                    CORE,
                    prepare=(lambda: setattr(testbeds, "load", LOAD)) if loads else lambda: None,
                )
                first = (
                    trial.end(number)
                    if trial.runs_for(RNG.uniform(0.02, 0.2 if loads else 0.8) * cpu)
                    else "ended before"
                )
                says_so = trial.last.startswith(f"error: interrupted by {number.name}") and tells_the_truth(
                    trial, folder
                )
                again = Trial(folder, runs, CORE)
                ok = first == code and says_so and again.wait() == 0 and same(folder, alone, runs)
                good += ok
                if not ok:
                    print(first, trial.text, again.text)
                shutil.rmtree(folder)
            self.row(
                f"{number.name} at a random instant",
                tries,
                good,
                f"one true line, exit {code}; the same command ends with the same bytes",
            )

    def owners(self):
        good = 0
        for _ in range(3):
            first = Trial(folder := self.folder())
            while not list(folder.glob("run_1/config.json")):
                time.sleep(0.01)
            second = Trial(folder / "x", runs=("../run_1",))
            good += second.wait() == 2 and f"process {first.pid} on" in second.last and first.wait() == 0
            third = Trial(folder)
            good -= third.wait() != 0
        self.row(
            "a second process on the same folder",
            3,
            good,
            "exit 2, names the owner's process, host and start; the owner is not disturbed",
        )

    # ---- other people's files

    def foreign(self):
        """Beforehand in a folder; then put into a run folder while it runs, which is killed or left alone,
        and given again, also with --overwrite."""
        good, tries = 0, 6
        for i in range(tries):
            put(place := (folder := self.folder()) / "run_1")
            if i % 2:
                (place / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
            before = bytes_below(folder)
            trials = [Trial(folder, extra=(*GEOMETRY, *more)) for more in ((), ("--overwrite",))]
            ok = all(t.wait() == 2 and "nothing is removed or written there" in t.last for t in trials)
            ok = ok and bytes_below(folder) == before
            good += ok
            if not ok:
                print(*(trial.text for trial in trials))
            shutil.rmtree(folder)
        outcome = "exit 2, also with --overwrite; byte for byte as before"
        self.row("a folder of other people's files as --out_dir", tries, good, outcome)
        alone, cpu = self.undisturbed()
        good, tries = 0, 6
        for i in range(tries):
            trial = Trial(folder := self.folder())
            while not list(folder.glob("run_1/config.json")) and trial.poll() is None:
                time.sleep(0.01)
            put(folder / "run_1")
            put(folder / "beside")
            put(folder / "run_1.eval")
            before = theirs(folder)
            if i % 3 and trial.runs_for(RNG.uniform(0.3, 1.0) * cpu):
                trial.end(signal.SIGKILL if i % 2 else signal.SIGHUP)
            ok = trial.wait() in (0, 129, -signal.SIGKILL) and theirs(folder) == before
            for more in ((), (), ("--overwrite",)):  # it goes on, it is complete, it is made anew
                again = Trial(folder, extra=(*GEOMETRY, *more))
                ok = again.wait() == 0 and theirs(folder) == before and same(folder, alone) and ok
                ok = ok and not checkpoint.steps_in(folder / "run_1")
            good += ok
            if not ok:
                print(trial.text, again.text)
            shutil.rmtree(folder)
        outcome = "killed, gone on, asked again, --overwrite: byte for byte as before; the run's own, too"
        self.row("other people's files put into and beside a run folder while it runs", tries, good, outcome)

    # ---- damage

    def damage(self):
        alone, _ = self.undisturbed()
        others = self.stopped(extra=(*GEOMETRY, "--arm", "fixed", "--alpha", 0.5))
        foreign = checkpoint.path_of(others / "run_1", 2 * STEPS // 3 + 1).read_bytes()

        def flip(content: bytes) -> bytes:
            at = RNG.randrange(len(content))
            return content[:at] + bytes([content[at] ^ (1 << RNG.randrange(8))]) + content[at + 1 :]

        ways = [
            ("cut off", lambda b: b[: RNG.randrange(len(b))], 6),
            ("one bit flipped", flip, 20),
            ("of other settings", lambda b: foreign, 1),
            ("a pickle", lambda b: pickle.dumps({"a": 1}), 1),
        ]
        source = self.stopped()
        for name, way, tries in ways:
            good = 0
            for _ in range(tries):
                shutil.copytree(source, folder := self.folder())
                newest = checkpoint.path_of(folder / "run_1", checkpoint.steps_in(folder / "run_1")[-1])
                newest.write_bytes(way(newest.read_bytes()))
                trial = Trial(folder)
                ok = trial.wait() == 0 and f"warning: {newest}" in trial.text and same(folder, alone)
                good += ok
                if not ok:
                    print(trial.text)
                shutil.rmtree(folder)
            self.row(
                f"newest checkpoint {name}",
                tries,
                good,
                "named, the older one used, the same bytes in the end",
            )
        good = 0
        for _ in range(3):
            shutil.copytree(source, folder := self.folder())
            for step in checkpoint.steps_in(folder / "run_1"):
                path = checkpoint.path_of(folder / "run_1", step)
                path.write_bytes(flip(path.read_bytes()))
            trial = Trial(folder)
            good += (
                trial.wait() == 2
                and "--overwrite" in trial.last
                and len(checkpoint.steps_in(folder / "run_1")) == 2
            )
        self.row("both checkpoints damaged", 3, good, "exit 2, both named, nothing removed")
        good = 0
        for _ in range(10):
            shutil.copytree(source, folder := self.folder())
            path = folder / "run_1/config.json"
            path.write_bytes(flip(path.read_bytes()))
            trial = Trial(folder)
            good += trial.wait() == 2 and ("config.json" in trial.last or "other settings" in trial.last)
        self.row("config.json with one bit flipped", 10, good, "exit 2, named")
        good = 0
        for _ in range(20):
            shutil.copytree(alone, folder := self.folder())
            path = folder / "run_1/final_info.json"
            path.write_bytes(flip(path.read_bytes()))
            trial = Trial(folder)
            good += trial.wait() == 2 and f"{path} " in trial.last
            shutil.rmtree(folder)
        self.row("final_info.json with one bit flipped", 20, good, "exit 2, named")
        good = 0
        for _ in range(3):
            folder = self.folder()
            trial = Trial(
                folder,
                prepare=lambda: wrap(
                    geometry,
                    "geometry",
                    lambda calls, args: os.kill(os.getpid(), signal.SIGTERM) if calls == 2 else None,
                ),
            )
            assert trial.wait() == 143, trial.text
            weights = folder / "run_1/sae_seed0/sae_weights.safetensors"
            weights.write_bytes(flip(weights.read_bytes()))
            trial = Trial(folder)
            good += (
                trial.wait() == 0
                and "sae_seed0 is not as it was written" in trial.text
                and same(folder, alone)
            )
        self.row(
            "exported weights with one bit flipped, between two evaluations",
            3,
            good,
            "named, exported anew, the same bytes in the end",
        )

    # ---- numbers that are none

    def numbers(self):
        for name, arms, act, said in INJECTED:
            for arm in arms:

                def prepare():
                    return do_at(60, act, seed=1)

                trial = Trial(folder := self.folder(), ("x",), (*GEOMETRY, "--arm", arm), prepare=prepare)
                code = trial.wait()
                warned = json.loads((folder / "x/warnings.json").read_text())
                ok = (
                    code == 1
                    and said in trial.last
                    and f"at step 60 of arm {arm}, seed 1" in trial.last
                    and any(w.startswith("seed 1 failed") for w in warned)
                )
                ok = (
                    ok
                    and not (folder / "x/final_info.json").exists()
                    and (folder / "x/eval/seed0_geometry.json").exists()
                )
                self.row(
                    f"{name} not finite in one seed ({arm})",
                    1,
                    int(ok),
                    "named with step, arm, seed and entries; exit 1; no final_info.json; the other seed"
                    " finished",
                )
                if not ok:
                    print(trial.text)

    # ---- the machine

    def machine(self):
        alone, _ = self.undisturbed()
        self.survived(
            "file size limit reached",
            alone,
            lambda: do_at(130, lambda *_: limit(resource.RLIMIT_FSIZE, 50_000)),
            "File too large",
        )
        self.survived(
            "folder cannot be written any more",
            alone,
            lambda: (obey_permissions(), do_at(130, write_protect)),
            "Permission denied",
        )
        good = 0
        for step in (20, 80, 140):
            trial = Trial(
                folder := self.folder(),
                prepare=lambda: do_at(step, lambda *_: shutil.rmtree(folder / "run_1")),
            )
            good += (
                trial.wait() == 1
                and "its folder was removed" in trial.last
                and trial.last.startswith("error: ")
                and not (folder / "run_1").exists()
            )
        self.row("folder removed while training", 3, good, "one line, exit 1, the folder is not made anew")
        good, tried = 0, 0
        for size in ("1200k", "3m", "4m"):
            (folder := self.folder()).mkdir()
            if subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
            ).returncode:
                break
            tried += 1
            trial = Trial(folder)
            code, kept = trial.wait(), checkpoint.steps_in(folder / "run_1")
            ok = code == 1 and "free disk space" in trial.last
            subprocess.run(["mount", "-o", "remount,size=200m", folder], check=True)
            again = Trial(folder)
            ok = (
                ok
                and again.wait() == 0
                and same(folder, alone)
                and (not kept or "goes on at step" in again.text)
            )
            good += ok
            if not ok:
                print(code, trial.text, again.text)
            subprocess.run(["umount", folder], check=True)
        self.row(
            "disk full",
            tried,
            good,
            "one line, exit 1; with space again the same command ends with the same bytes",
        )
        self.survived(
            "memory runs out (address space limit)",
            alone,
            lambda: do_at(130, no_more_memory),
            "out of memory (",
        )

    def survived(self, fault: str, alone: Path, prepare, said: str):
        """Two checkpoints, the fault (at step 130, behind both) in the third process, one line, and the
        same command again."""
        good, source = 0, self.stopped(at=30)
        for _ in range(3):
            shutil.copytree(source, folder := self.folder())
            trial = Trial(folder, prepare=prepare)
            code, kept = trial.wait(), checkpoint.steps_in(folder / "run_1")
            for path in folder.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
            again = Trial(folder)
            ok = (
                code == 1
                and said in trial.last
                and trial.last.startswith("error: ")
                and kept
                and again.wait() == 0
                and "goes on at step" in again.text
                and same(folder, alone)
            )
            good += bool(ok)
            if not ok:
                print(code, kept, trial.text, again.text)
        self.row(
            fault,
            3,
            good,
            "one line, exit 1, older checkpoints whole; the same command then ends with the same bytes",
        )

    # ---- the rest

    def bounds(self):
        runs = ("run_1", "run_6")
        alone, _ = self.undisturbed(runs, CORE)
        trial = Trial(folder := self.folder(), runs, CORE)
        self.row(
            "none: the same command again elsewhere",
            1,
            int(trial.wait() == 0 and same(folder, alone, runs)),
            "the same bytes apart from times",
        )
        peaks = []
        for tokens in (300_000, 3_000_000):
            trial = Trial(
                self.folder(),
                extra=(
                    "--evals",
                    "none",
                    "--tokens",
                    tokens,
                    "--d_sae",
                    1024,
                    "--batch_size",
                    2048,
                    "--buffer_tokens",
                    131_072,
                    "--seeds",
                    0,
                ),
            )
            assert trial.wait() == 0, trial.text
            peaks.append(trial.usage.ru_maxrss / 1e6)
        self.row(
            "ten times the tokens",
            1,
            int(peaks[1] < 1.05 * peaks[0]),
            f"peak memory {peaks[0]:.3f} GB and {peaks[1]:.3f} GB (d_sae 1,024, buffer of 131,072)",
        )
        trial = Trial(folder := self.folder(), extra=(*CORE, "--tokens", 10**9, "--time_budget_minutes", 3))
        code = trial.wait()
        ok = (
            code == 0
            and "the time budget ended training after" in trial.text
            and results(folder / "run_1") is not None
        )
        busy = f" ({trial.queued:.0f} s of them behind other processes)" if trial.queued >= 1 else ""
        self.row(
            "an hour's run with --time_budget_minutes 3",
            1,
            int(ok and trial.seconds - trial.queued < 180),
            f"complete after {trial.seconds:.0f} s{busy}, a warning says how far it got",
        )
        trial = Trial(self.folder(), extra=(*GEOMETRY, "--d_sae", 2**22))
        self.row(
            "a dictionary larger than the memory",
            1,
            int(trial.wait() == 2 and "GB of memory" in trial.last),
            "exit 2 before anything is written, with the gigabytes needed",
        )
        trial = Trial(
            self.folder(),
            extra=(
                "--evals",
                "none",
                "--tokens",
                1_500_000,
                "--d_sae",
                1024,
                "--batch_size",
                2048,
                "--seeds",
                0,
                1,
                2,
                "--checkpoint_seconds",
                10,
            ),
            prepare=time_saves,
        )
        assert trial.wait() == 0, trial.text
        spent, whole = (
            float(v)
            for v in next(line for line in trial.text.splitlines() if line.startswith("saves ")).split()[1:]
        )
        self.row(
            "none: what checkpoints cost",
            1,
            int(spent < 0.02 * whole),
            f"{spent:.2f} s of {whole:.0f} s at one every 10 s (d_sae 1,024, three seeds)",
        )


# ---- what is done inside a trial's process


def do_at(step: int, act, seed: int = 1):
    """Have act(trainer, x) done before that step of the trainers of that seed; a tensor that it returns
    takes the place of x."""
    take = experiment.Trainer.step

    def stepped(self, x, forget, look=True):
        changed = act(self, x) if self.steps == step and self.seed == seed else None
        return take(self, x if changed is None else changed, forget, look)

    experiment.Trainer.step = stepped


def wrap(cls, name: str, act):
    """Have act(number of the call, arguments) done before every call of a method."""
    method, calls = getattr(cls, name), []

    def wrapped(*args):
        calls.append(1)
        act(len(calls), args)
        return method(*args)

    setattr(cls, name, wrapped)


def obey_permissions():
    """Give up the right of a superuser to write anywhere (CAP_DAC_OVERRIDE), for this process."""
    libc, header, sets = (
        ctypes.CDLL(None, use_errno=True),
        (ctypes.c_uint32 * 2)(0x20080522, 0),
        (ctypes.c_uint32 * 6)(),
    )
    libc.capget(header, sets)
    sets[0] &= ~2
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def write_protect(*_):
    for lock in run_folder._owned:
        for folder in (lock.parent, *(p for p in lock.parent.iterdir() if p.is_dir())):
            folder.chmod(0o555)


def limit(which: int, size: int):
    resource.setrlimit(which, (size, resource.getrlimit(which)[1]))


def no_more_memory(*_):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit(resource.RLIMIT_AS, pages * resource.getpagesize() + 2**20)


def time_saves():
    save, train, seconds = checkpoint.save, experiment.TrainingLoop.train, []

    def timed(*args):
        start = time.monotonic()
        save(*args)
        seconds.append(time.monotonic() - start)

    def trained(*args, **settings):
        start = time.monotonic()
        train(*args, **settings)
        print(f"saves {sum(seconds)} {time.monotonic() - start}")

    checkpoint.save, experiment.TrainingLoop.train = timed, trained


def spoil_x(trainer, x):
    x = x.clone()
    x[5, 3] = float("nan")
    return x


def spoil_gradient(trainer, x):
    accumulate = trainer.accumulate_grads

    def spoiled(*args):
        terms = accumulate(*args)
        trainer.sae.W_enc_FD.grad[7, 3] = float("inf")
        return terms

    trainer.accumulate_grads = spoiled


def spoil(name: str, value: float):
    def act(trainer, x):
        owner = trainer if hasattr(trainer, name) else trainer.sae
        getattr(owner, name).data.view(-1)[:1] = value

    return act


INF, NAN = float("inf"), float("nan")
ALL = tuple(arm for arm, row in experiment.ARMS.items() if row.trains_sae)
INJECTED = [
    ("activation", ALL, spoil_x, "activations of the LM not finite in 1 of"),
    ("gradient", ("vanilla", "adaptive"), spoil_gradient, "gradient of W_enc_FD not finite in 1 of"),
    *(
        (f"parameter {name}", ("fixed",), spoil(name, NAN), f"{name} not finite in 1 of")
        for name in ("W_enc_FD", "W_dec", "b_enc", "b_dec")
    ),
    ("lambda", ("vanilla",), spoil("log_l1", INF), "l1_coefficient = inf"),
    *(("alpha", (arm,), spoil("log_alpha", INF), "alpha = inf") for arm in ("fixed", "grouped", "adaptive")),
]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {
        "kills": Campaign.kills_at_random,
        "signals": Campaign.signals,
        "owners": Campaign.owners,
        "damage": Campaign.damage,
        "foreign": Campaign.foreign,
        "numbers": Campaign.numbers,
        "machine": Campaign.machine,
        "bounds": Campaign.bounds,
    }
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "tests" / "faults",
        help="where the table goes, as .json and .md; rows of other parts stay",
    )
    args = parser.parse_args()
    import sae_bench.evals.core.main  # noqa: F401  (once, for all trials)
    import sae_lens  # noqa: F401

    torch.set_num_threads(1)
    loaded = replace(testbeds.load("micro"), n_held_out=32)
    testbeds.load = lambda *_: loaded
    experiment.Evaluator = partial(Evaluator, n_contexts=64)
    old = (
        json.loads(args.out.with_suffix(".json").read_text())
        if args.out.with_suffix(".json").exists()
        else {}
    )
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        tempfile.tempdir = scratch
        Path(scratch).chmod(0o777)
        for name in args.only:
            campaign = Campaign(Path(scratch) / name, args.kills)
            campaign.scratch.mkdir(mode=0o755)
            parts[name](campaign)
            old[name] = campaign.rows
            shutil.rmtree(campaign.scratch, ignore_errors=True)
            rows = [row for part in parts for row in old.get(part, [])]
            args.out.with_suffix(".json").write_text(json.dumps(old, indent=1) + "\n")
            lines = ["| fault | tried | as it should | what it should |", "| --- | --- | --- | --- |"]
            args.out.with_suffix(".md").write_text(
                "\n".join(
                    lines
                    + [
                        f"| {r['fault']} | {r['tried']} | {r['as it should']} | {r['outcome']} |"
                        for r in rows
                    ]
                )
                + "\n"
            )
    sys.exit(any(row["tried"] != row["as it should"] for row in rows))


if __name__ == "__main__":
    main()
