"""plot.py on run folders: real ones, perturbed ones, broken ones; and its report in a real browser."""

import hashlib
import json
import random
import shutil
import struct
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest
from conftest import ROOT, run_script

sys.path.insert(0, str(ROOT))
import plot

ALPHA = {"run_1": 0.1, "run_2": 0.1, "run_3": 0.01, "run_4": 0.5, "run_5": 1.0, "run_9": 0.25}
ARMS = ["vanilla", "fixed", "grouped", "grouped", "grouped", "grouped", "adaptive", "adaptive", "adaptive", "ortsae", "frozen_decoder"]
PNGS = ["unlearning_tradeoff", "explained_variance", "alpha_sweep", "interventions", "geometry", "training_curves"]


def edit(path: Path, change):
    """Read a JSON file, let `change` alter the value in place, write it back."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def made_up(folder: Path, name: str, arm: str, warnings=()) -> Path:
    """A run folder with invented numbers: a committed one, its metrics, log, sweeps and spectra scaled at random, and those of
    other interventions put in; without the checksums of the committed one."""
    rng, run = random.Random(name), folder / name
    shutil.copytree(ROOT / ("run_0" if arm in ("vanilla", "adaptive") else "run_1"), run, ignore=shutil.ignore_patterns("sae_seed*", "checksums.json", "seed*_metrics.json"))
    bend = rng.uniform(0.8, 1.3)

    def scaled(value, spread):
        return value * rng.uniform(1 - spread, 1 + spread) if isinstance(value, float) else value

    def metrics(info):
        for parts in info.values():
            by_seed, shift = parts["final_info_dict"], rng.uniform(0.85, 1.0)
            for m, values in list(by_seed.items()):
                by_seed[m] = [None if v is None else scaled(v, 0.02) * shift + (rng.uniform(0.001, 0.01) if m == "unlearning_score" else 0) for v in values]
                if m in ("unlearning_score", "forget_ce_gain_at_retain_ce_cost_0.05"):
                    by_seed |= {m + suffix: [scaled(v, 0.5) for v in by_seed[m]] for suffix in ("_conditional", "_guardrail")}
            for m, values in by_seed.items():
                parts["means"][m] = mean = None if None in values else sum(values) / len(values)
                parts["stderrs"][m] = None if mean is None else (sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)) ** 0.5
        info["core"]["means"]["l0"] = 16.0

    def sweep(details):
        cells = [c for c in details["sweep"] if c.get("intervention", "clamp") == "clamp"]
        for c in cells:
            c.update({k: scaled(v, 0.1) if k.endswith(("gain", "cost")) else min(1.0, scaled(v, 0.02)) for k, v in c.items() if k.endswith(("gain", "cost", "accuracy"))})
        details["sweep"] = cells + [{**c, "intervention": "conditional"} for c in cells]

    edit(run / "final_info.json", metrics)
    edit(run / "config.json", lambda c: c["config"].update(arm=arm, alpha=ALPHA.get(name, 0.1)))
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    (run / "train_log.jsonl").write_text("".join(json.dumps({k: v * bend if k in ("fvu", "sharing", "l1_coefficient") else v for k, v in r.items()}) + "\n" for r in log))
    for path in run.glob("eval/*unlearning.json"):
        edit(path, sweep)
    for path in run.glob("eval/*geometry.json"):
        edit(path, lambda d: d.update(singular_values={g: [v * bend for v in vs] for g, vs in d["singular_values"].items()}))
    (run / "warnings.json").write_text(json.dumps(list(warnings)))
    return run


def no_score(info: dict):
    for kind, value in (("means", None), ("stderrs", None), ("final_info_dict", [None] * len(info["core"]["final_info_dict"]["l0"]))):
        info["unlearning"][kind]["unlearning_score"] = value


def scores(folder: Path) -> dict[str, float | None]:
    return {run.name: json.loads((run / "final_info.json").read_text())["unlearning"]["means"]["unlearning_score"] for run in folder.glob("run_*")}


class Outline(HTMLParser):
    """Tags with their attributes, the text, and whether every element that was opened is closed in its turn."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(page)
        self.text = " ".join(self.text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element, line {self.getpos()[0]}"

    def handle_data(self, data):
        self.text.append(data)


HOSTILE = "</script><script>alert('x')</script><img src=https://example.org/x.png onerror=alert(1)>"


@pytest.fixture(scope="module")
def eleven(tmp_path_factory) -> Path:
    """All runs of the plan, and plot.py run over them: run_8 is flagged and hostile, run_4 has no score, run_10 another L0."""
    folder = tmp_path_factory.mktemp("eleven")
    for i, arm in enumerate(ARMS):
        made_up(folder, f"run_{i}", arm, ["seed 0: more than half of the features are dead", "seed 2: more than half of the features are dead", HOSTILE] if i == 8 else [])
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
    monkeypatch.setitem(plot.matplotlib.rcParams, "savefig.dpi", 40)
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
    assert list(plot.labels) == [f"run_{i}" for i in range(11)]
    runs, skipped = plot.find_runs(list(eleven.glob("run_*")))
    assert [run.name for run in runs] == list(plot.labels) and not skipped
    for part in ("color", "marker"):
        assert len({run.style[part] for run in runs}) == 11
    alone, _ = plot.find_runs([eleven / "run_6"])
    assert alone[0].style == runs[6].style, "a run looks the same whichever others are drawn"


def test_two_folders_of_one_name_are_told_apart(eleven):
    runs, _ = plot.find_runs([eleven / "run_0", ROOT / "run_0", eleven / "run_6"])
    assert {run.label for run in runs} == {f"{eleven}/run_0 (vanilla)", f"{ROOT}/run_0 (vanilla)", "adaptive"}
    assert len({run.style["color"] for run in runs}) == 3 and "run_0 (vanilla)" not in plot.cautions(runs, [])[0]


def test_a_flagged_run_is_marked_in_table_figures_and_report_with_the_reason(eleven):
    stdout, page = (eleven / "stdout.txt").read_text(), (eleven / "report.html").read_text()
    assert "| run_8 | adaptive, BatchTopK † |" in stdout and "| run_7 | adaptive + curriculum, unlocking |" in stdout
    assert "† run_8 (adaptive, BatchTopK): more than half of the features are dead (2 times)." in stdout
    assert "† run_8 (adaptive, BatchTopK): more than half of the features are dead (2 times)." in Outline(page).text
    runs, _ = plot.find_runs([eleven / "run_8", eleven / "run_0"])
    figure = plot.training_curves(runs)
    legend = figure.legends[0]
    assert [t.get_text() for t in legend.get_texts()] == ["vanilla", "adaptive, BatchTopK †"]
    assert legend.get_title().get_text().startswith("† run_8: more than half of the features are dead")
    plot.plt.close(figure)


def test_a_run_whose_results_were_changed_is_marked(tmp_path):
    shutil.copytree(ROOT / "smollm2/run_9", tmp_path / "run_9")
    plot.checkpoint.write_result(tmp_path / "run_9", json.loads((tmp_path / "run_9/final_info.json").read_text()))
    info = tmp_path / "run_9/final_info.json"
    before = plot.Run(tmp_path / "run_9").warnings
    info.write_text(info.read_text().replace("0.", "0.1", 1))
    assert plot.Run(tmp_path / "run_9").warnings == [*before, f"{info} is not as it was written: its checksum is wrong"]


def test_runs_that_are_not_at_matched_l0_are_said_to_be_so(eleven):
    told = "The runs are not at matched L0: it goes from 16.0 (run_0, vanilla) to 19.1 (run_10, frozen decoder)"
    assert told in (eleven / "stdout.txt").read_text() and told in Outline((eleven / "report.html").read_text()).text
    runs, _ = plot.find_runs([eleven / f"run_{i}" for i in range(10)])
    assert not any("matched" in text for text in plot.cautions(runs, []))


def test_missing_and_skipped_runs_are_named(eleven, tmp_path):
    (tmp_path / "run_3").mkdir()
    runs, skipped = plot.find_runs([eleven / f"run_{i}" for i in range(11) if i not in (3, 5)] + [tmp_path / "run_3"])
    said = plot.cautions(runs, skipped)
    assert "Runs of the plan that are missing here: run_3 (grouped, α 0.01), run_5 (grouped, α 1)." in said
    assert any(text.startswith("Skipped: ") and "run_3: no final_info.json" in text for text in said)
    edit(shutil.copytree(eleven / "run_2", tmp_path / "run_2") / "config.json", lambda c: c["config"].update(tokens=7))
    runs, _ = plot.find_runs([eleven / "run_0", tmp_path / "run_2"])
    assert "The runs do not share their tokens; the settings of each stand below." in plot.cautions(runs, [])


def test_the_report_is_one_valid_page_that_needs_nothing_else(eleven):
    page = (eleven / "report.html").read_text()
    outline = Outline(page)
    assert page.startswith("<!DOCTYPE html>") and not outline.open
    images = [a for tag, a in outline.tags if tag == "img"]
    assert len(images) == len(PNGS) and all(a["src"].startswith("data:image/png;base64,") and len(a["alt"]) > 40 for a in images)
    assert not [a for tag, a in outline.tags if tag in ("link", "iframe", "object")]
    assert all(a.get(key, "data:").startswith("data:") for _, a in outline.tags for key in ("src", "href"))
    assert ("html", {"lang": "en"}) in outline.tags and any(a.get("name") == "viewport" for _, a in outline.tags)
    for run in plot.labels:
        info = json.loads((eleven / run / "final_info.json").read_text())
        mean, stderr, seeds = (info["geometry"][kind]["omega"] for kind in ("means", "stderrs", "final_info_dict"))
        assert f"{mean:.3f} ± {stderr:.3f}" in outline.text and ", ".join(f"{v:.3f}" for v in seeds) in outline.text


def test_hostile_text_from_a_run_folder_stays_text(eleven, tmp_path, monkeypatch, capsys):
    outline = Outline((eleven / "report.html").read_text())
    assert outline.text.count("alert('x')") >= 2, "the warning and the setting are shown"
    assert [tag for tag, _ in outline.tags].count("script") == 1 and not any(key.startswith("on") for _, a in outline.tags for key in a)
    run = made_up(tmp_path, "a$\\bad{$<b>&\"'_0", "<i>arm</i>", ["$\\oops{$"])
    _, page = drawn([run], tmp_path, monkeypatch, capsys)
    tags = {tag for tag, _ in Outline(page).tags}
    assert not {"b", "i"} & tags and "a$\\bad{$<b>&\"'_0 (<i>arm</i>) †" in Outline(page).text


BREAKS = {
    "no final_info.json": lambda run: (run / "final_info.json").unlink(),
    "no config.json": lambda run: (run / "config.json").unlink(),
    "no log": lambda run: (run / "train_log.jsonl").unlink(),
    "no warnings.json": lambda run: (run / "warnings.json").unlink(),
    "truncated final_info.json": lambda run: (run / "final_info.json").write_text((run / "final_info.json").read_text()[:2000]),
    "truncated log": lambda run: (run / "train_log.jsonl").write_text((run / "train_log.jsonl").read_text()[:-20]),
    "truncated details": lambda run: (run / "eval" / "seed1_geometry.json").write_text('{"singular_values": {'),
    "log of one seed lost": lambda run: (run / "train_log.jsonl").write_text((run / "train_log.jsonl").read_text().splitlines()[0]),
    "a list for a table": lambda run: edit(run / "final_info.json", lambda info: info["core"].update(means=[1])),
    "a number for a warning": lambda run: (run / "warnings.json").write_text("[1]"),
    "no UTF-8": lambda run: (run / "config.json").write_bytes(b"\xff\xfe"),
    "a list for details": lambda run: (run / "eval" / "seed0_unlearning.json").write_text("[]"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_folder_is_skipped_with_the_reason_and_the_others_are_drawn(case, tmp_path, capsys):
    broken, whole = made_up(tmp_path, "run_1", "fixed"), ROOT / "run_0"
    BREAKS[case](broken)
    runs, skipped = plot.find_runs([broken, whole])
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
    lines = [line for line in (run / "train_log.jsonl").read_text().splitlines() if json.loads(line)["seed"] == 1]
    (run / "train_log.jsonl").write_text("\n".join(lines))


def nulls_everywhere(run: Path):
    def empty(info):
        for parts in info.values():
            parts.update(means=dict.fromkeys(parts["means"]), stderrs=dict.fromkeys(parts["means"]), final_info_dict={m: [None] * len(v) for m, v in parts["final_info_dict"].items()})

    edit(run / "final_info.json", empty)
    lines = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    (run / "train_log.jsonl").write_text("\n".join(json.dumps(r | dict.fromkeys(set(r) - {"seed", "tokens"})) for r in lines))
    for path in run.glob("eval/*.json"):
        edit(path, lambda d: d.update(sweep=None, singular_values={"forget": [], "retain": [], "shared": []}, principal_cosines_forget_retain=[]))


def only_training(run: Path):
    edit(run / "final_info.json", lambda info: [info.pop(section) for section in set(info) - {"training"}])
    shutil.rmtree(run / "eval")


@pytest.mark.parametrize("poor", [one_seed, nulls_everywhere, only_training])
def test_a_run_with_little_in_it_is_drawn_alone(poor, tmp_path, monkeypatch, capsys):
    run = made_up(tmp_path, "run_1", "fixed")
    poor(run)
    told, page = drawn([run], tmp_path, monkeypatch, capsys)
    assert "| run_1 | fixed |" in told and "wrote training_curves.png" in told and "no alpha_sweep.png: no run of the grouped arm" in told
    assert ("no unlearning_tradeoff.png: no run has a sweep" in told) == (poor is not one_seed)
    assert not Outline(page).open and "nan" not in Outline(page).text.lower().split()
    assert "no two runs share a seed" in page


def test_the_curve_of_the_tradeoff_is_the_best_that_a_budget_buys():
    sweep = plot.np.array([[0.3, 2.0], [0.1, 1.0], [0.2, 0.5], [0.05, -1.0]])
    assert plot.within(sweep, plot.np.array([0.0, 0.05, 0.1, 0.25, 0.3])).tolist() == [0, 0, 1, 1, 2]


def test_only_the_plain_clamp_is_in_the_tradeoff(eleven):
    run = plot.find_runs([eleven / "run_0"])[0][0]
    cells = run.evals["unlearning"][0]["sweep"]
    assert {c.get("intervention") for c in cells} == {"clamp", "conditional"}
    assert len(run.sweeps("unlearning", "retain_accuracy", "forget_accuracy")[0]) == len(cells) // 2


def test_the_t_distributions_tail_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for df in [*range(1, 12), 30, 101]:
        for t in (0.0, 1e-3, 0.5, 1.0, 2.776, -4.3, 12.7, 80.0):
            assert plot.two_sided_p(t, df) == pytest.approx(2 * stats.t.sf(abs(t), df), abs=1e-13), (t, df)
    assert plot.two_sided_p(1, 1) == pytest.approx(0.5) and plot.two_sided_p(2**0.5, 2) == pytest.approx(1 - 0.5**0.5)


def test_paired_tests_use_shared_seeds_and_agree_with_scipy(eleven, tmp_path):
    stats = pytest.importorskip("scipy.stats")
    a, b, c = plot.find_runs([eleven / f"run_{i}" for i in (0, 1, 6)])[0]
    tests = {(t["a"].name, t["b"].name): t for t in plot.paired_tests(combinations([a, b, c], 2), *plot.SCORE)}
    assert set(tests) == {("run_0", "run_1"), ("run_0", "run_6"), ("run_1", "run_6")}
    for (x, y), t in tests.items():
        x, y = (next(r.by_seed(*plot.SCORE) for r in (a, b, c) if r.name == name) for name in (x, y))
        expected = stats.ttest_rel(list(x.values()), list(y.values()))
        assert t["p"] == pytest.approx(expected.pvalue) and t["difference"] / t["stderr"] == pytest.approx(expected.statistic)
    low, middle, high = sorted(t["p"] for t in tests.values())
    assert sorted(t["holm"] for t in tests.values()) == pytest.approx([min(1.0, p) for p in (3 * low, max(3 * low, 2 * middle), max(3 * low, 2 * middle, high))])
    b.seeds = [2, 1, *range(100, 98 + len(a.seeds))]  # two seeds in common, in another order
    (test,) = plot.paired_tests([(a, b)], *plot.SCORE)
    x, y = a.by_seed(*plot.SCORE), b.by_seed(*plot.SCORE)
    assert test["n"] == 2 and test["difference"] == pytest.approx((x[1] - y[1] + x[2] - y[2]) / 2)
    (same,) = plot.paired_tests([(a, a)], *plot.SCORE)
    assert same["difference"] == 0 and same["p"] != same["p"], "no spread, no test"
    printed = run_script("plot.py", "run_0", "run_1", "run_6", "--against=run_6", cwd=eleven).stdout.splitlines()
    holm = min(1.0, 2 * min(tests["run_0", "run_6"]["p"], tests["run_1", "run_6"]["p"]))
    assert [line.split()[1] for line in printed] == ["run_6", "---", "run_0", "run_1"] and f"| {holm:.2g} |" in "".join(printed)
    assert run_script("plot.py", "run_0", "--against=run_6", cwd=eleven).returncode == 2


BLOCKED = """
import runpy, sys
ALLOWED = {"numpy", "matplotlib", "mpl_toolkits", "PIL", "dateutil", "six", "pyparsing", "packaging", "cycler", "kiwisolver", "contourpy", "fontTools",
           "checkpoint", "errors"}  # our own, of the standard library alone
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


def test_plot_runs_where_only_numpy_and_matplotlib_are_installed(tmp_path):
    code = f"import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(ROOT)!r})\n{BLOCKED}"
    done = subprocess.run([sys.executable, "-c", code, ROOT / "plot.py", ROOT / "run_0"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "wrote report.html" in done.stdout and (tmp_path / "report.html").stat().st_size > 100_000


def browse(page: Path) -> dict:
    """What tests/browser.py saw. Skips where there is no browser; that is said in the summary of warnings too."""
    done = run_script("tests/browser.py", page, timeout=120)
    if done.returncode == 3:
        warnings.warn(f"THE REPORT WAS NOT TESTED IN A BROWSER: {done.stderr.strip()}", stacklevel=2)
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_the_report_works_in_chromium_from_disk_without_network(eleven):
    seen = browse(eleven / "report.html")
    assert seen["opened"] and "Chrome/" in seen["agent"] and seen["title"] == "Knowledge separation in sparse autoencoders"
    assert seen["messages"] == [] and seen["blocked"] == []
    assert len(seen["images"]) == len(PNGS) and all(alt and decoded for alt, decoded in seen["images"])
    score = scores(eleven)
    rising = sorted((run for run in score if score[run] is not None), key=score.get)
    assert seen["order"] == [list(plot.labels), rising + ["run_4"], rising[::-1] + ["run_4"]], "a run without a score stays last"
    assert [[s for s in sort if s] for sort in seen["aria_sort"]] == [["ascending"], ["descending"]]
    keyboard = seen["by_keyboard"]
    assert keyboard["head"] == "with guardrail" and keyboard["sort"] == "descending" and keyboard["order"] not in seen["order"]
    content, window = seen["phone_widths"]
    assert content <= window == 390, "nothing but the tables scrolls sideways on a phone"
    assert seen["pdf_bytes"] > 100_000
    for words in ("Results", "Paired tests", "not at matched L0", "0.05 nats a token", "adaptive, BatchTopK †"):
        assert words in seen["text_without_scripts"]


def test_the_browser_notices_errors_requests_and_broken_images(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text('<!DOCTYPE html><title>bad</title><img alt="none" src="https://example.invalid/x.png"><p style="width: 900px">wide</p><script>console.log("hello"); missing()</script>')
    seen = browse(page)
    assert set(seen["blocked"]) == {"https://example.invalid/x.png"} and seen["images"] == [["none", False]]
    assert "hello" in seen["messages"] and any("missing is not defined" in m for m in seen["messages"])
    assert seen["phone_widths"][0] > 390
