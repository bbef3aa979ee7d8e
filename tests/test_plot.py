"""plot.py on run folders: real ones, perturbed ones, broken ones; and its report in a real browser."""

import errno
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import warnings
from functools import partial
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import numpy as np
import pytest
from conftest import ROOT, run_script
from scipy import stats

sys.path.insert(0, str(ROOT))
import plot
from experiment import PLAN
from sae_separation import run_folder
from sae_separation.errors import Output, keep_output_open
from sae_separation.files import seal
from sae_separation.plots import figures, folders, looks, report, tables

ALPHA = {"run_1": 0.1, "run_2": 0.1, "run_3": 0.01, "run_4": 0.5, "run_5": 1.0, "run_9": 0.25}
ARMS = [
    "vanilla",
    "fixed",
    "grouped",
    "grouped",
    "grouped",
    "grouped",
    "adaptive",
    "adaptive",
    "adaptive",
    "ortsae",
    "frozen_decoder",
]
PNGS = [
    "unlearning_tradeoff",
    "explained_variance",
    "alpha_sweep",
    "interventions",
    "geometry",
    "training_curves",
]


def edit(path: Path, change):
    """Read a JSON file, let `change` alter the value in place, write it back."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def standard_error(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return (sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)) ** 0.5


def scaled(rng, value, spread):
    return value * rng.uniform(1 - spread, 1 + spread) if isinstance(value, float) else value


def scaled_metric(rng, m, v, shift):
    if v is None:
        return None
    return scaled(rng, v, 0.02) * shift + (rng.uniform(0.001, 0.01) if m == "unlearning_score" else 0)


def scale_metrics(rng, info):
    for parts in info.values():
        by_seed, shift = parts["final_info_dict"], rng.uniform(0.85, 1.0)
        for m, values in list(by_seed.items()):
            by_seed[m] = [scaled_metric(rng, m, v, shift) for v in values]
            if m in ("unlearning_score", "forget_ce_gain_at_retain_ce_cost_0.05"):
                by_seed |= {
                    m + suffix: [scaled(rng, v, 0.5) for v in by_seed[m]]
                    for suffix in ("_conditional", "_guardrail")
                }
        for m, values in by_seed.items():
            whole = None not in values
            parts["means"][m] = sum(values) / len(values) if whole else None
            parts["stderrs"][m] = standard_error(values) if whole else None
    info["core"]["means"]["l0"] = 16.0


def scale_sweep(rng, details):
    cells = [c for c in details["sweep"] if c.get("intervention", "clamp") == "clamp"]
    for c in cells:
        c.update(
            {
                k: scaled(rng, v, 0.1) if k.endswith(("gain", "cost")) else min(1.0, scaled(rng, v, 0.02))
                for k, v in c.items()
                if k.endswith(("gain", "cost", "accuracy"))
            }
        )
    details["sweep"] = cells + [{**c, "intervention": "conditional"} for c in cells]


def drop(section: str, info: dict):
    info.pop(section, None)


def made_up(folder: Path, name: str, arm: str, warnings=()) -> Path:
    """A run folder with invented numbers: a committed one, its metrics, log, sweeps and spectra scaled at
    random, and those of other interventions put in; without the checksums of the committed one."""
    rng, run = random.Random(name), folder / name
    shutil.copytree(
        ROOT / ("run_0" if arm in ("vanilla", "adaptive") else "run_1"),
        run,
        ignore=shutil.ignore_patterns("sae_seed*", "checksums.json", "seed*_metrics.json"),
    )
    bend = rng.uniform(0.8, 1.3)

    for section in ("robustness", "depth", "relearning"):  # as of a run that was not on the ruler
        edit(run / "final_info.json", partial(drop, section))
    edit(run / "final_info.json", partial(scale_metrics, rng))
    edit(run / "config.json", lambda c: c["config"].update(arm=arm, alpha=ALPHA.get(name, 0.1)))
    edit(run / "config.json", lambda c: c.pop("sha256", None))  # as of a run folder without checksums
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    (run / "train_log.jsonl").write_text(
        "".join(
            json.dumps(
                {k: v * bend if k in ("fvu", "sharing", "l1_coefficient") else v for k, v in r.items()}
            )
            + "\n"
            for r in log
        )
    )
    for path in run.glob("eval/*unlearning.json"):
        edit(path, partial(scale_sweep, rng))
    for path in run.glob("eval/*geometry.json"):
        edit(
            path,
            lambda d: d.update(
                singular_values={g: [v * bend for v in vs] for g, vs in d["singular_values"].items()}
            ),
        )
    (run / "warnings.json").write_text(json.dumps(list(warnings)))
    return run


def no_score(info: dict):
    for kind, value in (
        ("means", None),
        ("stderrs", None),
        ("final_info_dict", [None] * len(info["core"]["final_info_dict"]["l0"])),
    ):
        info["unlearning"][kind]["unlearning_score"] = value


def scores(folder: Path) -> dict[str, float]:
    """The mean unlearning score of each run that has one."""
    infos = {run.name: json.loads((run / "final_info.json").read_text()) for run in folder.glob("run_*")}
    means = {name: info["unlearning"]["means"]["unlearning_score"] for name, info in infos.items()}
    return {name: mean for name, mean in means.items() if mean is not None}


class Outline(HTMLParser):
    """Tags with their attributes, the text, and whether every opened element is closed in its turn."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(page)
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element, line {self.getpos()[0]}"

    def handle_data(self, data):
        self.texts.append(data)


HOSTILE = "</script><script>alert('x')</script><img src=https://example.org/x.png onerror=alert(1)>"


@pytest.fixture(scope="module")
def eleven(tmp_path_factory) -> Path:
    """All runs of the plan, and plot.py run over them: run_8 is flagged and hostile, run_4 has no score,
    run_10 another L0."""
    folder = tmp_path_factory.mktemp("eleven")
    for i, arm in enumerate(ARMS):
        made_up(
            folder,
            f"run_{i}",
            arm,
            (
                [
                    "seed 0: more than half of the features are dead",
                    "seed 2: more than half of the features are dead",
                    HOSTILE,
                ]
                if i == 8
                else []
            ),
        )
    edit(folder / "run_4" / "final_info.json", no_score)
    edit(folder / "run_10" / "final_info.json", lambda info: info["core"]["means"].update(l0=19.1))
    edit(folder / "run_8" / "config.json", lambda config: config["config"].update(note=HOSTILE))
    done = run_script("plot.py", cwd=folder)
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def drawn(folders: list[Path], where: Path, monkeypatch, capsys) -> tuple[str, str]:
    """plot.py in this process: what it printed, and the report."""
    monkeypatch.chdir(where)
    monkeypatch.setitem(figures.matplotlib.rcParams, "savefig.dpi", 40)
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, folders)])
    assert plot.main() == 0
    return capsys.readouterr().out, (where / "report.html").read_text()


def test_eleven_runs_give_every_figure_in_print_size(eleven):
    for name in PNGS:
        data = (eleven / f"{name}.png").read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data.startswith(b"\x89PNG") and width >= 1500 and height >= 700, name
    assert len({hashlib.sha256((eleven / f"{name}.png").read_bytes()).digest() for name in PNGS}) == len(PNGS)


