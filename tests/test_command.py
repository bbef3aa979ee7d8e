"""What is asked on the command line: what each run gets of it, what is shared, what is said, and what is
refused."""

import json
import re
import shlex
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import tqdm
from conftest import ROOT
from test_bad_input import OWN, here, refused, request  # noqa: F401  (here is a fixture)
from tiny import another_value

import experiment
from experiment import ARMS, PLAN, Command, Request, parse_command
from sae_separation import checkpoint, checks, grid, results
from sae_separation import config as settings
from sae_separation.config import ACTIVATION_NAMES, ONE_PASS, option, whole_number, with_arms
from sae_separation.errors import WrongRequest
from sae_separation.specs import SPECS, DataConfig

# ---- what runs on one LM pass share

A_RUNS_OWN = set(
    "arm seeds d_sae activation k temperature target_l0 l1 alpha alpha_start loss_warmup_steps layer_norm"
    " skip orthogonal_init feature_dropout unlock_steps lr feature_lr_power grad_clip grad_accumulation"
    " warmup_steps decay_fraction compile resample_steps dead_tokens bandwidth".split()
).union(*(row.options for row in ARMS.values()))
ANOTHER = {
    "testbed": "micro",
    "lm": "other/lm",
    "layer": 2,
    "forget_text": ("f.txt",),
    "forget_entities": 15,
    "retain_text": ("r.txt",),
    "questions": ("q.json",),
    "forget_subject": "history",
    "scoring": "cloze",
    "tokens": 204_800,
    "context_size": 64,
    "batch_size": 1024,
    "buffer_tokens": 65_536,
    "time_budget_minutes": 5.0,
}


def test_every_setting_is_either_shared_by_a_pass_or_a_runs_own():
    assert A_RUNS_OWN | set(ONE_PASS) == {f.name for f in fields(Request)}, (
        "a new setting needs a class: ONE_PASS, or here"
    )
    assert not A_RUNS_OWN & set(ONE_PASS) and len(set(ONE_PASS)) == len(ONE_PASS)
    assert set(ANOTHER) == set(ONE_PASS)


@pytest.mark.parametrize("name", ONE_PASS)
def test_runs_that_differ_in_what_a_pass_shares_get_a_pass_each(name):
    plain, other = Request(), Request(arm="fixed", **{name: ANOTHER[name]})
    again = Request(arm="grouped")
    parts = settings.passes(Command(out_dir=("a", "b", "c")), [plain, other, again])
    assert [(part.out_dir, some) for part, some in parts] == [(("a", "c"), [plain, again]), (("b",), [other])]


def test_a_complete_run_is_evaluated_on_a_pass_with_its_lm_and_text(tmp_path):
    folders = tuple(str(tmp_path / name) for name in "abc")
    for name in "ac":
        (tmp_path / name).mkdir()
        (tmp_path / name / "final_info.json").touch()
    requests = [Request(tokens=500_000), Request(), Request(layer=2)]
    parts = settings.passes(Command(out_dir=folders), requests)
    assert [part.out_dir for part, _ in parts] == [folders[:2], folders[2:]]
    anew = settings.passes(Command(out_dir=folders, overwrite=True), requests)
    assert [part.out_dir for part, _ in anew] == [(folder,) for folder in folders]


def test_a_seed_that_fails_on_one_pass_does_not_stop_the_next(monkeypatch, capsys):
    began = []

    def stand_in(command, requests, started, tracking):
        began.append((command.out_dir, started))
        info = {"core": {"means": {"l0": 16.0}, "stderrs": {"l0": None}}}
        failed = [("a seed 0", "W_dec not finite")] if command.out_dir == ("a",) else []
        return [results.Outcome(command.out_dir[0], {} if failed else info, failed)]

    monkeypatch.setattr(experiment, "run_experiments", stand_in)
    command = Command(out_dir=("a", "b"))
    assert experiment.main(command, [Request(), Request(layer=2)], started=-5.0) == 1
    assert [names for names, _ in began] == [("a",), ("b",)]
    assert began[0][1] == -5.0 < 0 < began[1][1], "a pass has a time budget of its own"
    out, err = capsys.readouterr()
    assert "pass 2 of 2: b" in out and out.splitlines()[-4:-1] == ["      b", "core", "  l0  16"]
    where = "(no final_info.json where a seed failed: a seed 0)"
    assert err.splitlines()[-1] == f"error: W_dec not finite {where}"


class Measured:
    """Stands for the evaluator, and the functions below for evaluations: one number a section."""

    settings, asked, runs_in = {}, {}, "float32"
    testbed = SimpleNamespace(lm=SimpleNamespace(device="cpu"))


def measured_features(evaluator, sae, seed, name):
    return {"features": float(sae.W_dec.shape[0])}, {}


def measured_seed(evaluator, sae, seed, name):
    return {"seed": float(seed)}, {}, []


