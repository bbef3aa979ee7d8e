"""The figures: one function each, which returns a figure, or why there is none."""

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator
from PIL import Image, PngImagePlugin

from sae_separation.errors import plain
from sae_separation.plots.folders import QUESTIONS, TEXT, Run, cut, finite
from sae_separation.plots.looks import literal
from sae_separation.plots.tables import EXPLAINED, GAIN, MATCHED_L0, SCORE, by_worst_case

matplotlib.rcParams |= {"savefig.dpi": 150, "axes.formatter.useoffset": False, "svg.hashsalt": "figures"}

# intervention -> suffix of its metrics, marker
INTERVENTIONS = {"clamp": ("", "o"), "conditional": ("_conditional", "s"), "guardrail": ("_guardrail", "^")}
GROUPS = ("forget", "retain", "shared")
EXPLAINED_TICKS = (-1, 0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)

# ------------------------------------------------------------------------------------------------ axes


def panels(rows: int, columns: int, width: float, height: float, **shared) -> tuple[Figure, np.ndarray]:
    """A figure of so many inches and its axes [row, column]."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def rescale(axis: Axes, scale: Callable[[Axes], None]):
    """Give an axis that shows something its scale."""
    if np.isfinite(axis.dataLim.ymin):
        scale(axis)


def minor_tick(value: float, position: float) -> str:
    """A label for 2, 3 and 5 of each decade alone."""
    return f"{value:g}" if f"{value:e}"[0] in "235" else ""


def log_scale(axis: Axes):
    """A logarithmic y axis whose ticks read 0.2, not 2 × 10⁻¹; as many as have room. What differs by less
    than a part in 50 looks like it."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if high < 1.02 * low:
        low, high = axis.set_ylim((low * high) ** 0.5 / 1.01, (low * high) ** 0.5 * 1.01)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.tick_params(axis="y", which="minor", labelsize=7)
    if high < 5 * low:
        axis.yaxis.set_major_locator(MaxNLocator(6))
        axis.yaxis.set_minor_locator(NullLocator())
    elif high < 200 * low:
        axis.yaxis.set_minor_formatter(minor_tick)
    else:
        axis.yaxis.set_minor_formatter("")


def from_zero(axis: Axes):
    """A y axis that starts at 0 or, where there are values below, under them, and is not tiny."""
    high = max(axis.get_ylim()[1], 0.05)
    axis.set_ylim(min(axis.dataLim.ymin * 1.05, -0.02 * high), high)


def whole_share(axis: Axes):
    """The y axis of a share: from 0 to 1."""
    axis.set_ylim(0, 1.02)


def weight_scale(axis: Axes):
    """The y axis of a weight that may be 0: linear up to 0.01, then logarithmic."""
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set_ylim(-0.002, max(2 * axis.dataLim.ymax, 0.1))
    axis.yaxis.set_major_formatter("{x:g}")


def explained_scale(axis: Axes):
    """A y axis of explained variance, from 0, on which half of what is unexplained is always as far."""

    def height(explained):
        return -np.log(np.maximum(1 - np.asarray(explained), 1e-6))

    def explained(height):
        return 1 - np.exp(-np.asarray(height))

    lowest, highest = axis.dataLim.ymin, axis.dataLim.ymax
    axis.set_yscale("function", functions=(height, explained))
    axis.set_yticks(EXPLAINED_TICKS, [f"{tick:g}" for tick in EXPLAINED_TICKS])
    axis.set_ylim(min(0.0, lowest) - 0.02, min(1 - (1 - highest) / 1.5, 0.9999))


def at_least_wide(axis: Axes, width: float):
    """An x axis that spans so much, however near each other its values are."""
    low, high = axis.get_xlim()
    if high - low < width:
        middle = (low + high) / 2
        axis.set_xlim(middle - width / 2, middle + width / 2)


# ------------------------------------------------------------------------------------------------ marks


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


def handle(run: Run, points: bool = False) -> Line2D:
    """A run's line, or its marker alone, for a legend."""
    style: dict[str, Any] = run.style | ({"linestyle": "none"} if points else {})
    return Line2D([], [], label=run.mark, **style)