def test_every_run_of_the_plan_has_a_label_and_a_look_of_its_own(eleven):
    assert list(folders.labels) == list(PLAN)
    runs, skipped = folders.find_runs(list(eleven.glob("run_*")))
    assert [run.name for run in runs] == list(folders.labels)[:11] and not skipped
    assert len({tuple(run.style.values()) for run in runs}) == 11
    by_arm = {(run.arm, run.style["color"]) for run in runs}
    assert len(by_arm) == len({arm for arm, _ in by_arm}) == len({colour for _, colour in by_arm})
    alone, _ = folders.find_runs([eleven / "run_8"])
    assert alone[0].style == runs[8].style, "a run looks the same whichever others are drawn"


def test_every_arm_has_a_colour_of_its_own_and_an_unknown_one_keeps_its():
    assert {settings["arm"] for settings in PLAN.values()} <= set(looks.METHODS)
    assert len({colour for colour, _ in looks.METHODS.values()}) == len(looks.METHODS)
    thirty = [looks.look("mine", variant) for variant in range(30)]
    assert len({look["color"] for look in thirty}) == 1
    assert len({(look["marker"], str(look["linestyle"])) for look in thirty}) == 30


def test_long_labels_have_three_lines_at_most_and_lose_their_middle():
    assert looks.in_lines("vanilla, features chosen with labels") == "vanilla, features chosen with labels"
    lines = looks.in_lines("a" * 300 + "_end (fixed)").split("\n")
    assert len(lines) == 3 and max(map(len, lines)) <= 36 and lines[-1].endswith("_end (fixed)")
    assert "…" in "".join(lines)


def test_long_names_lie_beside_each_other_and_within_the_figure(eleven, tmp_path):
    for i, name in enumerate(("with_every_setting_in_its_name_" * 5, "another with " * 8, "short")):
        shutil.copytree(eleven / f"run_{i}", tmp_path / f"{name}{i}")
    runs, skipped = folders.find_runs(list(tmp_path.iterdir()))
    assert len(runs) == 3 and not skipped
    for drawer in (figures.interventions, figures.explained_variance):
        figure = drawer(runs)
        assert not isinstance(figure, str)
        figure.draw_without_rendering()
        axis, legend = figure.axes[0], figure.legends[0]
        texts = [*axis.get_yticklabels(), *legend.get_texts(), axis.xaxis.label, axis.yaxis.label]
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2)), drawer
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes), drawer


@pytest.mark.parametrize("kind", ["svg", "pdf"])
def test_another_format_is_written_twice_alike_and_shown_as_png(kind, tmp_path, monkeypatch, capsys):
    written = []
    for _ in range(2):
        code, out, _ = ended(monkeypatch, capsys, tmp_path, ROOT / "run_0", "--format", kind)
        assert code == 0 and f"wrote explained_variance.{kind}\n" in out
        written.append((tmp_path / f"explained_variance.{kind}").read_bytes())
    assert written[0] == written[1] and b"Matplotlib v" in written[0]
    assert "data:image/png;base64," in (tmp_path / "report.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", f"explained_variance.{kind}"}


FORMS = {"letter_own_trained_alone": (0.1, 1.0), "prose_no_trained_passage": (0.3, 0.98)}


def robust(folder: Path, eleven: Path, run: str, worst: float, forms: dict, **more) -> Path:
    """A copy of a run that was evaluated for robustness."""
    copied = shutil.copytree(eleven / run, folder / run)
    rows = [
        {"form": form, "left": left, "kept": kept, "kept_enough": kept >= 0.99}
        for form, (left, kept) in forms.items()
    ]
    metrics = {"worst_case_score": worst, "knowledge_left_max": 0.3, "kept_at_worst": 0.98} | more
    seeds = json.loads((copied / "config.json").read_text())["config"]["seeds"]
    section = {"means": metrics, "stderrs": dict.fromkeys(metrics)}
    section["final_info_dict"] = {name: [value] * len(seeds) for name, value in metrics.items()}
    edit(copied / "final_info.json", lambda info: info.update(robustness=section))
    for seed in seeds:
        (copied / "eval" / f"seed{seed}_robustness.json").write_text(json.dumps({"forms": rows}))
    return copied


def test_the_figure_and_the_table_of_the_ruler_have_the_best_worst_case_first(eleven, tmp_path):
    robust(tmp_path, eleven, "run_0", 0.0, FORMS)
    robust(tmp_path, eleven, "run_6", 0.7, {form: (left, 1.0) for form, (left, _) in FORMS.items()})
    shutil.copytree(eleven / "run_1", tmp_path / "run_1")
    runs, skipped = folders.find_runs(sorted(tmp_path.iterdir()))
    assert not skipped and [run.name for run in tables.by_worst_case(runs)] == ["run_6", "run_0"]
    assert figures.by_form(runs[0]) == {
        "letter_own_trained_alone": pytest.approx((0.1, 0.0)),
        "prose_no_trained_passage": pytest.approx((0.3, 1.0)),
    }
    figure = figures.robustness(runs)
    assert not isinstance(figure, str)
    axis = figure.axes[0]
    (scores,) = axis.child_axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["adaptive", "vanilla"]
    assert [text.get_text() for text in scores.get_yticklabels()] == ["0.70 (0.98)", "0.00 (0.98)"]
    assert np.asarray(axis.images[0].get_array()) == pytest.approx(np.array([[0.1, 0.3], [0.1, 0.3]]))
    crossed = axis.lines[0].get_xydata()
    assert np.array_equal(crossed, [[1, 1]]), "run_0 behind a passage"
    assert isinstance(figures.robustness([runs[1]]), str)
    robust(tmp_path / "unseen", eleven, "run_6", 0.1, FORMS, unseen_knowledge_left_max=0.25)
    table = [row.split(" | ") for row in tables.ruler_table(runs).splitlines()]
    assert len(table) == 4 and "adaptive" in table[2][0]
    assert table[2][table[0].index("worst case")] == "0.70"
    assert [row[table[0].index("unseen: left")] for row in table[2:]] == ["0.25", "-"]
    assert tables.ruler_table(runs, ["worst case"]).splitlines()[2].split(" | ")[2:] == ["0.70 |"]


def test_forms_that_are_no_numbers_are_refused(eleven, tmp_path):
    broken = robust(tmp_path, eleven, "run_0", 0.0, FORMS)
    (file,) = broken.glob("eval/seed0_robustness.json")
    file.write_text(json.dumps({"forms": [{"form": "letter", "left": "much"}]}))
    _, skipped = folders.find_runs([broken])
    assert "forms are not names with numbers" in skipped[0]


def test_two_folders_of_one_name_are_kept_apart(eleven):
    runs, _ = folders.find_runs([eleven / "run_0", ROOT / "run_0", eleven / "run_6"])
    assert {run.label for run in runs} == {f"{eleven}/run_0 (vanilla)", f"{ROOT}/run_0 (vanilla)", "adaptive"}
    assert len({tuple(run.style.values()) for run in runs}) == 3


def test_a_flagged_run_is_marked_in_table_figures_and_report_with_the_reason(eleven):
    stdout, page = (eleven / "stdout.txt").read_text(), (eleven / "report.html").read_text()
    assert (
        "| run_8 | adaptive, BatchTopK † |" in stdout
        and "| run_7 | adaptive + curriculum, unlocking |" in stdout
    )
    assert "† run_8 (adaptive, BatchTopK): more than half of the features are dead (2 times)." in stdout
    assert (
        "† run_8 (adaptive, BatchTopK): more than half of the features are dead (2 times)."
        in Outline(page).text
    )
    runs, _ = folders.find_runs([eleven / "run_8", eleven / "run_0"])
    figure = figures.training_curves(runs)
    assert not isinstance(figure, str)
    legend = figure.legends[0]
    assert [t.get_text() for t in legend.get_texts()] == ["vanilla", "adaptive, BatchTopK †"]
    assert legend.get_title().get_text().startswith("† run_8: more than half of the features are dead")


