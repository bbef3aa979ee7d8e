"""Nothing that a run did is lost and nothing is told that is not so: interruption, damage, faults,
determinism."""

import errno
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, seconds_of_children, small_command
from test_trainer import SMALL
from tiny import numpy_state, there

import experiment
from sae_separation import checkpoint, process, run_folder, saebench
from sae_separation import run as run_module
from sae_separation.errors import Interrupted, RunFailed, WrongRequest
from sae_separation.evals import geometry
from sae_separation.evals.evaluator import Evaluator, finite
from sae_separation.files import Unusable, write_json

STEPS = 100
TINY = (
    "--tokens",
    STEPS * 256,
    "--batch_size",
    256,
    "--d_sae",
    128,
    "--target_l0",
    8,
    "--buffer_tokens",
    8192,
    "--dead_tokens",
    5000,
    "--testbed=micro",
    "--checkpoint_seconds",
    0,
)


@pytest.fixture
def here(micro, monkeypatch, tmp_path):
    """The command in this process, on the LM of the session: its exit code."""
    monkeypatch.setattr("sae_separation.testbeds.load", lambda *_: micro)
    monkeypatch.setattr(experiment, "Evaluator", evaluator_of)

    def run(*out_dirs, evals=("none",), seeds=(0, 1), extra=()) -> int:
        argv = [
            "--out_dir",
            *(tmp_path / d for d in out_dirs),
            "--seeds",
            *seeds,
            "--evals",
            *evals,
            *TINY,
            *extra,
        ]
        command, configs = experiment.unfinished(*experiment.parse_command([str(a) for a in argv]))
        return experiment.main(command, configs) if configs else 0

    return run


EVALUATORS: dict[int, Evaluator] = {}


def evaluator_of(testbed, context_size: int) -> Evaluator:
    """On few contexts, and one for all commands: the LM of the session is theirs."""
    if context_size not in EVALUATORS:
        EVALUATORS[context_size] = Evaluator(testbed, context_size, 64)
    return EVALUATORS[context_size]


def results(folder) -> tuple:
    """What a run is: final_info.json without times, the log, the bytes of every weight."""
    info = json.loads((folder / "final_info.json").read_text())
    for part in info["training"].values():
        del part["train_seconds"], part["tokens_per_second"]
    for section in info.values():
        section.pop("made_by", None)
    weights = {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("sae_seed*/*.safetensors")}
    return (
        info,
        (folder / "train_log.jsonl").read_text(),
        weights,
        json.loads((folder / "warnings.json").read_text()),
    )


def at_step(monkeypatch, step, act, seed=1, times=1):
    """Have act(trainer, x) done before the trainers of `seed` take that step; what it returns, if
    anything, takes the place of x."""
    take, left = experiment.Trainer.step, [times]

    def stepped(self, x, forget, look=True):
        if self.steps == step and self.seed == seed and left[0]:
            left[0] -= 1
            changed = act(self, x)
            x = x if changed is None else changed
        return take(self, x, forget, look)

    monkeypatch.setattr(experiment.Trainer, "step", stepped)


def interrupt(number=signal.SIGTERM):
    return lambda *_: os.kill(os.getpid(), number) or None


# ------------------------------------------------------------------------------------------------ going on

FORMS = {
    "vanilla": dict(),
    "frozen_decoder": dict(arm="frozen_decoder"),
    "grouped": dict(arm="grouped"),
    "adaptive": dict(arm="adaptive", alpha_start=0.1, loss_warmup_steps=30),
    "adaptive_both": dict(arm="adaptive_both", alpha_start=0.01),
    "routed": dict(arm="routed"),
    "soft_frozen_decoder": dict(arm="soft_frozen_decoder", least_cosine=0.99),
    "ortsae": dict(arm="ortsae", alpha=0.25),
    "batchtopk unlocking": dict(activation="batchtopk", unlock_steps=4),
    "softk": dict(activation="softk"),
    "jumprelu": dict(activation="jumprelu"),
    "matryoshka": dict(activation="matryoshka"),
    "dropout, own learning rates": dict(feature_dropout=0.2, feature_lr_power=0.5),
    "between two accumulations": dict(arm="fixed", grad_accumulation=4),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_trainer_goes_on_from_its_checkpoint_to_the_same_bits(form, activations, tmp_path):
    config = replace(SMALL, **FORMS[form], resample_steps=10, dead_tokens=4096)
    batches = list(activations.batches(config.batch_size))

    def go(trainer, first, last):
        for i in range(first, last):
            trainer.step(*batches[i % len(batches)])

    def make():
        trainer = experiment.Trainer(config, 3, activations.x.shape[1], 200, activations)
        trainer.sae.b_enc.data[:80] = -100.0  # dead, to be resampled, but for a forget group
        return trainer

    whole, begun, other = make(), make(), make()
    go(whole, 0, 60)
    go(begun, 0, 33)
    tensors, facts = begun.state()
    checkpoint_folder = tmp_path / "checkpoints"
    checkpoint_folder.mkdir()
    checkpoint.save(tmp_path, 33, tensors, facts | {"config_hash": "me"})
    go(other, 0, 7)
    other.restore(*checkpoint.read(tmp_path, 33, "me"))
    go(other, 33, 60)
    assert whole.resampled, "the test meets what resampling leaves behind"
    (expected, known), (tensors, facts) = whole.state(), other.state()
    assert facts == known and tensors.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(expected[name], tensors[name])] == []


