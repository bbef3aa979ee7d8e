"""The committed runs, and that what notes.txt and README.md say of them is what their files hold."""

import json
import re

import pytest
from conftest import ROOT, run_script
from test_run import NEEDED, strict

from experiment import PLAN

INFOS = {name: strict(ROOT / name / "final_info.json") for name in PLAN}
CONFIGS = {name: strict(ROOT / name / "config.json") for name in PLAN}


def test_every_run_of_the_plan_is_there_with_five_seeds_from_one_clean_commit():
    for name, info in INFOS.items():
        assert set(NEEDED) <= set(info) and len(info["core"]["final_info_dict"]["l0"]) >= 5
        assert {k: CONFIGS[name]["config"][k] for k in PLAN[name]} == PLAN[name]
    (commit,) = {config["git"] for config in CONFIGS.values()}
    assert re.fullmatch("[0-9a-f]{7,}", commit), "of a clean tree"


def test_they_are_small():
    assert (
        sum(
            p.stat().st_size
            for name in PLAN
            for p in (ROOT / name).rglob("*")
            if p.is_file() and "sae_seed" not in str(p)
        )
        < 5_000_000
    )


def test_l0_is_within_2_of_its_target_or_the_run_says_why_not():
    for name, info in INFOS.items():
        warned = json.loads((ROOT / name / "warnings.json").read_text())
        for seed, l0 in zip(CONFIGS[name]["config"]["seeds"], info["core"]["final_info_dict"]["l0"]):
            assert abs(l0 - 16) <= 2 or any(w.startswith(f"seed {seed}: L0 is") for w in warned), (
                name,
                seed,
                l0,
            )


def test_no_two_runs_share_their_numbers():
    for section, metric in (
        ("core", "explained_variance"),
        ("geometry", "omega"),
        ("training", "final_loss"),
        ("corpus_unlearning", "forget_ce_gain_at_retain_ce_cost_0.1"),
    ):
        values = [v for info in INFOS.values() for v in info[section]["final_info_dict"][metric]]
        assert len(set(values)) == len(values), metric


def test_every_number_in_the_notes_is_in_the_run_folders():
    """Notes quote `section.metric = mean ± standard error` under a run's heading."""
    parts = {part.split(":")[0]: part for part in (ROOT / "notes.txt").read_text().split("\n## ")[1:]}
    for name, info in INFOS.items():
        quoted = re.findall(r"(\w+)\.([\w.]+) = (-?[\d.]+) ± ([\d.]+)", parts[name])
        assert len(quoted) >= 40, name
        for section, metric, mean, stderr in quoted:
            for text, kind in ((mean, "means"), (stderr, "stderrs")):
                assert float(text) == pytest.approx(
                    info[section][kind][metric], abs=0.51 * 10 ** -len(text.partition(".")[2])
                ), f"{name} {section}.{metric}"


def test_tables_in_the_notes_and_the_readme_are_what_plot_prints():
    assert run_script("plot.py", *PLAN, "--table").stdout.strip() in (ROOT / "README.md").read_text()
    assert run_script("plot.py", *PLAN, "--against=run_6").stdout.strip() in (ROOT / "notes.txt").read_text()


def test_the_table_of_the_real_lm_is_what_plot_prints():
    assert (
        run_script("plot.py", "smollm2/run_0", "smollm2/run_6", "smollm2/run_9", "--table").stdout.strip()
        in (ROOT / "README.md").read_text()
    )
    gains = {
        name: strict(ROOT / "smollm2" / name / "final_info.json")["corpus_unlearning"]
        for name in ("run_0", "run_6", "run_9")
    }
    for form in ("", "_guardrail"):
        for part in gains.values():
            mean, stderr = (
                part[kind][f"forget_ce_gain_at_retain_ce_cost_0.05{form}"] for kind in ("means", "stderrs")
            )
            assert f"{mean:.2f} ± {stderr:.2f}" in " ".join(
                (ROOT / "README.md").read_text().partition("<!-- /smollm2 -->")[2].split()
            )