def test_a_run_whose_results_were_changed_is_marked(tmp_path):
    shutil.copytree(ROOT / "smollm2/run_9", tmp_path / "run_9")
    run_folder.write_result(tmp_path / "run_9", json.loads((tmp_path / "run_9/final_info.json").read_text()))
    info = tmp_path / "run_9/final_info.json"
    before = folders.Run(tmp_path / "run_9").warnings
    info.write_text(info.read_text().replace("0.", "0.1", 1))
    assert folders.Run(tmp_path / "run_9").warnings == [
        *before,
        f"{info} is not as it was written: its checksum is wrong",
    ]


def test_runs_that_are_not_at_matched_l0_are_said_to_be_so(eleven):
    caution = (
        "The runs are not at matched L0: it goes from 16.0 (run_0, vanilla) to 19.1 (run_10, frozen decoder)"
    )
    assert (
        caution in (eleven / "stdout.txt").read_text()
        and caution in Outline((eleven / "report.html").read_text()).text
    )
    runs, _ = folders.find_runs([eleven / f"run_{i}" for i in range(10)])
    assert not any("matched" in text for text in tables.cautions(runs, []))


def test_missing_and_skipped_runs_are_named(eleven, tmp_path):
    (tmp_path / "run_3").mkdir()
    runs, skipped = folders.find_runs(
        [eleven / f"run_{i}" for i in range(11) if i not in (3, 5)] + [tmp_path / "run_3"]
    )
    said = tables.cautions(runs, skipped)
    assert not any("of the plan" in text for text in said), "of less than half of the plan nothing is missing"
    assert tables.missing_of_plan(folders.labels.keys() - {"run_3", "run_5"}) == [
        "Runs of the plan that are missing here: run_3 (grouped, α 0.01), run_5 (grouped, α 1)."
    ]
    assert tables.missing_of_plan({*folders.labels, "mine"} - {"run_3"}) == []
    assert any(text.startswith("Skipped: ") and "run_3: no final_info.json" in text for text in said)
    edit(
        shutil.copytree(eleven / "run_2", tmp_path / "run_2") / "config.json",
        lambda c: c["config"].update(tokens=7),
    )
    runs, _ = folders.find_runs([eleven / "run_0", tmp_path / "run_2"])
    assert "The runs do not share their tokens; the settings of each stand below." in tables.cautions(
        runs, []
    )


def test_the_report_is_one_valid_page_that_needs_nothing_else(eleven):
    page = (eleven / "report.html").read_text()
    outline = Outline(page)
    assert page.startswith("<!DOCTYPE html>") and not outline.open
    images = [a for tag, a in outline.tags if tag == "img"]
    assert len(images) == len(PNGS) and all(
        a["src"].startswith("data:image/png;base64,") and len(a["alt"]) > 10 for a in images
    )
    assert not [a for tag, a in outline.tags if tag in ("link", "iframe", "object")]
    assert all(a.get("src", "data:").startswith("data:") for _, a in outline.tags)
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    links = {a["href"] for _, a in outline.tags if "href" in a}
    assert len(set(ids)) == len(ids) and links <= {f"#{name}" for name in ids}
    assert {"#results", "#figures", "#tests", "#runs", "#geometry", "#run-10"} <= links
    assert "share of features that fire on held-out text" in outline.text
    assert ("html", {"lang": "en"}) in outline.tags and any(
        a.get("name") == "viewport" for _, a in outline.tags
    )
    for run in list(folders.labels)[:11]:
        info = json.loads((eleven / run / "final_info.json").read_text())
        mean, stderr, seeds = (
            info["geometry"][kind]["omega"] for kind in ("means", "stderrs", "final_info_dict")
        )
        assert (
            f"{mean:.3f} ± {stderr:.3f}" in outline.text
            and ", ".join(f"{v:.3f}" for v in seeds) in outline.text
        )


def test_hostile_text_from_a_run_folder_stays_text(eleven, tmp_path, monkeypatch, capsys):
    outline = Outline((eleven / "report.html").read_text())
    assert outline.text.count("alert('x')") >= 2, "the warning and the setting are shown"
    assert [tag for tag, _ in outline.tags].count("script") == 1 and not any(
        key.startswith("on") for _, a in outline.tags for key in a
    )
    run = made_up(tmp_path, "a$\\bad{$<b>&\"'_0", "<i>arm</i>", ["$\\oops{$"])
    _, page = drawn([run], tmp_path, monkeypatch, capsys)
    tags = {tag for tag, _ in Outline(page).tags}
    assert not {"b", "i"} & tags and "a$\\bad{$<b>&\"'_0: <i>arm</i> †" in Outline(page).text