@pytest.mark.slow
def test_what_is_a_runs_own_takes_effect_in_each_run(micro, monkeypatch, tmp_path, capsys):
    loaded, checked, bars = [], [], []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr("sae_separation.testbeds.load", lambda *args: loaded.append(args) or micro)
    monkeypatch.setattr(experiment, "evaluation_contexts", lambda *args: checked.append(args))
    monkeypatch.setattr(experiment, "Evaluator", lambda *_: Measured())
    for name, of in {
        "core": measured_features,
        "unlearning": measured_seed,
        "geometry": measured_features,
    }.items():
        monkeypatch.setattr(f"sae_separation.evals.{name}.{name}", of)
    monkeypatch.setattr(experiment, "tqdm", Bar)
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    small: dict[str, Any] = dict(
        testbed="micro", tokens=25_600, batch_size=256, buffer_tokens=8192, target_l0=8.0
    )
    configs = [
        Request(**small, seeds=(3,), d_sae=96, arm="fixed", alpha=0.3),
        Request(**small, seeds=(0,), d_sae=64, lr=1e-3),
        Request(**small, seeds=(0, 1), d_sae=128, k=8, activation="batchtopk"),
    ]
    command = Command(
        out_dir=tuple(str(tmp_path / name) for name in "abc"), evals=("core", "unlearning", "geometry")
    )
    assert experiment.main(command, configs) == 0, capsys.readouterr().err
    assert [args[3] for args in loaded] == [True], (
        "as one that is asked questions, as one of the runs wants them"
    )
    assert len(checked) == 1
    assert [(bar.desc, bar.n, bar.total) for bar in bars] == [
        ("setting up", 45, 45),
        ("training", 25_600, 25_600),
        ("evaluating", 209, 209),
    ], "4 SAEs of core, unlearning and geometry"
    info = [json.loads((tmp_path / name / "final_info.json").read_text()) for name in "abc"]
    assert [set(i) for i in info] == [{"training", "core", "unlearning", "geometry"}] * 3
    assert info[1]["core"]["final_info_dict"] == {"features": [64.0]}
    assert info[2]["geometry"]["final_info_dict"] == {"features": [128.0, 128.0]}
    assert info[2]["unlearning"]["final_info_dict"] == {"seed": [0.0, 1.0]}
    for i, config, name in zip(info, configs, "abc"):
        said = json.loads((tmp_path / name / "config.json").read_text())["config"]
        asked = {
            k: v
            for k, v in vars(config).items()
            if v not in (None, "", ()) and k not in ("group_size", "chunk_size")
        }  # at most d_sae
        assert {k: said[k] for k in asked} == json.loads(json.dumps(asked))
        assert i["training"]["final_info_dict"]["tokens_trained"] == [said["tokens"]] * len(said["seeds"])
    assert [i["training"]["means"]["alpha"] for i in info] == pytest.approx([0.3, 0, 0])
    assert (
        info[2]["training"]["means"]["l1_coefficient"] == 0 < info[1]["training"]["means"]["l1_coefficient"]
    )


# ---- the plan


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["--out_dir=x/run_8"],
            "x/run_8: run 8 of the plan: --arm adaptive --alpha 1 --activation batchtopk",
        ),
        (
            ["--out_dir=run_10", "--tokens=3M", "--seeds", "4"],
            "run_10: run 10 of the plan: --arm frozen_decoder",
        ),
        (["--out_dir=run_9", "--alpha=0.25"], "run_9: run 9 of the plan: --arm ortsae --alpha 0.25"),
        (
            ["--out_dir=run_1", "--arm=fixed", "--alpha=0.7"],
            "run_1: run 1 of the plan: --arm fixed --alpha 0.1; in its place --alpha 0.7",
        ),
        (
            ["--out_dir=run_0", "--arm=ortsae"],
            "run_0: run 0 of the plan: --arm vanilla; in its place --arm ortsae",
        ),
        (["--out_dir=mine", "--arm=fixed"], ""),
    ],
)
def test_what_the_plan_gives_a_run_is_said_in_one_line(argv, said, capsys):
    parse_command([*argv, "--testbed=micro"])
    assert capsys.readouterr().out == (f"{said}\n" if said else "")


@pytest.mark.parametrize(
    ("argv", "contradicts", "too"),
    [
        (["--out_dir=x/run_8", "--arm=vanilla"], "--arm vanilla", "--alpha --activation"),
        (["--out_dir=run_8", "--activation=relu"], "--activation relu", "--arm --alpha"),
        (["--out_dir=run_1", "--alpha=0.5"], "--alpha 0.5", "--arm"),
        (["--out_dir", "run_2", "run_3", "--alpha=0.1"], "--alpha 0.1", "--arm"),
        (
            ["--out_dir=run_7", "--arm=adaptive", "--alpha=1", "--unlock_steps=0"],
            "--unlock_steps 0",
            "--alpha_start --loss_warmup_steps",
        ),
    ],
)
def test_an_option_that_contradicts_the_plan_half_way_is_refused(argv, contradicts, too):
    with pytest.raises(WrongRequest) as wrong:
        parse_command([*argv, "--testbed=micro"])
    name = "run_3" if "run_3" in argv else argv[0].removeprefix("--out_dir=")
    assert f"--out_dir {name}: run {name[-1]} of the plan: --arm " in str(wrong.value)
    assert f"which {contradicts} contradicts: name another folder and its --arm, or give {too} too" in str(
        wrong.value
    )


