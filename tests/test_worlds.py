"""studies/worlds.py: what the runs of several worlds come to together."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from sae_separation.errors import WrongRequest
from studies import worlds

ROOT = Path(__file__).resolve().parent.parent


def test_worlds_are_the_sample_and_stouffer_puts_tests_together():
    rng = np.random.default_rng(0)
    by_world = [rng.normal(0.1, 0.1, 3).tolist() for _ in range(4)]
    found = worlds.compared(by_world)
    means = [np.mean(d) for d in by_world]
    over_worlds: Any = stats.ttest_1samp(means, 0)
    assert np.allclose(found["interval_95"], list(over_worlds.confidence_interval(0.95)))
    assert np.isclose(found["difference"], np.mean(means)) and np.allclose(found["by_world"], means)
    tests: Any = [stats.ttest_1samp(d, 0, alternative="greater") for d in by_world]
    together: Any = stats.combine_pvalues([t.pvalue for t in tests], method="stouffer")
    assert np.isclose(found["stouffer_p"], together.pvalue)


def test_seeds_that_do_not_vary_have_no_test():
    found = worlds.compared([[0.5, 0.5, 0.5], [0.1, 0.2, 0.3]])
    assert found["stouffer_p"] is None and np.isclose(found["difference"], 0.35)
    assert worlds.compared([[0.5]]) == {"by_world": [0.5], "difference": 0.5, "stouffer_p": None}


def test_committed_runs_are_collected_and_compared(tmp_path, monkeypatch, capsys):
    out = tmp_path / "worlds.json"
    monkeypatch.setattr(sys, "argv", ["worlds", str(ROOT / "in_context"), "--out", str(out)])
    worlds.main()
    assert "NaN" not in out.read_text()  # runs without facts never shown have no such metric
    found = json.loads(out.read_text())
    ours = found["worlds"]["world 0"]["run_29"]
    info = json.loads((ROOT / "in_context/run_29/final_info.json").read_text())
    assert (
        list(ours["by_seed"]["worst_case"].values()) == info["choice"]["final_info_dict"]["worst_case_score"]
    )
    less = {(row["less"], row["metric"]): row["difference"] for row in found["comparisons"]}
    of = [json.loads((ROOT / f"in_context/run_{i}/final_info.json").read_text()) for i in (29, 28)]
    means = [run["choice"]["means"]["mean_score"] for run in of]
    assert np.isclose(less["run_28", "mean_of_forms"], means[0] - means[1])
    assert f"{means[0]:.2f}" in capsys.readouterr().out


def test_a_world_in_two_folders_is_refused(tmp_path, monkeypatch):
    folder, out = str(ROOT / "in_context"), str(tmp_path / "worlds.json")
    monkeypatch.setattr(sys, "argv", ["worlds", folder, folder, "--out", out])
    with pytest.raises(WrongRequest, match="in two folders"):
        worlds.main()


def test_folders_without_runs_and_of_several_worlds_are_refused(tmp_path):
    with pytest.raises(WrongRequest, match="no complete run"):
        worlds.collected(tmp_path)
    for i in (28, 29):
        shutil.copytree(ROOT / f"in_context/run_{i}", tmp_path / f"run_{i}")
    path = tmp_path / "run_28/final_info.json"
    path.write_text(path.read_text().replace("world 0", "world 5"))
    with pytest.raises(WrongRequest, match="world 0.*world 5"):
        worlds.collected(tmp_path)