BREAKS = {
    "no final_info.json": lambda run: (run / "final_info.json").unlink(),
    "no config.json": lambda run: (run / "config.json").unlink(),
    "no log": lambda run: (run / "train_log.jsonl").unlink(),
    "no warnings.json": lambda run: (run / "warnings.json").unlink(),
    "truncated final_info.json": (
        lambda run: (run / "final_info.json").write_text((run / "final_info.json").read_text()[:2000])
    ),
    "truncated log": (
        lambda run: (run / "train_log.jsonl").write_text((run / "train_log.jsonl").read_text()[:-20])
    ),
    "truncated details": (
        lambda run: (run / "eval" / "seed1_geometry.json").write_text('{"singular_values": {')
    ),
    "log of one seed lost": (
        lambda run: (run / "train_log.jsonl").write_text(
            (run / "train_log.jsonl").read_text().splitlines()[0]
        )
    ),
    "a list for a table": lambda run: edit(
        run / "final_info.json", lambda info: info["core"].update(means=[1])
    ),
    "a number for a warning": lambda run: (run / "warnings.json").write_text("[1]"),
    "no UTF-8": lambda run: (run / "config.json").write_bytes(b"\xff\xfe"),
    "a list for details": lambda run: (run / "eval" / "seed0_unlearning.json").write_text("[]"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_folder_is_skipped_with_the_reason_and_the_others_are_drawn(case, tmp_path, capsys):
    broken, whole = made_up(tmp_path, "run_1", "fixed"), ROOT / "run_0"
    BREAKS[case](broken)
    runs, skipped = folders.find_runs([broken, whole])
    assert [run.name for run in runs] == ["run_0"] and len(skipped) == 1
    assert f"skipping {broken}: " in capsys.readouterr().err


def one_seed(run: Path):
    def shorten(info):
        for parts in info.values():
            parts["final_info_dict"] = {m: values[1:2] for m, values in parts["final_info_dict"].items()}
            parts["means"] = {m: values[0] for m, values in parts["final_info_dict"].items()}
            parts["stderrs"] = dict.fromkeys(parts["means"])

    edit(run / "final_info.json", shorten)
    edit(run / "config.json", lambda c: c["config"].update(seeds=[1]))
    lines = [
        line for line in (run / "train_log.jsonl").read_text().splitlines() if json.loads(line)["seed"] == 1
    ]
    (run / "train_log.jsonl").write_text("\n".join(lines))


def nulls_everywhere(run: Path):
    def empty(info):
        for parts in info.values():
            parts.update(
                means=dict.fromkeys(parts["means"]),
                stderrs=dict.fromkeys(parts["means"]),
                final_info_dict={m: [None] * len(v) for m, v in parts["final_info_dict"].items()},
            )

    edit(run / "final_info.json", empty)
    lines = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    (run / "train_log.jsonl").write_text(
        "\n".join(json.dumps(r | dict.fromkeys(set(r) - {"seed", "tokens"})) for r in lines)
    )
    for path in run.glob("eval/*.json"):
        edit(
            path,
            lambda d: d.update(
                sweep=None,
                singular_values={"forget": [], "retain": [], "shared": []},
                principal_cosines_forget_retain=[],
            ),
        )


def only_training(run: Path):
    edit(run / "final_info.json", lambda info: [info.pop(section) for section in set(info) - {"training"}])
    shutil.rmtree(run / "eval")


@pytest.mark.parametrize("poor", [one_seed, nulls_everywhere, only_training])
def test_a_run_with_little_in_it_is_drawn_alone(poor, tmp_path, monkeypatch, capsys):
    run = made_up(tmp_path, "run_1", "fixed")
    poor(run)
    out, page = drawn([run], tmp_path, monkeypatch, capsys)
    assert (
        "| run_1 | fixed |" in out
        and "wrote training_curves.png" in out
        and "no alpha_sweep.png: no run of the grouped arm" in out
    )
    assert ("no unlearning_tradeoff.png: no run has a sweep" in out) == (poor is not one_seed)
    assert not Outline(page).open and "nan" not in Outline(page).text.lower().split()
    assert "no two runs that have it share a seed" in page


def test_the_curve_of_the_tradeoff_is_the_best_that_a_budget_buys():
    sweep = np.array([[0.3, 2.0], [0.1, 1.0], [0.2, 0.5], [0.05, -1.0]])
    assert figures.within(sweep, np.array([0.0, 0.05, 0.1, 0.25, 0.3])).tolist() == [0, 0, 1, 1, 2]


def test_only_the_plain_clamp_is_in_the_tradeoff(eleven):
    run = folders.find_runs([eleven / "run_0"])[0][0]
    cells = run.evals["unlearning"][0]["sweep"]
    assert {c.get("intervention") for c in cells} == {"clamp", "conditional"}
    assert len(run.sweeps("unlearning", "retain_accuracy", "forget_accuracy")[0]) == len(cells) // 2


def of_seeds(*values: float) -> Any:
    """A run that has these values of every metric, for seeds 0, 1, ..."""
    return SimpleNamespace(by_seed=lambda section, metric: dict(enumerate(values)))


def test_p_values_by_hand():
    """Student's t with one degree of freedom is Cauchy's distribution; t 1 has p 1/2. With two, t √2 has p
    1 - 1/√2."""
    (one,) = tables.paired_tests([(of_seeds(1, 0), of_seeds(0, 0))], *tables.SCORE)
    assert one["p"] == pytest.approx(0.5, abs=1e-13) and one["difference"] / one["stderr"] == pytest.approx(1)
    spread = math.sqrt(1.5)  # of -1, 0, 1 times this about a mean of 1: t = 1 / (spread / √3) = √2
    (two,) = tables.paired_tests([(of_seeds(1 - spread, 1, 1 + spread), of_seeds(0, 0, 0))], *tables.SCORE)
    assert two["p"] == pytest.approx(1 - 0.5**0.5, abs=1e-13)


def test_holms_correction_by_hand():
    corrected = tables.holm(np.array([0.03, math.nan, 0.01, 0.6, 0.011]))
    assert corrected.tolist() == pytest.approx([0.06, math.nan, 0.04, 0.6, 0.04], nan_ok=True)
    assert tables.holm(np.array([0.6, 0.7])).tolist() == [1.0, 1.0] and not len(tables.holm(np.array([])))


def test_paired_tests_use_shared_seeds_and_agree_with_scipy(eleven, tmp_path):
    a, b, c = folders.find_runs([eleven / f"run_{i}" for i in (0, 1, 6)])[0]
    tests = {
        (t["a"].name, t["b"].name): t for t in tables.paired_tests(combinations([a, b, c], 2), *tables.SCORE)
    }
    assert set(tests) == {("run_0", "run_1"), ("run_0", "run_6"), ("run_1", "run_6")}
    for (x, y), t in tests.items():
        x, y = (next(r.by_seed(*tables.SCORE) for r in (a, b, c) if r.name == name) for name in (x, y))
        expected = stats.ttest_rel(list(x.values()), list(y.values()))
        assert t["p"] == pytest.approx(expected.pvalue) and t["difference"] / t["stderr"] == pytest.approx(
            expected.statistic
        )
    low, middle, high = sorted(t["p"] for t in tests.values())
    assert sorted(t["holm"] for t in tests.values()) == pytest.approx(
        [min(1.0, p) for p in (3 * low, max(3 * low, 2 * middle), max(3 * low, 2 * middle, high))]
    )
    b.seeds = [2, 1, *range(100, 98 + len(a.seeds))]  # two seeds in common, in another order
    (test,) = tables.paired_tests([(a, b)], *tables.SCORE)
    x, y = a.by_seed(*tables.SCORE), b.by_seed(*tables.SCORE)
    assert test["n"] == 2 and test["difference"] == pytest.approx((x[1] - y[1] + x[2] - y[2]) / 2)
    (same,) = tables.paired_tests([(a, a)], *tables.SCORE)
    assert same["difference"] == 0 and same["p"] != same["p"], "no spread, no test"
    printed = run_script(
        "plot.py", "run_0", "run_1", "run_6", "--against=run_6", cwd=eleven
    ).stdout.splitlines()
    holm = min(1.0, 2 * min(tests["run_0", "run_6"]["p"], tests["run_1", "run_6"]["p"]))
    assert [line.split()[1] for line in printed] == [
        "run_6",
        "---",
        "run_0",
        "run_1",
    ] and f"| {holm:.2g} |" in "".join(printed)
    assert run_script("plot.py", "run_0", "--against=run_6", cwd=eleven).returncode == 2


BLOCKED = """
import runpy, sys
ALLOWED = {"numpy", "matplotlib", "mpl_toolkits", "PIL", "dateutil", "six", "pyparsing", "packaging",
           "cycler", "kiwisolver", "contourpy", "fontTools", "scipy", "jinja2", "markupsafe",
           "sae_separation"}
class Block:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in ALLOWED and top not in sys.stdlib_module_names and not top.startswith("_"):
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Block())
try:
    import pandas
except ImportError:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_plot_runs_where_only_what_it_imports_is_installed(tmp_path):
    code = f"import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(ROOT)!r})\n{BLOCKED}"
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT / "plot.py", ROOT / "run_0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "wrote report.html" in done.stdout and (tmp_path / "report.html").stat().st_size > 100_000


def browse(page: Path) -> dict:
    """What tests/browser.py saw. Skips where there is no browser; that is said in the summary of warnings
    too."""
    done = run_script("tests/browser.py", page, timeout=120)
    if done.returncode == 3:
        warnings.warn(f"THE REPORT WAS NOT TESTED IN A BROWSER: {done.stderr.strip()}", stacklevel=2)
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_the_report_works_in_chromium_from_disk_without_network(eleven):
    seen = browse(eleven / "report.html")
    assert (
        seen["opened"]
        and "Chrome/" in seen["agent"]
        and seen["title"] == "Knowledge separation in sparse autoencoders"
    )
    assert seen["messages"] == [] and seen["blocked"] == []
    assert len(seen["images"]) == len(PNGS) and all(alt and decoded for alt, decoded in seen["images"])
    score = scores(eleven)
    assert len(score) == 10
    rising = sorted(score, key=score.__getitem__)
    assert seen["order"] == [
        list(folders.labels)[:11],
        rising + ["run_4"],
        rising[::-1] + ["run_4"],
    ], "a run without a score stays last"
    assert [[s for s in sort if s] for sort in seen["aria_sort"]] == [["ascending"], ["descending"]]
    keyboard = seen["by_keyboard"]
    assert (
        keyboard["head"] == "with guardrail"
        and keyboard["sort"] == "descending"
        and keyboard["order"] not in seen["order"]
    )
    assert seen["searched"] == ["run_7"] and seen["count"] == "1 of 11 rows"
    assert seen["filtered"] == ["run_6"]
    assert seen["figure"] == [True, True, False], "a click opens it large, and another closes it"
    assert abs(seen["contents"]) < 100 and seen["run"] == [False, True]
    content, window = seen["phone_widths"]
    assert content <= window == 390, "nothing but the tables scrolls sideways on a phone"
    assert seen["pdf_bytes"] > 100_000
    for words in (
        "Results",
        "Paired tests",
        "not at matched L0",
        "0.05 nats a token",
        "adaptive, BatchTopK †",
    ):
        assert words in seen["text_without_scripts"]


def feature(number: int, forget: float, tokens: list[str], near: int) -> dict:
    """As `--evals features` tells it."""
    return {
        "feature": number,
        "forget": forget,
        "retain": 0.001,
        "affinity": 0.9,
        "mean": 2.5,
        "in_cell": number == 3,
        "cells": {"retain_threshold 0.01": 5},
        "neighbours": [[near, 0.9], [77, 0.5]],
        "contexts": [["forget", 1, tokens, [0, 4, 1][: len(tokens)]]],
        "changes": {"n": number, "by_format": {"letter": [number, 0]}, "examples": []},
    }


def inside(run: Path, features: list[dict]):
    """Give a run features, answers and prompts."""
    rows = [
        ["biology", "What is it?", "red", "choosing", True, [True, "<i>blue</i>"]],
        ["history", "Who was it?", "Ann", "reporting", [True, "Bob"], True],
        ["history", "When was it?", "then", "reporting", True, None],
    ]
    prompt = {"domain": "forget", "prompt": "Once", "without": " upon a time", "with": " more"}
    asked = {"columns": ["subject", "question", "right", "half", "letter", "cloze"], "rows": rows}
    (run / "eval/seed0_features.json").write_text(json.dumps({"features": features}))
    (run / "eval/seed0_questions.json").write_text(json.dumps(asked | {"prompts": [prompt]}))


def test_the_inside_of_a_run_is_sorted_opened_searched_and_filtered_in_chromium(tmp_path):
    made = [made_up(tmp_path, "run_0", "vanilla"), made_up(tmp_path, "run_6", "adaptive")]
    inside(made[0], [feature(3, 0.2, ["a", " <b>bold</b>", "c"], 4), feature(4, 0.5, ["x", "\n"], 3)])
    inside(made[1], [feature(9, 0.1, ["y", " bold"], 9)])
    page = report.render(folders.find_runs(made)[0], [], [])
    assert "<b>" not in page and "<i>" not in page
    (tmp_path / "report.html").write_text(page)
    seen = browse(tmp_path / "report.html")
    assert seen["messages"] == [] and seen["blocked"] == [] and seen["phone_widths"][0] <= 390
    assert seen["beyond_phone"] == [0, 0, 0], "a phone shows whole rows, an opened one too"
    there = seen["inside"]
    assert there["features"] == [["3", "4"], ["3", "4"], ["4", "3"]], "by the share of forget text"
    assert there["opened"] == ["forgetx\\n"] and there["shades"][0] == "" and "rgb" in there["shades"][1]
    assert there["neighbour"] == ["forgetx\\n", "forgeta <b>bold</b>c"] and there["found"] == ["3"]
    blue, bob = (
        "What is it?biologyclozered✓ red✗ <i>blue</i>choosing",
        "Who was it?historyletterAnn✓ Ann✗ Bobreporting",
    )
    changed, everything, letters, of_biology, none = there["answers"]
    assert changed == [blue, bob] and len(everything) == 5 and none == []
    assert len(letters) == 3 and bob in letters and of_biology == [r for r in letters if "biology" in r]
    assert there["prompts"] == ["Once", "forget", " upon a time", " more"] and there["other_run"] == ["9"]
    assert "This part needs scripts" in seen["text_without_scripts"]


def test_what_the_page_has_no_room_for_is_named(tmp_path, monkeypatch):
    run = made_up(tmp_path, "run_0", "vanilla")
    page = report.render(folders.find_runs([run])[0], [], [])
    assert "python experiment.py --out_dir=run_0 --evals features questions\nadds both" in page
    inside(run, [feature(3, 0.2, ["a", "b"], 4)])
    monkeypatch.setattr(report, "MOST_INSIDE", 100)
    page = report.render(folders.find_runs([run])[0], [], [])
    assert "run_0 (vanilla), seed 0.\npython plot.py with fewer run folders" in page
    assert "data-packed" not in page


def test_the_browser_notices_errors_requests_and_broken_images(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<!DOCTYPE html><title>bad</title><img alt="none" src="https://example.invalid/x.png"><p'
        ' style="width: 900px">wide</p><script>console.log("hello"); missing()</script>'
    )
    seen = browse(page)
    assert set(seen["blocked"]) == {"https://example.invalid/x.png"} and seen["images"] == [["none", False]]
    assert "hello" in seen["messages"] and any("missing is not defined" in m for m in seen["messages"])
    assert seen["phone_widths"][0] > 390


# -------------------------------------------------------------------------------- how it ends


def ended(monkeypatch, capsys, where: Path, *args) -> tuple[int, str, str]:
    """plot.py in this process, with one figure at low resolution: exit code, stdout, stderr."""
    monkeypatch.chdir(where)
    monkeypatch.setitem(figures.matplotlib.rcParams, "savefig.dpi", 20)
    monkeypatch.setattr(figures, "FIGURES", {figures.explained_variance: ("Explained variance", "So much.")})
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, args)])
    capsys.readouterr()
    return plot.main(), *capsys.readouterr()


def disk_full(path: Path, content: bytes):
    with path.open("wb") as file:
        file.write(content[: len(content) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_permission(*args, **kind):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


UNWRITABLE = {
    "a full disk": (("plot.Path.write_bytes", disk_full), "No space left on device; free disk space"),
    "a folder without permission": (
        ("plot.tempfile.mkdtemp", no_permission),
        "Permission denied; restore the permission to write",
    ),
    "a file without permission": (
        ("plot.os.access", lambda *_: False),
        "it is write-protected; move it away or permit it",
    ),
}


@pytest.mark.parametrize("name", ["explained_variance.png", "report.html"])
@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_cannot_be_written_is_one_line_and_what_stood_there_stays(
    case, name, tmp_path, monkeypatch, capsys
):
    (patched, patch), reason = UNWRITABLE[case]
    (tmp_path / name).write_bytes(good := plot.OURS[0])
    if name == "report.html":  # the figure was written
        monkeypatch.setattr(plot, "draw", lambda runs, kind: [])
    monkeypatch.setattr(patched, patch)
    code, _, err = ended(monkeypatch, capsys, tmp_path, ROOT / "run_0")
    assert code == 1 and err == f"error: {name} cannot be written: {reason}\n"
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == good


@pytest.mark.parametrize("what", ["a folder", "a pipe", "a link to a device"])
def test_what_is_not_a_file_in_place_of_a_figure_stays(what, tmp_path, monkeypatch, capsys):
    place = tmp_path / "explained_variance.png"
    make = {
        "a folder": place.mkdir,
        "a pipe": lambda: os.mkfifo(place),
        "a link to a device": lambda: place.symlink_to("/dev/full"),
    }
    make[what]()
    code, _, err = ended(monkeypatch, capsys, tmp_path, ROOT / "run_0")
    assert (
        code == 1
        and err
        == "error: explained_variance.png cannot be written: what stands there is not a file; move it away\n"
    )
    assert not place.is_file() and list(tmp_path.iterdir()) == [place] and Path("/dev/full").is_char_device()


def test_a_figure_that_is_a_link_is_written_where_it_leads(tmp_path, monkeypatch, capsys):
    (tmp_path / "kept").mkdir()
    (tmp_path / "report.html").symlink_to("kept/report.html")
    assert ended(monkeypatch, capsys, tmp_path, ROOT / "run_0")[0] == 0
    assert (tmp_path / "report.html").is_symlink() and (tmp_path / "kept/report.html").read_text().startswith(
        "<!DOCTYPE html>"
    )
    assert {p.name for p in tmp_path.iterdir()} == {"kept", "report.html", "explained_variance.png"}


def kept_open(stream: TextIO, name: str) -> Output:
    """The stream in place of stdout or stderr, as the command has it."""
    return Output(stream, stream.fileno(), plot.stdout_lost if name == "stdout" else None)


def test_a_reader_who_has_gone_keeps_nothing_from_being_written(tmp_path, monkeypatch, capsys):
    for gone in ("stdout", "stderr"):
        out, into = os.pipe()
        os.close(out)
        with monkeypatch.context() as patch, os.fdopen(into, "w") as stream:
            patch.setattr(sys, gone, kept_open(stream, gone))
            code, _, err = ended(
                patch, capsys, tmp_path, ROOT / "run_0", tmp_path
            )  # tmp_path is no run, and so named
            assert code == 0 and "Traceback" not in err
        assert {p.name for p in tmp_path.iterdir()} == {"report.html", "explained_variance.png"}, gone
        for path in tmp_path.iterdir():
            path.unlink()


def test_a_full_disk_behind_stdout_is_an_error_and_one_behind_stderr_changes_no_exit_code(
    tmp_path, monkeypatch, capsys
):
    line = "error: stdout cannot be written: No space left on device; send it elsewhere\n"
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", kept_open(full, "stdout"))
        code, _, err = ended(patch, capsys, tmp_path, ROOT / "run_0", "--table")
    assert code == 1 and err == line
    with Path("/dev/full").open("w", buffering=1) as full, monkeypatch.context() as patch:  # as stderr is
        patch.setattr(sys, "stderr", kept_open(full, "stderr"))
        assert ended(patch, capsys, tmp_path, "nothing")[0] == 2
    command = [sys.executable, str(ROOT / "plot.py"), "--table", str(ROOT / "run_0")]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr == line


def test_the_command_in_a_pipe_that_nobody_reads_on_a_terminal_of_ascii(tmp_path):
    command = f'"{sys.executable}" "{ROOT / "plot.py"}" --table "{ROOT / "run_0"}"'
    ascii_only = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    done = subprocess.run(
        ["bash", "-c", f"{command}; {command} | true; exit ${{PIPESTATUS[0]}}"],
        check=False,
        env=ascii_only,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert re.search(rb"15\.6\d\d \\xb1 0\.0", done.stdout) and done.stdout.isascii()


def test_an_ascii_terminal_is_shown_what_it_can_show(tmp_path, monkeypatch, capsys):
    for args in (["--table", ROOT / "run_10"], [ROOT / "run_10"], ["--help"]):
        with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            patch.setattr(sys, "stderr", sys.stderr)  # is put back with it
            keep_output_open(plot.stdout_lost)
            try:
                assert ended(patch, capsys, tmp_path, *args)[0] == 0
            except SystemExit as left:
                assert left.code == 0
            assert rb"\u2020" in terminal.buffer.getvalue(), "†"


WRONG = {
    "no run folder at all": (
        [],
        "no complete run folder to plot; name folders: python plot.py link whole",
    ),
    "an unknown folder": (
        ["whole", "missing"],
        "missing: there is no such folder; name folders that experiment.py wrote",
    ),
    "a folder twice": (["whole", "./whole/"], "whole is given twice (as whole); leave one out"),
    "a folder and a link to it": (["whole", "link"], "link is given twice (as whole); leave one out"),
    "an unknown option": (
        ["--nothing"],
        "unrecognized arguments: --nothing; python plot.py --help lists the options",
    ),
    "a name for a reader": (
        ["whole", "--against=\x1b[31m"],
        r"--against \x1b[31m: no complete run of that name; there are whole",
    ),
    "nothing to compare with": (
        ["whole", "--against", "whole"],
        "--against whole: there is no other complete run to compare it with",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_one_line_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    args, line = WRONG[case]
    shutil.copytree(ROOT / "run_0", tmp_path / "whole")
    (tmp_path / "link").symlink_to("whole")
    assert ended(monkeypatch, capsys, tmp_path, *args) == (2, "", f"error: {line}\n")


def test_the_first_sentence_holds_for_all_runs(tmp_path):
    runs = {name: made_up(tmp_path, name, "fixed") for name in ("a", "b")}

    def said(**settings) -> str:
        edit(runs["b"] / "config.json", lambda of: of["config"].update(settings))
        return tables.summary(folders.find_runs(list(runs.values()))[0])

    assert "2 runs on testbed micro, 3 seeds each, 3,000,000 training tokens a SAE." in said()
    more = said(tokens=20480, testbed="pythia-70m")
    assert "2 runs on testbeds micro, pythia-70m, 3 seeds each, 20,480 to 3,000,000 training" in more


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (MemoryError(), 1, "out of memory: give fewer run folders at once"),
        (signal.SIGINT, 130, "interrupted by SIGINT: every file that was written is whole"),
        (signal.SIGTERM, 143, "interrupted by SIGTERM: every file that was written is whole"),
        (
            ZeroDivisionError("of\nnothing"),
            1,
            "unexpected ZeroDivisionError: of; please report it with the lines above",
        ),
    ],
)
def test_every_end_has_its_exit_code_and_one_last_line(raised, code, line, tmp_path, monkeypatch, capsys):
    def comes(*_):
        if isinstance(raised, BaseException):
            raise raised
        os.kill(os.getpid(), raised)

    monkeypatch.setattr(plot.report, "render", comes)
    ended_with, _, err = ended(monkeypatch, capsys, tmp_path, ROOT / "run_0")
    assert ended_with == code and err.splitlines()[-1] == f"error: {line}"
    assert err.count("error: ") == 1 and ("Traceback" in err) == isinstance(raised, ZeroDivisionError)
    assert [p.name for p in tmp_path.iterdir()] == ["explained_variance.png"]


# -------------------------------------------------------------------------------- hostile run folders


def put(name: str, content: str | bytes):
    """A damage: this file of the run holds that."""
    return lambda run: (run / name).write_bytes(content.encode() if isinstance(content, str) else content)


def in_info(*place_and_value):
    """A damage: this place of final_info.json holds that."""
    *place, last, value = place_and_value

    def change(info):
        for key in place:
            info = info[key]
        info[last] = value

    return lambda run: edit(run / "final_info.json", change)


def in_settings(**values):
    return lambda run: edit(run / "config.json", lambda config: config["config"].update(values))


def pipe(name: str):
    return lambda run: ((run / name).unlink(), os.mkfifo(run / name))


def huge(name: str):
    """A damage: a file of gigabytes, which take no room on the disk."""
    return lambda run: os.truncate(run / name, 5 * 10**9)


def folder(name: str):
    return lambda run: ((run / name).unlink(), (run / name).mkdir())


def log_line(line: str):
    return lambda run: (run / "train_log.jsonl").write_text(
        f"{line}\n" + (run / "train_log.jsonl").read_text()
    )


def link_to_nothing(run: Path):
    shutil.rmtree(run)
    run.symlink_to("nothing")


DEEP = "[" * 100_000 + "]" * 100_000
DAMAGES = {
    "an integer of 401 digits": (
        in_info("core", "means", "l0", 10**400),
        "final_info.json: 10000000000000000000 (and 381 more characters) is not a number",
    ),
    "an integer of 10,000 digits": (
        put("final_info.json", "1" * 10_000),
        "final_info.json: Exceeds the limit",
    ),
    "a number too large for a float": (
        lambda run: (run / "final_info.json").write_text(
            (run / "final_info.json").read_text().replace("0.", "1e400, 0.", 1)
        ),
        "final_info.json: ",
    ),
    "a number too large for float32": (
        in_info("core", "stderrs", "l0", 1e300),
        "final_info.json: 1e+300 is not a number that a run writes",
    ),
    "NaN": (
        in_info("core", "means", "l0", float("nan")),
        "final_info.json: nan is not a number that a run writes",
    ),
    "NaN as a text": (
        in_info("core", "means", "l0", "NaN"),
        "final_info.json: core.means.l0 is not a number",
    ),
    "a text for the seeds' numbers": (
        in_info("core", "final_info_dict", "l0", "12345"),
        "final_info.json: core.final_info_dict.l0 is not a number for each seed",
    ),
    "a negative standard error": (
        in_info("core", "stderrs", "l0", -1),
        "final_info.json: core.stderrs.l0 is negative",
    ),
    "no means": (
        in_info("core", "means", None),
        "final_info.json: core is not a table of metrics (means, stderrs, final_info_dict)",
    ),
    "a list for a section": (in_info("core", []), "final_info.json: core is not a table of metrics"),
    "a list for all sections": (put("final_info.json", "[]"), "final_info.json: no section training"),
    "no training": (in_info("training", "means", {}), "final_info.json: no training results"),
    "a section that leads elsewhere": (
        in_info("../../x", {}),
        "final_info.json: ../../x is not the name of a section",
    ),
    "JSON nested 100,000 deep": (put("final_info.json", DEEP), "final_info.json: nested more than 50 deep"),
    "settings nested 100 deep": (
        put("config.json", DEEP[99_900:100_100]),
        "config.json: nested more than 50 deep",
    ),
    "a log line nested 100,000 deep": (log_line(DEEP), "train_log.jsonl, line 1: nested more than 50 deep"),
    "a log line that is no JSON": (log_line("{"), "train_log.jsonl, line 1: Expecting property name"),
    "a log line that is a list": (
        log_line("[]"),
        "train_log.jsonl, line 1: not numbers of a seed after so many tokens",
    ),
    "a log line of another seed": (
        log_line('{"seed": 77, "tokens": 1}'),
        "train_log.jsonl: its seeds are not those of config.json",
    ),
    "a text in the log": (
        log_line('{"seed": 0, "tokens": 1, "fvu": "low"}'),
        "train_log.jsonl, line 1: not numbers of a seed",
    ),
    "no tokens in the log": (
        log_line('{"seed": 0, "tokens": NaN}'),
        "train_log.jsonl, line 1: not numbers of a seed",
    ),
    "a pipe for warnings": (pipe("warnings.json"), "warnings.json: not a regular file"),
    "a pipe for results": (pipe("final_info.json"), "final_info.json: not a regular file"),
    "a pipe for details": (pipe("eval/seed0_geometry.json"), "seed0_geometry.json: not a regular file"),
    "a folder for the log": (folder("train_log.jsonl"), "train_log.jsonl: not a regular file"),
    "a device for settings": (
        lambda run: ((run / "config.json").unlink(), (run / "config.json").symlink_to("/dev/zero")),
        "config.json: not a regular file",
    ),
    "gigabytes of results": (huge("final_info.json"), "final_info.json: larger than 64 MB"),
    "gigabytes of log": (huge("train_log.jsonl"), "train_log.jsonl: larger than 64 MB"),
    "gigabytes of details": (huge("eval/seed0_unlearning.json"), "seed0_unlearning.json: larger than 64 MB"),
    "no UTF-8": (put("warnings.json", b'["\xff"]'), "warnings.json: 'utf-8' codec can't decode byte 0xff"),
    "an object of warnings": (put("warnings.json", '{"a": 1}'), "warnings.json: not a list of texts"),
    "no settings": (put("config.json", '{"config": []}'), "config.json: no settings under config"),
    "a number for the seeds": (in_settings(seeds=5), "config.json: seeds are not different whole numbers"),
    "a seed twice": (in_settings(seeds=[0, 0]), "config.json: seeds are not different whole numbers"),
    "seeds as texts": (in_settings(seeds=["0"]), "config.json: seeds are not different whole numbers"),
    "a text for a sweep": (
        put("eval/seed0_unlearning.json", '{"sweep": "x"}'),
        "eval/seed0_unlearning.json: sweep is not a list of cells",
    ),
    "a text in a cell": (
        put("eval/seed0_unlearning.json", '{"sweep": [{"retain_accuracy": "1"}]}'),
        "eval/seed0_unlearning.json: a cell of the sweep holds what is not a number",
    ),
    "a list of spectra": (
        put("eval/seed0_geometry.json", '{"singular_values": [1]}'),
        "eval/seed0_geometry.json: singular_values are not those of groups",
    ),
    "a number for a spectrum": (
        put("eval/seed0_geometry.json", '{"singular_values": {"forget": 1}}'),
        "eval/seed0_geometry.json: singular values or cosines are not numbers",
    ),
    "a link to nothing": (link_to_nothing, "a link to nothing"),
    "a file for the folder": (lambda run: (shutil.rmtree(run), run.write_text("")), "not a folder"),
}


def test_a_damaged_run_is_skipped_by_name_and_the_others_are_shown(tmp_path, monkeypatch, capsys):
    source, expected = made_up(tmp_path, "source", "fixed"), {}
    for i, (case, (damage, reason)) in enumerate(DAMAGES.items()):
        run = shutil.copytree(source, tmp_path / f"broken_{i}")
        damage(run)
        expected[run] = (case, reason)
    code, out, err = ended(monkeypatch, capsys, tmp_path, "--table", *expected, ROOT / "run_0")
    assert code == 0 and out.count("\n| run_") == 1 and "broken" not in out
    lines = err.splitlines()
    assert len(lines) == len(expected)
    for line, (run, (case, reason)) in zip(lines, expected.items()):
        assert line.startswith(f"skipping {run}: {reason}") and len(line) < 400, (case, line)
    code, out, err = ended(monkeypatch, capsys, tmp_path, "--table", *expected)
    assert code == 2 and not out and err.splitlines()[-1].startswith("error: no complete run folder to plot")


def test_a_link_to_nothing_is_named_where_no_folder_is_given(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "run_0", tmp_path / "run_0")
    (tmp_path / "run_1").symlink_to("gone")
    (tmp_path / "run_notes.txt").write_text("mine")
    code, out, err = ended(monkeypatch, capsys, tmp_path, "--table")
    assert code == 0 and "| run_0 |" in out and err == "skipping run_1: a link to nothing\n"


@pytest.mark.parametrize(
    "damage",
    [
        pipe("checksums.json"),
        huge("checksums.json"),
        folder("checksums.json"),
        put("checksums.json", DEEP),
        put("checksums.json", "[]"),
        put("checksums.json", json.dumps(seal({"files": {"../run_0/config.json": ""}}))),
        put("checksums.json", json.dumps(seal({"files": ["config.json"]}))),
    ],
)
def test_a_run_whose_checksums_are_damaged_is_marked(damage, tmp_path):
    run = tmp_path / "run_0"
    shutil.copytree(ROOT / "run_0", run)
    damage(run)
    *_, warning = folders.Run(run).warnings  # the others are remarks of the run's own
    assert warning.startswith(f"{run}/checksums.json ") and len(warning) < 400


def test_undefined_values_in_a_log_are_no_damage(tmp_path):
    run = made_up(tmp_path, "run_0", "vanilla")
    log_line('{"seed": 0, "tokens": 1, "sharing": NaN, "fvu": Infinity}')(run)
    assert folders.Run(run).log[0] == {"seed": 0, "tokens": 1, "sharing": None, "fvu": None}


def test_20_000_warnings_leave_table_and_page_usable(tmp_path, monkeypatch, capsys):
    run = made_up(
        tmp_path,
        "run_0",
        "vanilla",
        [f"seed {i % 5}: batch {i} was lost" for i in range(20_000)] + ["x" * 10**6],
    )
    code, out, err = ended(monkeypatch, capsys, tmp_path, run)
    notes = [line for line in out.splitlines() if line.startswith("† run_0")]
    assert code == 0 and not err and out.splitlines()[2].endswith("| 20001 |")
    assert len(notes) == 11 and notes[0] == "† run_0 (vanilla): batch 0 was lost."
    assert notes[-1] == "† run_0 (vanilla): 19,991 more are in its warnings.json."
    page = (tmp_path / "report.html").read_text()
    assert (
        page.count(" was lost") == 60 and "19,951 more are in its warnings.json" in page and len(page) < 10**6
    )
    edit(run / "warnings.json", lambda warned: warned.reverse())
    assert folders.Run(run).warnings[0] == "x" * 1000 + " (and 999,000 more characters)"


def test_control_characters_and_markup_are_shown_not_obeyed(tmp_path, monkeypatch, capsys):
    bad = "\x1b[31m\x07\n|\u202e\ud800<b>\x00"
    run = made_up(tmp_path, "x\x1b[31m\n|<b>", bad, [f"seed 0: {bad}"])
    edit(
        run / "config.json",
        lambda config: (config.update({bad: bad}), config["config"].update({"testbed": bad, "note": [bad]})),
    )
    in_info("core", "means", bad, 1.0)(run)
    broken = tmp_path / "broken\x1b[31m\n"
    broken.mkdir()
    code, out, err = ended(monkeypatch, capsys, tmp_path, run, broken)
    page = (tmp_path / "report.html").read_text()
    assert (
        code == 0
        and err == f"skipping {tmp_path}/broken\\x1b[31m\\n: no final_info.json: the run is not complete\n"
    )
    assert all(line.isprintable() for text in (out, page) for line in text.split("\n"))
    head, _, row = out.splitlines()[:3]
    assert head.count(" | ") == row.count(" | ") and row.startswith(
        r"| x\x1b[31m\n\|<b> | \x1b[31m\x07\n\|\u202e\ud800<b>\x00 † |"
    )
    assert (
        "b" not in {tag for tag, _ in Outline(page).tags}
        and r"\x1b[31m\x07\n|\u202e\ud800<b>\x00" in Outline(page).text
    )


ODD = [
    None,
    True,
    -1,
    0,
    1e300,
    3e38,
    -3e38,
    5e-324,
    10**400,
    math.nan,
    math.inf,
    "",
    "NaN",
    "\x1b[31m\n\ud800|$<b>",
    [],
    {},
    [[]],
    {"a": {}},
    [1],
    "y" * 5000,
    2**63,
]


def mutated(value, rng: random.Random):
    """The JSON value with one part, at any depth, replaced, removed or added."""
    place, part = [], value
    while isinstance(part, dict | list) and part and rng.random() < 0.85:
        place.append((part, rng.choice(list(part)) if isinstance(part, dict) else rng.randrange(len(part))))
        part = part[place[-1][1]]
    new = (
        part * rng.choice([-1, 1e10, 1e30])
        if isinstance(part, float) and rng.random() < 0.5
        else json.loads(json.dumps(rng.choice(ODD)))
    )
    if not place:
        return new
    parent, key = place[-1]
    kind = rng.random()
    if kind < 0.7:
        parent[key] = new
    elif kind < 0.85:
        del parent[key]
    elif isinstance(parent, dict):
        parent[rng.choice(["", "core", "a\n|", "x" * 300, "means"])] = new
    else:
        parent.insert(key, new)
    return value


def test_whatever_stands_in_the_files_is_shown_or_skipped_with_one_line(tmp_path, capsys):
    rng, runs = (
        random.Random(0),
        [made_up(tmp_path, "run_0", "vanilla"), made_up(tmp_path, "run_6", "adaptive")],
    )
    for run in runs:
        one_seed(run)
        for path in run.glob("eval/seed[!1]*"):
            path.unlink()
    files = [p for run in runs for p in run.rglob("*.json*")]
    seen, skips = 0, 0
    for _ in range(200):
        path = rng.choice(files)
        before = path.read_text()
        values = (
            [json.loads(line) for line in before.splitlines()]
            if path.suffix == ".jsonl"
            else json.loads(before)
        )
        for _ in range(rng.choice([1, 1, 3, 20])):
            values = mutated(values, rng)
        lines = values if path.suffix == ".jsonl" and isinstance(values, list) else [values]
        path.write_text("\n".join(map(json.dumps, lines)))
        shown, skipped = folders.find_runs(runs)
        page = plot.report.render(shown, skipped, [])
        text = "\n".join(
            [
                tables.summary_table(shown),
                *tables.cautions(shown, skipped),
                tables.against_table(shown[0], shown),
            ]
        )
        folders.say(text)
        assert (
            len(shown) + len(skipped) == 2
            and page.encode()
            and capsys.readouterr().err.count("\n") == len(skipped)
        )
        seen, skips = seen + len(shown), skips + len(skipped)
        path.write_text(before)
    assert seen > 250 and skips > 50


@pytest.mark.parametrize("name", ["report.html", "explained_variance.png"])
def test_a_file_of_the_users_own_is_not_replaced(name, tmp_path, monkeypatch, capsys):
    (tmp_path / name).write_text("mine")
    code, _, err = ended(monkeypatch, capsys, tmp_path, ROOT / "run_0")
    assert (code, (tmp_path / name).read_text()) == (1, "mine")
    assert err == f"error: {name} would be replaced, and is none of this program's: move it away\n"