def test_a_planned_run_with_all_its_settings_given_is_that_run_and_so_is_one_with_others():
    given = [f"--{k}={v}" for k, v in PLAN["run_7"].items()]
    (plain,), (repeated,) = (
        parse_command(["--out_dir=run_7", "--testbed=micro", *more])[1] for more in ([], given)
    )
    assert plain == repeated and plain.unlock_steps == 30
    (other,) = parse_command(["--out_dir=run_1", "--arm=ortsae", "--alpha=2"])[1]
    assert (other.arm, other.alpha) == ("ortsae", 2.0)


@pytest.mark.parametrize("folders", ["m_vanilla m_adaptive", "run_0 mine", "mine run_6 mine_too"])
def test_two_runs_with_the_same_settings_are_refused(folders):
    arm = "vanilla" if "run_0" in folders else "adaptive"
    with pytest.raises(
        WrongRequest,
        match=f"--out_dir {'run_0 mine' if 'run_0' in folders else '.*'} are two runs with the same settings",
    ):
        parse_command(["--out_dir", *folders.split(), f"--arm={arm}", "--alpha=1"])


# ---- values


def test_a_home_folder_is_expanded_in_every_path(here, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HOME", str(here))
    command, _ = parse_command(["--out_dir=~/deep/run_0", "--testbed=micro"])
    assert command.out_dir == (str(here / "deep/run_0"),)
    assert Command(out_dir=("~/a", "b")).out_dir == (str(here / "a"), "b")
    tiny.save_jsonl(here / "bio.jsonl", tiny.questions("x", 20))
    tiny.save_jsonl(here / "rest.jsonl", tiny.questions("history", 20))
    monkeypatch.chdir(ROOT)
    request(
        [
            "--out_dir=~/run_0",
            "--lm=~/lm",
            "--layer=1",
            "--forget_text=~/good.jsonl#text",
            "--retain_text=~/*.jsonl#text".replace("*", "good"),
            "--questions",
            "biology=~/bio.jsonl",
            "~/rest.jsonl",
            "--forget_subject=biology",
        ]
    )
    assert checks.check_lm(DataConfig(lm="~/lm")) == 3


NUMBERS = {
    "3M": 3_000_000,
    "0.5M": 500_000,
    "4e5": 400_000,
    "4.096e5": 409_600,
    "200k": 200_000,
    "200K": 200_000,
    "3_000_000": 3_000_000,
    "1B": 10**9,
    "204800": 204_800,
}


@pytest.mark.parametrize("said", NUMBERS)
def test_amounts_are_read_as_people_write_them(said):
    assert whole_number(said) == NUMBERS[said]
    (config,) = parse_command(["--out_dir=run_0", "--dead_tokens", said])[1]
    assert config.dead_tokens == NUMBERS[said] and type(config.dead_tokens) is int


def test_every_whole_number_of_the_command_line_is_read_so():
    options = [f.name for f in fields(Request) if f.type in (int, int | None)]
    assert len(options) == 18
    values = {
        "layer": 3,
        "tokens": 10**6,
        "batch_size": 2000,
        "k": 20,
        "context_size": 100,
        "grad_accumulation": 2,
        "unlock_steps": 10,
    }
    argv = [f"--{name}={values.get(name, 12_000) / 1000:g}k" for name in options]
    (config,) = parse_command(["--out_dir=run_0", "--seeds", "0", "1k", *argv])[1]
    assert {name: getattr(config, name) for name in options} == {
        name: values.get(name, 12_000) for name in options
    }
    assert config.seeds == (0, 1000)
    for name in options:
        with pytest.raises(WrongRequest, match=f"--{name}: 1.5 is not a whole number"):
            parse_command(["--out_dir=run_0", f"--{name}=1.5"])


@pytest.mark.parametrize(
    "said", ["1.5", "0.0001k", "many", "k", "", "nan", "inf", "3MM", "3 000", "1,000", "1e-3", "0x10"]
)
def test_what_is_no_whole_number_is_refused_for_that_reason(said):
    with pytest.raises(WrongRequest, match=f"argument --tokens: {re.escape(said)} is not a whole number"):
        parse_command(["--out_dir=run_0", f"--tokens={said}"])


def test_numbers_of_any_length_are_refused_at_once():
    for said in ("1e999999999", "9e99", "1e400k"):
        with pytest.raises(WrongRequest, match="give a smaller number"):
            parse_command(["--out_dir=run_0", f"--tokens={said}"])


def test_evaluations_keep_the_order_given_and_unknown_ones_are_refused():
    command, _ = parse_command(["--out_dir=run_0", "--evals", "geometry", "core"])
    assert command.evals == ("geometry", "core")
    with pytest.raises(
        WrongRequest, match="argument --evals: invalid choice: 'vibes' .choose from 'core', 'unlearning'"
    ) as wrong:
        parse_command(["--out_dir=run_0", "--evals", "core", "vibes"])
    assert "\n" not in str(wrong.value)
    with pytest.raises(WrongRequest, match="--evals .*each once"):
        parse_command(["--out_dir=run_0", "--evals", "core", "core"])


# ---- what was meant


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("--out_dir run_0 --tokns 3M", "unrecognized arguments: --tokns 3M; did you mean --tokens?"),
        ("--out-dir=run_0", "unrecognized arguments: --out-dir=run_0; did you mean --out_dir?"),
        ("--out_dir run_0 --vibes 3", "unrecognized arguments: --vibes 3 ("),
        ("--out_dir m --arm adaptve", "--arm: invalid choice: 'adaptve'; did you mean adaptive? ("),
        ("--out_dir run_0 --testbed=micr", "--testbed: invalid choice: 'micr'; did you mean micro? ("),
        ("--out_dir run_0 --activation batchtop", "'batchtop'; did you mean batchtopk? ("),
        ("--out_dir run_0 --scoring leter", "--scoring: invalid choice: 'leter'; did you mean letter? ("),
        (
            "--out_dir run_0 --evals robustnes",
            "--evals: invalid choice: 'robustnes'; did you mean robustness? (",
        ),
        ("--out_dir m --arm xyz", "'oracle', 'feature_gate') ("),
        (
            "--out_dir m --arm vanilla --alpha o.3",
            "o.3 is not a number (0.3, 3e-3); did you mean --alpha 0.3? (",
        ),
        ("--out_dir run_0 --alpha=0,3", "0,3 is not a number (0.3, 3e-3); did you mean --alpha 0.3? ("),
        ("--out_dir run_0 --lr=0.1,1e-3", "values stand apart, without commas: --lr 0.1 1e-3 ("),
        ("--out_dir run_0 --seeds=0,1", "several values stand apart, without commas: --seeds 0 1 ("),
        ("--out_dir run_0 --d_sae 4k,16k", "several values stand apart, without commas: --d_sae 4k 16k ("),
        ("--out_dir run_0 --tokens 200,000", "3M, 4e5); did you mean --tokens 200000? ("),
        ("--out_dir run_0 --tokens many", "many is not a whole number (200000, 200_000, 200k, 3M, 4e5) ("),
        ("--out_dir run_0 --evals xyz", "'none') ("),
        (
            "--out_dir=a b --arm=fixed",
            "b; several values follow their option without =, as in --out_dir a b (",
        ),
        (
            "--out_dir=m --alpha=0.1 1",
            "1; several values follow their option without =, as in --alpha 0.1 1 (",
        ),
        ("--out_dir run_0 --lm a b", "unrecognized arguments: b; --lm takes one value ("),
    ],
)
def test_what_was_meant_is_said(said, meant):
    with pytest.raises(WrongRequest) as wrong:
        parse_command(said.split())
    assert meant in str(wrong.value) and str(wrong.value).endswith("(--help lists the options)")


