"""Figures, tables and a report from run folders alone.

    python plot.py [run_0 run_1 ...]    (default: every run_* folder here)

Needs numpy, scipy, matplotlib and Jinja2 only. Folders that are not complete are skipped, and the reason is
printed. Figures are written as PNGs and the report as report.html, one page that needs nothing else, into
the current folder, each whole or not at all; the table goes to the screen. † marks a run whose warnings.json
is not empty, or whose files are not as they were written. A figure whose data no run has is left out, and
the reason is printed. Exit code 2: a wrong request, 1: a file could not be written; one last line on
stderr says what is wrong.
"""

import argparse
import base64
import errno
import hashlib
import io
import json
import math
import os
import re
import signal
import struct
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from sae_separation import evals, process, run_folder
from sae_separation.errors import (
    Interrupted,
    RunFailed,
    WrongRequest,
    keep_output_open,
    leave_at_once,
    plain,
    stops,
    tell,
)
from sae_separation.files import REMEDIES, content_of


def stdout_lost(error: OSError):
    """The table is what was asked for: raises RunFailed where it cannot be written, as on a full disk. Where
    the reader has gone (| head) the work goes on."""
    if not isinstance(error, BrokenPipeError):
        raise RunFailed(f"stdout cannot be written: {error.strerror}; send it elsewhere") from error


if __name__ == "__main__":  # before what takes long to import
    keep_output_open(stdout_lost)
    for ending in stops():
        signal.signal(ending, leave_at_once)
try:
    import jinja2
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
    from scipy.special import stdtr
except (ImportError, OSError) as missing:  # an OSError where matplotlib has no room for its cache
    if __name__ != "__main__":
        raise
    remedy = "free disk space" if isinstance(missing, OSError) else "pip install -r requirements.txt"
    sys.exit(tell(RunFailed(f"what plot.py needs cannot be imported: {missing}; {remedy}")))
matplotlib.rcParams |= {"savefig.dpi": 150, "axes.formatter.useoffset": False}

labels = {
    "run_0": "vanilla",
    "run_1": "fixed",
    "run_2": "grouped, α 0.1",
    "run_3": "grouped, α 0.01",
    "run_4": "grouped, α 0.5",
    "run_5": "grouped, α 1",
    "run_6": "adaptive",
    "run_7": "adaptive + curriculum, unlocking",
    "run_8": "adaptive, BatchTopK",
    "run_9": "ortsae",
    "run_10": "frozen decoder",
    "run_11": "vanilla, features chosen with labels",
    "run_12": "difference of means",
    "run_13": "LEACE",
    "run_14": "linear probe gate",
    "run_15": "MLP probe gate",
    "run_16": "token list",
    "run_17": "guard: mean activation",
    "run_18": "guard: naive Bayes",
    "run_19": "RMU",
    "run_20": "NPO",
    "run_21": "oracle",
}

# Okabe & Ito's palette, told apart by the colour-blind (grey for its yellow), and three more of Tol's; line
# styles and markers tell them apart in print
COLOURS = [
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#D55E00",
    "#0072B2",
    "#CC79A7",
    "#7F7F7F",
    "#882255",
    "#999933",
    "#332288",
]
MARKERS = "osD^vP*X<>pdh"
STYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
SCORE, GAIN, EXPLAINED = (
    ("unlearning", "unlearning_score"),
    ("corpus_unlearning", "forget_ce_gain_at_retain_ce_cost_0.05"),
    ("core", "explained_variance"),
)
# intervention -> suffix of its metrics
WORST = ("robustness", "worst_case_score")
INTERVENTIONS = {"clamp": "", "conditional": "_conditional", "guardrail": "_guardrail"}
GROUPS = ("forget", "retain", "shared")
TESTED = {
    "Unlearning score": SCORE,
    "Cross-entropy added on forget text at 0.05 nats a token on retain text": GAIN,
}
MATCHED_L0 = 2.0  # arms whose mean L0 lies further apart are not compared at the same sparsity
KINDS = ("means", "stderrs", "final_info_dict")
# where a sweep stands, and its cells' cost and gain
QUESTIONS = ("unlearning", "retain_accuracy", "forget_accuracy")
TEXT = ("corpus_unlearning", "retain_ce_cost", "forget_ce_gain")
MOST = float(np.finfo(np.float32).max)  # no number of a run is larger
DEEPEST = 50  # lists in lists and objects in objects in a run's JSON

# ------------------------------------------------------------------------------------------------ words


def cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} (and {len(text) - most:,} more characters)"


def first(texts: list[str], most: int) -> list[str]:
    """As many of a run's warnings as can be read, and how many more there are."""
    more = [f"{len(texts) - most:,} more are in its warnings.json"] if len(texts) > most else []
    return texts[:most] + more


def say(text: str, stderr: bool = False):
    """Lines for the user; what is not printable in them is shown as Python writes it."""
    lines = "\n".join(plain(line) for line in text.split("\n"))
    print(lines, file=sys.stderr if stderr else sys.stdout, flush=True)


# ------------------------------------------------------------------------------------------------ run folders


def need(holds: object, otherwise: str):
    if not holds:
        raise ValueError(otherwise)


def check(value):
    """Raises ValueError for a number that float32 cannot hold, and for lists and objects nested too deep.

    Level by level: Python's recursion may be what the file is after."""
    levels, layer = 0, [value]
    while layer:
        need(levels <= DEEPEST, f"nested more than {DEEPEST} deep")
        levels, level, layer = levels + 1, layer, []
        for v in level:
            if isinstance(v, list):
                layer += v
            elif isinstance(v, dict):
                layer += v.values()
            elif isinstance(v, int | float) and not abs(v) <= MOST:
                raise ValueError(f"{cut(str(v), 20)} is not a number that a run writes")


def undefined(text: str) -> None:
    """NaN or infinity in a training log, which says so of what is undefined at a step."""


