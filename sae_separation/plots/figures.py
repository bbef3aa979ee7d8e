"""The figures: one function each, which returns a figure, or why there is none."""

import math
import textwrap
from collections.abc import Sequence
from operator import attrgetter

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sae_separation.errors import plain
from sae_separation.plots.folders import COLOURS, QUESTIONS, TEXT, Run, cut, finite
from sae_separation.plots.tables import EXPLAINED, GAIN, SCORE, by_worst_case

matplotlib.rcParams |= {"savefig.dpi": 150, "axes.formatter.useoffset": False}

INTERVENTIONS = {"clamp": "", "conditional": "_conditional", "guardrail": "_guardrail"}

GROUPS = ("forget", "retain", "shared")


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
        " Right: the same for held-out text, in cross-entropy. Bands run from the least to the most of"
        " the seeds."
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
        " the two domains have in common. Mean over seeds. Bands run from the least to the most of the seeds."
    ),
}