# ---- grids


def test_options_with_several_values_are_found_in_a_command_line():
    rest, several = grid.split(
        "--alpha 0.1 1 --seeds 0 1 --layer=2 -k 8 16 x".split(), ["alpha", "k", "layer"]
    )
    assert rest == ["--seeds", "0", "1", "--layer=2"]
    assert several == {"alpha": ["0.1", "1"], "k": ["8", "16", "x"]}
    assert list(grid.combinations(["a"], {"b": ["1"], "c": ["2", "3"]})) == [
        ["a", "--b=1", "--c=2"],
        ["a", "--b=1", "--c=3"],
    ]
    turned = grid.split("--layer 1 2 --alpha 3 4".split(), ["alpha", "layer"])[1]
    assert list(turned) == ["alpha", "layer"], "the order in which they are given names no other folders"
    last = grid.split("--alpha 1 2 --alpha 3".split(), ["alpha"])
    assert last == (["--alpha", "3"], {}), "the last one counts"
    assert grid.split([], ["alpha"]) == ([], {})
    assert grid.folder_name("fixed", {"alpha": 0.01, "tokens": 3_000_000}) == "fixed_alpha0.01_tokens3000000"


def test_a_grid_is_a_run_for_each_combination_and_says_how_many(capsys):
    said = "--out_dir=mine --alpha 0.01 1 --layer 1 2 --arm fixed adaptive --seeds 0 1 --testbed=micro"
    command, requests = parse_command(said.split())
    out, err = capsys.readouterr()
    names = [
        f"{arm}_layer{n}_alpha{a}" for arm in ("fixed", "adaptive") for n in (1, 2) for a in ("0.01", "1")
    ]
    assert command.out_dir == tuple(f"mine/{name}" for name in names)
    passes = "2 passes of the LM, one after the other, in mine"
    assert out == (
        f"grid (2 arm x 2 layer x 2 alpha): 8 runs with 16 seeds in all, on {passes}:"
        f" {', '.join(names[:6])}, ...\n"
    )
    assert not err
    for folder, asked in zip(command.out_dir, requests):
        arm, layer, alpha = Path(folder).name.replace("alpha", "").replace("layer", "").split("_")
        alone = parse_command(
            ["--out_dir", folder, "--seeds", "0", "1", "--testbed=micro"]
            + [f"--arm={arm}", f"--alpha={alpha}", f"--layer={layer}"]
        )
        assert (alone[0].out_dir, alone[1]) == ((folder,), [asked]), "as the run alone"
    parts = settings.passes(command, requests)
    assert [{asked.layer for asked in some} for _, some in parts] == [{1}, {2}]