def parsed(text: str, where: str, constant: Callable[[str], float | None] = float):
    """JSON that a run may have written. Raises ValueError with the place and what is wrong there."""
    try:
        value = json.loads(text, parse_constant=constant)
        check(value)
        return value
    except RecursionError:
        raise ValueError(f"{where}: nested more than {DEEPEST} deep") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def text_of(path: Path) -> str:
    """Raises ValueError with the file's name and why it cannot be read."""
    try:
        return content_of(path).decode()
    except OSError as error:
        raise ValueError(f"{path.name}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def read(path: Path):
    return parsed(text_of(path), path.name)


def finite(value) -> float:
    """The number, or nan for whatever is none."""
    return float(value) if isinstance(value, int | float) else math.nan


def are_numbers(values) -> bool:
    """A list of numbers; None where one is undefined."""
    return isinstance(values, list) and all(v is None or isinstance(v, int | float) for v in values)


def are_seeds(values) -> bool:
    """A list of whole numbers, at least one, each once."""
    return (
        isinstance(values, list)
        and len(values) > 0
        and all(type(s) is int for s in values)
        and len(set(values)) == len(values)
    )


class Run:
    """One complete run folder. Raises ValueError with the reason when it is not complete or not a run's."""

    label: str  # what the run is called in tables; this and the next four are set by `name_and_style`
    mark: str  # the same in figures
    order: int  # of its colour, line style and marker
    style: dict
    band: float  # opacity of the band from the least to the most of its seeds

    def __init__(self, folder: Path):
        self.folder, self.name = folder, plain(os.path.basename(os.path.realpath(folder)))
        need(os.path.isdir(folder), "a link to nothing" if os.path.islink(folder) else "not a folder")
        need(os.path.lexists(folder / "final_info.json"), "no final_info.json: the run is not complete")
        names = ("final_info", "config", "warnings")
        self.info, self.config, warnings = (read(folder / f"{name}.json") for name in names)
        settings = self.config.get("config") if isinstance(self.config, dict) else None
        if not isinstance(settings, dict):
            raise ValueError("config.json: no settings under config")
        self.settings, self.seeds = settings, settings.get("seeds", [])
        need(are_seeds(self.seeds), "config.json: seeds are not different whole numbers")
        are_texts = isinstance(warnings, list) and all(isinstance(w, str) for w in warnings)
        need(are_texts, "warnings.json: not a list of texts")
        self._check_info()
        self.log = self._read_log(folder / "train_log.jsonl")
        paths = {s: [folder / "eval" / f"seed{seed}_{s}.json" for seed in self.seeds] for s in self.info}
        self.evals = {s: [self._read_details(p) for p in paths[s] if os.path.lexists(p)] for s in self.info}
        self.warnings = [cut(plain(w), 1000) for w in (*warnings, *run_folder.changed_files(folder))]
        self.arm = cut(plain(str(settings.get("arm"))), 60)
        self.alpha = finite(settings.get("alpha"))

    def _check_info(self):
        need(isinstance(self.info, dict) and "training" in self.info, "final_info.json: no section training")
        for section, parts in self.info.items():
            where = f"final_info.json: {cut(section, 60)}"
            need(re.fullmatch(r"\w{1,60}", section), f"{where} is not the name of a section")
            whole = isinstance(parts, dict) and all(isinstance(parts.get(kind), dict) for kind in KINDS)
            need(whole, f"{where} is not a table of metrics ({', '.join(KINDS)})")
            for kind in KINDS:
                for metric, value in parts[kind].items():
                    place, by_seed = f"{where}.{kind}.{cut(metric, 60)}", kind == "final_info_dict"
                    reason = f"{place} is not a number{' for each seed' * by_seed}"
                    need(are_numbers(value if by_seed else [value]), reason)
                    need(kind != "stderrs" or value is None or value >= 0, f"{place} is negative")
        need(self.info["training"]["means"], "final_info.json: no training results")

    def _read_log(self, path: Path) -> list[dict]:
        if "final_fvu" not in self.info["training"]["means"] and not os.path.lexists(path):
            return []  # a method that needs no SAE
        lines = enumerate(text_of(path).splitlines(), 1)
        rows = [parsed(line, f"{path.name}, line {n}", undefined) for n, line in lines]
        for n, row in enumerate(rows, 1):
            whole = isinstance(row, dict) and are_numbers(list(row.values()))
            whole = whole and None not in (row.get("seed"), row.get("tokens"))
            need(whole, f"{path.name}, line {n}: not numbers of a seed after so many tokens")
        seeds = {row["seed"] for row in rows}
        need(seeds == set(self.seeds), f"{path.name}: its seeds are not those of config.json")
        return rows

    @staticmethod
    def _read_details(path: Path) -> dict:
        details, where = read(path), f"eval/{path.name}"
        need(isinstance(details, dict), f"{where}: not an object")
        cells, spectra = details.get("sweep") or [], details.get("singular_values") or {}
        whole = isinstance(cells, list) and all(isinstance(c, dict) for c in cells)
        need(whole, f"{where}: sweep is not a list of cells")
        costs_and_gains = [c.get(key) for c in cells for key in (*QUESTIONS[1:], *TEXT[1:])]
        need(are_numbers(costs_and_gains), f"{where}: a cell of the sweep holds what is not a number")
        need(isinstance(spectra, dict), f"{where}: singular_values are not those of groups")
        rows = [details.get("principal_cosines_forget_retain"), *spectra.values()]
        whole = all(row is None or are_numbers(row) for row in rows)
        need(whole, f"{where}: singular values or cosines are not numbers")
        forms = details.get("forms") or []
        whole = isinstance(forms, list) and all(isinstance(form, dict) for form in forms)
        whole = whole and all(isinstance(form.get("form"), str) for form in forms)
        numbers = [form.get(key) for form in forms if whole for key in ("left", "kept")]
        need(whole and are_numbers(numbers), f"{where}: forms are not names with numbers")
        return details

    def mean(self, section: str, metric: str) -> tuple[float, float]:
        """Mean and standard error over seeds; nan where the run has none."""
        parts = self.info.get(section, {})
        mean, stderr = (finite(parts.get(kind, {}).get(metric)) for kind in ("means", "stderrs"))
        return mean, stderr

    def by_seed(self, section: str, metric: str) -> dict[int, float]:
        """The values of the seeds; empty where the run has none."""
        values = self.info.get(section, {}).get("final_info_dict", {}).get(metric) or []
        if len(values) != len(self.seeds):
            return {}
        return {seed: finite(v) for seed, v in zip(self.seeds, values)}

    def sweeps(self, section: str, cost: str, gain: str) -> list[np.ndarray]:
        """(cost, gain) of the clamp's cells, [cell, 2], for each seed that has any."""
        sweeps = []
        for details in self.evals.get(section, []):
            cells = [c for c in details.get("sweep") or [] if c.get("intervention", "clamp") == "clamp"]
            pairs = [(finite(c.get(cost)), finite(c.get(gain))) for c in cells]
            sweeps.append(np.array([pair for pair in pairs if not np.isnan(pair).any()]))
        return [sweep for sweep in sweeps if len(sweep)]

    def doubts(self) -> Counter[str]:
        """The warnings for which the run's numbers are not to be taken at their face, without their seeds,
        and how often each stands there."""
        return Counter(re.sub(r"^seed \d+: ", "", w) for w in self.warnings if not is_a_remark(w))


def is_a_remark(warning: str) -> bool:
    """Whether a warning merely says what is not there: metrics that are undefined, forms that the LM does not
    answer, knowledge that does not come back."""
    remarks = ("undefined for seeds", "which do not count", "relearning: more than")
    return any(remark in warning for remark in remarks)


def in_order(folder: Path) -> list[tuple[bool, int, str]]:
    """What run folders are sorted by: run_2 comes before run_10."""
    parts = folder.name.split("_")
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def find_runs(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """The complete runs, and why the other folders are skipped."""
    runs, skipped = [], []
    for folder in sorted(set(folders), key=in_order):
        try:
            runs.append(Run(folder))
        except ValueError as reason:
            skipped.append(plain(f"{folder}: {reason}"))
            say(f"skipping {skipped[-1]}", stderr=True)
    name_and_style(runs)
    return runs, skipped


def name_and_style(runs: list[Run]):
    """Give each run its label and its look; a run of the plan looks the same whichever others are drawn."""
    names = Counter(run.name for run in runs)
    for run in runs:
        run.name = plain(str(run.folder)) if names[run.name] > 1 else run.name
        run.label = labels.get(run.name, f"{run.name} ({run.arm})") + " †" * bool(run.doubts())
        run.mark = run.label.replace("$", r"\$").lstrip("_")  # as matplotlib takes a text literally
    places = [*labels, *(run.name for run in runs if run.name not in labels)]
    for run in runs:
        run.order = places.index(run.name)
        run.band = min(0.15, 0.5 / len(runs))
        run.style = {
            "color": COLOURS[run.order % len(COLOURS)],
            "linestyle": STYLES[run.order % len(STYLES)],
            "marker": MARKERS[run.order % len(MARKERS)],
            "markersize": 5,
        }


# ------------------------------------------------------------------------------------------------ numbers


def holm(p_values: np.ndarray) -> np.ndarray:
    """The p-values [test] after Holm's correction for the number of tests; undefined ones (nan) stay so and
    do not count."""
    # by hand: statsmodels has it too, but takes longer to import than all else here together
    defined = np.argsort(p_values, kind="stable")[: np.isfinite(p_values).sum()]
    corrected = np.full(len(p_values), np.nan)
    times_tests = p_values[defined] * np.arange(len(defined), 0, -1)
    corrected[defined] = np.maximum.accumulate(np.minimum(1.0, times_tests))
    return corrected


def paired_tests(pairs: Iterable[tuple[Run, Run]], section: str, metric: str) -> list[dict]:
    """Pairs of runs on the seeds they share: mean difference, its standard error, and the paired t-test's
    p, two-sided, as it is and after Holm's correction for the number of tests. p is nan under two seeds,
    or where the differences do not vary.
    """
    tests = []
    for a, b in pairs:
        x, y = (run.by_seed(section, metric) for run in (a, b))
        differences = np.array([x[s] - y[s] for s in x if s in y and np.isfinite(x[s] - y[s])])
        n = len(differences)
        if n:
            mean, stderr = differences.mean(), differences.std(ddof=1) / n**0.5 if n > 1 else math.nan
            p = 2 * stdtr(n - 1, -abs(mean / stderr)) if stderr > 1e-12 else math.nan  # Student's t
            tests.append({"a": a, "b": b, "n": n, "difference": mean, "stderr": stderr, "p": p})
            tests[-1]["by_seed"] = differences
    for test, p in zip(tests, holm(np.array([test["p"] for test in tests]))):
        test["holm"] = p
    return tests


def shown(mean: float, stderr: float, digits=".3f") -> str:
    if np.isnan(mean):
        return "-"
    return f"{mean:{digits}}" if np.isnan(stderr) else f"{mean:{digits}} ± {stderr:{digits}}"


def difference(test: dict) -> str:
    """Of a paired test: mean with its sign ± standard error."""
    return shown(test["difference"], test["stderr"], "+.3f").replace("± +", "± ")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in escaped)


def columns(runs: list[Run]) -> list[tuple[str, str, str]]:
    """(section, metric, head) of the columns of a table: those of the evaluations that some run has."""
    return [
        (row.section, metric, head)
        for row in evals.ROWS
        for metric, head in row.columns.items()
        if any(metric in run.info.get(row.section, {}).get("means", {}) for run in runs)
    ]


def summary_table(runs: list[Run]) -> str:
    """Markdown: mean ± standard error over seeds."""
    shown_columns = columns(runs)
    head = ["run", "arm", "seeds", *(title for _, _, title in shown_columns), "warnings"]
    rows = []
    for run in runs:
        means = [shown(*run.mean(section, metric)) for section, metric, _ in shown_columns]
        rows.append([run.name, run.label, str(len(run.seeds)), *means, str(len(run.warnings))])
    return markdown(head, rows)


RULER = {  # head -> section and metric of a column of the table of methods
    "standard": ("robustness", "standard_score"),
    "worst case": WORST,
    "left at most": ("robustness", "knowledge_left_max"),
    "kept at least": ("robustness", "kept_at_worst"),
    "mean": ("robustness", "mean_score"),
    "unseen": ("robustness", "unseen_worst_case_score"),
    "unseen: left": ("robustness", "unseen_knowledge_left_max"),
    "4 bits: left": ("robustness", "knowledge_left_max_4bit"),
    "depth": ("depth", "depth_score"),
    "relearned": ("relearning", "left_after_100_steps"),
    "same entity": ("robustness", "retain_kept_same_entity"),
    "human aging": ("robustness", "retain_kept_human_aging"),
    "CE gained": ("robustness", "forget_ce_gain"),
    "CE paid": ("robustness", "retain_ce_cost"),
    "seconds": ("training", "train_seconds"),
}


def ruler_table(runs: list[Run], heads: Iterable[str] = RULER) -> str:
    """Markdown: every method on the ruler, the best worst case first; the columns that some run has. Those of
    facts never shown are of the run of the same name in the folder `unseen` beside a run (--forget_entities),
    where there is one."""
    ranked = by_worst_case(runs)
    numbers = {head: [on_ruler(run, head) for run in ranked] for head in heads}
    numbers = {head: column for head, column in numbers.items() if np.isfinite(column).any()}
    rows = []
    for i, run in enumerate(ranked):
        shown_here = [shown(*column[i], digits_of(head)) for head, column in numbers.items()]
        rows.append([run.label, str(len(run.seeds)), *shown_here])
    return markdown(["method", "seeds", *numbers], rows)


def on_ruler(run: Run, head: str) -> tuple[float, float]:
    """Mean and standard error of a column of RULER."""
    twin = run.folder.parent / "unseen" / run.folder.name
    if head.startswith("unseen") and twin.is_dir() and (twins := find_runs([twin])[0]):
        run = twins[0]
    return run.mean(*RULER[head])


def digits_of(head: str) -> str:
    return ".0f" if head == "seconds" else ".2f"


def against_table(reference: Run, runs: list[Run]) -> str:
    """Markdown: the reference less each other run, seed by seed, with Holm's correction over the rows."""
    pairs = [(reference, run) for run in runs if run is not reference]
    scores, gains, explained = (
        {test["b"]: test for test in paired_tests(pairs, *metric)} for metric in (SCORE, GAIN, EXPLAINED)
    )

    def p(run: Run, kind: str) -> str:
        return f"{scores[run][kind]:.2g}" if run in scores and np.isfinite(scores[run][kind]) else "-"

    rows = []
    for _, run in pairs:
        score, gain, fit = (difference(t[run]) if run in t else "-" for t in (scores, gains, explained))
        rows.append([f"{run.name} {run.label}", score, p(run, "p"), p(run, "holm"), gain, fit])
    head = [f"{reference.name} less", "unlearning", "p", "p (Holm)", "forget CE gain", "expl. var."]
    return markdown(head, rows)


def unmatched_l0(runs: list[Run]) -> list[str]:
    """Where the runs are not at matched L0: one sentence."""
    l0 = {}
    for run in runs:
        evaluated, trained = run.mean("core", "l0")[0], run.mean("training", "final_l0")[0]
        l0[run] = evaluated if np.isfinite(evaluated) else trained
    l0 = {run: v for run, v in l0.items() if np.isfinite(v)}
    if not l0 or max(l0.values()) - min(l0.values()) <= MATCHED_L0:
        return []
    ends = min(l0, key=l0.__getitem__), max(l0, key=l0.__getitem__)
    low, high = (f"{l0[run]:.1f} ({run.name}, {run.label})" for run in ends)
    return [
        f"The runs are not at matched L0: it goes from {low} to {high}, more than {MATCHED_L0:g} apart."
        " Differences between them may be differences in sparsity."
    ]


def compared(run: Run) -> dict[str, object]:
    """What runs must share to be compared, by name."""
    testbed = run.config.get("testbed")
    testbed = testbed if isinstance(testbed, dict) else {}
    return {
        "seeds": run.seeds,
        "testbed": testbed.get("name"),
        "hook": testbed.get("hook_name"),
        "tokens": run.settings.get("tokens"),
        "d_sae": run.settings.get("d_sae"),
    }


def cautions(runs: list[Run], skipped: list[str]) -> list[str]:
    """What keeps the runs from being compared as they stand, in sentences."""
    messages = unmatched_l0(runs)
    there = {os.path.basename(os.path.realpath(run.folder)) for run in runs}
    if missing := [f"{name} ({label})" for name, label in labels.items() if name not in there]:
        messages.append(f"Runs of the plan that are missing here: {', '.join(missing)}.")
    messages += [f"Skipped: {reason}." for reason in skipped]
    every = [compared(run) for run in runs]
    if differing := [key for key in every[0] if len({json.dumps(each[key]) for each in every}) > 1]:
        messages.append(
            f"The runs do not share their {', '.join(differing)}; the settings of each stand below."
        )
    for run in runs:
        notes = [f"{text}{f' ({n} times)' if n > 1 else ''}" for text, n in run.doubts().items()]
        messages += [f"† {run.name} ({run.label.removesuffix(' †')}): {note}." for note in first(notes, 10)]
    return messages


def summary(runs: list[Run]) -> str:
    """What was run and what came out, in two or three sentences."""
    settings, seeds = runs[0].settings, len(runs[0].seeds)
    tokens, testbed = finite(settings.get("tokens")), cut(str(settings.get("testbed")), 60)
    trained = "an unknown number of" if math.isnan(tokens) else f"{tokens:,.0f}"
    setup = f"{len(runs)} run{'s' * (len(runs) > 1)} on testbed {testbed}, "
    setup += f"{seeds} seed{'s' * (seeds > 1)} each, {trained} training tokens a SAE."
    scores = {run: run.mean(*SCORE)[0] for run in runs if np.isfinite(run.mean(*SCORE)[0])}
    if not scores:
        return f"{setup} No run has an unlearning score."
    best = max(scores, key=scores.__getitem__)
    text = (
        f"{setup} Highest mean unlearning score: {shown(*best.mean(*SCORE))} ({best.name}, {best.label}); the"
        f" same procedure on random features: {shown(*best.mean('unlearning', 'random_feature_score'))}."
    )
    vanilla = next((run for run in runs if run.arm == "vanilla"), best)
    for test in paired_tests([(best, vanilla)], *SCORE) if vanilla is not best else []:
        p = f"{test['p']:.2g}" if np.isfinite(test["p"]) else "not defined"
        text += (
            f" Against {vanilla.name} ({vanilla.label}), seed by seed: {test['difference']:+.3f} (paired"
            f" t-test, {test['n']} shared seeds, p {p}, not corrected for having picked the highest)."
        )
    return text


# ------------------------------------------------------------------------------------------------ figures


def minor_tick(value: float, position: float) -> str:
    """A label for 2, 3 and 5 of each decade alone."""
    return f"{value:g}" if f"{value:e}"[0] in "235" else ""


def plain_ticks(axis: Axes, scale: str):
    """A scale whose ticks read 0.2, not 2 × 10⁻¹."""
    axis.set_yscale(scale, **({"linthresh": 0.01} if scale == "symlog" else {}))
    axis.yaxis.set_major_formatter("{x:g}")
    if scale == "log":
        axis.yaxis.set_minor_formatter(minor_tick)
        axis.tick_params(axis="y", which="minor", labelsize=7)


def curve(axis: Axes, run: Run, x: np.ndarray, ys: np.ndarray):
    """The mean of ys [seed, point] over seeds, and a band from the least to the most."""
    step = max(1, len(x) // 6)
    axis.plot(x, ys.mean(0), markevery=(run.order * 3 % step, step), linewidth=1.4, **run.style)
    axis.fill_between(x, ys.min(0), ys.max(0), color=run.style["color"], alpha=run.band, linewidth=0)


def ranked(axis: Axes, run: Run, values: np.ndarray, step: int):
    """Values over their ranks from 1, with a marker at every step-th."""
    ranks = 1 + np.arange(len(values))
    axis.plot(ranks, values, markevery=(run.order % step, step), linewidth=1.3, **run.style)


def point(axis: Axes, run: Run, x, y, **kind):
    """(mean, standard error) on one axis or on both; a plain number has no error."""
    (x, xerr), (y, yerr) = (v if isinstance(v, tuple) else (v, math.nan) for v in (x, y))
    bars = {k: v for k, v in (("xerr", xerr), ("yerr", yerr)) if np.isfinite(v)}
    axis.errorbar(x, y, **bars, **(run.style | {"linestyle": "none", "markersize": 7, "capsize": 3} | kind))


def finish(figure: Figure, runs: list[Run], **legend) -> Figure:
    """The legend under the panels, headed by what † stands for."""
    flagged = []
    for run in runs:
        if notes := list(run.doubts()):
            more = f" (and {len(notes) - 1} more)" if len(notes) > 1 else ""
            flagged.append(f"{run.name}: {notes[0]}{more}")
    text = "† " + "; ".join(flagged).replace("$", r"\$")
    handles = [Line2D([], [], label=run.mark, **run.style) for run in runs]
    figure.legend(
        loc="outside lower center",
        title="\n".join(textwrap.wrap(text, 150, max_lines=4)) if flagged else None,
        title_fontsize=7,
        alignment="left",
        fontsize=8,
        frameon=False,
        handlelength=4,
        **{"handles": handles, "ncol": min(len(runs), 4)} | legend,
    )
    return figure


def training_curves(runs: list[Run]) -> Figure:
    panels = (
        ("fvu", "fraction of variance unexplained", "log"),
        ("l0", "active features a token (L0)", "log"),
        ("l1_coefficient", "weight of the sparsity loss (λ)", "log"),
        ("alpha", "weight of the orthogonality loss (α)", "symlog"),
        ("frac_dead", "share of features that are dead", "linear"),
        ("sharing", "share of firing common to both domains", "linear"),
    )
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), sharex=True, layout="constrained")
    for axis, (key, title, scale) in zip(axes.flat, panels):
        for run in (run for run in runs if run.log):
            tokens = sorted({r["tokens"] for r in run.log})
            logged = {(r["seed"], r["tokens"]): finite(r.get(key)) for r in run.log}
            ys = np.array([[logged.get((seed, t), np.nan) for t in tokens] for seed in run.seeds])
            ys[:, (ys <= 0).any(0) & (scale == "log")] = np.nan
            whole = np.isfinite(ys).all(0)  # a mean of fewer seeds is none
            if whole.any():
                curve(axis, run, np.array(tokens)[whole] / 1e6, ys[:, whole])
        axis.set_title(title, fontsize=10)
        plain_ticks(axis, scale)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("training tokens (millions)")
    return finish(figure, [run for run in runs if run.log])


