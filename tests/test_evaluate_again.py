"""Training and evaluation are two things: a complete run gains sections, or they are renewed."""

# ruff: noqa: F401, F811  (`here` is a fixture)

import json
import os
import re
import shutil
from dataclasses import replace
from typing import Any

import pytest
from test_resume import TINY, at_step, here, interrupt

import experiment
from sae_separation import evals, results, run_folder
from sae_separation.errors import WrongRequest
from sae_separation.plots import folders, tables

TRAINED: list[dict[str, bytes]] = []


@pytest.fixture
def trained(here, tmp_path, monkeypatch):
    """run_1, complete and not evaluated; it is trained once."""
    monkeypatch.setattr(run_folder, "commit_of_code", lambda: "0123abc")
    monkeypatch.setattr(experiment, "evaluation_contexts", lambda *_: None)
    if not TRAINED:
        assert here("run_1") == 0
        TRAINED.append(whole(tmp_path / "run_1"))
    put(tmp_path / "run_1", TRAINED[0])
    return tmp_path / "run_1"


def put(folder, contents: dict[str, bytes]):
    """A folder of these files and no others."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def measured(monkeypatch) -> list:
    """Core and geometry as one number each, which changes from call to call; what was called."""
    calls = []

    def stand_in(name, *notes):
        def measure(evaluator, sae, seed, at):
            calls.append(name)
            return {"number": float(len(calls)), "norm": sae.W_dec.norm().item()}, {"of": name}, *notes

        return measure

    for name in ("core", "geometry"):
        monkeypatch.setattr(f"sae_separation.evals.{name}.{name}", stand_in(name))
    return calls


def final(folder) -> dict:
    return json.loads((folder / "final_info.json").read_text())


def whole(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_complete_run_gains_a_section_and_the_rest_stays(here, trained, measured, monkeypatch):
    folder = trained
    assert set(final(folder)) == {"training"}
    monkeypatch.setattr(experiment, "ActivationStream", lambda *_: pytest.fail("the text was streamed"))
    assert here("run_1", evals=["geometry"]) == 0
    first = final(folder)
    assert first["geometry"]["final_info_dict"]["number"] == [1.0, 2.0]
    assert {k: v["means"] for k, v in first.items()}["geometry"]["number"] == 1.5
    made_by = first["geometry"]["made_by"]
    assert made_by["git"] == "0123abc" and made_by["seconds"] > 0
    assert re.match(r"\d{4}-\d\d-\d\d ", made_by["date"])
    assert made_by["settings"]["multipliers"] == [1, 3, 10, 30]
    record = json.loads((folder / "eval/seed1_metrics.json").read_text())
    assert record["made_by"]["geometry"]["git"] == made_by["git"]
    assert json.loads((folder / "eval/seed1_geometry.json").read_text()) == {"of": "geometry"}
    before = whole(folder)
    assert here("run_1", evals=["core"]) == 0
    assert measured == ["geometry"] * 2 + ["core"] * 2
    after = whole(folder)
    told = before["final_info.json"].decode()
    assert told[: told.rindex("\n}")] in after["final_info.json"].decode(), "byte for byte"
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {
        "final_info.json",
        "checksums.json",
        *(f"eval/seed{seed}_{name}.json" for seed in (0, 1) for name in ("core", "metrics")),
    }
    assert run_folder.changed_files(folder) == [] and not (folder / "evaluating").exists()


def test_a_section_that_is_asked_for_again_is_renewed_with_its_own_warnings(here, trained, monkeypatch):
    folder = trained

    def noted(*texts):
        def measure(row, evaluator, sae, seed, name):
            return {"number": None if texts else 1.0}, {}, [f"{row.name}: {text}" for text in texts]

        monkeypatch.setattr(results.Row, "measure", measure)

    noted("old")
    assert here("run_1", evals=["core", "geometry"]) == 0
    before = json.loads((folder / "warnings.json").read_text())
    assert "seed 0: core: old" in before and "seed 0: geometry: old" in before
    assert "geometry: number undefined for seeds [0, 1]: each mean is null" in before
    noted()
    assert here("run_1", evals=["geometry"]) == 0
    after = json.loads((folder / "warnings.json").read_text())
    assert after == [text for text in before if "geometry" not in text]
    assert final(folder)["geometry"]["means"]["number"] == 1.0 and run_folder.changed_files(folder) == []


@pytest.mark.slow
def test_a_kill_at_any_instant_leaves_the_run_complete_and_the_same_command_goes_on(
    here, trained, measured, tmp_path, monkeypatch
):
    assert here("run_1", evals=["core", "geometry"]) == 0
    before, replaced = whole(tmp_path / "run_1"), os.replace
    for at in (2, 4, 5, 7, 11, 99):  # while measuring, between the files of the result, and never
        put(tmp_path / "run_1", before)
        measured.clear()
        calls = []

        def dies(source, target):
            calls.append(target)
            if len(calls) == at:
                raise KeyboardInterrupt
            replaced(source, target)

        with monkeypatch.context() as m:
            m.setattr(os, "replace", dies)
            try:
                code = here("run_1", evals=["geometry"])
            except KeyboardInterrupt:
                code = None
        assert (code == 0) == (at == 99)
        if code == 0:
            break
        assert run_folder.changed_files(tmp_path / "run_1") == []
        info = final(tmp_path / "run_1")
        assert info["core"] == json.loads(before["final_info.json"])["core"]
        assert here("run_1", evals=["geometry"]) == 0
        assert len(measured) <= 3, "what was measured is not measured again"
        assert run_folder.changed_files(tmp_path / "run_1") == []
        assert not (tmp_path / "run_1/evaluating").exists()
    assert len(calls) == 12, "the last kill was between the last two files"


def test_files_of_a_complete_run_are_at_every_instant_as_its_checksums_say(tmp_path, monkeypatch):
    put(
        tmp_path, {name: b"[]\n" for name in ("warnings.json", "train_log.jsonl", "eval/seed0_geometry.json")}
    )
    run_folder.write_result(tmp_path, {"training": {}})
    before, replaced = whole(tmp_path), os.replace
    contents = {
        name: b"[1]\n" for name in ("eval/seed0_geometry.json", "eval/seed0_core.json", "warnings.json")
    }
    contents["final_info.json"] = b'{"training": {}, "core": {}}\n'
    for at in range(1, 7):
        put(tmp_path, before)
        calls = []

        def dies(source, target):
            calls.append(target)
            if len(calls) == at:
                raise KeyboardInterrupt
            replaced(source, target)

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(os, "replace", dies)
            run_folder.renew(tmp_path, contents)
        assert run_folder.changed_files(tmp_path) == [] and run_folder.is_as_recorded(
            tmp_path / "final_info.json"
        )
        run_folder.renew(tmp_path, contents)
        assert run_folder.changed_files(tmp_path) == []
        assert {name: (tmp_path / name).read_bytes() for name in contents} == contents
    (tmp_path / "warnings.json").write_bytes(b"[]\n")
    assert "warnings.json is not as it was written" in run_folder.changed_files(tmp_path)[0], "nor as before"


def test_a_new_file_that_is_damaged_before_a_killed_renewal_goes_on_is_written_anew(tmp_path, monkeypatch):
    put(
        tmp_path, {name: b"[]\n" for name in ("warnings.json", "train_log.jsonl", "eval/seed0_geometry.json")}
    )
    run_folder.write_result(tmp_path, {"training": {}})
    new = tmp_path / "eval/seed0_core.json"

    def dies(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(run_folder, "write_whole", dies)  # checksums.json names the new file then
        run_folder.renew(tmp_path, {"eval/seed0_core.json": b"[1]\n"})
    new.write_bytes(b"[2]\n")
    assert "seed0_core.json is not as it was written" in run_folder.changed_files(tmp_path)[0]
    run_folder.renew(tmp_path, {"eval/seed0_core.json": b"[1]\n"})
    assert run_folder.changed_files(tmp_path) == [] and new.read_bytes() == b"[1]\n"


def test_without_weights_a_complete_run_cannot_be_evaluated(here, trained, measured, tmp_path, capsys):
    shutil.rmtree(tmp_path / "run_1/sae_seed1")
    with pytest.raises(WrongRequest, match="its SAEs are not there: .*sae_seed1/cfg.json is missing"):
        here("run_1", evals=["geometry"])
    assert here("run_1") == 0, "it is complete all the same"


def test_a_complete_run_names_the_evaluations_it_lacks(here, trained, measured, tmp_path, capsys):
    assert here("run_1", evals=["geometry"]) == 0
    capsys.readouterr()
    assert here("run_1") == 0
    out = capsys.readouterr().out
    assert "run_1 is complete" in out and "lacks" not in out, "none were asked for"
    asked = ["--out_dir", str(tmp_path / "run_1"), "--seeds", "0", "1", *map(str, TINY)]
    assert experiment.unfinished(*experiment.parse_command(asked))[1] == []
    out = capsys.readouterr().out
    assert "run_1 is complete" in out
    assert "lacks evaluations; the same command adds them with --evals core unlearning corpus" in out


@pytest.mark.slow
def test_complete_runs_are_evaluated_beside_runs_that_are_trained(here, trained, measured, tmp_path):
    weights = (tmp_path / "run_1/sae_seed0/sae_weights.safetensors").read_bytes()
    assert here("run_0", "run_1", evals=["geometry"]) == 0
    for name in ("run_0", "run_1"):
        assert set(final(tmp_path / name)) == {"training", "geometry"}
    assert (tmp_path / "run_1/sae_seed0/sae_weights.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_an_interrupted_run_asked_again_with_other_evaluations_goes_on_and_makes_those(
    here, trained, measured, tmp_path, monkeypatch
):
    shutil.rmtree(trained)
    with monkeypatch.context() as m:
        at_step(m, 60, interrupt(), seed=0)
        assert here("run_1", evals=["core"], seeds=(0,)) == 143
    seen = []
    at_step(monkeypatch, 99, lambda trainer, _: seen.append(trainer.steps), seed=0)
    at_step(monkeypatch, 10, lambda *_: pytest.fail("training was done again"), seed=0)
    assert here("run_1", evals=["geometry"], seeds=(0,)) == 0
    assert seen == [99] and set(final(tmp_path / "run_1")) == {"training", "geometry"}


def test_from_python_a_run_is_made_as_the_command_makes_it(here, trained, measured, tmp_path):
    made = json.loads((trained / "config.json").read_text())["requested"]
    given = {name: value for name, value in made.items() if value not in (None, [], "")}
    asked: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    asked["seeds"] = (0,)
    request = experiment.Request(**asked)
    info = experiment.train(request, tmp_path / "mine/it", evals=("geometry",))
    assert info == final(tmp_path / "mine/it") and info["geometry"]["means"]["number"] == 1.0
    weights = "sae_seed0/sae_weights.safetensors"
    assert (tmp_path / "mine/it" / weights).read_bytes() == (trained / weights).read_bytes()
    assert experiment.train(request, tmp_path / "mine/it") == info and measured == ["geometry"]
    with pytest.raises(WrongRequest, match="holds a run with other settings .seeds .0. there, .1. wanted"):
        experiment.train(replace(request, seeds=(1,)), tmp_path / "mine/it")
    with pytest.raises(WrongRequest, match="--skip 0.5 cannot be held"):
        experiment.train(experiment.Request(skip=0.5, testbed="micro"), tmp_path / "other")
    wrongs: list[dict[str, Any]] = [dict(arm="adaptiv"), dict(arm="fixed", testbed="micra")]
    for wrong in wrongs:
        with pytest.raises(WrongRequest, match="invalid choice: .*; did you mean (adaptive|micro)"):
            experiment.train(experiment.Request(**wrong), tmp_path / "other")
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob("**/.lock"))


def test_other_text_than_the_saes_were_trained_on_is_refused(
    here, trained, measured, tmp_path, capsys, monkeypatch
):
    described = results.described
    monkeypatch.setattr(results, "described", lambda testbed: described(testbed) | {"world_seed": 1})
    assert here("run_1", evals=["geometry"]) == 2
    assert "was trained on another LM or text (world_seed differ)" in capsys.readouterr().err


def test_folders_of_older_versions_stay_valid(here, trained, measured, tmp_path, capsys):
    """They recorded the evaluations among the settings, listed notes, and had no made_by."""
    assert here("run_1", evals=["core"]) == 0
    folder = tmp_path / "run_1"
    config = json.loads((folder / "config.json").read_text())
    del config["sha256"]
    for part in ("requested", "config"):
        config[part]["evals"] = ["core"]
    results.write_json(folder / "config.json", results.seal(config))
    for seed in (0, 1):
        path = run_folder.record_of(folder, seed)
        record = json.loads(path.read_text())
        results.write_json(path, results.seal({k: record[k] for k in ("files", "sections")} | {"notes": []}))
    info = final(folder)
    del info["core"]["made_by"]
    run_folder.write_result(folder, info)
    assert here("run_1") == 0 and here("run_1", evals=["geometry"]) == 0
    assert (
        list(final(folder)) == ["training", "core", "geometry"] and "warning" not in capsys.readouterr().err
    )
    assert final(folder)["core"] == info["core"]


def toy(evaluator, sae, seed, name):
    """What a new evaluation is: one function."""
    return {"width": float(sae.W_dec.shape[0]), "seed": float(seed)}, {"name": name}


def test_an_evaluation_is_a_function_and_a_row(here, trained, monkeypatch, capsys):
    """It is on the command line, in final_info.json, the summary and the table; no other place names it."""
    row = evals.Row("toy", "toys", f"{__name__}:toy", shown=("width",), columns={"width": "toy width"})
    monkeypatch.setattr(evals, "ROWS", [*evals.ROWS, row])
    assert here("run_1", evals=["toy"]) == 0
    info = final(trained)
    assert info["toys"]["final_info_dict"] == {"width": [128.0, 128.0], "seed": [0.0, 1.0]}
    assert json.loads((trained / "eval/seed1_toys.json").read_text()) == {"name": "run_1_seed1"}
    assert "run_1 toys.width: 128 +- 0" in capsys.readouterr().out.splitlines()
    table = tables.summary_table(folders.find_runs([trained])[0]).splitlines()
    assert "| toy width |" in table[0] and "| 128.000 ± 0.000 |" in table[2]
    run_folder.start_anew(trained)
    assert not (trained / "eval/seed1_toys.json").exists()
    with pytest.raises(WrongRequest, match="invalid choice: 'other' .*, 'toy', 'none'"):
        here("run_1", evals=["other"])
