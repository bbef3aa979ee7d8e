"""The real command, end to end: what it writes, what it refuses, and what the earlier attempt got wrong."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_SWEEP, run_here, run_script, seconds_of_children, small_command

import experiment
from sae_separation import evals, methods, results, run_folder, testbeds
from sae_separation.evals.core import core
from sae_separation.evals.evaluator import Evaluator
from sae_separation.export import load_exported
from sae_separation.plots import folders
from sae_separation.run_folder import files_of
from sae_separation.specs import SPECS, DataConfig

NEEDED = {
    "training": (
        "tokens_trained final_loss final_fvu final_l0 l1_coefficient alpha tokens_per_second train_seconds"
    ),
    "core": (
        "explained_variance mse cossim l0 l1 ce_loss_score ce_loss_with_sae ce_loss_without_sae kl_div_score"
        " l2_ratio frac_alive"
    ),
    "unlearning": (
        "unlearning_score forget_accuracy retain_accuracy lm_forget_accuracy lm_retain_accuracy"
        " n_known_forget n_known_retain random_feature_score"
    ),
    "corpus_unlearning": (
        "forget_ce_gain_at_retain_ce_cost_0.01 forget_ce_gain_at_retain_ce_cost_0.05"
        " forget_ce_gain_at_retain_ce_cost_0.1"
    ),
    "geometry": (
        "omega omega_floor mean_max_cosine frac_pairs_above_0.2 condition_number_forget"
        " condition_number_retain condition_number_shared effective_rank_forget effective_rank_retain"
        " effective_rank_shared max_principal_cosine_forget_retain"
    ),
}


STEPS = 100


@pytest.fixture(scope="module")
def settings(small_micro) -> list[str]:
    """What the short runs were asked for, but for their folders."""
    data = [f"--{name}={value}" for name, (value,) in small_micro.items()]
    return ["--testbed=micro", *data, "--seeds", "0", "1", f"--tokens={STEPS * 2048}", "--d_sae=512"]


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory, settings) -> Path:
    """A folder with run_0 and run_1 of the plan, two seeds, trained for 100 steps on one LM pass."""
    folder = tmp_path_factory.mktemp("runs")
    argv = small_command("--out_dir", folder / "run_0", folder / "run_1", *settings)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def strict(path):
    def refuse(token):
        raise AssertionError(f"{path} holds {token}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_final_info_has_every_metric_for_every_seed_in_strict_json(short_runs):
    for run in ("run_0", "run_1"):
        info = strict(short_runs / run / "final_info.json")
        assert set(info) == {"training", *(row.section for row in evals.rows_of(()))} >= set(NEEDED)
        for section, names in NEEDED.items():
            for name in names.split():
                values = info[section]["final_info_dict"][name]
                assert len(values) == 2, (section, name)
                if None not in values:
                    assert info[section]["means"][name] == pytest.approx(sum(values) / 2)
                    assert info[section]["stderrs"][name] == pytest.approx(
                        abs(values[0] - values[1]) / 2, abs=1e-12
                    )


def test_steps_were_trained_and_the_loss_fell(short_runs):
    for run in ("run_0", "run_1"):
        info = strict(short_runs / run / "final_info.json")["training"]
        assert info["final_info_dict"]["tokens_trained"] == [STEPS * 2048] * 2
        log = [json.loads(line) for line in (short_runs / run / "train_log.jsonl").read_text().splitlines()]
        for seed in (0, 1):
            losses = [r["loss"] for r in log if r["seed"] == seed]
            assert losses[-1] < 0.8 * losses[0]


def test_runs_and_seeds_differ_from_one_another(short_runs):
    vanilla, fixed = (strict(short_runs / run / "final_info.json") for run in ("run_0", "run_1"))
    for section, name in (("core", "explained_variance"), ("core", "l0"), ("geometry", "omega")):
        values = vanilla[section]["final_info_dict"][name] + fixed[section]["final_info_dict"][name]
        assert len(set(values)) == 4, f"{section}.{name}: {values}"
    swept = [strict(path) for path in short_runs.glob("run_*/eval/seed*_corpus_unlearning.json")]
    assert len({details["sweep"][0]["forget_ce_gain"] for details in swept}) == 4
    assert vanilla["training"]["means"]["alpha"] == 0
    assert fixed["training"]["means"]["alpha"] == pytest.approx(0.1)


def test_saebench_core_on_the_saved_sae_repeats_the_numbers(short_runs, small_micro):
    testbed = testbeds.load(DataConfig(testbed="micro", **small_micro), examined=False)
    evaluator = Evaluator(replace(testbed, n_held_out=16), context_size=128)
    again, _ = core(evaluator, load_exported(short_runs / "run_1" / "sae_seed1"), 1, "again")
    written = strict(short_runs / "run_1" / "final_info.json")["core"]["final_info_dict"]
    for name, values in written.items():
        assert again[name] == pytest.approx(values[1], rel=1e-4, abs=1e-6), name


def test_an_exported_sae_read_back_as_one_of_others_has_the_same_numbers(
    short_runs, settings, monkeypatch, capsys
):
    """Its own hook and LM are read from its files."""
    small = replace(SPECS["micro"], n_held_out=16, sweep=SMALL_SWEEP)
    monkeypatch.setitem(SPECS, "micro", small)
    data = [part for part in settings if part.startswith(("--forget", "--retain", "--questions"))]
    folder, theirs = short_runs / "theirs", short_runs / "run_1/sae_seed1"
    assert run_here("--evaluate", theirs, "--out_dir", folder, "--seeds", 1, *data) == 0
    for row in evals.rows_of(()):
        path = f"eval/seed1_{row.section}.json"
        assert (folder / path).read_bytes() == (short_runs / "run_1" / path).read_bytes()
        ours, again = (strict(run / "final_info.json")[row.section] for run in (short_runs / "run_1", folder))
        whole = {name: values[1:] for name, values in ours["final_info_dict"].items()}
        assert again["final_info_dict"] == whole
    weights = "sae_seed1/sae_weights.safetensors"
    assert (folder / weights).read_bytes() == (short_runs / "run_1" / weights).read_bytes()
    (sae,) = strict(folder / "config.json")["saes"]
    assert sae["given"] == str(theirs) and sae["sha256"] == run_folder.files_of(theirs)
    assert strict(folder / "final_info.json")["training"]["means"]["final_fvu"] is None
    assert any("training: tokens_trained, final_loss" in w for w in strict(folder / "warnings.json"))
    assert folders.find_runs([folder])[0][0].label.startswith("theirs (loaded)")
    again = "--out_dir", folder, "--seeds", 1, *data
    capsys.readouterr()
    assert run_here("--evaluate", theirs, *again) == 0 and "is complete" in capsys.readouterr().out
    assert run_here("--evaluate", short_runs / "run_0/sae_seed1", *again) == 2
    assert "holds a run of other SAEs" in capsys.readouterr().err


def test_the_saved_sae_reconstructs_as_well_as_training_said(short_runs, activations):
    sae = load_exported(short_runs / "run_0" / "sae_seed0")
    x = activations.x
    fvu = ((sae(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item()
    assert fvu == pytest.approx(
        strict(short_runs / "run_0" / "final_info.json")["training"]["final_info_dict"]["final_fvu"][0],
        rel=0.1,
    )


def test_config_records_every_setting_the_testbed_and_what_ran_it(short_runs):
    config = strict(short_runs / "run_1" / "config.json")
    assert set(config["requested"]) == set(config["config"])
    assert set(config["config"]) == {f.name for f in fields(experiment.Config)} and [
        k for k, v in config["config"].items() if v is None
    ] == ["forget_entities"]
    assert config["config"]["arm"] == "fixed" and config["config"]["testbed"] == "micro"
    assert config["testbed"]["hook_name"] == "gpt_neox.layers.1" and {"versions", "hardware", "git"} <= set(
        config
    )


def test_only_json_and_safetensors_are_in_a_run_folder(short_runs):
    suffixes = {p.suffix for p in (short_runs / "run_0").rglob("*") if p.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors"}


def test_the_summary_can_be_grepped(short_runs):
    lines = (short_runs / "stdout.txt").read_text().splitlines()
    assert any(line.startswith("run_0 core.explained_variance: 0.") for line in lines)
    assert any(line.startswith("run_1 complete: ") for line in lines)


def test_a_finished_run_says_so_and_other_settings_are_refused(short_runs, settings):
    before = (short_runs / "run_1" / "final_info.json").stat().st_mtime_ns
    settings = ["--out_dir", short_runs / "run_1", *settings]
    started = seconds_of_children()
    again = run_script("experiment.py", *settings)
    assert again.returncode == 0 and "is complete" in again.stdout and seconds_of_children() - started < 5
    fewer, more = (run_script("experiment.py", *settings, "--seeds", *seeds) for seeds in ([1], [0, 1, 2]))
    assert fewer.returncode == 0 and "is complete" in fewer.stdout, "it holds the seed asked for"
    assert more.returncode == 2 and "seeds" in more.stderr.splitlines()[-1]
    other = run_script("experiment.py", *settings, "--arm=fixed", "--alpha=0.7")
    assert (
        other.returncode == 2
        and "alpha" in other.stderr.splitlines()[-1]
        and "--overwrite" in other.stderr.splitlines()[-1]
    )
    assert (short_runs / "run_1" / "final_info.json").stat().st_mtime_ns == before


@pytest.fixture
def loaded(micro, monkeypatch):
    """The embedded testbed is not loaded again in this process."""
    monkeypatch.setattr("sae_separation.testbeds.load", lambda *_: micro)


def test_a_run_that_blows_up_ends_with_one_line_exit_code_1_and_no_result(loaded, tmp_path, capsys):
    """A learning rate that overflows in the first steps: no constant takes the place of the loss."""
    short = ("--seeds=0", f"--tokens={100 * 2048}", "--d_sae=128", "--buffer_tokens=16384", "--testbed=micro")
    assert run_here("--out_dir", tmp_path / "run_1", *short, "--lr=1e30", "--warmup_steps=0") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "of arm fixed, seed 0" in last and "lower --lr" in last
    assert not (tmp_path / "run_1" / "final_info.json").exists()


def test_a_gate_reads_the_features_of_another_run(short_runs, loaded, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sae_separation.reader.N_CONTEXTS", 96)
    monkeypatch.setitem(methods.READERS, "feature_gate", {"hidden": 4, "steps": 30})
    source, asked = short_runs / "run_0", ("--arm=feature_gate", "--testbed=micro", "--seeds=0")
    to = ("--out_dir", tmp_path / "it", "--evals", "depth", *asked)
    assert run_here(*to, f"--features_of={source}") == 0
    made = strict(tmp_path / "it" / "config.json")["features_of"]
    assert made["config"]["arm"] == "vanilla" and made["files"]["0"] == files_of(source / "sae_seed0")
    method, sae = methods.load(tmp_path / "it" / "sae_seed0"), load_exported(source / "sae_seed0")
    assert torch.equal(method.tensors["W_enc"], sae.W_enc)
    info = strict(tmp_path / "it" / "final_info.json")
    assert 0 <= info["depth"]["means"]["depth_score"] <= 1.5
    assert run_here("--out_dir", tmp_path / "other", *asked, "--features_of=run_0") == 2
    assert f"{tmp_path / 'run_0'} is no run folder" in capsys.readouterr().err.splitlines()[-1]
    for given, why in (
        ((), "name it with --features_of"),
        ((f"--features_of={tmp_path / 'it'}",), "is a run of feature_gate, which has no SAE: name a run"),
        ((f"--features_of={source}", "--seeds=7"), "has no seed 7"),
    ):
        for also in ((), ("--dry_run",)):
            done = run_script("experiment.py", "--out_dir", tmp_path / "new", *asked, *given, *also)
            assert done.returncode == 2 and why in done.stderr.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_one_hook_everywhere(short_runs):
    """The layer the activations came from is the layer in the exported SAE and in the record."""
    recorded = strict(short_runs / "run_0" / "config.json")["testbed"]["hook_name"]
    exported = strict(short_runs / "run_0" / "sae_seed0" / "cfg.json")["metadata"]
    assert exported["hook_name"] == recorded == f"gpt_neox.layers.{exported['hook_layer']}"


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"name": "npm"}', '{"requested": 1, "config": 2}', b"\xff\xfe"]
)
def test_a_folder_with_a_strange_config_is_refused(content, tmp_path):
    (tmp_path / "run_0").mkdir()
    (tmp_path / "run_0" / "config.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    done = run_script("experiment.py", "--out_dir=run_0", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--overwrite" in done.stderr


def test_what_only_the_lm_can_refuse_is_refused_before_anything_is_written(loaded, tmp_path, capsys):
    for wrong, why in (("--context_size=257", "256 positions"), ("--d_sae=8", "must be under --d_sae 8")):
        assert run_here("--out_dir", tmp_path / "run_0", "--testbed=micro", wrong) == 2
        assert why in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_an_out_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run_0").write_text("mine")
    done = run_script("experiment.py", "--out_dir=run_0", cwd=tmp_path)
    assert done.returncode == 2 and "is a file" in done.stderr and (tmp_path / "run_0").read_text() == "mine"


def test_help_answers_within_a_second_and_names_every_option():
    started = seconds_of_children()
    done = run_script("experiment.py", "--help")
    assert done.returncode == 0 and seconds_of_children() - started < 2
    assert "--out_dir" in done.stdout and "--target_l0" in done.stdout


def test_plot_draws_complete_runs_and_names_the_ones_it_skips(short_runs, tmp_path):
    (short_runs / "run_9").mkdir(exist_ok=True)
    done = run_script(
        "plot.py", short_runs / "run_0", short_runs / "run_1", short_runs / "run_9", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "run_9: no final_info.json" in done.stderr and "| run_1 | fixed † | 2 |" in done.stdout
    assert all(
        (tmp_path / name).stat().st_size > 10_000
        for name in ("training_curves.png", "unlearning_tradeoff.png")
    )
    alone = run_script("plot.py", short_runs / "run_0", cwd=tmp_path)
    assert alone.returncode == 0, "one run is enough"
    damage = {
        "final_info.json": "[]",
        "config.json": '{"a": 1}',
        "train_log.jsonl": "",
        "eval/seed0_unlearning.json": "{",
    }
    broken = [tmp_path / f"{i}_a" for i in range(len(damage))]
    for folder, (name, content) in zip(broken, damage.items()):
        shutil.copytree(short_runs / "run_0", folder)
        (folder / name).write_text(content)
    done = run_script("plot.py", *broken, short_runs / "run_1", "--table", cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    for folder in broken:
        assert f"skipping {folder}: " in done.stderr
    none = run_script("plot.py", cwd=tmp_path)
    assert none.returncode == 2 and "no complete run folder" in none.stderr


def test_plot_needs_no_torch():
    for path in (ROOT / "plot.py", *(ROOT / "sae_separation/plots").iterdir()):
        if path.is_file():
            assert not re.search(r"import (torch|experiment)|from (torch|experiment)", path.read_text()), path


def test_undefined_metrics_are_null_with_a_reason_and_never_a_mean_of_fewer_seeds():
    summary = results.summarise({"good": [1.0, 3.0], "bad": [1.0, math.nan], "none": [None, None]})
    assert summary["means"] == {"good": 2.0, "bad": None, "none": None} and summary["stderrs"][
        "good"
    ] == pytest.approx(1.0)
    assert summary["final_info_dict"]["bad"] == [1.0, None]
    messages = results.undefined("core", summary, (3, 4))
    assert messages[0] == "core: bad undefined for seeds [4]: each mean is null" and len(messages) == 2