def flags(runs: list[Run], width: int) -> str:
    """What † stands for, in lines; empty where no run bears it."""
    flagged = []
    for run in runs:
        if notes := list(run.doubts()):
            more = f" (and {len(notes) - 1} more)" if len(notes) > 1 else ""
            flagged.append(f"{run.name}: {notes[0]}{more}")
    text = "† " + "; ".join(flagged)
    return literal("\n".join(textwrap.wrap(text, width, max_lines=4))) if flagged else ""


def finish(figure: Figure, runs: list[Run], handles: Sequence[Artist]) -> Figure:
    """The legend under the panels, headed by what † stands for; the figure grows by its height."""
    width, height = figure.get_size_inches()
    longest = max(len(line) for h in handles for line in str(h.get_label()).split("\n"))
    columns = max(1, min(len(handles), 5, int((width - 0.3) / (0.8 + 0.068 * longest))))
    rows = math.ceil(len(handles) / columns)
    lines = sum(max(str(h.get_label()).count("\n") + 1 for h in handles[i::rows]) for i in range(rows))
    note = flags(runs, int(17 * width))
    figure.legend(
        loc="outside lower center",
        title=note or None,
        title_fontsize=7,
        alignment="left",
        fontsize=8,
        frameon=False,
        handlelength=3.5,
        handles=handles,
        ncols=columns,
    )
    figure.set_size_inches(width, height + 0.17 * lines + 0.15 * (note.count("\n") + 1) * bool(note))
    return figure


# ------------------------------------------------------------------------------------------------ figures

LOGGED = (  # key in the log, title, scale of its axis
    ("fvu", "fraction of variance unexplained", log_scale),
    ("l0", "active features a token (L0)", log_scale),
    ("l1_coefficient", "weight of the sparsity loss (λ)", log_scale),
    ("alpha", "weight of the orthogonality loss (α)", weight_scale),
    ("frac_dead", "share of features that are dead", from_zero),
    ("sharing", "share of firing common to both domains", whole_share),
)


def training_curves(runs: list[Run]) -> Figure | str:
    if not (shown := [run for run in runs if run.log]):
        return "no run trained an SAE"
    figure, axes = panels(2, 3, 13, 6.6, sharex=True)
    for axis, (key, title, scale) in zip(axes.flat, LOGGED):
        for run in shown:
            tokens = sorted({r["tokens"] for r in run.log})
            logged = {(r["seed"], r["tokens"]): finite(r.get(key)) for r in run.log}
            ys = np.array([[logged.get((seed, t), np.nan) for t in tokens] for seed in run.seeds])
            ys[:, (ys <= 0).any(0) & (scale is log_scale)] = np.nan
            whole = np.isfinite(ys).all(0)  # a mean of fewer seeds is none
            if whole.any():
                curve(axis, run, np.array(tokens)[whole] / 1e6, ys[:, whole])
        axis.set_title(title, fontsize=10)
        rescale(axis, scale)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("training tokens (millions)")
    return finish(figure, shown, [handle(run) for run in shown])


def explained_variance(runs: list[Run]) -> Figure | str:
    if not (shown := [run for run in runs if np.isfinite(run.mean(*EXPLAINED)[0])]):
        return "no run has an explained variance"
    figure, axes = panels(1, 2, 11, 4.6, sharey=True)
    sparsity, cosine = axes[0]
    for axis, metric, title in (
        (sparsity, ("core", "l0"), "active features a token (L0)"),
        (cosine, ("geometry", "mean_max_cosine"), "mean over features of the largest |cosine| with another"),
    ):
        for run in shown:
            if np.isfinite(run.mean(*metric)[0]):
                point(axis, run, run.mean(*metric), run.mean(*EXPLAINED))
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    for axis in (sparsity, cosine):
        rescale(axis, explained_scale)
    at_least_wide(sparsity, MATCHED_L0)
    cosine.set_xlim(0, 1)
    sparsity.set_ylabel("explained variance")
    return finish(figure, shown, [handle(run, points=True) for run in shown])