def explained_variance(runs: list[Run]) -> Figure | str:
    if not (shown := [run for run in runs if np.isfinite(run.mean(*EXPLAINED)[0])]):
        return "no run has an explained variance"
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for axis, metric, title in zip(
        axes,
        (("core", "l0"), ("geometry", "mean_max_cosine")),
        ("active features a token (L0)", "mean over features of the largest |cosine| with another"),
    ):
        for run in shown:
            if np.isfinite(run.mean(*metric)[0]):
                point(axis, run, run.mean(*metric), run.mean(*EXPLAINED))
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("explained variance")
    return finish(figure, shown)


def within(sweep: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """The most gained by a cell of the sweep [cell, (cost, gain)] that costs no more than each budget;
    doing nothing gains 0."""
    costs, gains = sweep[np.argsort(sweep[:, 0])].T
    return np.maximum.accumulate([0.0, *gains])[np.searchsorted(costs, budgets + 1e-9, side="right")]


def mark_bounds(axis: Axes, floors: list[float]):
    """Chance, SAEBench's bound, and the accuracies that random features reach within it."""
    if floors:
        low = min(floors)
        axis.fill_between([0.99, 1.004], low - 0.004, 1.004, color="grey", alpha=0.4, linewidth=0)
        axis.annotate(
            "random features\nwithin the bound",
            (0.99, low),
            (0.985, 1.035),
            fontsize=8,
            color="#444444",
            va="bottom",
            arrowprops={"arrowstyle": "-", "color": "grey"},
        )
    look = {"fontsize": 8, "color": "#444444"}
    axis.axhline(0.25, color="grey", linewidth=1)
    axis.text(0.751, 0.26, "chance", ha="right", **look)
    axis.axvline(0.99, color="grey", linewidth=1, linestyle=":")
    axis.text(0.988, 0.27, "SAEBench's bound (0.99)", rotation=90, va="bottom", **look)


def unlearning_tradeoff(runs: list[Run]) -> Figure | str:
    figure, (questions, corpus) = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    shares, nats = np.linspace(0, 0.25, 251), np.geomspace(1e-3, 3, 300)
    for run in runs:
        if exams := [1 - sweep for sweep in run.sweeps(*QUESTIONS)]:
            curve(questions, run, 1 - shares, 1 - np.array([within(e, shares) for e in exams]))
        if texts := run.sweeps(*TEXT):
            curve(corpus, run, nats, np.array([within(t, nats) for t in texts]))
    if not questions.lines and not corpus.lines:
        plt.close(figure)
        return "no run has a sweep"
    scores = [s for run in runs for s in run.by_seed("unlearning", "random_feature_score").values()]
    mark_bounds(questions, [1 - score for score in scores if np.isfinite(score)])
    questions.set(
        xlabel="accuracy on known retain questions that is kept, at least",
        ylabel="lowest accuracy on known forget questions",
        xlim=(1.004, 0.75),
        ylim=(0, 1.12),
        title="questions (lower: more unlearned)",
    )
    corpus.set(
        xlabel="cross-entropy added on retain text, at most (nats a token)",
        ylabel="most cross-entropy added on forget text (nats a token)",
        xscale="log",
        title="held-out text (higher: more unlearned)",
    )
    corpus.xaxis.set_major_formatter("{x:g}")
    for axis in (questions, corpus):
        axis.grid(alpha=0.3)
    return finish(figure, runs)


def alpha_sweep(runs: list[Run]) -> Figure | str:
    grouped = sorted((r for r in runs if r.arm == "grouped" and r.alpha > 0), key=attrgetter("alpha"))
    others = [run for run in runs if run.arm in ("vanilla", "fixed", "adaptive", "ortsae")]
    if not grouped:
        return "no run of the grouped arm"
    figure, axes = plt.subplots(1, 3, figsize=(13, 5.5), layout="constrained")
    places = grouped[-1].alpha * 2.0 ** (1.5 + np.arange(len(others)))  # beside the sweep, one place each
    for axis, metric, title in zip(
        axes,
        (SCORE, GAIN, EXPLAINED),
        (
            "unlearning score",
            "cross-entropy added on forget text\nat 0.05 nats a token on retain text",
            "explained variance",
        ),
    ):
        means = np.array([run.mean(*metric)[0] for run in grouped])
        axis.plot([run.alpha for run in grouped], means, color="grey", linewidth=1)
        for run, place in [*zip(grouped, (run.alpha for run in grouped)), *zip(others, places)]:
            point(axis, run, place, run.mean(*metric))
        axis.axvline(grouped[-1].alpha * 2, color="grey", linewidth=1, linestyle=":")
        axis.set_xscale("log")
        axis.set_xticks([run.alpha for run in grouped], [f"{run.alpha:g}" for run in grouped])
        axis.set_xticks([], minor=True)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("α of the grouped loss" + "; right: the other arms" * bool(others))
        axis.grid(alpha=0.3, axis="y")
    return finish(figure, grouped + others)


def shortest_mean(rows: list[list]) -> np.ndarray:
    """Mean over seeds of lists of unequal length, as far as the shortest reaches."""
    rows = [[finite(v) for v in row] for row in rows if row]
    return np.array([row[: min(map(len, rows))] for row in rows]).mean(0) if rows else np.array([])


def label_geometry(spectra: Sequence[Axes], condition: Axes, angles: Axes, ranks: Axes):
    for axis, group in zip(spectra, GROUPS):
        axis.set(
            title=f"singular values, {group} features",
            xlabel="rank of the value",
            ylabel="singular value of the decoder rows",
        )
    for axis in (*spectra, condition):
        plain_ticks(axis, "log")
    condition.set(
        title="condition number of the group's decoder rows", ylabel="largest over smallest singular value"
    )
    ranks.set(title="effective rank of the group's decoder rows", ylabel="directions")
    angles.set(
        title="angles between forget and retain subspaces",
        xlabel="rank of the angle",
        ylabel="principal angle (degrees)",
    )
    for axis in (condition, ranks):
        axis.set_xticks(range(3), GROUPS)
        axis.set_xlim(-0.5, 2.5)
    for axis in (*spectra, angles):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (*spectra, condition, angles, ranks):
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)