def test_the_stream_goes_on_behind_any_block_to_the_same_bits(micro):
    def stream():
        return experiment.ActivationStream(micro, 128, 8192, lm_tokens=4096)

    whole, skipped = stream(), stream()
    blocks = [whole.next_block() for _ in range(4)]
    skipped.skip_blocks(2)
    for block in blocks[2:]:
        again = skipped.next_block()
        assert torch.equal(block.x, again.x) and torch.equal(block.forget, again.forget)


def test_killed_at_random_instants_a_command_ends_as_if_left_alone(tmp_path, small_micro):
    """A process of its own, two folders on one LM pass, SIGKILL wherever it hits."""
    data = [f"--{name}={value}" for name, (value,) in small_micro.items()]

    def begin(where) -> subprocess.Popen:
        folders = [tmp_path / where / run for run in ("run_1", "run_6")]
        evaluated = ("--seeds", 0, 1, "--evals", "core", "geometry")
        argv = small_command("--out_dir", *folders, *evaluated, *TINY, *data)
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    alone = begin("alone")
    started, folder = time.monotonic(), tmp_path / "alone/run_1"
    while not list(folder.glob("checkpoints/*.safetensors")) and alone.poll() is None:
        time.sleep(0.01)
    begun = time.monotonic() - started
    assert alone.communicate(timeout=300) and alone.returncode == 0
    took, rng, kills = time.monotonic() - started - begun, random.Random(0), 0
    for fraction in (0.15, 0.2, None):  # the second goes on from where the first was killed
        process = begin("killed")
        wait = 300 if fraction is None else begun + (fraction + rng.uniform(-0.1, 0.1)) * took
        try:
            process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert kills and process.returncode == 0  # a machine whose load falls can overtake the second
    for run in ("run_1", "run_6"):
        assert results(tmp_path / "killed" / run) == results(tmp_path / "alone" / run)
        assert not (tmp_path / "killed" / run / "checkpoints").exists()