def test_in_a_grid_what_has_no_effect_makes_no_run_of_its_own(capsys):
    said = "--out_dir mine --arm vanilla fixed rmu --alpha 0.1 1 --d_sae 64 128 --testbed micro --seeds 0"
    command, requests = parse_command(said.split())
    assert [Path(name).name for name in command.out_dir] == [
        "vanilla_d_sae64",
        "vanilla_d_sae128",
        *(f"fixed_alpha{a}_d_sae{n}" for a in ("0.1", "1") for n in (64, 128)),
        "rmu",
    ]
    assert requests[0].alpha == Request().alpha and requests[-1].d_sae is None
    out, err = capsys.readouterr()
    assert ": 7 runs with 7 seeds in all, on one pass of the LM, in mine: vanilla_d_sae64," in out
    assert "without effect: --alpha in mine/vanilla_d_sae64 (arm vanilla)" in err


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (
            "--out_dir a b --arm fixed vanilla",
            "--arm fixed vanilla is a grid of runs, and goes into one folder",
        ),
        (
            "--out_dir x/run_1 --alpha 0.1 1",
            "x/run_1 is one run of the plan, and --alpha 0.1 1 is a grid of runs",
        ),
        ("--out_dir a --alpha 0.1 1", "--arm is missing"),
        ("--out_dir a --arm fixed --alpha 0.1 x", "argument --alpha: x is not a number (0.3, 3e-3) ("),
        (
            "--out_dir a --arm fixed loaded",
            "argument --arm: invalid choice: 'loaded' (choose from 'vanilla', ",
        ),
        ("--out_dir a --arm fixed --lr 1e-3 0", "--lr is 0: give a finite number above 0"),
        ("--out_dir a --arm fixed --time_budget_minutes 5 9", "--time_budget_minutes takes one value"),
        ("--out_dir a --arm fixed --activation relu softk", "--activation takes one value"),
    ],
)
def test_what_makes_no_grid_is_refused(said, why):
    with pytest.raises(WrongRequest, match=re.escape(why)):
        parse_command([*said.split(), "--testbed=micro"])


def test_a_grid_does_not_go_into_a_run(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(WrongRequest, match="holds a run, and --arm fixed vanilla is a grid of runs"):
        parse_command(["--out_dir", str(tmp_path), "--arm", "fixed", "vanilla"])


# ---- a dry run


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in folder.rglob("*")}


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = "--out_dir=mine --arm fixed rmu --layer 1 2 --testbed=micro --evals geometry depth --dry_run"
    assert experiment.unfinished(*parse_command(said.split()))[1] == []
    out = capsys.readouterr().out
    assert not any(tmp_path.iterdir())
    steps = "1464 steps of 2048 activations; geometry, depth"
    assert f"mine/fixed_layer1: arm fixed, 3 SAEs of 1024 features (seeds 0 1 2), {steps}\n" in out
    assert "mine/rmu_layer2: arm rmu, fitted without an SAE (seeds 0 1 2); depth\n" in out
    assert "pass 2 of 2 of the LM:" in out and "  LM: micro_pythia, layer 2, 2.4 MB in " in out
    assert (
        "  testbed: micro\n" in out
        and "  forget text: invented biology\n" in out
        and "questions (for depth): invented questions" in out
    )
    assert "  memory: at least 90.2 MB to train, and" in out, "of which 67.1 are a block of activations"
    assert "  disk: 3.2 MB of SAEs, 18.9 MB of checkpoints" in out
    assert "  time: not known: no finished run of micro" in out
    assert "would write into fixed_layer1: config.json, sae_seed*/, eval/seed*_metrics.json, eval/" in out
    assert out.endswith("dry run: nothing was done\n")


def test_a_dry_run_counts_two_blocks_where_they_are_made_ahead(tmp_path, monkeypatch, capsys):
    """Of 67.1 MB each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SPECS, "micro", replace(SPECS["micro"], gpu=True))
    ends = ", and the LM, the text and the evaluations\n"
    more = " (on a GPU 0.2 GB, as the next activations are made meanwhile)"
    for kept, said in (("", more), (" --activations=cache", "")):
        argv = f"--out_dir=mine --arm=fixed --testbed=micro{kept} --dry_run".split()
        assert experiment.unfinished(*parse_command(argv))[1] == []
        assert f"  memory: at least 90.2 MB to train{said}{ends}" in capsys.readouterr().out


def test_a_dry_run_knows_what_is_there(tmp_path, monkeypatch, capsys):
    """A complete run, one that goes on, one that another process works on; and how long all that may take."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "run_1", "run_1")
    shutil.copytree(ROOT / "run_0", "run_0")
    Path("run_0/final_info.json").unlink()
    Path("run_0/checksums.json").unlink()
    Path("run_0/checkpoints").mkdir()
    Path("run_0/checkpoints/step_00000030.safetensors").touch()
    Path("run_0/.lock").write_text("process 7 on there since 2026-01-01 00:00:00 +0000\n")
    before = everything(tmp_path)
    said = "--out_dir run_0 run_1 --testbed=micro --dry_run"
    assert experiment.unfinished(*parse_command(said.split()))[1] == []
    out = capsys.readouterr().out
    assert everything(tmp_path) == before
    assert "run_1 is complete: run_1/final_info.json" in out
    assert "; goes on at step 30; locked, by process 7 on there since" in out
    made = json.loads(Path("run_1/final_info.json").read_text())
    passes = 1 - 30 * 2048 / 3_000_000  # less what is done
    minutes = round(passes * made["training"]["means"]["train_seconds"] / 60)
    assert (
        f"  time: about {minutes} min of training and about " in out
        and ", in proportion to what run_1 took" in out
    )
    assert "run_1: arm" not in out, "nothing is left to do of it"
    assert experiment.unfinished(*parse_command(said.replace(" run_1", " --evals choice").split()))[1] == []
    time = "min of training and evaluation not known, in proportion to what run_1 took\n"
    assert time in capsys.readouterr().out, "run_1 has no choice"