def geometry(runs: list[Run]) -> Figure | str:
    if not (shown := [run for run in runs if run.evals.get("geometry")]):
        return "no run has eval/seed*_geometry.json"
    figure, (spectra, (condition, angles, ranks)) = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    offsets = np.linspace(-0.3, 0.3, len(shown)) if len(shown) > 1 else [0.0]
    for run, offset in zip(shown, offsets):
        seeds = run.evals["geometry"]
        for place, (axis, group) in enumerate(zip(spectra, GROUPS)):
            values = [(seed.get("singular_values") or {}).get(group) or [] for seed in seeds]
            ranked(axis, run, shortest_mean(values), 12)
            for panel, metric in ((condition, "condition_number"), (ranks, "effective_rank")):
                mean = run.mean("geometry", f"{metric}_{group}")
                point(panel, run, place + offset, mean, markersize=5)
        cosines = shortest_mean([seed.get("principal_cosines_forget_retain") or [] for seed in seeds])
        ranked(angles, run, np.degrees(np.arccos(np.clip(cosines, -1, 1))), 4)
    label_geometry(spectra, condition, angles, ranks)
    return finish(figure, shown)


def interventions(runs: list[Run]) -> Figure | str:
    asked = [(section, metric + s) for section, metric in (SCORE, GAIN) for s in INTERVENTIONS.values() if s]
    if not any(np.isfinite(run.mean(*metric)[0]) for run in runs for metric in asked):
        return "no run was evaluated under conditional clamping or the guardrail"
    figure, axes = plt.subplots(1, 2, figsize=(11, 2 + 0.5 * len(runs)), sharey=True, layout="constrained")
    for axis, (section, metric), title in zip(
        axes,
        (SCORE, GAIN),
        (
            "unlearning score",
            "cross-entropy added on forget text at a cost of\n0.05 on retain text (nats a token)",
        ),
    ):
        for k, (name, suffix) in enumerate(INTERVENTIONS.items()):
            look = {"marker": "os^"[k], "color": (COLOURS[0], COLOURS[1], COLOURS[5])[k]}
            for i, run in enumerate(runs):
                point(axis, run, run.mean(section, metric + suffix), i + 0.22 * (k - 1), markersize=6, **look)
            axis.plot([], [], linestyle="none", label=name, **look)
        axis.set_xlabel(title)
        axis.set_yticks(range(len(runs)), [run.mark for run in runs])
        axis.hlines(
            np.arange(len(runs) - 1) + 0.5,
            0,
            1,
            transform=axis.get_yaxis_transform(),
            color="#dddddd",
            linewidth=1,
        )
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    return finish(figure, runs, handles=axes[0].get_legend_handles_labels()[0], ncol=3)


