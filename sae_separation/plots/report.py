"""The report: one page that opens from disk and needs nothing else."""

import base64
import hashlib
import json
import math
import struct
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np

from sae_separation.errors import plain
from sae_separation.plots import figures
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
    words = figures.FIGURES[drawer]
    return Picture(base64.b64encode(png).decode(), width, height, words)


def as_text(value):
    """What a template puts on the page, with nothing in it that is not printable; HTML of its own stays."""
    return value if hasattr(value, "__html__") else plain(str(value))


def render(runs: list[Run], skipped: list[str], pngs: dict[Callable, bytes]) -> str:
    """The page: everything that comes from a run folder is escaped, and its policy lets no other script
    run and nothing load."""
    source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
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
        pictures=[picture(png, drawer) for drawer, png in pngs.items()],
        tests={name: tests(runs, metric) for name, metric in TESTED.items()},
        runs=[(run, first(run.warnings, 50), all_metrics(run), all_settings(run)) for run in runs],
    )
