"""The benchmarks: limits by hand, tables, and our worker, run for real on a tiny LM and on made-up
activations."""

import os
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import run_script
from safetensors.torch import save_file

from benchmarks import bench, gpu


def test_the_dense_limit_is_six_products_of_the_sae_and_the_layers_up_to_the_hook(tmp_path):
    session = bench.Session(tmp_path, "none", quick=True)
    session.peaks = [{"fp32": 195.0, "bf16": 790.0}]
    limit = session.limits(4096)["bf16"]
    assert limit["step"] == pytest.approx(790e9 / (6 * 2 * 512 * 4096))
    assert limit["lm"] == pytest.approx(790e9 / (4 * (2 * 12 * 512**2 + 2 * 2 * 128 * 512)))
    assert 1 / limit["end_to_end"] == pytest.approx(1 / limit["step"] + 1 / limit["lm"])


def test_the_table_has_a_line_for_every_system_and_says_which_did_not_run():
    def rate(*values):
        return bench.spread(list(values)) | {
            "share_of_limit": {"fp32": 2.0, "bf16": 0.5},
            "ours_over_this": bench.spread([3.0, 4.0, 5.0]),
        }

    ran = {
        "about": {},
        "peak_rss_mb": 1234.0,
        **{what: rate(10.0, 20.0, 60.0) for what in ("lm", "step", "end_to_end")},
    }
    limit = {"lm": 1.0, "step": 2.0, "end_to_end": 3.0}
    text = bench.table(
        {
            "about": {
                "date": "d",
                "commit": "c",
                "machine": "m",
                "torch": "t",
                "peak": {"fp32": 1.0, "bf16": 2.0},
                "cores_of_others": 0.25,
            },
            "peers": {
                "4096": {
                    "systems": {"ours default": ran, "sparsify best": {"failed": "no module"}},
                    "limits": {"bf16": limit},
                }
            },
            "quality": {
                "4096": {
                    "tokens": 1000,
                    "lr": 0.1,
                    "ours": {"explained_variance": 0.91, "l0": 31.0, "seconds": 5.0},
                }
            },
        }
    )
    assert (
        "| ours default | 20 [10, 60] | 20 [10, 60] | 20 [10, 60] | 4.00 [3.00, 5.00] | 50% | 1,234 |" in text
    )
    assert "sparsify best | did not run: no module" in text and "| ours | 0.9100 | 31.0 | 5 |" in text
    assert "2 (bf16) GFLOP/s; others kept 0.25 cores busy. Tokens/s" in text


def test_cores_of_others_are_those_that_this_session_does_not_take(monkeypatch):
    Times = namedtuple("Times", "user system idle iowait")
    at = {"machine": Times(5.0, 1.0, 3.0, 1.0), "own": (2.0, 0.5, 1.0, 0.0, 9.0)}
    monkeypatch.setattr("psutil.cpu_times", lambda: at["machine"])
    monkeypatch.setattr(bench.os, "times", lambda: at["own"])
    monkeypatch.setattr(bench.time, "monotonic", lambda: at["machine"].idle)
    others = bench.Others()
    at["machine"] = at["machine"]._replace(user=12.0, system=2.0, idle=13.0, iowait=2.0)  # 8 s busy in 10 s
    at["own"] = (4.0, 1.5, 2.0, 1.0, 19.0)  # 5 of them ours
    assert others.cores() == pytest.approx(0.3)


class Canned:
    """Stands for a worker: 100 tokens/s of ours, 50 of a peer; "breaks" ends in its first turn."""

    about = {"torch": "t"}

    def __init__(self, system: str):
        self.system, self.asked = system, []

    def ask(self, do: str, **command) -> dict:
        self.asked.append((do, command["n"]))
        if self.system == "breaks" and do == "end_to_end":
            raise RuntimeError("breaks ended")
        return {"tokens_per_second": 100.0 if self.system == "ours" else 50.0, "l0": 32.0}

    def stop(self) -> dict:
        return {"peak_rss_mb": 9.0}


