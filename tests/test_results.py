"""The committed runs, and that what the documents say of them is what their files hold."""

import importlib
import json
import re
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, run_script
from scipy import stats
from test_run import strict

from experiment import PLAN
from sae_separation import results, run_folder
from sae_separation.methods import FITTED, SEEDED

COMMITTED = [name for name in PLAN if (ROOT / name).exists()]
INFOS = {name: strict(ROOT / name / "final_info.json") for name in COMMITTED}
SAES = {name: info for name, info in INFOS.items() if "core" in info}
CONFIGS = {name: strict(ROOT / name / "config.json") for name in COMMITTED}


FOLDERS = [
    *(ROOT / name for name in COMMITTED),
    *(ROOT / "smollm2" / name for name in ("run_0", "run_6", "run_9")),
    *(path.parent for path in sorted(ROOT.glob("unseen/*/config.json"))),
    *(path.parent for path in sorted(ROOT.glob("in_context/**/config.json"))),
    *(path.parent for path in sorted(ROOT.glob("taught/*/config.json"))),
]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_a_committed_folder_is_sound(folder):
    """Strict JSON, as it was written, its own settings, means that are those of its seeds. Which sections and
    metrics it holds is its own affair: what the code has gained since is none of it."""
    for path in folder.rglob("*.json"):
        strict(path)
    told = run_folder.changed_files(folder)
    assert [line for line in told if "checksums.json is missing" not in line] == []  # older ones have none
    seeds = strict(folder / "config.json")["config"]["seeds"]
    info = strict(folder / "final_info.json")
    assert info["training"]["means"] and all(type(w) is str for w in strict(folder / "warnings.json"))
    for section, parts in info.items():
        for metric, values in parts["final_info_dict"].items():
            mean, stderr = parts["means"][metric], parts["stderrs"][metric]
            assert len(values) == len(seeds), (section, metric)
            if None in values:
                assert mean is stderr is None, (section, metric)
            else:
                wanted = results.summarise({metric: values})
                assert mean == pytest.approx(wanted["means"][metric]), (section, metric)
                assert stderr == pytest.approx(wanted["stderrs"][metric], abs=1e-12), (section, metric)


def test_the_committed_runs_are_the_plan_and_from_one_clean_commit():
    """Of three seeds; of one where a method draws no number. The plan's last runs may be yet to be made. All
    SAEs are from one commit, and all methods that need none, as a change of training leaves those as they
    are."""
    assert COMMITTED == list(PLAN)[: len(COMMITTED)] and len(COMMITTED) >= 22
    for name, config in CONFIGS.items():
        fixed = PLAN[name]["arm"] in set(FITTED) - set(SEEDED)
        assert config["config"]["seeds"] == ([0] if fixed else [0, 1, 2])
        assert {k: config["config"][k] for k in PLAN[name]} == PLAN[name]
    for some in (SAES, INFOS.keys() - SAES.keys()):
        (commit,) = {CONFIGS[name]["git"] for name in some}
        parts = [part for name in some for part in INFOS[name].values()]
        (evaluated,) = {part["made_by"]["git"] for part in parts if "made_by" in part}
        for git in (commit, evaluated):
            assert re.fullmatch("[0-9a-f]{7,}", git), "of a clean tree"


def test_they_are_small():
    assert (
        sum(
            p.stat().st_size
            for name in (*COMMITTED, "unseen", "in_context")
            for p in (ROOT / name).rglob("*")
            if p.is_file() and "sae_seed" not in str(p)
        )
        < 17_000_000
    )


def test_l0_is_within_2_of_its_target_or_the_run_says_why_not():
    for name, info in SAES.items():
        warned = json.loads((ROOT / name / "warnings.json").read_text())
        for seed, l0 in zip(CONFIGS[name]["config"]["seeds"], info["core"]["final_info_dict"]["l0"]):
            assert abs(l0 - 16) <= 2 or any(w.startswith(f"seed {seed}: L0 is") for w in warned), (
                name,
                seed,
                l0,
            )


def test_no_two_runs_share_their_numbers():
    """But for run_11, whose SAEs are run_0's: labels choose their features."""
    for section, metric in (
        ("core", "explained_variance"),
        ("geometry", "omega"),
        ("training", "final_loss"),
        ("corpus_unlearning", "forget_ce_gain_at_retain_ce_cost_0.1"),
    ):
        own = [info for name, info in SAES.items() if name != "run_11"]
        values = [v for info in own for v in info[section]["final_info_dict"][metric]]
        assert len(set(values)) == len(values), metric


def test_every_number_in_the_notes_is_in_the_run_folders():
    """Notes quote `section.metric = mean ± standard error` under a run's heading."""
    parts = {part.split(":")[0]: part for part in (ROOT / "notes.txt").read_text().split("\n## ")[1:]}
    for name, info in INFOS.items():
        quoted = re.findall(r"(\w+)\.([\w.]+) = (-?[\d.]+)(?: ± ([\d.]+))?", parts[name])
        assert len(quoted) >= (35 if name in SAES else 20), name
        for section, metric, mean, stderr in quoted:
            for text, kind in ((mean, "means"), (stderr, "stderrs")):
                there = info[section][kind][metric]
                if text == "":
                    assert there is None, f"{name} {section}.{metric}: its error is not quoted"
                else:
                    assert float(text) == pytest.approx(
                        there, abs=0.51 * 10 ** -len(text.partition(".")[2])
                    ), f"{name} {section}.{metric}"


def test_the_documents_quote_the_run_folders_as_they_are():
    checked = run_script("docs/make.py", "--check")
    assert (checked.returncode, checked.stderr) == (0, "")


