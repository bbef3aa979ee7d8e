"""Run folders read without torch: each file checked for what a run writes, and each run with its names and
its look in figures.
"""

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np

from sae_separation import run_folder
from sae_separation.errors import plain
from sae_separation.files import content_of
from sae_separation.plots import pages
from sae_separation.plots.looks import in_lines, literal, look

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
    "run_22": "adaptive directions",
    "run_23": "adaptive directions and firing",
    "run_24": "G-SAE",
    "run_25": "gradient routing",
    "run_26": "soft-frozen decoder",
    "run_27": "frozen encoder",
    "run_28": "context gate",
    "run_29": "context gate on features of vanilla",
    "run_30": "context gate on features of ortsae",
    "run_31": "context gate on features of adaptive",
    "run_32": "context gate on features of a frozen encoder",
}
VARIANTS = {
    "run_3": 1,
    "run_4": 2,
    "run_5": 3,
    "run_7": 1,
    "run_8": 2,
    "run_30": 1,
    "run_31": 2,
    "run_32": 3,
}  # of their arms; the others are the first
KINDS = ("means", "stderrs", "final_info_dict")
# where a sweep stands, and its cells' cost and gain
QUESTIONS = ("unlearning", "retain_accuracy", "forget_accuracy")
TEXT = ("corpus_unlearning", "retain_ce_cost", "forget_ce_gain")
MOST = float(np.finfo(np.float32).max)  # no number of a run is larger
DEEPEST = 50  # lists in lists and objects in objects in a run's JSON


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

    method: str  # what it is, as tables say beside its name; this and the next six are by `name_and_style`
    label: str  # the same where its name does not stand beside it
    title: str  # name and method, as sentences have it
    mark: str  # the label in figures, in lines that are not too long
    order: int  # among the runs shown, from 0
    style: dict  # colour, line style and marker
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
        self.pages = {seed: pages.read(folder, seed) for seed in self.seeds}
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
        if self.info["training"]["means"].get("final_fvu") is None and not os.path.lexists(path):
            return []  # nothing was trained: a method that needs no SAE, or SAEs of others
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
    answer, knowledge that does not come back, how an SAE of others was trained."""
    remarks = ("undefined for seeds", "which do not count", "relearning: more than", "files do not say")
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
    """Give each run its names, and the look of its method. A run of the plan looks the same whichever others
    are shown; the user's own take what the plan's leave free."""
    names, marks = Counter(run.name for run in runs), Counter()
    in_plan = {run for run in runs if run.name in labels and names[run.name] == 1}
    taken = {(run.arm, VARIANTS.get(run.name, 0)) for run in in_plan}
    for order, run in enumerate(runs):
        flag = " †" * bool(run.doubts())
        what = labels.get(run.name, run.arm)
        run.name = plain(str(run.folder)) if names[run.name] > 1 else run.name
        run.method, run.title = what + flag, f"{run.name} ({what})"
        run.label = run.method if run in in_plan else run.title + flag
        mark = literal(in_lines(run.label))
        marks[mark] += 1
        run.mark = f"{mark} ({marks[mark]})" if marks[mark] > 1 else mark
        variant = VARIANTS.get(run.name, 0)
        if run not in in_plan:
            variant = next(k for k in count() if (run.arm, k) not in taken)
            taken.add((run.arm, variant))
        run.style = look(run.arm, variant)
        run.order, run.band = order, min(0.15, 0.5 / len(runs))