def test_a_dry_run_says_at_which_step_runs_on_one_pass_go_on(tmp_path, monkeypatch, capsys):
    """At the newest that all of them hold, if any; not at each one's own."""
    import torch

    monkeypatch.chdir(tmp_path)

    def begun(name: str, *steps: int, written: int = 1):
        shutil.rmtree(name, ignore_errors=True)
        Path(name, "checkpoints").mkdir(parents=True)
        shutil.copy(ROOT / name / "config.json", name)
        position = {"written": written, "together": ["run_0", "run_1"]}
        for step in steps:
            facts = {"config_hash": "", "position": position}
            checkpoint.save(Path(name), step, {"t": torch.ones(1)}, facts)

    def states() -> list[str]:
        said = "--out_dir run_0 run_1 --testbed=micro --dry_run"
        assert experiment.unfinished(*parse_command(said.split()))[1] == []
        out = capsys.readouterr().out.splitlines()
        return [line.rpartition("; ")[2] for line in out if line.startswith(("run_0: arm", "run_1: arm"))]

    begun("run_0", 30, 61, written=2)
    begun("run_1", 30, written=2)
    assert states() == ["goes on at step 30"] * 2
    begun("run_0", 61)
    begun("run_1")
    lost = "the checkpoint of step 61 is not in all folders that are trained together"
    assert states() == [f"starts again at step 0, for {lost}", "begun before, without a checkpoint"]
    begun("run_0", 61, written=2)
    stands = "no step has a usable checkpoint in every folder: run_0 at step 61, run_1 at no step; give the"
    with pytest.raises(WrongRequest, match=stands):
        states()
    checkpoint.path_of(Path("run_0"), 61).write_bytes(b"")
    with pytest.raises(WrongRequest, match="no step .*: run_0.*step_00000061.safetensors is damaged"):
        states()