def within(sweep: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """The most gained by a cell of the sweep [cell, (cost, gain)] that costs no more than each budget;
    doing nothing gains 0."""
    costs, gains = sweep[np.argsort(sweep[:, 0])].T
    return np.maximum.accumulate([0.0, *gains])[np.searchsorted(costs, budgets + 1e-9, side="right")]


def mark_bounds(axis: Axes, floors: list[float]) -> list[Artist]:
    """Chance, SAEBench's bound, and the accuracies that random features reach within it; what the legend
    says of them."""
    grey: dict[str, Any] = {"color": "grey", "linewidth": 1}
    axis.axhline(0.25, **grey)
    axis.axvline(0.99, linestyle=":", **grey)
    handles: list[Artist] = [
        Line2D([], [], label="chance (0.25)", **grey),
        Line2D([], [], label="SAEBench's bound (0.99)", linestyle=":", **grey),
    ]
    if floors:
        axis.fill_between([0.99, 1.004], min(floors) - 0.004, 1.004, color="grey", alpha=0.4, linewidth=0)
        handles.append(Patch(label="random features within the bound", color="grey", alpha=0.4, linewidth=0))
    return handles


def unlearning_tradeoff(runs: list[Run]) -> Figure | str:
    figure, axes = panels(1, 2, 12, 5.4)
    questions, corpus = axes[0]
    shares, nats = np.linspace(0, 0.25, 251), np.geomspace(1e-3, 3, 300)
    shown = []
    for run in runs:
        if exams := [1 - sweep for sweep in run.sweeps(*QUESTIONS)]:
            curve(questions, run, 1 - shares, 1 - np.array([within(e, shares) for e in exams]))
        if texts := run.sweeps(*TEXT):
            curve(corpus, run, nats, np.array([within(t, nats) for t in texts]))
        shown += [run] * bool(exams or texts)
    if not shown:
        return "no run has a sweep"
    scores = [s for run in runs for s in run.by_seed("unlearning", "random_feature_score").values()]
    handles = mark_bounds(questions, [1 - score for score in scores if np.isfinite(score)])
    questions.set(
        xlabel="accuracy on known retain questions that is kept, at least",
        ylabel="lowest accuracy on known forget questions",
        xlim=(1.004, 0.75),
        ylim=(0, 1.02),
        title="questions (lower: more unlearned)",
    )
    corpus.set(
        xlabel="cross-entropy added on retain text, at most (nats a token)",
        ylabel="most cross-entropy added on forget text (nats a token)",
        xscale="log",
        title="held-out text (higher: more unlearned)",
    )
    rescale(corpus, from_zero)
    corpus.xaxis.set_major_formatter("{x:g}")
    for axis in (questions, corpus):
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
    return finish(figure, shown, [handle(run) for run in shown] + handles)


def places_beside(alphas: list[float], n: int) -> np.ndarray:
    """Where n other arms stand on the logarithmic axis of α: right of the sweep, one place each, on at most
    as much of it again."""
    room = max(alphas[-1] / alphas[0], 10.0)
    return 2 * alphas[-1] * min(2.0, room ** (1 / max(n, 1))) ** (np.arange(n) + 1.0)


def alpha_sweep(runs: list[Run]) -> Figure | str:
    grouped = sorted((r for r in runs if r.arm == "grouped" and r.alpha > 0), key=attrgetter("alpha"))
    others = [run for run in runs if run.log and run.arm != "grouped"]
    if not grouped:
        return "no run of the grouped arm"
    figure, axes = panels(1, 3, 13, 4.8)
    alphas = [run.alpha for run in grouped]
    for axis, metric, title, scale in zip(
        axes[0],
        (SCORE, GAIN, EXPLAINED),
        (
            "unlearning score",
            "cross-entropy added on forget text\nat 0.05 nats a token on retain text",
            "explained variance",
        ),
        (from_zero, from_zero, explained_scale),
    ):
        means = np.array([run.mean(*metric)[0] for run in grouped])
        axis.plot(alphas, means, color=grouped[0].style["color"], linewidth=1)
        for run, place in [*zip(grouped, alphas), *zip(others, places_beside(alphas, len(others)))]:
            point(axis, run, place, run.mean(*metric))
        axis.set_xscale("log")
        ticks = sorted(set(alphas))
        axis.set_xticks(ticks, [f"{alpha:g}" for alpha in ticks], rotation=90 if len(ticks) > 5 else 0)
        axis.set_xticks([], minor=True)
        if others:
            axis.axvline(alphas[-1] * 2, color="grey", linewidth=1, linestyle=":")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("α of the grouped loss" + "; right: the other arms" * bool(others))
        axis.grid(alpha=0.3, axis="y")
        rescale(axis, scale)
    shown = grouped + others
    return finish(figure, shown, [handle(run, points=True) for run in shown])


def shortest_mean(rows: list[list]) -> np.ndarray:
    """Mean over seeds of lists of unequal length, as far as the shortest reaches."""
    rows = [[finite(v) for v in row] for row in rows if row]
    return np.array([row[: min(map(len, rows))] for row in rows]).mean(0) if rows else np.array([])


def label_geometry(spectra: Sequence[Axes], condition: Axes, angles: Axes, ranks: Axes):
    for axis, group in zip(spectra, GROUPS):
        axis.set(title=f"singular values, {group} features", xlabel="rank of the value")
        axis.set_ylabel("singular value of the decoder rows")
    condition.set(title="condition number of the group's decoder rows")
    condition.set_ylabel("largest over smallest singular value")
    ranks.set(title="effective rank of the group's decoder rows", ylabel="directions")
    angles.set(title="angles between forget and retain subspaces", xlabel="rank of the angle")
    angles.set(ylabel="principal angle (degrees)", ylim=(-2, 92), yticks=range(0, 91, 15))
    for axis in (*spectra, condition):
        rescale(axis, log_scale)
    rescale(ranks, from_zero)
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
    figure, (spectra, (condition, angles, ranks)) = panels(2, 3, 13, 7.6)
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
    return finish(figure, shown, [handle(run) for run in shown])


def row_height(runs: list[Run]) -> float:
    """Inches that the longest label of a row needs."""
    return 0.16 + 0.13 * max(run.mark.count("\n") + 1 for run in runs)


def interventions(runs: list[Run]) -> Figure | str:
    asked = [
        (section, metric + s) for section, metric in (SCORE, GAIN) for s, _ in INTERVENTIONS.values() if s
    ]
    if not any(np.isfinite(run.mean(*metric)[0]) for run in runs for metric in asked):
        return "no run was evaluated under conditional clamping or the guardrail"
    figure, axes = panels(1, 2, 11, 1 + max(0.36, row_height(runs)) * len(runs), sharey=True)
    for axis, (section, metric), title in zip(
        axes[0],
        (SCORE, GAIN),
        (
            "unlearning score",
            "cross-entropy added on forget text at a cost of\n0.05 on retain text (nats a token)",
        ),
    ):
        for k, (suffix, marker) in enumerate(INTERVENTIONS.values()):
            for i, run in enumerate(runs):
                place = i + 0.24 * (k - 1)
                point(axis, run, run.mean(section, metric + suffix), place, markersize=5, marker=marker)
        axis.set_xlabel(title)
        low, high = axis.get_xlim()
        axis.set_xlim(min(low, -0.02 * max(high, 0.1)), max(high, 0.1))
        for i in range(len(runs) - 1):
            axis.axhline(i + 0.5, color="#dddddd", linewidth=1)
        axis.grid(alpha=0.3, axis="x")
    axes[0, 0].set_yticks(range(len(runs)), [run.mark for run in runs], fontsize=8)
    axes[0, 0].set_ylim(len(runs) - 0.5, -0.5)
    grey: dict[str, Any] = {"color": "#555555", "linestyle": "none"}
    handles = [Line2D([], [], label=name, marker=m, **grey) for name, (_, m) in INTERVENTIONS.items()]
    handles[0].set_label("clamp, or the method's own")
    return finish(figure, runs, handles)


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


def robustness(runs: list[Run]) -> Figure | str:
    if not (shown := [run for run in by_worst_case(runs) if by_form(run)]):
        return "no run was evaluated for robustness"
    tables = [by_form(run) for run in shown]
    forms = list(dict.fromkeys(form for table in tables for form in table))
    cells = np.array([[table.get(form, (np.nan, 0.0)) for form in forms] for table in tables])
    figure, axes = panels(1, 1, 4.5 + 0.16 * len(forms), 3 + row_height(shown) * len(shown))
    axis = axes[0, 0]
    image = axis.imshow(cells[..., 0], vmin=0, vmax=1, cmap="cividis_r", aspect="auto")
    y, x = np.nonzero(cells[..., 1] > 0)
    axis.plot(x, y, "x", color="#D55E00", markersize=4, linestyle="none", label="keeps too little")
    for i, (form, following) in enumerate(zip(forms, forms[1:])):
        if form.partition("_")[0] != following.partition("_")[0]:
            axis.axvline(i + 0.5, color="white", linewidth=2)
    axis.set_xticks(range(len(forms)), [form.replace("_", " ") for form in forms], rotation=90, fontsize=6)
    axis.set_yticks(range(len(shown)), [run.mark for run in shown], fontsize=8)
    scores = axis.secondary_yaxis("right")
    texts = [
        f"{shown_or_dash(run, 'worst_case_score')} ({shown_or_dash(run, 'kept_at_worst')})" for run in shown
    ]
    scores.set_yticks(range(len(shown)), texts, fontsize=8)
    scores.set_ylabel("worst-case score (least kept)", fontsize=8)
    figure.colorbar(image, ax=axis, label="knowledge left", location="top", shrink=0.3, aspect=30)
    return finish(figure, shown, axis.lines[:1])


def shown_or_dash(run: Run, metric: str) -> str:
    mean = run.mean("robustness", metric)[0]
    return "-" if np.isnan(mean) else f"{mean:.2f}"


FIGURES: dict[Callable[[list[Run]], Figure | str], tuple[str, str]] = {
    # drawer -> title, and what it shows in words; its file bears the drawer's name
    robustness: (
        "Knowledge left in every form of asking",
        "One row a run in the order of the worst case: the score is one less the most that is left in any"
        " form, and 0 where a form (crossed) keeps under 0.99 of the retain questions or under 0.95 of one"
        " subject's in any seed. In brackets the least that is kept. Means over seeds.",
    ),
    unlearning_tradeoff: (
        "Forgetting against retaining",
        "Under SAEBench's sweep. Left: the lowest accuracy on known forget questions that any setting reaches"
        " while keeping at least so much accuracy on known retain questions, with chance, SAEBench's bound,"
        " and what random features reach within the bound. Right: the same for held-out text, in"
        " cross-entropy. Bands run from the least to the most of the seeds.",
    ),
    interventions: (
        "Three interventions",
        "Unlearning under clamp, conditional clamp and guardrail; in questions (left) and in held-out text"
        " (right). A method without an SAE has one intervention, its own. Bars: standard error over seeds.",
    ),
    alpha_sweep: (
        "The weight of the grouped loss",
        "The grouped arm over the weight α of its loss, beside the other arms: unlearning score,"
        " cross-entropy added on forget text, explained variance. Bars: standard error over seeds.",
    ),
    explained_variance: (
        "Explained variance",
        "Against L0 (left) and against the mean largest cosine between features (right). Equal steps of the"
        " upright axis halve what is unexplained. Bars: standard error over seeds.",
    ),
    geometry: (
        "Geometry of forget, retain and shared features",
        "Singular values of their decoder rows (mean over seeds as far as the smallest group reaches),"
        " condition numbers and effective ranks (mean and standard error), and principal angles between the"
        " forget and the retain subspaces (0 degrees: a direction in common).",
    ),
    training_curves: (
        "Training",
        "Fraction of variance unexplained, L0, λ, α, dead features, and the share of firing that the two"
        " domains have in common. Mean over seeds. Bands run from the least to the most of the seeds.",
    ),
}

# ------------------------------------------------------------------------------------------------ files

SIGNATURE = b"Matplotlib v"  # stands in every file that is written here
UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}


def content(figure: Figure, kind: str) -> bytes:
    """The file of a figure, the same for the same figure: svg, pdf, or a PNG of at most 256 colours."""
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata=UNDATED[kind])
    if kind != "png":
        return file.getvalue()
    image = Image.open(file)
    smaller, signed = io.BytesIO(), PngImagePlugin.PngInfo()
    signed.add_text("Software", image.info["Software"])
    in_256_colours(image).save(smaller, "png", pnginfo=signed, dpi=image.info["dpi"])
    return smaller.getvalue()


def in_256_colours(image: Image.Image) -> Image.Image:
    """The image in its most frequent colours, which are kept as they are; the others, at the edges of lines
    and letters, become the nearest of these."""
    pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    codes, places, counts = np.unique(pixels @ [65536, 256, 1], return_inverse=True, return_counts=True)
    colours = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1).astype(np.float32)
    kept = colours[np.argsort(-counts, kind="stable")[:256]]
    squares = (kept**2).sum(1) - 2 * colours @ kept.T  # distances, but for what does not depend on `kept`
    nearest = squares.argmin(1).astype(np.uint8)
    small = Image.fromarray(nearest[places].reshape(pixels.shape[:2]))
    small.putpalette(kept.astype(np.uint8).tobytes())
    return small
