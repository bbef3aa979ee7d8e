"""What a command asks for, what its runs are known by, and what is told of them: function by function."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

import experiment
from sae_separation import checkpoint, evals, progress, results, resume, run, run_folder
from sae_separation import config as settings
from sae_separation.config import Command
from sae_separation.errors import WrongRequest
from sae_separation.files import Unusable, seal, write_json


def put(path: Path, content: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


# ---- what is asked


def test_settings_of_one_pass_are_those_that_all_runs_share():
    runs = [experiment.Request(tokens=500_000, arm=arm) for arm in ("vanilla", "fixed")]
    assert vars(settings.one_pass(("a", "b"), runs, ("tokens",))) == {"tokens": 500_000}
    assert vars(settings.one_pass((), [], ("tokens",))) == {}
    with pytest.raises(WrongRequest, match=r"--arm differs .*\(a vanilla, b fixed\): give it one value"):
        settings.one_pass(("a", "b"), runs, ("tokens", "arm"))


def test_runs_that_are_complete_are_not_trained_again_unless_overwritten(tmp_path):
    a, b = (str(tmp_path / name) for name in "ab")
    put(tmp_path / "a/final_info.json")
    requests = [experiment.Request(seeds=(seed,)) for seed in (1, 2)]
    assert settings.to_train(Command(out_dir=(a, b)), requests) == ([b], requests[1:])
    assert settings.to_train(Command(out_dir=(a, b), overwrite=True), requests) == ([a, b], requests)


def test_a_parser_reads_amounts_and_raises_what_a_command_can_tell():
    parser = settings.Parser(prog="x")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--arm", choices=("fixed", "vanilla"))
    assert parser.parse_args(["--tokens", "3M"]).tokens == 3_000_000
    for argv, why in (
        (["--tokens", "1.5"], "argument --tokens: 1.5 is not a whole number .*(--help lists the options)"),
        (["run_1"], "unrecognized arguments: run_1; several values follow their option without ="),
        (["--tok", "3"], "unrecognized arguments: --tok"),
    ):
        with pytest.raises(WrongRequest, match=why):
            parser.parse_args(argv)


def test_evaluations_are_asked_for_by_name_in_the_order_of_the_registry(monkeypatch):
    assert evals.names() == tuple(row.name for row in evals.ROWS)
    extra = evals.Row("extra", "extra", "", by_default=False)
    monkeypatch.setattr(evals, "ROWS", [extra, *evals.ROWS])
    assert (
        evals.rows_of(()) == [row for row in evals.ROWS if row.by_default] and evals.rows_of(("none",)) == []
    )
    assert evals.rows_of(("extra",)) == [extra] not in evals.rows_of(())
    last, first = evals.names()[-1], evals.names()[0]
    assert [row.name for row in evals.rows_of((last, first))] == [first, last]


def two_metrics(evaluator, sae, seed, name):
    return {"a": evaluator + sae, "b": seed}, {"name": name}


def noted_metrics(evaluator, sae, seed, name):
    return {}, {}, ["odd"]


def test_a_row_measures_by_its_function_and_notes_may_be_left_out():
    row = evals.Row("x", "x", f"{__name__}:two_metrics")
    assert row.measure(1, 2, 3, "run_1_seed3") == ({"a": 3, "b": 3}, {"name": "run_1_seed3"}, [])
    assert evals.Row("x", "x", f"{__name__}:noted_metrics").measure(1, 2, 3, "") == ({}, {}, ["odd"])


# ---- what a run is known by


def test_a_runs_identity_is_what_trained_it():
    config = {"arm": "fixed", "seeds": (0, 1), "evals": ["core"], "questions": ["q"], "scoring": "cloze"}
    testbed = {"name": "micro", "scoring": "cloze", "sources": {"lm": "l", "questions": "q"}}
    trained = results.what_trained(config, testbed)
    assert trained == [{"arm": "fixed", "seeds": [0, 1]}, {"name": "micro", "sources": {"lm": "l"}}]
    asked_otherwise = results.what_trained(config | {"scoring": "letter"}, testbed | {"clamp_scale": "x"})
    assert asked_otherwise == trained
    assert results.what_trained(config | {"arm": "vanilla"}, testbed) != trained
    younger = dict(results.YOUNGER)
    assert results.what_trained(config | younger, testbed) == results.what_trained(
        {k: v for k, v in config.items() if k not in younger}, testbed
    )
    for name in younger:  # at its default
        assert vars(tiny.config())[name] == younger[name]
        assert results.what_trained(config | {name: 0.77}, testbed) != trained
    some = [results.what_trained(vars(tiny.config(forget_entities=n)), testbed) for n in (None, 15, 16)]
    assert some[0] != some[1] != some[2]


def test_settings_that_a_run_was_made_with_are_told_from_those_wanted():
    request = experiment.Request(arm="fixed", alpha=0.5, seeds=(0,), testbed="auto")
    made = {"requested": {"arm": "fixed", "alpha": 0.1, "seeds": [0, 1]}, "config": {"testbed": "micro"}}
    assert set(resume.differing(request, made, ())) == {"alpha", "seeds"}, "auto is whatever it was"
    assert resume.differing(request, made, ("seeds", "questions")) == ["alpha"]
    made["config"]["alpha"] = 0.5  # what was asked for by its default
    assert resume.differing(request, made, ("seeds",)) == []


def test_a_run_that_goes_on_on_another_processor_is_warned_of(tmp_path, monkeypatch):
    def goes_on(capability: str) -> list[str]:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        known = object.__new__(run.Run)
        known.folder, known.warnings = tmp_path, []
        known._warn_of_other_machine(settings_of_run | run_folder.provenance(), step=40)
        return known.warnings

    settings_of_run: dict[str, Any] = {"requested": {}, "config": {}}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    write_json(tmp_path / "config.json", seal(settings_of_run | run_folder.provenance()))
    assert goes_on("AVX2") == []
    (warning,) = goes_on("AVX512")
    assert warning.startswith("begun with other hardware than it went on with at step 40: not the same bits")


def test_a_position_is_kept_as_json():
    at = checkpoint.Position(step=3, together=("run_1",), passes={"forget": 2})
    again = checkpoint.Position(**json.loads(json.dumps(vars(at))))
    assert (again.step, again.block, again.over, list(again.together)) == (3, 0, False, ["run_1"])
    assert checkpoint.Position().passes == {} and checkpoint.Position().passes is not at.passes


def test_tensors_of_a_part_lose_its_name():
    assert checkpoint.under("sae.", {"sae.W": 1, "adam.sae.W": 2, "sae": 3}) == {"W": 1}


def test_what_is_not_finite_is_named_by_place():
    values = torch.zeros(3, 4)
    assert checkpoint.describe_nonfinite("W", values) is None
    values[1, 2], values[2, 0], values[0, 3] = math.inf, math.nan, -7.5
    told = checkpoint.describe_nonfinite("W", values)
    assert told is not None
    assert told.startswith("W not finite in 2 of 12 entries ([1, 2] = inf, [2, 0] = nan; largest finite ")
    assert "7.5" in told and "[0, 3]" in told
    assert checkpoint.describe_nonfinite("alpha", torch.tensor(math.inf)) == "alpha = inf"


# ---- what is measured


def test_a_record_begins_empty_and_older_ones_hold_notes_of_unlearning(tmp_path):
    assert results.new_record({"cfg.json": "0"}) == {
        "files": {"cfg.json": "0"},
        "sections": {},
        "notes": {},
        "made_by": {},
    }
    path = tmp_path / "seed0_metrics.json"
    assert results.read_record(path) is None
    record = results.new_record({}) | {"notes": {"core": ["odd"]}}
    write_json(path, seal(record))
    assert results.read_record(path) == record
    write_json(path, seal({"files": {}, "sections": {}, "notes": ["few questions"]}))
    assert results.read_record(path) == results.new_record({}) | {"notes": {"unlearning": ["few questions"]}}
    put(path, "{}")
    with pytest.raises(Unusable, match="its checksum is wrong"):
        results.read_record(path)


def test_what_made_a_section_is_the_commit_the_settings_and_the_precision(monkeypatch):
    monkeypatch.setattr("sae_separation.run_folder.commit_of_code", lambda: "0123abc")
    asked = {"settings": {"multipliers": [1]}, "asked": {"scoring": "letter"}, "runs_in": "float32"}
    made_by = {"settings": {"multipliers": [1], "scoring": "letter"}, "lm_runs_in": "float32"}
    assert results.maker(SimpleNamespace(**asked)) == made_by | {"git": "0123abc"}


def record(value, seconds=1.0, date="2026-01-01", note=()):
    return {
        "sections": {"core": {"l0": value}},
        "notes": {"core": list(note)},
        "made_by": {"core": {"git": "0123abc", "date": date, "seconds": seconds}},
    }


def test_a_section_is_summed_up_over_seeds():
    assert results.by_metric([{"a": 1, "b": 2}, {"a": 3, "b": None}]) == {"a": [1, 3], "b": [2, None]}
    summary = results.summary_of("core", {0: record(1.0), 3: record(3.0, 2.5, "2026-01-02")})
    assert summary["means"] == {"l0": 2.0} and summary["stderrs"] == {"l0": pytest.approx(1.0)}
    assert summary["final_info_dict"] == {"l0": [1.0, 3.0]}
    assert summary["made_by"] == {"git": "0123abc", "date": "2026-01-02", "seconds": 3.5}


def test_warnings_are_of_numbers_that_are_not_what_they_seem_and_notes_of_the_rows():
    config = SimpleNamespace(activation="relu", target_l0=16.0, k=16)
    fine = {"final_l0": 16.0, "final_fvu": 0.1, "frac_dead": 0.0}
    rows = [evals.Row("core", "core", "")]
    records = {0: record(16.5, note=["few questions"]), 1: record(30.0)}
    training = {0: fine, 1: fine | {"final_fvu": 1.25, "frac_dead": 0.75}}
    assert results.warnings_of(rows, records, training, config, 128) == [
        "seed 0: few questions",
        "seed 1: L0 is 30.0, more than 2 from the target 16",
        "seed 1: fraction of variance unexplained is 1.250: no better than predicting the mean",
        "seed 1: more than half of the features are dead",
    ]
    records[1]["sections"]["core"]["l0"] = None
    records[0]["sections"]["core"]["l0"] = 16.0
    (told,) = results.warnings_of(rows, {0: records[0]}, training, config, 128)
    assert told == "seed 0: few questions"
    assert results.warnings_of([], {0: records[0]}, training, config, 128) == [], "notes of no row"


def test_a_summary_is_a_line_a_metric_then_the_warnings(tmp_path, capsys):
    core = {
        "means": {"l0": 20.0, "mse": 1.0, "cossim": None},
        "stderrs": {"l0": 0.5, "mse": None, "cossim": None},
    }
    rows = [evals.Row("core", "core", "", shown=("l0", "mse", "cossim", "absent"))]
    results.print_summary("run_1", tmp_path, {"core": core}, ["odd"], rows, {"l0": 37.5})
    assert capsys.readouterr().out.splitlines() == [
        "run_1 core.l0: 20 +- 0.5",
        "run_1 core.mse: 1 +- n/a",
        "run_1 core.cossim: n/a +- n/a",
        "run_1 core.l0: 20 here, 37.5 in dictionary_learning's end-to-end test of a standard SAE",
        "run_1 warning: odd",
        f"run_1 complete: {tmp_path / 'final_info.json'}",
    ]
    results.print_summary("run_1", tmp_path, {}, [], rows, {})
    assert capsys.readouterr().out == "", "a run that failed"


def test_a_summary_is_a_table_for_people_too():
    core = {"means": {"l0": 20.123, "mse": 1.0, "cossim": None}, "stderrs": {"l0": 0.5, "mse": None}}
    core["stderrs"]["cossim"] = None
    rows = [
        evals.Row("core", "core", "", shown=("l0", "mse", "cossim", "absent")),
        evals.Row("depth", "depth", "", shown=("depth_score",)),
    ]
    runs = [
        results.Outcome("run_1", {"core": core}, []),
        results.Outcome(
            "run_12", {"depth": {"means": {"depth_score": 0.5}, "stderrs": {"depth_score": 0}}}, []
        ),
    ]
    assert results.table(runs, rows, 110).splitlines() == [
        "               run_1        run_12",
        "core",
        "  l0           20.12 ± 0.5",
        "  mse          1",
        "  cossim       n/a",
        "depth",
        "  depth_score               0.5 ± 0",
    ]
    narrow = results.table(runs, rows, 30)
    assert [block.splitlines()[0].split() for block in narrow.split("\n\n")] == [["run_1"], ["run_12"]]
    assert results.table([], rows, 110) == ""


def test_bars_count_what_is_finished():
    with progress.bar("evaluating", 100) as bar:
        progress.done_before(bar, 60)
        bar.update(20)
        assert (bar.n, bar.initial) == (80, 60) and bar.format_dict["rate"] is None, "the mean, of these 20"
    outside = progress.SetUp()
    outside.begin("loading the LM")  # nothing is said
    with outside:
        shown = outside.bar
        assert shown.n == 0
        outside.begin("loading the LM")
        assert shown.n == 12, "what comes before it, whether it was needed or not"
        assert shown.postfix == "loading the LM"
        outside.begin("reading the questions")
        assert shown.n == 12, "it never goes back"
        outside.close()
        assert shown.n == shown.total == 45 and outside.bar is None
    assert progress.bar("nothing to do", 0).disable


def test_a_complete_run_is_evaluated_on_what_it_was_trained_on(tmp_path):
    testbed = SimpleNamespace(
        name="micro", hook_name="h", d_in=4, scoring="letter", clamp_scale="feature", describe={"lm": "l"}
    )
    config = {"context_size": 128, "seeds": [0, 3]}
    made = {"requested": {}, "config": config, "testbed": results.described(testbed)}
    write_json(tmp_path / "config.json", seal(made))
    put(tmp_path / "final_info.json", '{"training": {}}')
    put(tmp_path / "warnings.json", '["odd"]')
    finished = results.Finished(tmp_path, SimpleNamespace(context_size=128), testbed)
    assert (finished.seeds, finished.warnings, finished.info) == ([0, 3], ["odd"], {"training": {}})
    with pytest.raises(WrongRequest, match=re.escape("another LM or text (context_size differ)")):
        results.Finished(tmp_path, SimpleNamespace(context_size=64), testbed)
    testbed.describe = {"lm": "another"}
    with pytest.raises(WrongRequest, match=re.escape("another LM or text (lm differ)")):
        results.Finished(tmp_path, SimpleNamespace(context_size=128), testbed)
    testbed.describe = {"lm": "l"}
    (tmp_path / "warnings.json").unlink()
    with pytest.raises(WrongRequest, match="warnings.json cannot be read"):
        results.Finished(tmp_path, SimpleNamespace(context_size=128), testbed)


@pytest.mark.parametrize("n_blocks, left", [(1, 3.9), (2, 4.4)])
def test_training_that_surely_needs_more_memory_is_refused_with_the_numbers(n_blocks, left, monkeypatch):
    testbed: Any = SimpleNamespace(d_in=500, device=torch.device("cpu"))
    config: Any = SimpleNamespace(d_sae=100_000, seeds=(0, 1), batch_size=1000, buffer_tokens=250_000)
    # weights 0.4 GB an SAE: with Adam's moments 2.4 for two; gradients and features 0.4 + 0.6; a block 0.5
    for more, fits in ((-0.1, False), (0.1, True)):
        monkeypatch.setattr("sae_separation.process.memory_left", lambda device: (left + more) * 1e9)
        if fits:
            run.refuse_more_than_memory([config], testbed, n_blocks)
        else:
            why = f"at least {left} GB of memory and {left - 0.1:.1f} GB are left: lower"
            with pytest.raises(WrongRequest, match=why):
                run.refuse_more_than_memory([config], testbed, n_blocks)