def by_form(run: Run) -> dict[str, tuple[float, float]]:
    """Of every form of asking: knowledge left, and the share of seeds that keep too little in it; means over
    seeds."""
    tables = [details["forms"] for details in run.evals.get("robustness", []) if details.get("forms")]
    cells: dict[str, list] = {}
    for row in (row for table in tables for row in table):
        spoilt = row.get("kept_enough") is not True
        cells.setdefault(cut(plain(row["form"]), 60), []).append((finite(row.get("left")), spoilt))
    left, spoilt = ({f: float(np.mean([c[k] for c in v])) for f, v in cells.items()} for k in (0, 1))
    return {form: (left[form], spoilt[form]) for form in cells}


def by_worst_case(runs: list[Run]) -> list[Run]:
    """The runs with a worst-case score, the best first; where it is the same, the one that leaves less."""

    def order(run: Run) -> tuple[float, float]:
        return -run.mean(*WORST)[0], run.mean("robustness", "knowledge_left_max")[0]

    return sorted((run for run in runs if np.isfinite(run.mean(*WORST)[0])), key=order)


def robustness(runs: list[Run]) -> Figure | str:
    if not (shown := [run for run in by_worst_case(runs) if by_form(run)]):
        return "no run was evaluated for robustness"
    tables = [by_form(run) for run in shown]
    forms = list(dict.fromkeys(form for table in tables for form in table))
    cells = np.array([[table.get(form, (np.nan, 0.0)) for form in forms] for table in tables])
    size = (4 + 0.16 * len(forms), 2.6 + 0.3 * len(shown))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = axis.imshow(cells[..., 0], vmin=0, vmax=1, cmap="cividis_r", aspect="auto")
    y, x = np.nonzero(cells[..., 1] > 0)
    axis.plot(x, y, "x", color="#D55E00", markersize=4, linestyle="none")
    axis.set_xticks(range(len(forms)), [form.replace("_", " ") for form in forms], rotation=90, fontsize=6)
    texts = [
        f"{run.mark}   {shown_or_dash(run, 'worst_case_score')} ({shown_or_dash(run, 'kept_at_worst')})"
        for run in shown
    ]
    axis.set_yticks(range(len(shown)), texts, fontsize=8)
    figure.colorbar(image, ax=axis, label="knowledge left", pad=0.01)
    axis.set_title("worst-case score (least kept), and knowledge left in every form of asking", fontsize=9)
    return figure


