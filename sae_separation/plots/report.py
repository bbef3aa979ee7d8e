"""The report: one page that opens from disk and needs nothing else."""

import base64
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from sae_separation import evals
from sae_separation.errors import plain
from sae_separation.plots import pages
from sae_separation.plots.folders import Run, cut, first
from sae_separation.plots.tables import (
    GAIN,
    SCORE,
    cautions,
    columns,
    difference,
    paired_tests,
    shown,
    summary,
)

TESTED = {
    "Unlearning score": SCORE,
    "Cross-entropy added on forget text at 0.05 nats a token on retain text": GAIN,
}
PAGE = Path(__file__).with_name("page")  # templates, style and script
PARTS = ("style.css", "inside.css"), ("script.js", "inside.js")


class Picture(NamedTuple):
    """A figure for the page: name, title, what it shows, its PNG, width and height in pixels of CSS."""

    name: str
    title: str
    words: str
    png: bytes
    width: int
    height: int

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()


class Column(NamedTuple):
    """The head of a column: title, what stands in it, and whether rows can be chosen by it."""

    title: str
    says: str = ""
    filter: bool = False


class Cell(NamedTuple):
    """A cell of a table that can be sorted: text, what it is sorted by, small print under it, its link."""

    text: object
    key: object
    small: str = ""
    href: str = ""


class Section(NamedTuple):
    """A section of the page: its anchor, which is its template's name too, its title, the values of its
    template, and what stands under it in the contents (anchor, title)."""

    name: str
    title: str
    values: dict
    entries: Sequence[tuple[str, str]] = ()


def numeric(text: str, value: float, small: str = "") -> Cell:
    """The cell of a number; nan has nothing to be sorted by and stays last."""
    return Cell(text, "" if math.isnan(value) else value, small)


def results(runs: list[Run], pictures: list[Picture]) -> Section:
    """The table of results."""
    meanings = {row.section: row.says for row in evals.ROWS}
    metrics = columns(runs)
    heads = [Column("run"), Column("arm", filter=True), Column("seeds")]
    heads += [Column(head, meanings[section].get(metric, "")) for section, metric, head in metrics]
    rows = []
    for i, run in enumerate(runs):
        row = [Cell(run.name, i, href=f"#run-{i}"), Cell(run.method, run.method)]
        row.append(Cell(len(run.seeds), len(run.seeds)))
        for section, metric, _ in metrics:
            seeds = [f"{v:.3f}" if np.isfinite(v) else "-" for v in run.by_seed(section, metric).values()]
            mean = run.mean(section, metric)
            row.append(numeric(shown(*mean), mean[0], ", ".join(seeds)))
        rows.append([*row, Cell(len(run.warnings), len(run.warnings))])
    return Section("results", "Results", {"columns": [*heads, Column("warnings")], "rows": rows})


def figures(runs: list[Run], pictures: list[Picture]) -> Section:
    entries = [(picture.name, picture.title) for picture in pictures]
    return Section("figures", "Figures", {"pictures": pictures}, entries)


TEST_COLUMNS = (
    Column("run", filter=True),
    Column("less", "the run that is subtracted", filter=True),
    Column("seeds", "how many the two share"),
    Column("difference", "mean ± standard error over the seeds that they share; under it, seed by seed"),
    Column("p", "of the two-sided paired t-test"),
    Column("p (Holm)", "corrected for the number of tests in the table"),
)


def tests(runs: list[Run], pictures: list[Picture]) -> Section:
    """The tables of paired tests."""
    tables = {name: rows_of_tests(runs, metric) for name, metric in TESTED.items()}
    return Section("tests", "Paired tests", {"columns": TEST_COLUMNS, "tests": tables})


def rows_of_tests(runs: list[Run], metric: tuple[str, str]) -> list[list[Cell]]:
    """Least p first; none where no two runs share a seed."""

    def p(value: float) -> Cell:
        text = "-" if np.isnan(value) else f"{value:.3f}" if value >= 0.001 else "< 0.001"
        return numeric(text, value)

    rows = []
    for t in sorted(paired_tests(combinations(runs, 2), *metric), key=lambda t: (math.isnan(t["p"]), t["p"])):
        seeds = ", ".join(f"{d:+.3f}" for d in t["by_seed"])
        gap = Cell(difference(t), t["difference"], seeds)
        pair = [Cell(run.title, run.title) for run in (t["a"], t["b"])]
        rows.append([*pair, Cell(t["n"], t["n"]), gap, p(t["p"]), p(t["holm"])])
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


MOST_INSIDE = 900_000  # bytes of the insides of runs: the page of all committed runs stays under 3 MB


def inside(runs: list[Run], pictures: list[Picture]) -> Section:
    """Features, answers and prompts: the first seed of every run, and as many more as there is room for. Of
    runs without them, the command that makes them."""
    places = range(max(len(run.seeds) for run in runs))
    some = [(run, run.seeds[place]) for place in places for run in runs if place < len(run.seeds)]
    titled = {f"{run.title}, seed {seed}": run.pages[seed] for run, seed in some if run.pages[seed]}
    texts, fit, left_out = pages.that_fit(titled, MOST_INSIDE)
    entries = [("features", "Features"), ("questions", "Questions"), ("prompts", "Prompts")]
    values = {"texts": texts, "pages": fit, "left_out": left_out, "example": runs[0].name}
    return Section("inside", "Inside a run", values, entries if fit else [])


def details(runs: list[Run], pictures: list[Picture]) -> Section:
    """Warnings, metrics and settings of each run."""
    rows = [(run, first(run.warnings, 50), all_metrics(run), all_settings(run)) for run in runs]
    return Section("runs", "Runs", {"runs": rows})


SECTIONS: tuple[Callable[[list[Run], list[Picture]], Section], ...] = (  # in the order of the page
    results,
    figures,
    inside,
    tests,
    details,
)


def as_text(value):
    """What a template puts on the page, with nothing in it that is not printable; HTML of its own stays."""
    return value if hasattr(value, "__html__") else plain(str(value))


def render(runs: list[Run], skipped: list[str], pictures: list[Picture]) -> str:
    """The page: everything that comes from a run folder is escaped, and its policy lets no other script
    run and nothing load."""
    style, script = ("".join((PAGE / name).read_text(encoding="utf-8") for name in some) for some in PARTS)
    sections = [make(runs, pictures) for make in SECTIONS]
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        finalize=as_text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return templates.get_template("page.html").render(
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        style=Markup(style),
        script=Markup(script),
        summary=summary(runs),
        cautions=cautions(runs, skipped),
        sections=sections,
    )