def test_a_dry_run_refuses_what_the_run_would(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for wrong, why in (("--layer=9", "the LM has 4 layers"), ("--d_sae=8", "must be under --d_sae 8")):
        said = ["--out_dir=run_0", "--testbed=micro", "--dry_run", wrong]
        with pytest.raises(WrongRequest, match=why):
            experiment.unfinished(*parse_command(said))
    assert not any(tmp_path.iterdir())


# ---- what is missing, and what does nothing


def test_all_that_an_lm_of_ones_own_lacks_is_named_at_once_with_a_command_that_works(here):  # noqa: F811
    with pytest.raises(WrongRequest) as wrong:
        request(["--lm", "lm", "--seeds", "0", "1"])
    told = str(wrong.value)
    assert told.startswith(
        "--out_dir, --layer, --forget_text, --retain_text, --questions, --forget_subject are missing: "
    )
    assert "which layer of --lm lm (0 to 2)" in told and "\n" not in told
    program, argv = (
        told.split("; for example: ")[1].split(" ", 2)[:2],
        shlex.split(told.split("; for example: ")[1])[2:],
    )
    assert program == ["python", "experiment.py"] and argv[:5] == ["--lm", "lm", "--seeds", "0", "1"]
    places = {
        "FORGET.jsonl": "good.jsonl",
        "RETAIN.jsonl": "good.jsonl",
        "QUESTIONS.jsonl": "good_q.jsonl",
        "SUBJECT": "biology",
    }
    assert set(places) <= set(argv)
    request([places.get(a, a) for a in argv])


def test_a_missing_arm_is_named_with_all_else_and_the_subjects_with_it(here):  # noqa: F811
    with pytest.raises(WrongRequest) as wrong:
        request(
            [
                "--out_dir=mine",
                "--lm=lm",
                "--layer=1",
                "--questions=good_q.jsonl",
                "--forget_text=two words.txt",
            ]
        )
    told = str(wrong.value)
    assert told.startswith(
        "--arm, --retain_text, --forget_subject are missing: mine is not in the plan (run_0, "
    )
    assert "which of biology, history is to be forgotten" in told
    assert told.endswith(
        "'--forget_text=two words.txt' --arm vanilla --retain_text RETAIN.jsonl --forget_subject biology"
    )


def test_evaluations_without_questions_lack_none(here):  # noqa: F811
    refused(
        ["--out_dir=run_0", "--lm=lm", "--layer=1", "--evals", "core"],
        "--forget_text, --retain_text are missing: ",
        here,
    )
    refused([*OWN[:3]], "--forget_text, --retain_text, --questions, --forget_subject are missing: ", here)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--out_dir run_0 --alpha 1", "--alpha in run_0 (arm vanilla)"),
        ("--out_dir run_6 --k 8", "--k in run_6 (activation relu)"),
        ("--out_dir run_6 -k 8", "--k in run_6 (activation relu)"),
        ("--out_dir run_8 --target_l0=8 --l1 0.1", "--l1 --target_l0 in run_8 (activation batchtopk)"),
        ("--out_dir run_2 --chunk_size 64", "--chunk_size in run_2 (arm grouped)"),
        (
            "--out_dir run_0 run_1 run_6 --forget_features 9",
            "--forget_features in run_0 (arm vanilla), --forget_features in run_1 (arm fixed)",
        ),
        (
            "--out_dir m --arm fixed --activation batchtopk --temperature 1",
            "--temperature in m (activation batchtopk)",
        ),
        (
            "--out_dir run_1 run_9 --group_update_steps 9",
            "--group_update_steps in run_1 (arm fixed), --group_update_steps in run_9 (arm ortsae)",
        ),
        (
            "--out_dir run_8 run_6 --k 8 --alpha 1 --margin 2 --tokens 3M --lr 1e-3",
            "--k in run_6 (activation relu)",
        ),
        ("--out_dir run_6 --alpha 1 --target_l0 8", ""),
        ("--out_dir run_6 --activations cache --evals core", ""),
        (
            "--out_dir run_6 run_13 --activations cache --evals core unlearning",
            "--activations --evals core in run_13 (arm leace)",
        ),
    ],
)
def test_an_option_that_does_nothing_in_a_run_is_told_in_one_line(argv, said, capsys):
    parse_command([*argv.split(), "--testbed=micro"])
    assert capsys.readouterr().err == (f"warning: without effect: {said}\n" if said else "")


def test_an_arm_brings_its_options_by_its_row_alone(capsys):
    """A row more in the table: its name can be asked for, its option is bounded, and told where it does
    nothing."""
    row = experiment.Arm(loss="all_pairs_grad", options={"tau": option(0.3, "cosines that are free", most=1)})
    arms = ARMS | {"hinge": row}

    @with_arms(arms)
    class Asked(settings.Request):
        pass

    def parse(said: str) -> Asked:
        return settings.parse_command(said.split(), PLAN, arms, Asked, "")[1][0]

    asked = parse("--out_dir=mine --arm=hinge --tau=0.2 --alpha=2 --margin=3 --testbed=micro")
    assert (asked.arm, vars(asked)["tau"], asked.alpha) == ("hinge", 0.2, 2.0)
    assert capsys.readouterr().err == "warning: without effect: --margin in mine (arm hinge)\n"
    assert vars(parse("--out_dir=run_1 --tau=0.2"))["tau"] == 0.2
    assert capsys.readouterr().err == "warning: without effect: --tau in run_1 (arm fixed)\n"
    with pytest.raises(WrongRequest, match="--tau is 1.5: give a smaller number, of at most 1"):
        parse("--out_dir=mine --arm=hinge --tau=1.5")
    with pytest.raises(SystemExit):
        parse("--help")
    assert re.search(
        r"loss:\n(  .*\n|\n)*  --tau float +cosines that are free \(default: 0.3\)", capsys.readouterr().out
    )


def test_every_option_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        parse_command(["--help"])
    text = capsys.readouterr().out.partition("\ndata:")[2]
    asked = [f for kind in (Request, Command) for f in fields(kind) if f.metadata.get("cmd", True)]
    for name in (f.name for f in asked):
        said = re.search(rf"^  (-k int, )?--{name}\b[^\n]*?(  +|\n {{10,}})\S", text, re.M)
        assert said, name


def test_help_has_groups_and_the_defaults_that_testbeds_bring(capsys):
    with pytest.raises(SystemExit):
        parse_command(["--help"])
    text = capsys.readouterr().out
    groups = dict(re.findall(r"(?m)^([a-z]+):\n((?:\n|  .*\n)*)", text))
    assert list(groups) == ["data", "model", "loss", "training", "run"]
    names = {group: re.findall(r"(?m)^  (?:-k int, )?--(\w+)", part) for group, part in groups.items()}
    options = [f for kind in (Request, Command) for f in fields(kind) if f.metadata.get("cmd", True)]
    assert {n for some in names.values() for n in some} == {f.name for f in options}
    assert {"lm", "layer", "context_size"} <= set(names["data"])
    assert names["model"][0] == "d_sae" and names["training"][0] == "seeds" and names["run"][0] == "out_dir"
    own = dict.fromkeys(name for row in ARMS.values() for name in row.options)
    assert names["loss"] == [*settings.GROUPS["loss"], *own], "what an arm brings"
    said = " ".join(text.split())
    assert "activations to train on, per SAE (default: 10M with pythia-70m; 50M with gemma-2-2b;" in said
    assert "1M with smollm2-135m; 1.5M with smollm2-taught; 3M with micro, --lm)" in said
    assert "counted from 0 (default: 3 with pythia-70m;" in said
    assert "the leading BOS included (default: 128)" in said, "the same with all"
    assert "which layer" not in said and "None" not in said and "()" not in said and "%" not in said
    assert "The file reads in the order" not in said, "of the code, not of the command"