def shown_or_dash(run: Run, metric: str) -> str:
    mean = run.mean("robustness", metric)[0]
    return "-" if np.isnan(mean) else f"{mean:.2f}"


FIGURES = {  # drawer -> what it shows, in words; the PNG bears the drawer's name
    unlearning_tradeoff: (
        "Trade-off between forgetting and retaining under SAEBench's sweep. Left: the lowest accuracy on"
        " known forget questions that any setting reaches while keeping at least so much accuracy on known"
        " retain questions, with chance, SAEBench's bound, and what random features reach within the bound."
        " Right: the same for held-out text, in cross-entropy."
    ),
    robustness: (
        "Knowledge left in every form of asking, one row a run in the order of the worst case: the score is"
        " one less the most that is left in any form, and 0 where a form (crossed) keeps under 0.99 of the"
        " retain questions or under 0.95 of one subject's in any seed. In brackets the least that is kept."
        " Means over seeds."
    ),
    explained_variance: (
        "Explained variance against L0 (left) and against the mean largest cosine between features (right)."
        " Bars: standard error over seeds."
    ),
    alpha_sweep: (
        "The grouped arm over the weight α of its loss, beside the other arms: unlearning score,"
        " cross-entropy added on forget text, explained variance. Bars: standard error over seeds."
    ),
    interventions: (
        "Unlearning under three interventions: clamp, conditional clamp and guardrail; in questions (left)"
        " and in held-out text (right). Bars: standard error over seeds."
    ),
    geometry: (
        "Geometry of forget, retain and shared features: singular values of their decoder rows (mean over"
        " seeds as far as the smallest group reaches), condition numbers and effective ranks (mean and"
        " standard error), and principal angles between the forget and the retain subspaces (0 degrees: a"
        " direction in common)."
    ),
    training_curves: (
        "Training: fraction of variance unexplained, L0, λ, α, dead features, and the share of firing that"
        " the two domains have in common. Mean over seeds."
    ),
}
BAND = " Bands run from the least to the most of the seeds."


