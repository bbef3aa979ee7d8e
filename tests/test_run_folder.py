"""A run folder: what the program writes there is the program's; everything else stays. And how it ends."""

# ruff: noqa: F401, F811  (`here` is a fixture)
import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from test_resume import at_step, here, interrupt

import experiment
from sae_separation import checkpoint, errors, evals, process, resume, run_folder
from sae_separation.errors import Interrupted, Output, RunFailed, WrongRequest, tell
from sae_separation.files import HALF_WRITTEN, write_json
from sae_separation.specs import SPECS

FOREIGN = {
    "notes.json": "mine",
    "mine.tmp": "half a thought",
    "data.safetensors": "weights",
    "step_00000001.safetensors": "not in checkpoints/",
    "deep/er/config.json": "{}",
    "deep/er/x.tmp": "x",
    "deep/run_1/final_info.json": "{}",
    "checkpoints/mine.safetensors": "mine",
    "checkpoints/step_1.safetensors": "fewer digits",
    "checkpoints/old/step_00000001.safetensors": "deeper",
    "checkpoints/x.tmp": "x",
    "eval/notes.json": "[]",
    "eval/seed0_notes.json": "[]",
    "eval/x.json.tmp": "x",
    "sae_seed0/notes.txt": "which one was it?",
    "sae_seed7/cfg.json": "no record of it",
}