def test_systems_are_measured_in_turns_and_one_that_ends_leaves_the_others(tmp_path, monkeypatch):
    session, workers = bench.Session(tmp_path, "none", quick=True), {}
    monkeypatch.setattr(session, "matmul_peak", lambda: session.peaks.append({"fp32": 100.0}))

    def start(system: str, variant: str, **spec) -> Canned:
        if system == "absent":
            raise RuntimeError("no module")
        return workers.setdefault(system, Canned(system))

    monkeypatch.setattr(session, "start", start)
    systems = [(name, "default") for name in ("absent", "peer", "breaks", "ours")]
    found = bench.peers(session, 64, systems, repetitions=2)["systems"]
    assert found["absent default"] == {"failed": "no module"}
    assert found["breaks default"] == {"failed": "breaks ended"}
    assert found["peer default"]["step"]["values"] == [50.0, 50.0] and "l0" not in found["peer default"]
    assert found["peer default"]["lm"]["ours_over_this"]["values"] == [2.0, 2.0]
    assert found["ours default"]["l0"] == [32.0, 32.0] and found["ours default"]["peak_rss_mb"] == 9.0
    turn = [("step", 4), ("lm", 16_384), ("end_to_end", 20_480)]
    assert workers["peer"].asked == [("step", 2), ("step", 4), ("lm", 16_384), *turn, *turn]
    assert workers["ours"].asked[0] == ("settle", bench.SETTLE["n"]) and len(session.peaks) == 3


def test_a_worker_of_its_own_for_one_command_says_all_that_it_was_and_did(tmp_path, monkeypatch):
    session = bench.Session(tmp_path, "none", quick=True)
    monkeypatch.setattr(session, "start", Canned)
    told = session.once("step", {"n": 2}, system="peer")
    assert told == {"torch": "t", "tokens_per_second": 50.0, "l0": 32.0, "peak_rss_mb": 9.0}


def test_results_are_not_overwritten_by_fewer_parts(tmp_path):
    (tmp_path / "results.json").write_text('{"about": {}, "peers": {}, "curves": {}}')
    for out, said in (
        (tmp_path / "results", "results.json holds peers, which would be lost: give another --out"),
        (tmp_path / "no" / "results", "there is no folder"),
    ):
        done = run_script("benchmarks/bench.py", "--only", "curves", "--out", out)
        assert done.returncode == 2 and said in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder in which root can make no file")
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_measured():
    done = run_script("benchmarks/bench.py", "--only", "costs", "--out", "/proc/costs")
    assert done.returncode == 2 and "/proc cannot be written to" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_benchmark_that_is_ended_leaves_no_files_behind(tmp_path):
    about = {"env": os.environ | {"TMPDIR": str(tmp_path)}, "stdout": subprocess.DEVNULL}
    command = [sys.executable, "benchmarks/bench.py", "--quick", "--only", "costs", "--out", tmp_path / "x"]
    process = subprocess.Popen(command, cwd=Path(bench.__file__).parent.parent, **about)
    while process.poll() is None and not list(tmp_path.glob("bench-*/contexts.safetensors")):
        time.sleep(0.1)
    process.terminate()
    assert process.wait() == 143 and not list(tmp_path.glob("bench-*"))


@pytest.fixture
def session(tmp_path) -> bench.Session:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=200
        )
    ).save_pretrained(tmp_path)
    save_file({"tokens": torch.randint(0, 200, (64, 1024))}, tmp_path / "contexts.safetensors")
    return bench.Session(tmp_path, "none", quick=True)


@pytest.mark.slow
def test_our_worker_answers_every_command_and_a_worker_that_ends_is_an_error_with_its_last_line(
    session, tmp_path
):
    worker = session.start(
        "ours", d_sae=64, arms=["vanilla", "ortsae"], settings={"target_l0": 4.0}, buffer_tokens=16_384
    )
    for what, n in (("step", 2), ("lm", 10_000), ("end_to_end", 10_000)):
        answer = worker.ask(what, n=n)
        assert answer["tokens"] >= n and answer["tokens_per_second"] == pytest.approx(
            answer["tokens"] / answer["seconds"]
        )
    stored = tmp_path / "activations.safetensors"
    assert 0 < worker.ask("store", n=28 * 2048, path=str(stored))["variance"] <= 1.01
    settings = {"target_l0": 0.0, "l1": 0.0, "lr": 3e-3, "warmup_steps": 2}
    worker.ask("build", arms=["vanilla"], activations=str(stored), steps=20, settings=settings)
    trained = worker.ask("quality")
    assert worker.stop()["peak_rss_mb"] > worker.about["rss_mb"] / 2
    assert trained["explained_variance"] > 0.5 and 0 < trained["l0"] <= 64
    with pytest.raises(RuntimeError, match="ours default ended: KeyError: 'd_sae'"):
        session.start("ours")  # before it imports anything heavy