# ------------------------------------------------------------------------------------------------ report


class Cell(NamedTuple):
    """A cell of a table that can be sorted: text, what it is sorted by, small print under it."""

    text: object
    key: object
    small: str = ""


def numeric(text: str, value: float, small: str = "") -> Cell:
    """The cell of a number; nan has nothing to be sorted by and stays last."""
    return Cell(text, "" if math.isnan(value) else value, small)


def results(runs: list[Run]) -> list[list[Cell]]:
    """The rows of the table of results."""
    rows = []
    for i, run in enumerate(runs):
        row = [Cell(run.name, i), Cell(run.label, run.label), Cell(len(run.seeds), len(run.seeds))]
        for section, metric, _ in columns(runs):
            seeds = [f"{v:.3f}" if np.isfinite(v) else "-" for v in run.by_seed(section, metric).values()]
            mean = run.mean(section, metric)
            row.append(numeric(shown(*mean), mean[0], ", ".join(seeds)))
        rows.append([*row, Cell(len(run.warnings), len(run.warnings))])
    return rows


def tests(runs: list[Run], metric: tuple[str, str]) -> list[list[Cell]]:
    """The rows of the table of paired tests, least p first; none where no two runs share a seed."""

    def p(value: float) -> Cell:
        text = "-" if np.isnan(value) else f"{value:.3f}" if value >= 0.001 else "< 0.001"
        return numeric(text, value)

    rows = []
    for t in sorted(paired_tests(combinations(runs, 2), *metric), key=lambda t: (math.isnan(t["p"]), t["p"])):
        pair = f"{t['a'].name} {t['a'].label} against {t['b'].name} {t['b'].label}"
        seeds = ", ".join(f"{d:+.3f}" for d in t["by_seed"])
        gap = Cell(difference(t), t["difference"], seeds)
        rows.append([Cell(pair, pair), Cell(t["n"], t["n"]), gap, p(t["p"]), p(t["holm"])])
    return rows


def all_metrics(run: Run) -> list[tuple[str, str, str]]:
    """Every metric of a run: its name, mean ± standard error, the seeds."""
    rows = []
    for section, metric in [(s, m) for s, parts in run.info.items() for m in parts["means"]]:
        seeds = [f"{v:.4g}" if np.isfinite(v) else "-" for v in run.by_seed(section, metric).values()]
        mean = shown(*run.mean(section, metric), ".4g")
        rows.append((f"{section}.{cut(metric, 60)}", mean, ", ".join(seeds)))
    return rows