def test_differences_of_runs_have_the_interval_of_a_paired_t_test(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    make = importlib.import_module("make")
    runs = make.runs_in([ROOT / "run_15", ROOT / "run_6"])
    row = make.differences(runs, [("run_6", "run_15"), ("run_6", "not_there")]).splitlines()[-1]
    values = [INFOS[name]["robustness"]["final_info_dict"]["mean_score"] for name in ("run_6", "run_15")]
    found: Any = stats.ttest_rel(*values)
    low, high = found.confidence_interval(0.95)
    cells = [cell.strip() for cell in row.strip("| ").split(" | ")]
    assert cells[:2] == ["adaptive", "MLP probe gate"] and cells[-1] == f"{found.pvalue:.2g}"
    assert cells[2] == f"{np.subtract(*values).mean():+.2f} ± {(high - low) / 2:.2f}"


def test_over_all_its_forms_a_run_scores_as_on_the_ruler_and_over_some_by_these_alone(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    make = importlib.import_module("make")
    (run,) = make.runs_in([ROOT / "taught/run_15"], by_section=True)
    by_seed, of_run = run.evals["robustness"], run.info["robustness"]["final_info_dict"]
    found = make.over_forms(by_seed, [row["form"] for row in by_seed[0]["forms"]])
    for head, metric in {"worst case": "worst_case_score", "left at most": "knowledge_left_max"}.items():
        assert found[head] == pytest.approx(of_run[metric])
    assert found["kept at least"] == pytest.approx(of_run["kept_at_worst"])
    forms = [
        {"form": "a", "left": 0.2, "kept": 1.0, "kept_enough": True},
        {"form": "b", "left": 0.4, "kept": 0.995, "kept_enough": True},
        {"form": "c", "left": 0.1, "kept": 0.9, "kept_enough": False},
    ]
    assert list(make.over_forms([{"forms": forms}], ["a", "b"]).values()) == [[0.6], [0.4], [0.995], [0]]
    assert list(make.over_forms([{"forms": forms}], ["a", "c"]).values()) == [[0.0], [0.2], [0.9], [1]]


def test_answers_count_where_they_did_not_choose_the_cell(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    make = importlib.import_module("make")
    rows = [  # right without and with; with neither; without alone; with alone; not asked so; the other half
        *[
            ["biology", "?", "x", "reporting", answer]
            for answer in (True, ["a", "b"], [True, "b"], ["a", True])
        ],
        ["biology", "?", "x", "reporting", None],
        ["biology", "?", "x", "choosing", True],
        ["history", "?", "x", "reporting", [True, "b"]],
    ]
    details = {"columns": ["subject", "question", "right", "half", "cloze"], "rows": rows}
    rates = [
        make.right_in(details, "cloze", *which) for which in ((True, False), (True, True), (False, True))
    ]
    assert rates == [0.5, 0.5, 0.0] and make.right_in(details, "cloze", False, False) == 1.0


def test_sections_of_saes_and_of_other_methods_may_be_of_a_commit_each(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    make = importlib.import_module("make")

    def run(**commits: str) -> Any:
        return SimpleNamespace(info={name: {"made_by": {"git": git}} for name, git in commits.items()})

    runs = [run(core="a", depth="a", robustness="c"), run(depth="b", robustness="c")]
    found = {"core": {"a"}, "depth (SAEs)": {"a"}, "depth (without an SAE)": {"b"}, "robustness": {"c"}}
    assert make.sections_at(runs) == found
    assert make.sections_at([*runs, run(core="a", depth="b")])["depth (SAEs)"] == {"a", "b"}, "no mixture"


def test_a_number_changed_by_hand_is_named_and_mended(tmp_path, monkeypatch, capsys):
    read = ("README.md", "docs/results.md", "docs/reliability.md", "notes.txt")
    studies = [str(path.relative_to(ROOT)) for path in ROOT.glob("studies/*.json")]
    for name in (*read, "tests/faults.json", "benchmarks/known_truth.json", *studies):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    for name in (*COMMITTED, "smollm2", "unseen", "in_context", "taught"):
        (tmp_path / name).symlink_to(ROOT / name)
    readme, notes = tmp_path / "README.md", tmp_path / "notes.txt"
    whole = readme.read_text(), notes.read_text()
    readme.write_text(whole[0].replace("| adaptive | 3 | 0.", "| adaptive | 3 | 1."))
    notes.write_text(whole[1].replace("core.l0 = 1", "core.l0 = 2", 1))
    monkeypatch.syspath_prepend(ROOT / "docs")
    make = importlib.import_module("make")
    monkeypatch.setattr(make, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make.py", "--check"])
    assert make.main() == 1 and readme.read_text() != whole[0]
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in err.splitlines()] == ["README.md", "notes.txt"] and not out
    monkeypatch.setattr(sys, "argv", ["make.py"])
    assert make.main() == 0 and (readme.read_text(), notes.read_text()) == whole
    readme.write_text(whole[0].replace("<!-- /results -->", ""))
    with pytest.raises(SystemExit, match="README.md: the markers <!-- results -->.*put them back"):
        make.main()


def test_the_sentences_on_the_real_lm_quote_its_runs():
    text = (ROOT / "docs/results.md").read_text().partition("<!-- /smollm2 -->")[2]
    for name in ("run_0", "run_6", "run_9"):
        part = strict(ROOT / "smollm2" / name / "final_info.json")["corpus_unlearning"]
        for form in ("", "_guardrail"):
            metric = f"forget_ce_gain_at_retain_ce_cost_0.05{form}"
            quoted = f"{part['means'][metric]:.2f} ± {part['stderrs'][metric]:.2f}"
            assert quoted in " ".join(text.split()), (name, form)