@pytest.mark.slow
def test_costs_are_shares_of_the_lms_and_the_steps_time(session):
    shares = bench.costs(session, 64)
    assert shares["lm"] + shares["step"] == pytest.approx(1)
    for what in ("lm", "step"):
        operations = {name: share for name, share in shares.items() if name.startswith(f"{what}: ")}
        assert 0.3 * shares[what] < sum(operations.values()) <= shares[what]
        assert any(name.endswith("mm") for name in operations)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    about = dict.fromkeys(("date", "commit", "machine", "torch"), "x") | {"peak": {"fp32": 1.0}}
    table = bench.table({"about": about, "costs": {"64": {"lm": 0.75, "step": 0.25, "lm: x": 0.001}}})
    assert "| lm | 75% |" in table and "lm: x" not in table


# ---- on a GPU


def test_the_gpu_benchmark_measures_ours_first_in_every_group_and_every_peer_at_every_size():
    cells = gpu.plan()
    for size in gpu.SIZES:
        for activation in gpu.SYSTEMS:
            group = [c for c in cells if (c["d_in"], c["d_sae"]) == size and c["activation"] == activation]
            assert (group[0]["system"], group[0]["variant"]) == ("ours", "default")
    assert {c["system"] for c in cells} == {"ours", "sae_lens", "dictionary_learning", "sparsify"}


def test_ratios_and_shares_of_the_gpu_benchmark_are_of_the_same_sae_and_what_failed_is_named():
    def cell(system: str, activation: str, rate: float) -> dict:
        about = {"d_in": 512, "d_sae": 1000, "activation": activation, "system": system, "variant": "default"}
        return about | {"step": bench.spread([rate / 2, rate, 2 * rate]), "peak_device_mb": 1234.0}

    cells = [cell("ours", "relu", 4e5), cell("ours", "topk", 1e5), cell("peer", "topk", 5e4)]
    failed = {k: v for k, v in cell("absent", "topk", 1.0).items() if k not in ("step", "peak_device_mb")}
    cells.append(failed | {"failed": "no module"})
    gpu.compare(cells, peak=10.0)
    assert [c.get("ours_over_this") for c in cells] == [1.0, 1.0, 2.0, None]
    assert cells[0]["share_of_peak"] == pytest.approx(4e5 * 6 * 2 * 512 * 1000 / 10e12)
    about = {"date": "d", "commit": "c", "card": "a card", "torch": "t", "peaks": {"bf16 TFLOP/s": 10.0}}
    text = gpu.table({"about": about, "cells": cells})
    assert "d, commit c, a card, torch t; bf16 TFLOP/s 10." in text
    assert "| 512 | 1,000 | topk | peer default | 50,000 [25,000, 100,000] | 2.00 | 3% | 1,234 |" in text
    assert "| 512 | 1,000 | topk | absent default | not measured: no module | | | |" in text


@pytest.mark.slow
def test_a_worker_without_an_lm_trains_on_made_up_activations_and_makes_one_sae_after_another(tmp_path):
    session = bench.Session(tmp_path, "none", quick=True)
    systems = gpu.Systems(session, "cpu")
    cell = {"d_in": 16, "d_sae": 256, "system": "ours", "variant": "default"}
    for activation in ("relu", "topk"):
        found = systems.measure(cell | {"activation": activation})
        assert found["step"]["median"] > 0 and found["l0"] > 0
        assert activation == "relu" or found["l0"] == pytest.approx(32, rel=0.05)
    systems.stop()