def all_settings(run: Run) -> list[tuple[str, str]]:
    """Every setting of a run and what made each of its sections, with its value."""
    settings = [(k, v) for k, v in run.config.items() if not isinstance(v, dict)]
    parts = {k: v for k, v in run.config.items() if k != "requested"}
    parts |= {f"{section}.made_by": of.get("made_by") for section, of in run.info.items()}
    nested = [(f"{k}.{k2}", v2) for k, v in parts.items() if isinstance(v, dict) for k2, v2 in v.items()]
    return [
        (cut(k, 100), cut(v if isinstance(v, str) else json.dumps(v), 2000)) for k, v in nested + settings
    ]


class Picture(NamedTuple):
    """A PNG for the page."""

    base64: str
    width: int
    height: int
    words: str


def picture(png: bytes, drawer: Callable) -> Picture:
    width, height = struct.unpack(">II", png[16:24])
    words = FIGURES[drawer] + BAND * (drawer in (unlearning_tradeoff, training_curves))
    return Picture(base64.b64encode(png).decode(), width, height, words)


def as_text(value):
    """What a template puts on the page, with nothing in it that is not printable; HTML of its own stays."""
    return value if hasattr(value, "__html__") else plain(str(value))


def report(runs: list[Run], skipped: list[str], figures: dict[Callable, bytes]) -> str:
    """The page: everything that comes from a run folder is escaped, and its policy lets no other script
    run and nothing load."""
    source = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    script = source.partition("<script>")[2].partition("</script>")[0]
    page = jinja2.Environment(
        autoescape=True, finalize=as_text, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return page.from_string(source).render(
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        summary=summary(runs),
        cautions=cautions(runs, skipped),
        columns=[title for _, _, title in columns(runs)],
        results=results(runs),
        pictures=[picture(png, drawer) for drawer, png in figures.items()],
        tests={name: tests(runs, metric) for name, metric in TESTED.items()},
        runs=[(run, first(run.warnings, 50), all_metrics(run), all_settings(run)) for run in runs],
    )


# ------------------------------------------------------------------------------------------------ command


class Parser(argparse.ArgumentParser):
    """Ends as every other wrong request does, and writes as everything else is written."""

    def error(self, message):
        raise WrongRequest(f"{message}; python plot.py --help lists the options")

    def print_help(self, file=None):
        say(self.format_help().rstrip())


def named(folders: list[Path]) -> list[Path]:
    """The folders of the command. Raises WrongRequest for one that is not there or is given twice."""
    real = [os.path.realpath(folder) for folder in folders]
    for i, folder in enumerate(folders):
        if not os.path.lexists(folder):
            raise WrongRequest(f"{folder}: there is no such folder; name folders that experiment.py wrote")
        if real[i] in real[:i]:
            raise WrongRequest(f"{folder} is given twice (as {folders[real.index(real[i])]}); leave one out")
    return folders or [p for p in Path().glob("run_*") if os.path.isdir(p) or not os.path.exists(p)]


def run_named(name: str, runs: list[Run]) -> Run:
    """The run of --against. Raises WrongRequest where there is none, or nothing to compare it with."""
    reference = next((run for run in runs if run.name == plain(name)), None)
    if reference is None:
        there = ", ".join(run.name for run in runs)
        raise WrongRequest(f"--against {name}: no complete run of that name; there are {there}")
    if len(runs) == 1:
        raise WrongRequest(f"--against {name}: there is no other complete run to compare it with")
    return reference


OURS = b"Matplotlib version", b"<title>Knowledge separation in sparse autoencoders</title>"


def write(name: str, content: bytes):
    """A file in the current folder, whole or not at all: what stood there stays until the new one is there.

    Raises RunFailed where that cannot be, or where what stands there is not a file or is write-protected."""
    try:
        target = Path(os.path.realpath(name))
        if os.path.lexists(target) and not os.path.isfile(target):
            raise RunFailed(f"{name} cannot be written: what stands there is not a file; move it away")
        if os.path.lexists(target) and not any(mark in target.read_bytes()[:2000] for mark in OURS):
            raise RunFailed(f"{name} would be replaced, and is none of this program's: move it away")
        if os.path.lexists(target) and not os.access(target, os.W_OK):
            raise RunFailed(f"{name} cannot be written: it is write-protected; move it away or permit it")
        with tempfile.TemporaryDirectory(prefix=".plot_", dir=target.parent) as beside:
            part = Path(beside, target.name)
            part.write_bytes(content)
            part.replace(target)
    except OSError as error:
        remedies = REMEDIES | {errno.ENOENT: "start this in a folder that can be written"}
        remedy = remedies.get(error.errno or errno.ENOENT, remedies[errno.ENOENT])
        raise RunFailed(f"{name} cannot be written: {error.strerror}; {remedy}") from error
    say(f"wrote {name}")


def draw(runs: list[Run]) -> dict[Callable, bytes]:
    """Write the figures; the PNGs that were made, by drawer."""
    made = {}
    for drawer in FIGURES:
        name, figure = f"{drawer.__name__}.png", drawer(runs)
        if isinstance(figure, str):
            say(f"no {name}: {figure}")
            continue
        png = io.BytesIO()
        figure.savefig(png)
        plt.close(figure)
        write(name, png.getvalue())
        made[drawer] = png.getvalue()
    return made


def show():
    """What the command asks for. Raises WrongRequest, and RunFailed for what cannot be written."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="run folders (default: run_* here)")
    parser.add_argument("--table", action="store_true", help="print the table and draw nothing")
    parser.add_argument(
        "--against",
        metavar="RUN",
        help="print paired t-tests of this run against each other one, and draw nothing",
    )
    args = parser.parse_args()
    runs, skipped = find_runs(named(args.folders))
    if not runs:
        remedy = "make one with python experiment.py --out_dir=run_0"
        raise WrongRequest(f"no complete run folder to plot; {remedy}")
    if args.against is not None:
        return say(against_table(run_named(args.against, runs), runs))
    say(summary_table(runs))
    if by_worst_case(runs):
        say("\n" + ruler_table(runs))
    if args.table:
        return
    for text in cautions(runs, []):
        say(text)
    write("report.html", report(runs, skipped, draw(runs)).encode())


def main() -> int:
    """Exit code of the command. But for 0, the last line on stderr says why."""
    try:
        with process.signals:
            show()
        return 0
    except Interrupted as stop:
        return tell(Interrupted(stop.number, "every file that was written is whole"))
    except Exception as error:
        return tell(error, take_less="give fewer run folders at once")


if __name__ == "__main__":
    CODE = main()
    for ending in stops():  # all is written and told
        signal.signal(ending, signal.SIG_IGN)
    sys.exit(CODE)