@pytest.mark.parametrize("number, code", [(signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_and_one_line(number, code, here, tmp_path, monkeypatch, capsys):
    assert here("a/run_1", "a/run_6") == 0
    at_step(monkeypatch, 41, interrupt(number))
    before = signal.getsignal(number)
    capsys.readouterr()
    assert here("b/run_1", "b/run_6", extra=["--checkpoint_seconds", 1000]) == code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        last
        == f"error: interrupted by {signal.Signals(number).name}: at step 42 of {STEPS}; the same command"
        " (without --overwrite) goes on from there"
    )
    assert signal.getsignal(number) == before
    assert [checkpoint.steps_in(tmp_path / "b" / run) for run in ("run_1", "run_6")] == [[42], [42]]
    assert here("b/run_1", "b/run_6") == 0
    assert "goes on at step 42" in capsys.readouterr().out
    for run in ("run_1", "run_6"):
        assert results(tmp_path / "a" / run) == results(tmp_path / "b" / run)


def test_a_signal_before_the_first_checkpoint_says_that_nothing_was_done(here, tmp_path, monkeypatch, capsys):
    start = experiment.Run.start

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return start(*args)

    with monkeypatch.context() as m:
        m.setattr(experiment.Run, "start", interrupted)
        assert here("run_1") == 143 and not checkpoint.steps_in(tmp_path / "run_1")
        assert (
            capsys.readouterr().err.strip().splitlines()[-1]
            == "error: interrupted by SIGTERM: nothing was done yet; the same command starts"
        )
    interrupted_run(here, monkeypatch, tmp_path, "run_1")
    capsys.readouterr()
    with monkeypatch.context() as m:
        m.setattr(experiment.Run, "start", interrupted)
        assert here("run_1") == 143 and checkpoint.steps_in(tmp_path / "run_1")
        assert (
            capsys.readouterr()
            .err.strip()
            .splitlines()[-1]
            .endswith("what is done is kept; the same command (without --overwrite) goes on")
        )
        assert here("run_1", extra=["--overwrite"]) == 143
        assert (
            capsys.readouterr()
            .err.strip()
            .splitlines()[-1]
            .endswith("nothing was done yet; the same command starts")
        )


def test_a_signal_while_a_block_is_made_leaves_the_state_whole(here, tmp_path, monkeypatch):
    assert here("a/run_1") == 0
    make, calls = experiment.ActivationStream.next_block, []

    def next_block(self):
        calls.append(self.block_index)
        if calls == [0, 1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return make(self)

    monkeypatch.setattr(experiment.ActivationStream, "next_block", next_block)
    assert here("b/run_1") == 143 and here("b/run_1") == 0
    assert calls == [0, 1, 1, 2, 3] and results(tmp_path / "a/run_1") == results(tmp_path / "b/run_1")


# ---- blocks that are made beside training


class LM:
    """Of each LM batch that the stream had read: its block's index, and whether another block was at hand.
    Before the one of that number `act` is done."""

    def __init__(self):
        self.read: list[tuple[int, bool]] = []
        self.stream, self.number, self.act = None, -1, None

    def reads(self, stream):
        self.stream = stream
        if len(self.read) == self.number and self.act:
            self.act()
        self.read.append((stream.block_index, stream.block is not None))


@pytest.fixture
def lm(here, micro, monkeypatch) -> LM:
    """Blocks are of four LM batches; of each domain there are so few documents that some are read twice."""
    few = {
        domain: replace(text, train=text.train.select(range(90)))
        for domain, text in (("forget", micro.forget), ("retain", micro.retain))
    }
    monkeypatch.setattr("sae_separation.testbeds.load", lambda *_: replace(micro, **few))
    monkeypatch.setattr("sae_separation.stream.fast_lm_tokens", lambda _: 2048)
    activations, seen = experiment.ActivationStream.activations, LM()

    def looked_at(self, tokens):
        seen.reads(self)
        return activations(self, tokens)

    monkeypatch.setattr(experiment.ActivationStream, "activations", looked_at)
    return seen


def position(folder, step) -> dict:
    """Of a checkpoint, without times and folders."""
    at = json.loads(checkpoint_facts(checkpoint.path_of(folder, step)))["position"]
    return {k: at[k] for k in ("step", "block", "batch", "passes")}


SELDOM = ["--checkpoint_seconds", 1000]


def test_blocks_made_ahead_train_to_the_same_bits_also_stopped_in_the_middle_of_one(
    here, lm, tmp_path, monkeypatch, request
):
    """Four blocks of 31 steps. Nothing is made behind the last one that training needs."""
    runs = ("run_1", "run_6")

    def train(where: str, until: int | None = None) -> int:
        lm.read.clear()
        with monkeypatch.context() as m:
            if until is not None:
                at_step(m, until - 1, interrupt())
            return here(*(f"{where}/{run}" for run in runs), extra=SELDOM)

    assert train("plain") == 0 and lm.read == [(i, False) for i in range(4) for _ in range(4)]
    assert train("plain_parts", until=42) == 143
    request.getfixturevalue("ahead")
    assert train("whole") == 0 and lm.read == [(i, i > 0) for i in range(4) for _ in range(4)]
    assert lm.stream.drawn == 4 and lm.stream.makings == []
    assert train("parts", until=42) == 143 and lm.stream.drawn == 4
    for run in runs:
        assert position(tmp_path / "parts" / run, 42) == position(tmp_path / "plain_parts" / run, 42)
    assert train("parts") == 0
    for run in runs:
        known = results(tmp_path / "plain" / run)
        assert known[0]["training"]["means"]["forget_text_passes"] > 1
        assert known == results(tmp_path / "whole" / run) == results(tmp_path / "parts" / run)


def test_a_signal_while_a_block_is_made_ahead_leaves_the_state_whole(here, lm, ahead, tmp_path):
    assert here("a/run_1", extra=SELDOM) == 0
    lm.read.clear()
    lm.number, lm.act = 6, interrupt()
    assert here("b/run_1", extra=SELDOM) == 143 and lm.read[-1] == (1, True) and len(lm.read) == 7
    (step,) = checkpoint.steps_in(tmp_path / "b/run_1")
    assert step == 16, "at once, and not where the block is made"
    lm.number = -1
    assert here("b/run_1", extra=SELDOM) == 0
    assert results(tmp_path / "a/run_1") == results(tmp_path / "b/run_1")


def test_an_lm_that_fails_while_a_block_is_made_ahead_ends_the_command(here, lm, ahead, tmp_path, capsys):
    def fail():
        raise RunFailed("the LM broke")

    lm.number, lm.act = 6, fail
    assert here("run_1") == 1 and capsys.readouterr().err.strip().splitlines()[-1] == "error: the LM broke"
    lm.number = -1
    assert here("run_1") == 0


def test_a_block_is_let_go_of_before_the_lm_makes_the_next(here, monkeypatch):
    make, blocks, alive = experiment.ActivationStream.block_from_lm, [], []

    def block_from_lm(self):
        alive.append(sum(block() is not None for block in blocks))
        block = make(self)
        blocks.append(weakref.ref(block.x))
        return block

    monkeypatch.setattr(experiment.ActivationStream, "block_from_lm", block_from_lm)
    assert here("run_1") == 0 and alive == [0, 0, 0, 0]


def test_finished_evaluations_are_not_done_again(here, tmp_path, monkeypatch):
    assert here("a/run_1", evals=["core", "geometry"]) == 0
    done, measure, core, export = [], geometry.geometry, saebench.run_core, run_module.export
    monkeypatch.setattr(saebench, "run_core", lambda *args: done.append("core") or core(*args))
    monkeypatch.setattr(run_module, "export", lambda *args: done.append("export") or export(*args))

    def interrupted(*args):
        done.append("geometry")
        if done.count("geometry") == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(*args)

    monkeypatch.setattr(geometry, "geometry", interrupted)
    assert here("b/run_1", evals=["core", "geometry"]) == 143
    at_step(monkeypatch, 0, lambda *_: pytest.fail("training was done again"), seed=0)
    assert here("b/run_1", evals=["core", "geometry"]) == 0
    assert done == ["export", "core", "geometry"] + ["export", "core", "geometry"] + ["geometry"]
    assert results(tmp_path / "a/run_1") == results(tmp_path / "b/run_1")


# ------------------------------------------------------------------------------------------------ one owner


def test_a_second_process_is_refused_at_once_and_a_dead_one_does_not_block(tmp_path):
    folder = tmp_path / "run_1"
    folder.mkdir()
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from sae_separation import run_folder; from"
        f" pathlib import Path; run_folder.lock(Path({str(folder)!r})); print('mine', flush=True);"
        " time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert there(owner.stdout).readline() == "mine\n"
    started = seconds_of_children()
    second = run_script("experiment.py", "--out_dir", folder, *TINY)
    assert second.returncode == 2 and seconds_of_children() - started < 5
    assert (
        len(second.stderr.splitlines()) == 1
        and f"process {owner.pid} on " in second.stderr
        and time.strftime(" since %Y-") in second.stderr
    )
    owner.kill()
    owner.wait()
    assert (folder / ".lock").exists()
    run_folder.lock(folder)
    run_folder.lock(folder)
    run_folder.unlock()
    assert not list(folder.iterdir())


def test_a_private_folder_of_a_killed_process_is_removed_and_no_other(tmp_path, monkeypatch):
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from sae_separation import process; user ="
        " type('', (), {})(); folder = process.private_folder(user, 'saebench');(folder /"
        " 'sweep.pkl').touch(); print(folder, flush=True); time.sleep(float(sys.argv[1]))"
    )

    def begin(seconds):
        return subprocess.Popen(
            [sys.executable, "-c", code, seconds],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )

    def folder_of(process):
        return Path(process.stdout.readline().strip())

    killed, lives, leaves = (begin(seconds) for seconds in ("60", "60", "0"))
    left, kept, gone = (folder_of(process) for process in (killed, lives, leaves))
    killed.kill()
    killed.wait()
    leaves.wait()
    (other := tmp_path / "saebench-of-someone").write_text("a file")
    (link := tmp_path / "saebench-of-1-link").symlink_to(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert left.exists() and not gone.exists()
    mine = process.private_folder(user := process.Signals(), "saebench")
    assert set(tmp_path.iterdir()) == {kept, other, link, mine} and (kept / "sweep.pkl").exists()
    del user
    assert not mine.exists()
    lives.kill()
    lives.wait()


# ------------------------------------------------------------------------------------------------ damage


def interrupted_run(here, monkeypatch, tmp_path, name):
    """A run that stopped at step 61 with checkpoints of steps 30 and 61."""
    with monkeypatch.context() as m:
        at_step(m, 29, interrupt())
        assert here(name, extra=["--checkpoint_seconds", 1000]) == 143
    with monkeypatch.context() as m:
        at_step(m, 60, interrupt())
        assert here(name, extra=["--checkpoint_seconds", 1000]) == 143
    assert checkpoint.steps_in(tmp_path / name) == [30, 61]


class Boom:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/unpickled_by_a_checkpoint",))


DAMAGE = {
    "truncated": lambda b: b[: len(b) // 2],
    "empty": lambda b: b"",
    "a bit in the header": lambda b: b[:40] + bytes([b[40] ^ 4]) + b[41:],
    "a bit in the checksum": lambda b: b.replace(b'"sha256":"', b'"sha256":"x', 1),
    "a bit in the weights": lambda b: b[:-9999] + bytes([b[-9999] ^ 1]) + b[-9998:],
    "the last bit": lambda b: b[:-1] + bytes([b[-1] ^ 128]),
    "another program's": lambda b: (8).to_bytes(8, "little") + b"{}      ",
    "a pickle": lambda b: pickle.dumps(Boom()),
}


def test_a_damaged_checkpoint_is_named_and_the_older_one_used(here, monkeypatch, tmp_path, capsys):
    assert here("a/run_1") == 0
    interrupted_run(here, monkeypatch, tmp_path, "b/run_1")
    newest = checkpoint.path_of(tmp_path / "b/run_1", 61)
    whole = newest.read_bytes()
    config_hash = json.loads(checkpoint_facts(newest))["config_hash"]
    checkpoint.read(tmp_path / "b/run_1", 61, config_hash)
    with pytest.raises(Unusable, match="other settings"):
        checkpoint.read(tmp_path / "b/run_1", 61, "another run")
    for what, damage in DAMAGE.items():
        newest.write_bytes(damage(whole))
        with pytest.raises(Unusable, match="step_00000061"):
            checkpoint.read(tmp_path / "b/run_1", 61, config_hash)
            pytest.fail(what)
    assert not os.path.exists("/tmp/unpickled_by_a_checkpoint")
    capsys.readouterr()
    assert here("b/run_1") == 0
    out = capsys.readouterr().out
    assert f"warning: {newest} is damaged" in out and "goes on at step 30" in out
    assert results(tmp_path / "a/run_1") == results(tmp_path / "b/run_1")


def checkpoint_facts(path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()["facts"]


def test_with_no_usable_checkpoint_nothing_is_thrown_away_unasked(here, monkeypatch, tmp_path, capsys):
    interrupted_run(here, monkeypatch, tmp_path, "run_1")
    for step in (30, 61):
        path = checkpoint.path_of(tmp_path / "run_1", step)
        path.write_bytes(path.read_bytes()[:-5])
    before = {p: p.read_bytes() for p in (tmp_path / "run_1").rglob("*") if p.is_file()}
    assert here("run_1") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        "step_00000061.safetensors is damaged" in last
        and "step_00000030.safetensors is damaged" in last
        and "--overwrite" in last
    )
    assert {p: p.read_bytes() for p in (tmp_path / "run_1").rglob("*") if p.is_file()} == before
    assert here("run_1", extra=["--overwrite"]) == 0


def test_a_result_that_is_not_as_it_was_written_is_named(here, tmp_path, capsys):
    folder = tmp_path / "run_1"
    assert here("run_1", evals=["geometry"]) == 0 and here("run_1") == 0
    assert capsys.readouterr().err.count("warning") == 0
    for name, refused in {
        "final_info.json": True,
        "warnings.json": False,
        "eval/seed0_geometry.json": False,
        "checksums.json": False,
    }.items():
        whole = (folder / name).read_bytes()
        at = next(i for i, b in enumerate(whole) if chr(b) in "02468")
        (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        json.loads((folder / name).read_text())
        if refused:
            with pytest.raises(WrongRequest, match=f"{name} is not as it was written.*--overwrite"):
                here("run_1")
        else:
            assert here("run_1") == 0
            assert f"warning: {folder / name} is not as it was written" in capsys.readouterr().err
        (folder / name).write_bytes(whole)
    (folder / "checksums.json").unlink()
    assert here("run_1") == 0, "as an older run folder"


def test_folders_go_on_from_the_newest_step_that_all_of_them_hold(here, monkeypatch, tmp_path):
    assert here("a/run_1", "a/run_6") == 0
    with monkeypatch.context() as m:  # dies between the writes of one checkpoint into two folders
        save, seen = checkpoint.save, []

        def dies(folder, step, *rest):
            seen.append(step)
            if len(seen) == 6:
                raise KeyboardInterrupt
            save(folder, step, *rest)

        m.setattr("sae_separation.checkpoint.save", dies)
        with pytest.raises(KeyboardInterrupt):
            here("b/run_1", "b/run_6")
    first, second = (checkpoint.steps_in(tmp_path / "b" / run) for run in ("run_1", "run_6"))
    assert first[-1] == seen[-1] and second[-1] == first[0] < first[-1]
    assert here("b/run_1", "b/run_6") == 0
    for run in ("run_1", "run_6"):
        assert results(tmp_path / "a" / run) == results(tmp_path / "b" / run)


def test_folders_begun_apart_are_not_thrown_together(here, monkeypatch, tmp_path, capsys):
    interrupted_run(here, monkeypatch, tmp_path, "run_1")
    assert here("run_1", "run_6") == 2
    assert (
        "run_1 at step 61" in (last := capsys.readouterr().err.strip().splitlines()[-1])
        and "run_6 at no step" in last
    )
    assert checkpoint.steps_in(tmp_path / "run_1") == [30, 61] and not (tmp_path / "run_6").exists()


def test_a_first_checkpoint_that_one_folder_lacks_costs_only_a_new_start(tmp_path):
    for name, written, together in (("a", 1, ["a", "c"]), ("b", 2, ["b", "c"]), ("d", 1, ["d"])):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        checkpoint.save(
            tmp_path / name,
            5,
            {"t": torch.ones(3)},
            {"config_hash": "me", "position": {"written": written, "together": together}},
        )
    assert checkpoint.newest_common({tmp_path / "a": "me", tmp_path / "c": "me"}) is None
    assert checkpoint.steps_in(tmp_path / "a") == []
    for name in ("b", "d"):
        with pytest.raises(WrongRequest, match=f"{name} at step 5"):
            checkpoint.newest_common({tmp_path / name: "me", tmp_path / "c": "me"})


def test_changed_weights_measurements_and_settings_are_noticed(here, tmp_path, monkeypatch, capsys):
    def flip(path, at=-99):
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)

    with monkeypatch.context() as m:  # stops in the evaluation of the second seed
        measure, calls = geometry.geometry, []
        m.setattr(
            geometry,
            "geometry",
            lambda *args: (
                calls.append(1)
                or (os.kill(os.getpid(), signal.SIGTERM) if len(calls) == 2 else None)
                or measure(*args)
            ),
        )
        assert here("run_1", evals=["geometry"]) == 143
    flip(tmp_path / "run_1/sae_seed0/sae_weights.safetensors")
    capsys.readouterr()
    assert here("run_1", evals=["geometry"]) == 0
    assert "sae_seed0 is not as it was written" in capsys.readouterr().err
    assert here("run_1") == 0 and "warning" not in capsys.readouterr().err
    flip(tmp_path / "run_1/sae_seed1/sae_weights.safetensors")
    measured = tmp_path / "run_1/eval/seed0_metrics.json"
    measured.write_text(measured.read_text().replace('"omega": ', '"omega": 1'))
    assert here("run_1") == 0
    told = capsys.readouterr().err.splitlines()
    assert any("sae_seed1 is not as it was written" in line for line in told) and any(
        "seed0_metrics.json is not as it was written" in line for line in told
    )
    config = tmp_path / "run_1/config.json"
    config.write_text(config.read_text().replace('"threads": ', '"threads": 1'))
    with pytest.raises(WrongRequest, match="config.json is not as it was written"):
        here("run_1")


# -------------------------------------------------------------------------------------- numbers that are none


def bad_gradient(trainer, x):
    accumulate = trainer.accumulate_grads

    def spoiled(*args):
        terms = accumulate(*args)
        trainer.sae.W_enc_FD.grad[7, 3] = math.inf
        return terms

    trainer.accumulate_grads = spoiled


def bad_parameter(trainer, x):
    trainer.sae.W_dec.data[2, 9] = math.nan


def bad_activation(trainer, x):
    x = x.clone()
    x[17, 4] = math.inf
    return x


def bad_lambda(trainer, x):
    trainer.log_l1.fill_(1000.0)


def bad_alpha(trainer, x):
    trainer.log_alpha.fill_(1000.0)


INJECTED = {
    "activation": (
        bad_activation,
        "activations of the LM not finite in 1 of 32768 entries ([17, 4] = inf; largest finite ",
    ),
    "gradient": (
        bad_gradient,
        "gradient of W_enc_FD not finite in 1 of 16384 entries ([7, 3] = inf; largest finite ",
    ),
    "parameter": (bad_parameter, "W_dec not finite in 1 of 16384 entries ([2, 9] = nan; largest finite "),
    "lambda": (bad_lambda, "l1_coefficient = inf"),
    "alpha": (bad_alpha, "alpha = inf"),
}


@pytest.mark.parametrize("where", INJECTED)
def test_a_number_that_is_none_fails_its_seed_by_name_and_no_other(
    where, here, tmp_path, monkeypatch, capsys
):
    """In run_1 and run_6 alike; the second seed fails, the first is trained to the end, and neither folder
    has a result."""
    act, said = INJECTED[where]
    at_step(monkeypatch, 60, act, times=100)
    assert here("run_1", "run_6", extra=["--checkpoint_seconds", 1000]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        last.startswith("error: ")
        and said in last
        and "at step 60 of arm fixed, seed 1" in last
        and "run_1 seed 1" in last
    )
    for run in ("run_1", "run_6"):
        assert not (tmp_path / run / "final_info.json").exists()
        assert any(
            w.startswith("seed 1 failed: ") and "at step 60" in w
            for w in json.loads((tmp_path / run / "warnings.json").read_text())
        )
        log = [json.loads(line) for line in (tmp_path / run / "train_log.jsonl").read_text().splitlines()]
        assert {seed: max(r["step"] for r in log if r["seed"] == seed) for seed in (0, 1)} == {
            0: STEPS,
            1: 51,
        }
        assert all(math.isfinite(v) for r in log for v in r.values())
    assert here("run_1", "run_6") == 1, "and it stays so"


def test_a_run_whose_every_seed_fails_keeps_its_last_good_checkpoint(here, tmp_path, monkeypatch):
    at_step(monkeypatch, 60, bad_parameter, seed=0, times=100)
    at_step(monkeypatch, 60, bad_parameter, seed=1, times=100)
    assert here("run_1") == 1
    kept = checkpoint.steps_in(tmp_path / "run_1")
    tensors, facts = checkpoint.read(
        tmp_path / "run_1",
        kept[-1],
        json.loads(checkpoint_facts(checkpoint.path_of(tmp_path / "run_1", kept[-1])))["config_hash"],
    )
    assert kept[-1] <= 60 and not any(t["failed"] for t in facts["trainers"])
    assert all(torch.isfinite(t).all() for name, t in tensors.items() if "log_" not in name)


def test_a_signal_when_every_seed_has_failed_claims_no_checkpoint(here, tmp_path, monkeypatch, capsys):
    def last(trainer, x):
        bad_parameter(trainer, x)
        os.kill(os.getpid(), signal.SIGTERM)

    at_step(monkeypatch, 10, bad_parameter, seed=0)
    at_step(monkeypatch, 10, last, seed=1)
    assert here("run_1", extra=["--checkpoint_seconds", 1000]) == 143
    assert "nothing was done yet; the same command starts" in capsys.readouterr().err.splitlines()[-1]
    assert not checkpoint.steps_in(tmp_path / "run_1")


def test_a_metric_that_is_not_finite_fails_its_seed_alone(here, tmp_path, monkeypatch, capsys):
    measure, calls = geometry.geometry, []

    def measured(*args):
        calls.append(1)
        metrics, details = measure(*args)
        return finite("geometry", metrics | {"omega": math.nan} if len(calls) == 2 else metrics, details)

    monkeypatch.setattr(geometry, "geometry", measured)
    assert here("run_0", "run_1", evals=["geometry"]) == 1
    assert "geometry.omega is nan" in capsys.readouterr().err.strip().splitlines()[-1]
    assert (tmp_path / "run_1/final_info.json").exists() and not (tmp_path / "run_0/final_info.json").exists()
    assert (tmp_path / "run_0/eval/seed0_geometry.json").exists()


# --------------------------------------------------------------------------------------- the machine's faults


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_a_lost_folder_and_a_size_limit_end_in_one_line_with_the_older_checkpoint_whole(
    here, tmp_path, monkeypatch, capsys
):
    assert here("alone/run_1") == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    faults = {
        "No space left on device; free disk space": lambda m: m.setattr(os, "fsync", no_space),
        "Permission denied; restore the permission": lambda m: m.setattr(
            os,
            "replace",
            lambda a, b: (_ for _ in ()).throw(PermissionError(errno.EACCES, os.strerror(errno.EACCES))),
        ),
        "File too large; raise the file size limit": lambda m: resource.setrlimit(
            resource.RLIMIT_FSIZE, (20_000, limits[1])
        ),
    }
    interrupted_run(here, monkeypatch, tmp_path, "begun/run_1")
    for i, (said, fault) in enumerate(faults.items()):
        name = f"{i}/run_1"
        shutil.copytree(tmp_path / "begun/run_1", tmp_path / name)
        with monkeypatch.context() as m:
            at_step(m, 70, lambda *_: fault(m) if fault else None)
            try:
                assert here(name) == 1, said
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ") and said in last and "cannot be written" in last
        assert checkpoint.steps_in(tmp_path / name) and not list((tmp_path / name).rglob("*.tmp"))
        assert here(name) == 0
        assert results(tmp_path / name) == results(tmp_path / "alone/run_1")
    with monkeypatch.context() as m:
        at_step(m, 50, lambda *_: shutil.rmtree(tmp_path / "gone/run_1"))
        assert here("gone/run_1") == 1
    assert (
        "its folder was removed" in capsys.readouterr().err.strip().splitlines()[-1]
        and not (tmp_path / "gone/run_1").exists()
    )


def test_too_little_memory_is_told_at_the_start_or_where_it_runs_out(here, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as m:
        m.setattr("sae_separation.process.memory_left", lambda device: 1e6)
        assert here("run_1") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        "training needs at least 0.0 GB" in last and "--d_sae" in last and not (tmp_path / "run_1").exists()
    )

    def out_of_memory(*_):
        torch.empty(2**50)

    at_step(monkeypatch, 50, out_of_memory)
    assert here("run_1") == 1
    assert "out of memory: lower --batch_size" in capsys.readouterr().err.strip().splitlines()[-1]
    assert here("run_1") == 0


def test_a_compilation_that_fails_is_told_in_one_line(here, monkeypatch, capsys):
    from torch._dynamo.exc import InternalTorchDynamoError

    def no_compiler(*_):
        raise InternalTorchDynamoError("no C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    at_step(monkeypatch, 50, no_compiler)
    assert here("run_1") == 1
    assert (
        capsys.readouterr().err.strip().splitlines()[-1]
        == "error: torch.compile failed (no C++ compiler found): leave out --compile, or mend what it needs"
    )
    assert here("run_1") == 0


def test_the_time_budget_ends_training_and_the_rest_is_done(here, tmp_path):
    started = time.monotonic()
    assert here("run_1", evals=["geometry"], extra=["--tokens", 10**9, "--time_budget_minutes", 0.2]) == 0
    assert time.monotonic() - started < 12 + 10  # and room for a busy machine
    told = json.loads((tmp_path / "run_1/warnings.json").read_text())
    assert all(
        any(
            f"seed {seed}: the time budget ended training after " in w and "of 3906250 steps" in w
            for w in told
        )
        for seed in (0, 1)
    )
    assert here("run_1", evals=["geometry"], extra=["--tokens", 10**9, "--time_budget_minutes", 0.2]) == 0


# --------------------------------------------------------------------------------------------- the same again


def test_the_same_command_writes_the_same_bytes_and_leaves_global_state_alone(here, tmp_path, monkeypatch):
    def state():
        return (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.random.get_rng_state().tolist(),
            numpy_state(),
            random.getstate(),
            dict(os.environ),
            os.getcwd(),
            signal.getsignal(signal.SIGTERM),
            signal.getsignal(signal.SIGINT),
            torch.get_num_threads(),
        )

    before = state()
    evals = ["core", "geometry"]
    assert here("a/run_1", "a/run_6", evals=evals) == 0
    assert state() == before
    torch.manual_seed(99)
    np.random.seed(99)
    assert here("b/run_6", evals=evals) == 0 and here("c/run_1", seeds=(1,)) == 0
    assert results(tmp_path / "a/run_6") == results(tmp_path / "b/run_6"), "also without the other run"
    assert (
        results(tmp_path / "c/run_1")[2]["sae_seed1/sae_weights.safetensors"]
        == results(tmp_path / "a/run_1")[2]["sae_seed1/sae_weights.safetensors"]
    ), "seeds are independent"


def test_checkpoints_are_written_less_often_when_writing_is_slow(here, monkeypatch):
    save, steps = checkpoint.save, []

    def slow(folder, step, *rest):
        steps.append(step)
        time.sleep(1)
        save(folder, step, *rest)

    monkeypatch.setattr("sae_separation.checkpoint.save", slow)
    assert here("run_1") == 0
    assert len(steps) == 2 and steps[-1] == STEPS, (
        "one at once, none in the 50 seconds after it, and the last"
    )


def test_failed_writing_names_file_cause_and_remedy(tmp_path):
    with pytest.raises(
        RunFailed, match="x.json cannot be written: No such file or directory; its folder was removed"
    ):
        write_json(tmp_path / "gone" / "x.json", {})
    assert not (tmp_path / "gone").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_drops_in_a_finaliser_is_raised_at_the_next_held():
    class Dropping:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):  # the handler runs in here, and what it raises is dropped
                pass

    with process.signals:
        Dropping()
        with pytest.raises(Interrupted):
            with process.signals.held():
                pass
        process.signals.taken()
        with process.signals.held():
            pass


def test_the_recorded_commit_is_dirty_for_changed_code_and_not_for_changed_runs(tmp_path, monkeypatch):
    def git(*args):
        return subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    git("init")
    (tmp_path / "run_0").mkdir()
    for name in ("experiment.py", "run_0/config.json"):
        (tmp_path / name).write_text("0")
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "sae_separation" / "run_folder.py"))
    assert run_folder.provenance()["git"].startswith("unknown: ")
    git("add", ".")
    git("commit", "-m", "all")
    (tmp_path / "run_0/config.json").write_text("1")
    assert not run_folder.provenance()["git"].endswith("-dirty")
    (tmp_path / "experiment.py").write_text("1")
    assert run_folder.provenance()["git"].endswith("-dirty")