def test_a_complete_config_has_the_settings_that_can_be_asked_for_and_none_is_open():
    config = tiny.config(arm="ortsae", d_sae=256)
    assert {f.name for f in fields(config)} == {f.name for f in fields(Request)}
    assert [k for k, v in vars(config).items() if v is None] == ["forget_entities"], "all"
    cut = {"chunk_size": 256, "group_size": 64, "tokens": 3_000_000}
    assert {name: vars(config)[name] for name in cut} == cut
    assert vars(tiny.config(arm="grouped", group_size=500))["group_size"] == 128, "d_in"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (dict(arm="adaptive", forget_features=1025), "--forget_features 1025 must be at most --d_sae 1024"),
        (dict(activation="batchtopk", k=1024), r"--k 1024 must lie in \[1, --d_sae 1024\)"),
        (dict(target_l0=1024.0), "--target_l0 1024 must be under --d_sae 1024"),
        (dict(unlock_steps=190), "--unlock_steps 190: .* training takes 1464 steps"),
    ],
)
def test_what_does_not_fit_the_testbeds_defaults_is_refused_too(asked, said):
    request = Request(**asked)
    with pytest.raises(WrongRequest, match=said):
        tiny.config(**asked)
    assert request.d_sae is None


def test_options_said_to_do_nothing_do_nothing(activations):
    """Trained with another value of each, an SAE is the same to the bit."""
    import torch
    from test_trainer import SMALL, replace, train

    other = {name: another_value(made) for row in ARMS.values() for name, made in row.options.items()}
    other |= {
        "alpha": 3.0,
        "alpha_start": 0.01,
        "target_l0": 30.0,
        "l1": 0.5,
        "k": 20,
        "temperature": 0.9,
        "bandwidth": 0.3,
    }
    ever = set()
    with_sae = [arm for arm, row in ARMS.items() if row.trains_sae]
    for setting, values in (("arm", with_sae), ("activation", ACTIVATION_NAMES)):
        for value in values:
            plain = replace(SMALL, **{setting: value})
            idle = {f.name: other[f.name] for f in fields(Request) if not plain.matters(f)}
            ever |= set(idle)
            trained = [
                train(config, activations, steps=6)[0].sae.state_dict()
                for config in (plain, replace(plain, **idle))
            ]
            assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items()), value
    assert ever == set(other)


# ---- the LM's folder

LAYERS = {
    "GPTNeoForCausalLM": "GPTNeoConfig",
    "MptForCausalLM": "MptConfig",
    "FalconForCausalLM": "FalconConfig",
    "BloomForCausalLM": "BloomConfig",
    "GPT2LMHeadModel": "GPT2Config",
    "StableLmForCausalLM": "StableLmConfig",
    "OpenAIGPTLMHeadModel": "OpenAIGPTConfig",
    "OPTForCausalLM": "OPTConfig",
    "Phi3ForCausalLM": "Phi3Config",
}


@pytest.mark.parametrize("architecture", LAYERS)
def test_layers_are_counted_in_the_words_of_every_lm(architecture, tmp_path):
    import transformers

    more = {"attention_types": [[["global", "local"], 1]], "num_layers": 2} if "Neo" in architecture else {}
    config = getattr(transformers, LAYERS[architecture])(architectures=[architecture], **more)
    if not more:
        config.num_hidden_layers = 2
    config.save_pretrained(tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    assert checks.check_lm_folder(tmp_path) == 2


@pytest.mark.parametrize(
    "files",
    [
        "tokenizer.json",
        "tokenizer.model",
        "spiece.model",
        "vocab.txt",
        "sentencepiece.bpe.model",
        "vocab.json merges.txt",
    ],
)
def test_a_folder_with_some_tokenizer_is_one(files, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3}')
    (tmp_path / "model.safetensors").touch()
    for name in files.split():
        with pytest.raises(WrongRequest, match=f"--lm {tmp_path} holds no tokenizer .tokenizer.json, "):
            checks.check_lm_folder(tmp_path)
        Path(tmp_path / name).touch()
    assert checks.check_lm_folder(tmp_path) == 3


def test_an_lm_whose_config_is_odd_is_refused_in_one_line(tmp_path):
    for odd, reason in (
        ({"architectures": [1]}, "architectures is not a list of names"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is not a list of names"),
        ({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": -3}, "not a causal decoder-only LM"),
        ({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": True}, "not a causal decoder-only LM"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(odd))
        with pytest.raises(WrongRequest, match=reason):
            checks.check_lm_folder(tmp_path)
