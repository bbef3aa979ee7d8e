"""studies/controls.py: runs with one option changed, against the planned ones."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from sae_separation.errors import WrongRequest
from studies import controls

ROOT = Path(__file__).resolve().parent.parent
CHANGES = (0.1, -0.2, 0.4)


@pytest.fixture
def changed(tmp_path) -> Path:
    """run_6 with other values of one metric."""
    folder = tmp_path / "label_noise_5"
    shutil.copytree(ROOT / "run_6", folder / "run_6")
    file = folder / "run_6/final_info.json"
    info = json.loads(file.read_text())
    scores = info["robustness"]["final_info_dict"]["mean_score"]
    info["robustness"]["final_info_dict"]["mean_score"] = [s + d for s, d in zip(scores, CHANGES)]
    file.write_text(json.dumps(info))
    change_option(folder, "label_noise", 0.05)
    return folder


def change_option(folder: Path, name: str, value):
    file = folder / "run_6/config.json"
    made = json.loads(file.read_text())
    made["config"][name] = value
    file.write_text(json.dumps(made))


def collect(monkeypatch, tmp_path, *folders) -> list[dict]:
    out = tmp_path / "controls.json"
    monkeypatch.setattr(sys, "argv", ["controls", str(ROOT), *map(str, folders), "--out", str(out)])
    controls.main()
    return json.loads(out.read_text())


def test_a_control_is_compared_with_its_planned_run_seed_by_seed(changed, tmp_path, monkeypatch, capsys):
    *planned, row = collect(monkeypatch, tmp_path, changed)
    assert [(of["run"], of["control"]) for of in planned] == [
        ("run_0", "as planned"),
        ("run_6", "as planned"),
    ]
    assert row["changed"] == {"label_noise": 0.05}
    assert row["run"] == "run_6" and row["control"] == "label noise 5"
    less = row["less_planned"]["mean of forms"]
    test: Any = stats.ttest_1samp(CHANGES, 0)
    low, high = test.confidence_interval(0.95)
    assert np.isclose(less["difference"], np.mean(CHANGES))
    assert np.isclose(less["plus_minus_95"], (high - low) / 2)
    assert row["less_planned"]["L0"]["difference"] == 0
    assert f"| label noise 5 | +0.10 ± {less['plus_minus_95']:.2f} |" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(changed, tmp_path, monkeypatch):
    with pytest.raises(WrongRequest, match="neither run_0 nor run_6"):
        collect(monkeypatch, tmp_path, ROOT / "in_context/run_28")
    with pytest.raises(WrongRequest, match="run_0: nothing differs, and one option may"):
        collect(monkeypatch, tmp_path, ROOT)
    file = changed / "run_6/final_info.json"
    info = json.loads(file.read_text())
    del info["depth"]
    file.write_text(json.dumps(info))
    with pytest.raises(WrongRequest, match="run_6 lacks depth: --evals core robustness depth"):
        collect(monkeypatch, tmp_path, changed)
    change_option(changed, "layer", 2)
    with pytest.raises(WrongRequest, match=r"\['label_noise', 'layer'\] differs, and one option may"):
        collect(monkeypatch, tmp_path, changed)