def fill(folder: Path) -> Path:
    for name, content in FOREIGN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and its bytes; of a link, where it leads."""
    found = (p for p in folder.rglob("*") if p.is_symlink() or p.is_file())
    return {
        str(p.relative_to(folder)): os.readlink(p).encode() if p.is_symlink() else p.read_bytes()
        for p in found
    }


def foreign(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(folder).items() if name in FOREIGN}


def refuse(folder: Path, *more: str) -> str:
    """What the command says to a folder, before it imports anything heavy."""
    with pytest.raises(WrongRequest) as wrong:
        experiment.unfinished(*experiment.parse_command(["--out_dir", str(folder), "--arm=vanilla", *more]))
    run_folder.unlock()
    assert len(str(wrong.value).splitlines()) == 1
    return str(wrong.value)


# ------------------------------------------------------------------------------ other people's files


@pytest.mark.parametrize(
    "settings",
    [None, {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}, {"requested": {}, "config": {}}],
)
def test_a_folder_of_other_files_is_refused_and_stays_as_it_is_byte_for_byte(settings, tmp_path, monkeypatch):
    fill(tmp_path)
    if settings is not None:
        (tmp_path / "config.json").write_text(json.dumps(settings))
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    for place in (Path("."), tmp_path, tmp_path / "deep"):
        for more in ([], ["--overwrite"]):
            assert "nothing is removed or written there" in refuse(place, *more)
    assert files(tmp_path) == before


def test_the_real_command_refuses_the_folder_that_it_is_given_in(tmp_path):
    before = files(fill(tmp_path))
    done = run_script(
        "experiment.py", "--out_dir=.", "--arm=vanilla", "--overwrite", cwd=tmp_path, timeout=60
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and files(tmp_path) == before


def test_a_first_start_that_was_killed_at_once_is_no_folder_of_other_files(tmp_path):
    for there in ((), (".lock",), (".lock", "config.json.sae.tmp")):
        for name in there:
            (tmp_path / name).write_text("")
        for part in ("checkpoints", "eval")[: len(there)]:
            (tmp_path / part).mkdir(exist_ok=True)
        _, left = experiment.unfinished(
            *experiment.parse_command(["--out_dir", str(tmp_path), "--arm=vanilla"])
        )
        assert len(left) == 1
        run_folder.unlock()
    (tmp_path / "eval/mine.json").write_text("[]")
    assert "holds 'eval'" in refuse(tmp_path)


@pytest.mark.slow
def test_files_put_into_a_run_folder_survive_start_going_on_overwrite_and_completion(
    here, tmp_path, monkeypatch
):
    (tmp_path / "run_1.json").write_text("beside it")
    take, put = experiment.Trainer.step, []

    def step(self, x, forget, look=True):  # while it runs
        if not put:
            put.append(fill(tmp_path / "run_1"))
        return take(self, x, forget, look)

    monkeypatch.setattr(experiment.Trainer, "step", step)
    with monkeypatch.context() as m:
        at_step(m, 30, interrupt())
        assert here("run_1", evals=["geometry"]) == 143
    whole = foreign(tmp_path / "run_1")
    assert whole.keys() == FOREIGN.keys()
    (tmp_path / "run_1/sae_seed0/cfg.json").write_text("not known")  # of a seed that is still to be exported
    with pytest.raises(WrongRequest, match="sae_seed0 holds cfg.json, which is not known to be of this run"):
        here("run_1", evals=["geometry"])
    (tmp_path / "run_1/sae_seed0/cfg.json").unlink()
    assert here("run_1", evals=["geometry"]) == 0 and foreign(tmp_path / "run_1") == whole
    assert here("run_1", evals=["geometry"]) == 0 and foreign(tmp_path / "run_1") == whole, (
        "complete, and named so"
    )
    assert {p.name for p in (tmp_path / "run_1/checkpoints").iterdir()} == {
        "mine.safetensors",
        "step_1.safetensors",
        "old",
        "x.tmp",
    }
    assert here("run_1", evals=["geometry"], seeds=(0,), extra=["--overwrite"]) == 0
    assert foreign(tmp_path / "run_1") == whole
    assert not (tmp_path / "run_1/sae_seed1").exists(), (
        "an SAE of the run before is not left behind as of this one"
    )
    assert (tmp_path / "run_1.json").read_text() == "beside it"


def test_what_is_removed_is_what_the_program_writes_by_name(tmp_path):
    """Every name in WRITTEN; start_anew leaves nothing of them but config.json."""
    ours = [
        *run_folder.FILES,
        "checkpoints/step_00000100.safetensors",
        "eval/seed0_metrics.json",
        "sae_seed0/cfg.json",
        "sae_seed0/sae_weights.safetensors",
    ]
    ours += [f"{part}/seed12_{row.section}.json" for row in evals.ROWS for part in ("eval", "evaluating")]
    ours += [f"{name}{HALF_WRITTEN}" for name in ours if not name.startswith("sae_seed")]
    fill(tmp_path)
    (tmp_path / "evaluating").mkdir()
    for name in ours:
        (tmp_path / name).write_text("ours")
    run_folder.start_anew(tmp_path)
    assert set(files(tmp_path)) == {"config.json", *FOREIGN}


def test_a_link_in_a_run_folder_is_removed_or_replaced_and_what_it_leads_to_stays(tmp_path):
    (elsewhere := tmp_path / "elsewhere").mkdir()
    for name in ("a", "step_00000001.safetensors", "seed0_geometry.json", "cfg.json"):
        (elsewhere / name).write_text(name)
    before = files(elsewhere)
    (folder := tmp_path / "run_1").mkdir()
    (folder / "eval").mkdir()
    for link in (
        "final_info.json",
        "config.json",
        f"config.json{HALF_WRITTEN}",
        "train_log.jsonl",
        "eval/seed0_metrics.json",
    ):
        (folder / link).symlink_to(elsewhere / "a")
    for link in ("checkpoints", "sae_seed0"):
        (folder / link).symlink_to(elsewhere)
    run_folder.start_anew(folder)
    write_json(folder / "config.json", {"new": 1})
    write_json(folder / "final_info.json", {"new": 1})
    assert files(elsewhere) == before
    assert {p.name for p in folder.rglob("*")} == {"config.json", "final_info.json", "eval"} and not (
        folder / "config.json"
    ).is_symlink()
    (folder / "checkpoints").symlink_to(elsewhere)
    run_folder.clear_complete(folder)
    assert files(elsewhere) == before and not (folder / "checkpoints").is_symlink()
    (folder / ".lock").symlink_to(elsewhere / "a")
    with pytest.raises(WrongRequest, match="remove it if it is not in use"):
        run_folder.lock(folder)
    assert files(elsewhere) == before


def test_what_stands_where_a_run_would_write_is_refused_before_anything_is_done(tmp_path):
    settings = json.dumps(
        {part: {"arm": "vanilla", "seeds": [0], "testbed": "micro"} for part in ("requested", "config")}
    )
    for i, (name, said) in enumerate(
        {
            "final_info.json/x": "final_info.json is a folder",
            "checkpoints": "checkpoints is no folder",
            "sae_seed0": "sae_seed0 is no folder",
        }.items()
    ):
        (tmp_path / str(i) / name).parent.mkdir(parents=True)
        (tmp_path / str(i) / "config.json").write_text(settings)
        (tmp_path / str(i) / name).write_text("mine")
        assert said in refuse(tmp_path / str(i), "--overwrite")


def test_a_private_folder_that_only_looks_like_one_of_ours_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("saebench-of-mine", "saebench-of-12-results", "saebench-of-12-abcdefgh"):
        (tmp_path / name).mkdir()
    process.remove_left("saebench")
    assert {p.name for p in tmp_path.iterdir()} == {"saebench-of-mine", "saebench-of-12-results"}


def test_a_lock_is_removed_by_its_owner_only_while_it_is_his(tmp_path):
    run_folder.lock(tmp_path)
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").write_text("another's")
    run_folder.unlock()
    assert (tmp_path / ".lock").read_text() == "another's"
    with pytest.raises(WrongRequest, match="was not written by this program"):
        run_folder.lock(tmp_path)
    assert (tmp_path / ".lock").read_text() == "another's"


# ------------------------------------------------------------------------------ where no run can be


def test_a_name_that_no_folder_can_have_is_refused_in_one_line(tmp_path):
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    cases = {
        "x" * 300: "longer than 200 bytes",
        "x" * 300 + "/run_0": "File name too long",
        "a\nb": r"'a\nb' holds a line break",
        "a\0b": r"'a\x00b' holds a line break",
        tmp_path / "nowhere": "is a link that leads nowhere",
        tmp_path / "nowhere/run_0": "is a link that leads nowhere",
    }
    for place, said in cases.items():
        assert said in refuse(place)
    assert {p.name for p in tmp_path.iterdir()} == {"nowhere"}


def test_a_lock_that_cannot_be_taken_is_refused_in_one_line_without_false_advice(tmp_path, monkeypatch):
    (tmp_path / "a/.lock").mkdir(parents=True)
    assert (
        "a/.lock, by which one process owns a run folder, cannot be opened: Is a directory; remove it"
        in refuse(tmp_path / "a")
    )
    (tmp_path / "b").mkdir()
    take = os.open

    def no_permission(path, *rest, **more):
        if str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return take(path, *rest, **more)

    monkeypatch.setattr(os, "open", no_permission)
    said = refuse(tmp_path / "b")
    assert "cannot be opened: Permission denied" in said and "checkpoint" not in said


# ------------------------------------------------------------------------------ going on


@pytest.mark.slow
def test_a_restart_from_zero_is_told_and_where_checkpoints_were_removed_it_is_a_warning(
    here, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run_1"

    def starts_again() -> bool:
        """Interrupted at step 30; whether it is told of, and nothing else."""
        capsys.readouterr()
        with monkeypatch.context() as m:
            at_step(m, 30, interrupt(), seed=0)
            assert here("run_1", seeds=(0,)) == 143
        return (
            f"{folder} was begun before and holds no checkpoint: it starts again at step 0\n"
            in capsys.readouterr().out
        )

    assert not starts_again(), "the first time"
    run_folder.start_anew(folder)  # as a process that was killed before its first checkpoint left it
    assert starts_again()
    shutil.rmtree(folder / "checkpoints")
    capsys.readouterr()
    assert here("run_1", seeds=(0,)) == 0
    assert f"{folder} was begun before and holds no checkpoint" in capsys.readouterr().out
    assert (
        json.loads((folder / "warnings.json").read_text())[0]
        == "begun before, and its checkpoints were gone: trained again from step 0"
    )


@pytest.mark.slow
def test_a_complete_run_that_was_killed_before_it_was_cleared_is_cleared_when_it_is_asked_again(
    here, tmp_path, monkeypatch
):
    with monkeypatch.context() as m:
        m.setattr("sae_separation.run_folder.clear_complete", lambda folder: None)
        assert here("run_1", seeds=(0,)) == 0
    assert checkpoint.steps_in(tmp_path / "run_1")
    (tmp_path / "run_1/warnings.json.sae.tmp").write_text("half")
    (tmp_path / "run_1/checkpoints/mine.txt").write_text("mine")
    run_folder.lock(tmp_path / "run_1")
    owned = dict(run_folder._owned)
    run_folder._owned.clear()  # as by another process
    assert here("run_1", seeds=(0,)) == 0 and checkpoint.steps_in(tmp_path / "run_1"), (
        "not while another owns it"
    )
    run_folder._owned.update(owned)
    run_folder.unlock()
    assert here("run_1", seeds=(0,)) == 0
    left = set(files(tmp_path / "run_1"))
    assert "checkpoints/mine.txt" in left and not any(
        name.endswith((".tmp", ".lock")) or "step_" in name for name in left
    )
    (tmp_path / "run_1/checkpoints/mine.txt").unlink()
    assert here("run_1", seeds=(0,)) == 0 and not (tmp_path / "run_1/checkpoints").exists()


def test_a_complete_run_is_complete_also_where_its_checkpoints_cannot_be_removed(
    tmp_path, monkeypatch, capsys
):
    def refused(self, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    (tmp_path / "checkpoints").mkdir()
    (path := checkpoint.path_of(tmp_path, 5)).touch()
    monkeypatch.setattr(Path, "unlink", refused)
    run_folder.clear_complete(tmp_path)
    assert (
        capsys.readouterr().err
        == f"warning: {path} is needed no more and cannot be removed: Permission denied\n"
    )


# ------------------------------------------------------------------------------ git


def test_a_commit_that_git_does_not_tell_is_unknown_for_a_reason(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "sae_separation" / "run_folder.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run_folder.commit_of_code().startswith("unknown: fatal: not a git repository")
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert run_folder.commit_of_code() == "unknown: the repository around the code does not track it"
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert run_folder.commit_of_code() == "unknown: git is not installed"
    (tmp_path / "bin/git").write_text(
        f"#!{sys.executable}\nimport sys\n"
        "sys.exit(sys.stderr.write('fatal: detected dubious ownership in repository\\nTo add') and 128)\n"
    )
    (tmp_path / "bin/git").chmod(0o755)
    assert run_folder.commit_of_code() == "unknown: fatal: detected dubious ownership in repository"
    (tmp_path / "bin/git").write_text("no program")
    assert run_folder.commit_of_code().startswith("unknown: git cannot be started (")


# ------------------------------------------------------------------------------ how a command ends


class Closed(io.StringIO):
    """A stream whose reader is gone."""

    def write(self, *_):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    flush = write


@pytest.fixture
def complete(tmp_path) -> Path:
    """A complete run of this project, as it stands in the repository, under another name."""
    return Path(shutil.copytree(ROOT / "run_0", tmp_path / "run_0"))


def real(complete: Path, redirected: str, *more: str) -> subprocess.CompletedProcess:
    """The real command, on a complete run, as a shell redirects it."""
    asked = " ".join(
        [
            sys.executable,
            str(ROOT / "experiment.py"),
            "--out_dir",
            str(complete),
            "--testbed=micro",
            "--seeds 0 1 2",
            *more,
        ]
    )
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {asked} {redirected}"], capture_output=True, text=True, timeout=60
    )


@pytest.mark.slow
def test_a_closed_stdout_or_stderr_changes_no_exit_code(complete):
    for redirected, code, more in (
        ("| true", 0, ()),
        (">&-", 0, ()),
        (">/dev/full", 0, ()),
        ("2>/dev/full", 2, ("--alpha=9",)),
        ("2>&-", 2, ("--alpha=9",)),
        (">&- 2>&- <&-", 2, ("--alpha=9",)),
    ):
        done = real(complete, redirected, *more)
        assert (
            done.returncode == code
            and "Traceback" not in done.stderr
            and "error" not in done.stderr
            and "xception" not in done.stderr
        ), (redirected, done)
        assert "--alpha" not in done.stdout, "what belongs on stderr does not come on stdout"


@pytest.mark.slow
def test_a_run_whose_reader_goes_away_is_complete_all_the_same(here, tmp_path, monkeypatch, capfd):
    with open(tmp_path / "stands for fd 1", "w") as other:
        with monkeypatch.context() as m:
            m.setattr(sys, "stdout", Output(Closed(), other.fileno()))
            assert here("run_1", seeds=(0,)) == 0
    assert (tmp_path / "run_1/final_info.json").exists() and "error" not in capfd.readouterr().err


def test_every_ending_is_an_exit_code_and_a_line(monkeypatch, capsys):
    def because(error, cause):
        return setattr(error, "__cause__", cause) or error

    no_memory = ImportError("libtorch_cpu.so: failed to map segment from shared object")
    for error, code, said in (
        (WrongRequest("no such\nfolder"), 2, "error: no such folder"),
        (RunFailed("at step 3"), 1, "error: at step 3"),
        (Interrupted(signal.SIGHUP, "at step 3"), 129, "error: interrupted by SIGHUP: at step 3"),
        (MemoryError(), 1, "error: out of memory: lower --batch_size"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "error: out of memory: lower"),
        (
            because(WrongRequest("--x cannot be read (memory ran out)"), MemoryError()),
            2,
            "error: --x cannot be read",
        ),
        (
            because(WrongRequest("--lm x cannot be loaded; save it anew"), no_memory),
            1,
            "error: out of memory: lower",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "x"),
            1,
            "error: PermissionError: [Errno 13] Permission denied: 'x'; mend that",
        ),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 1, "error: UnicodeDecodeError: "),
    ):
        assert tell(error) == code
        told = capsys.readouterr().err
        assert told.startswith(said) and len(told.splitlines()) == 1, told
    for error in (KeyError("x"), RecursionError("maximum recursion depth exceeded")):
        assert tell(error) == 1
        *trace, last = capsys.readouterr().err.splitlines()
        assert trace and last.startswith(f"error: unexpected {type(error).__name__}: ") and "report" in last
    assert tell(MemoryError(), began=False) == 1
    assert "before anything was begun" in capsys.readouterr().err
    monkeypatch.setattr(errors.resource, "getrlimit", lambda which: (3_000_000_000, -1))
    assert tell(no_memory, began=False) == 1
    assert (
        "(ulimit -v allows 3.0 GB of address space: raise it) before anything was begun"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_what_nobody_expected_in_a_run_ends_in_one_last_line(here, monkeypatch, capsys):
    at_step(monkeypatch, 10, lambda *_: {}["a bug"], seed=0)
    assert here("run_1", seeds=(0,)) == 1
    told = capsys.readouterr().err.splitlines()
    assert (
        told[-1] == "error: unexpected KeyError: 'a bug'; please report it with the lines above"
        and "Traceback (most recent call last):" in told
    )


@pytest.mark.slow
def test_too_little_address_space_is_told_in_one_line(tmp_path):
    asked = [
        sys.executable,
        str(ROOT / "experiment.py"),
        "--out_dir",
        str(tmp_path / "run_0"),
        "--testbed=micro",
    ]

    def limit():
        return resource.setrlimit(resource.RLIMIT_AS, (2 * 10**9, 2 * 10**9))

    done = subprocess.run(asked, preexec_fn=limit, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: out of memory (ulimit -v allows 2.0 GB of address space: raise it)")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ SIGHUP


@pytest.fixture
def hangup_counts():
    """SIGHUP as a process started from a terminal has it, also where these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_lost_connection_leaves_a_checkpoint_and_one_line(
    here, tmp_path, monkeypatch, capsys, hangup_counts
):
    with monkeypatch.context() as m:
        at_step(m, 41, interrupt(signal.SIGHUP), seed=0)
        assert here("run_1", seeds=(0,)) == 129
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        last
        == "error: interrupted by SIGHUP: at step 42 of 100; the same command (without --overwrite) goes on"
        " from there"
    )
    assert checkpoint.steps_in(tmp_path / "run_1")[-1] == 42
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_under_nohup_a_lost_connection_is_nothing(hangup_counts):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with process.signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("ignored", [False, True])
def test_a_lost_connection_before_anything_is_begun(ignored, tmp_path):
    """The real command, while it reads its request from a pipe that nobody writes into."""
    os.mkfifo(tmp_path / "asked.jsonl")
    asked = [
        sys.executable,
        str(ROOT / "experiment.py"),
        "--out_dir",
        str(tmp_path / "run_0"),
        "--testbed=micro",
        "--questions",
        str(tmp_path / "asked.jsonl"),
        "--forget_subject=x",
    ]

    def prepare():
        return signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    process = subprocess.Popen(
        asked, preexec_fn=prepare, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    status = Path(f"/proc/{process.pid}/status")

    def mask(kind):
        return int(
            next(line for line in status.read_text().splitlines() if line.startswith(kind)).split()[1], 16
        )

    while not mask("SigCgt") >> (signal.SIGTERM - 1) & 1:
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    if ignored:
        time.sleep(0.2)
        assert process.poll() is None
        process.terminate()
    name, code = ("SIGTERM", 143) if ignored else ("SIGHUP", 129)
    assert process.communicate(timeout=60)[1] == f"error: interrupted by {name} before anything was begun\n"
    assert process.returncode == code


def test_what_is_missing_of_a_complete_run_is_named(complete):
    assert run_folder.changed_files(complete) == []
    (complete / "warnings.json").unlink()
    assert run_folder.changed_files(complete) == [f"{complete / 'warnings.json'} is missing"]
    (complete / "checksums.json").unlink()
    (told,) = run_folder.changed_files(complete)
    assert told.startswith(f"{complete / 'checksums.json'} is missing: whether the results were changed")


def test_another_ones_file_that_ends_in_tmp_keeps_a_folder_from_being_used(tmp_path):
    (tmp_path / "config.json.tmp").write_text("precious")
    with pytest.raises(WrongRequest, match="holds 'config.json.tmp' and no config.json of this program"):
        run_folder.refuse_foreign(tmp_path, (0,))


def test_a_complete_run_that_lost_its_result_is_not_trained_again_unasked(complete):
    (complete / "final_info.json").unlink()
    before = files(complete)
    asked = ["--out_dir", str(complete), "--seeds", *"012", "--testbed=micro"]
    with pytest.raises(
        WrongRequest, match="complete run whose final_info.json is gone: restore that file, or --over"
    ):
        experiment.unfinished(*experiment.parse_command(asked))
    assert files(complete) == before
    assert experiment.unfinished(*experiment.parse_command([*asked, "--overwrite"]))[1]
    run_folder.unlock()


def test_a_run_on_forget_text_about_some_entities_is_another_run(complete):
    made = json.loads((complete / "config.json").read_text())
    asked = ["--out_dir", str(complete), "--seeds", *"012", "--testbed=micro"]
    some = experiment.parse_command([*asked, "--forget_entities=15"])
    with pytest.raises(WrongRequest, match=r"other settings \(forget_entities None there, 15 wanted\); name"):
        experiment.unfinished(*some)
    for part in ("requested", "config"):
        made[part]["forget_entities"] = 15
    assert resume.differing(some[1][0], made, without=()) == []
    whole = experiment.parse_command(asked)[1][0]
    assert resume.differing(whole, made, without=()) == ["forget_entities"]
    with pytest.raises(WrongRequest, match="forget_entities 15 there, the default wanted"):
        resume.refuse_differing(complete, whole, made, ["forget_entities"])
    assert resume.as_made(whole, made).forget_entities == 15


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"layer": 2}, "layer 1 there, 2 now"),
        ({"forget_text": ("a.txt",)}, r"forget_text \['invented biology'\] there, \['a.txt'\] now"),
        ({"defaults": SPECS["micro"].defaults | {"d_sae": 64}}, "d_sae 1024 there, 64 now"),
        ({"scoring": "cloze", "questions": ("a.jsonl",)}, ""),
    ],
    ids=["layer", "forget_text", "d_sae", "what evaluations need"],
)
def test_a_run_of_a_testbed_whose_row_has_changed_since_has_other_settings(
    changed, why, complete, monkeypatch
):
    monkeypatch.setitem(SPECS, "micro", replace(SPECS["micro"], **changed))
    asked = ["--out_dir", str(complete), "--seeds", *"012"]
    for more in (["--testbed=micro"], []):
        if why:
            with pytest.raises(
                WrongRequest, match=f"holds a run .* of --testbed micro .{why}.; name another"
            ):
                experiment.unfinished(*experiment.parse_command([*asked, *more]))
        else:
            assert experiment.unfinished(*experiment.parse_command([*asked, *more]))[1] == []
    as_it_was = ["--layer=1", "--forget_text=invented biology", "--d_sae=1024"]
    if why:  # what is given takes the place of the row's
        assert (
            experiment.unfinished(*experiment.parse_command([*asked, "--testbed=micro", *as_it_was]))[1] == []
        )


