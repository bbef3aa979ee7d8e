"""A run that is tracked: one tracked run a folder, every step once, whatever the tracker."""

# ruff: noqa: F401, F811  (`here` is a fixture)

import importlib
import importlib.util
import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
from itertools import groupby

import pytest
from conftest import ROOT
from test_resume import STEPS, at_step, here, interrupt

from sae_separation import config, tracking
from sae_separation.errors import WrongRequest
from sae_separation.tracking import Tracking

ABOUT = {"config": {"arm": "vanilla", "seeds": [0, 1]}, "git": "0123abc"}


def log_of(*steps: int) -> list[dict]:
    return [{"seed": s, "step": n, "tokens": n * 512, "fvu": 1 / n + s} for n in steps for s in (0, 1)]


@pytest.fixture
def sent(monkeypatch) -> list[tuple]:
    """All that a stand-in for wandb and for TensorBoard was told, in order."""
    told = []

    class StandIn:
        def __init__(self, folder, run_id, settings):
            self.where = "nowhere"
            told.append(("begin", run_id, settings["git"]))

        def log(self, values, step):
            told.append((step, values))

        def results(self, values, step):
            told.append(("results", step, values))

        def end(self, complete):
            told.append(("end", complete))

    for name in ("wandb", "tensorboard"):
        monkeypatch.setitem(tracking.TRACKERS, name, StandIn)
    return told


def steps(told: list[tuple]) -> list[int]:
    return [line[0] for line in told if isinstance(line[0], int)]


def test_a_step_is_sent_once_with_all_seeds_and_the_results_at_the_end(sent, tmp_path, capsys):
    with Tracking("wandb") as open_runs:
        tracked = open_runs.follow(tmp_path, ABOUT)
        for n in (1, 26, 51):
            tracked.log(log_of(n))
        tracked.results({"core": {"means": {"l0": 16.0, "of none": None}}})
    assert sent[1] == (1, {"tokens": 512, "fvu/seed0": 1.0, "fvu/seed1": 2.0})
    assert steps(sent) == [1, 26, 51] and sent[0][2] == "0123abc"
    assert sent[-2:] == [("results", 51, {"core/l0": 16.0}), ("end", True)]
    assert capsys.readouterr().out == f"{tmp_path} is tracked: nowhere\n"