@pytest.mark.parametrize("folder", [f"run_{i}" for i in range(11)] + [f"smollm2/run_{i}" for i in (0, 6, 9)])
def test_the_rows_of_the_committed_runs_are_as_they_were(folder):
    made = json.loads((ROOT / folder / "config.json").read_text())
    resume.refuse_changed_row(ROOT / folder, resume.as_made(experiment.Request(), made), made)


def test_two_links_to_one_folder_are_the_same_folder(tmp_path):
    (tmp_path / "zz").mkdir()
    for name in ("run_0", "run_1"):
        (tmp_path / name).symlink_to("zz")
    both = [str(tmp_path / name) for name in ("run_0", "run_1")]
    with pytest.raises(WrongRequest, match="run_0 and .*run_1 are the same folder: name two"):
        experiment.unfinished(*experiment.parse_command(["--out_dir", *both]))


def test_a_folder_that_cannot_be_made_is_a_wrong_request():
    with pytest.raises(WrongRequest, match="--out_dir /proc/x cannot be made: .*; name another folder"):
        run_folder.make(Path("/proc/x"))


def test_overwriting_leaves_files_of_seeds_that_the_run_never_had(tmp_path):
    write_json(tmp_path / "config.json", {"config": {"seeds": [0]}})
    (tmp_path / "eval").mkdir()
    for seed in (0, 7):
        (tmp_path / f"eval/seed{seed}_geometry.json").write_text("{}")
    run_folder.start_anew(tmp_path)
    assert [p.name for p in (tmp_path / "eval").iterdir()] == ["seed7_geometry.json"]


@pytest.mark.parametrize("part", ["checkpoints", "eval", "evaluating", "sae_seed0"])
def test_a_link_in_place_of_a_part_of_a_run_is_refused_and_stays(part, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/step_00000001.safetensors").write_text("mine")
    (tmp_path / "run_1").mkdir()
    about = {"arm": "", "seeds": [0], "testbed": ""}
    write_json(tmp_path / "run_1/config.json", {"requested": about, "config": about})
    (tmp_path / "run_1" / part).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WrongRequest, match=f"{part} is a link, and this program would make a folder there"):
        run_folder.refuse_foreign(tmp_path / "run_1", (0,))
    assert (tmp_path / "run_1" / part).is_symlink()