def test_what_was_sent_is_not_sent_again_and_what_was_not_is(sent, tmp_path):
    with pytest.raises(KeyError), Tracking("wandb") as open_runs:
        tracked = open_runs.follow(tmp_path, ABOUT)
        tracked.log(log_of(1, 26, 51))
        raise KeyError
    assert sent[-1] == ("end", False)
    with (tmp_path / "tracking.jsonl").open("a") as file:
        file.write('{"tracker": "wan')  # the process died
    with Tracking("wandb") as open_runs:  # it goes on from a checkpoint between the steps 26 and 51
        tracked = open_runs.follow(tmp_path, ABOUT, log_of(1, 26))
        for n in (51, 76):
            tracked.log(log_of(n))
    assert steps(sent) == [1, 26, 51, 76] and len({s[1] for s in sent if s[0] == "begin"}) == 1
    sent.clear()
    with Tracking("tensorboard") as open_runs:  # another tracker is told all
        open_runs.follow(tmp_path, ABOUT, log_of(1, 26, 51, 76))
    with Tracking("wandb") as open_runs:  # and the first one what it has missed
        open_runs.follow(tmp_path, ABOUT, log_of(1, 26, 51, 76, 100))
    assert steps(sent) == [1, 26, 51, 76, 100]
    assert len((tmp_path / "tracking.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"tracker": "wandb"}', '{"tracker": "wandb", "id": 1, "step": "x"}']
)
def test_a_damaged_record_of_what_was_sent_is_refused_in_a_line(line, sent, tmp_path):
    (tmp_path / "tracking.jsonl").write_text(line + "\n")
    with pytest.raises(WrongRequest, match="tracking.jsonl cannot be read .* remove it to begin"):
        Tracking("wandb").follow(tmp_path, ABOUT)


def test_without_a_tracker_nothing_is_written(tmp_path):
    with Tracking("none") as open_runs:
        tracked = open_runs.follow(tmp_path, ABOUT, log_of(1))
        tracked.log(log_of(26))
        tracked.results({})
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_missing_is_named_before_anything_is_loaded(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()  # as wandb leaves one where it was used; it is no package
    monkeypatch.chdir(tmp_path)
    code = f"import sys; sys.path[:0] = ['', {str(ROOT)!r}]\n"
    code += "sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
    code += "from sae_separation import tracking\ntracking.check('none')\ntracking.check('wandb')"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.stderr.endswith("WrongRequest: --track wandb needs the package wandb: pip install wandb\n")
    with monkeypatch.context() as m:
        m.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(WrongRequest, match="--track trackio needs the package trackio: pip install trac"):
            config.check(config.Command(out_dir=("a",), track="trackio"), [])


@pytest.mark.slow
def test_an_interrupted_run_goes_on_in_its_tracked_run(here, sent, tmp_path, monkeypatch):
    def run(**how) -> int:
        return here("run_1", extra=["--track=wandb", "--checkpoint_seconds", 1000], **how)

    def fall_over(*_):
        raise OSError("of no kind")

    with monkeypatch.context() as m:
        at_step(m, 41, interrupt(signal.SIGTERM))
        assert run() == 143
    with monkeypatch.context() as m:
        at_step(m, 80, fall_over)  # no checkpoint since step 42
        assert run() == 1
    assert [line for line in sent if line[0] == "end"] == [("end", False)] * 2 and max(steps(sent)) == 76
    assert run() == 0 and sent[-1] == ("end", True)
    lines = (tmp_path / "run_1/train_log.jsonl").read_text().splitlines()
    log = [(n, list(part)) for n, part in groupby(map(json.loads, lines), key=lambda record: record["step"])]
    assert [line for line in sent if isinstance(line[0], int)] == [(n, tracking.by_seed(r)) for n, r in log]
    assert steps(sent) == [1, 26, 51, 76, STEPS] and len({s[1] for s in sent if s[0] == "begin"}) == 1
    means = json.loads((tmp_path / "run_1/final_info.json").read_text())["training"]["means"]
    assert sent[-2] == ("results", STEPS, {f"training/{name}": mean for name, mean in means.items()})
    sent.clear()
    assert run(evals=["geometry"]) == 0 and not steps(sent)  # complete: measured, and that is sent
    assert [line[0] for line in sent] == ["begin", "results", "end"]
    assert {name.partition("/")[0] for name in sent[1][2]} == {"geometry"}


# --------------------------------------------------------------------------------------------- the packages

PROCESS = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from sae_separation.tracking import Tracking
name, killed = sys.argv[1], sys.argv[2] == "killed"
log = lambda *steps: [dict(seed=s, step=n, tokens=n, fvu=1 / n + s) for n in steps for s in (0, 1)]
about = dict(config=dict(arm="vanilla"), git="0123abc")
with Tracking(name) as open_runs:
    tracked = [open_runs.follow(Path(run), about, [] if killed else log(1, 26)) for run in ("a", "b")]
    for n in (1, 26, 51) if killed else (51, 76):
        for run in tracked:
            run.log(log(n))
    if killed:
        import time
        time.sleep(3)  # they write behind the process's back, each second
        os.kill(os.getpid(), signal.SIGKILL)
    for run in tracked:
        run.results(dict(core=dict(means=dict(l0=16.0))))
"""


def records_of_wandb(path):
    """The records of one .wandb file: LevelDB's log format, in blocks of 32 kB."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            read = vars(wandb_internal_pb2)["Record"]()
            read.ParseFromString(record)
            record = b""
            yield read


def in_wandb(folder, run_id: str) -> list[int]:
    files = sorted(folder.glob(f"wandb/offline-run-*-{run_id}/*.wandb"))
    read = [record for path in files for record in records_of_wandb(path)]
    assert len(files) == 2 and "l0" in str([r.summary for r in read if r.HasField("summary")])
    return [r.history.step.num for r in read if r.HasField("history")]


def in_trackio(folder, run_id: str) -> list[int]:
    (database,) = folder.glob("trackio/*.db")
    rows = sqlite3.connect(database).execute(
        "select step, metrics from metrics where run_name like ? order by id", [f"%-{run_id}"]
    )
    return [step for step, values in rows if b"core/l0" not in bytes(values)]


def in_tensorboard(folder, run_id: str) -> list[int]:
    (files,) = folder.glob(f"*/tensorboard/{run_id}")
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    read = reader.EventAccumulator(str(files), purge_orphaned_data=False)
    read.Reload()
    assert [event.value for event in read.Scalars("core/l0")] == [16.0]
    return [event.step for event in read.Scalars("fvu/seed1")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, read", [("wandb", in_wandb), ("trackio", in_trackio), ("tensorboard", in_tensorboard)]
)
def test_the_real_package_goes_on_in_the_same_run_after_a_kill_without_a_network(name, read, tmp_path):
    pytest.importorskip(name, reason=f"pip install {name} to test it")
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "TRACKIO_"))}
    key = "0123456789abcdef" * 3
    ours |= {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    ours |= {"WANDB_MODE": "offline", "WANDB_API_KEY": key[:40]}
    for how, code in (("killed", -signal.SIGKILL), ("whole", 0)):
        argv = [sys.executable, "-c", PROCESS, name, how]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=ours, timeout=600)
        assert done.returncode == code, done.stderr[-2000:]
        assert key[:40] not in done.stdout + done.stderr
    for run in ("a", "b"):
        lines = list(map(json.loads, (tmp_path / run / "tracking.jsonl").read_text().splitlines()))
        (run_id,) = {line["id"] for line in lines}
        assert read(tmp_path, run_id) == [1, 26, 51, 76]
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and key[:40].encode() in p.read_bytes()]
