"""Numbers of runs: tables, paired tests, and what keeps runs from being compared."""

import json
import math
import os
from collections.abc import Iterable

import numpy as np
from scipy.special import stdtr

from sae_separation import evals
from sae_separation.plots.folders import Run, cut, find_runs, finite, first, labels

SCORE, GAIN, EXPLAINED = (
    ("unlearning", "unlearning_score"),
    ("corpus_unlearning", "forget_ce_gain_at_retain_ce_cost_0.05"),
    ("core", "explained_variance"),
)

WORST = ("robustness", "worst_case_score")

MATCHED_L0 = 2.0  # arms whose mean L0 lies further apart are not compared at the same sparsity


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
        rows.append([run.name, run.method, str(len(run.seeds)), *means, str(len(run.warnings))])
    return markdown(head, rows)


RULER = {  # head -> section and metric of a column of the table of methods
    "standard": ("robustness", "standard_score"),
    "worst case": WORST,
    "left at most": ("robustness", "knowledge_left_max"),
    "kept at least": ("robustness", "kept_at_worst"),
    "mean": ("robustness", "mean_score"),
    "choice: worst case": ("choice", "worst_case_score"),
    "choice: left": ("choice", "knowledge_left_max"),
    "choice: kept": ("choice", "kept_at_worst"),
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


def by_worst_case(runs: list[Run]) -> list[Run]:
    """The runs with a worst-case score, the best first; where it is the same, the one that leaves less."""

    def order(run: Run) -> tuple[float, float]:
        return -run.mean(*WORST)[0], run.mean("robustness", "knowledge_left_max")[0]

    return sorted((run for run in runs if np.isfinite(run.mean(*WORST)[0])), key=order)


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
        rows.append([f"{run.name} {run.method}", score, p(run, "p"), p(run, "holm"), gain, fit])
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
    low, high = (f"{l0[run]:.1f} ({run.name}, {run.method})" for run in ends)
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


def missing_of_plan(there: set[str]) -> list[str]:
    """Where most of the plan is shown and nothing else, what is missing of it: one sentence. Nothing is
    missing among a user's own runs."""
    missing = [f"{name} ({label})" for name, label in labels.items() if name not in there]
    if there <= labels.keys() and 0 < len(missing) < len(there):
        return [f"Runs of the plan that are missing here: {', '.join(missing)}."]
    return []


def cautions(runs: list[Run], skipped: list[str]) -> list[str]:
    """What keeps the runs from being compared as they stand, in sentences."""
    messages = unmatched_l0(runs)
    messages += missing_of_plan({os.path.basename(os.path.realpath(run.folder)) for run in runs})
    messages += [f"Skipped: {reason}." for reason in skipped]
    every = [compared(run) for run in runs]
    if differing := [key for key in every[0] if len({json.dumps(each[key]) for each in every}) > 1]:
        messages.append(
            f"The runs do not share their {', '.join(differing)}; the settings of each stand below."
        )
    for run in runs:
        notes = [f"{text}{f' ({n} times)' if n > 1 else ''}" for text, n in run.doubts().items()]
        messages += [f"† {run.title}: {note}." for note in first(notes, 10)]
    return messages


def summary(runs: list[Run]) -> str:
    """What was run and what came out, in two or three sentences."""
    seeds = sorted({len(run.seeds) for run in runs})
    beds = list(dict.fromkeys(cut(str(run.settings.get("testbed")), 60) for run in runs))
    each = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else counted(seeds[0], "seed")
    where = f"testbed{'s' * (len(beds) > 1)} {', '.join(beds)}"
    text = f"{counted(len(runs), 'run')} on {where}, {each} each, {tokens(runs)} training tokens a SAE."
    scored = [run for run in runs if np.isfinite(run.mean(*SCORE)[0])]
    if ranked := by_worst_case(runs):
        best, worst = ranked[0], shown(*ranked[0].mean(*WORST))
        above = best.mean(*WORST)[0] > 0
        what = f"Highest mean worst-case score: {worst} ({best.name}, {best.method})."
        text += f" {what if above else 'No run has a worst-case score above 0.'}"
    return f"{text} {of_highest(scored) if scored else 'No run has an unlearning score.'}"


def tokens(runs: list[Run]) -> str:
    """That the runs' SAEs were trained on, as far as they tell."""
    here = [run for run in runs if np.isfinite(run.mean("training", "final_l0")[0])]
    known = sorted({n for run in here if not math.isnan(n := finite(run.settings.get("tokens")))})
    if not known:
        return "an unknown number of"
    return f"{known[0]:,.0f}" if len(known) == 1 else f"{known[0]:,.0f} to {known[-1]:,.0f}"


def counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def of_highest(runs: list[Run]) -> str:
    """Of the highest unlearning score: its floor, and how it compares with vanilla's."""
    best = max(runs, key=score)
    text = f"Highest mean unlearning score: {shown(*best.mean(*SCORE))} ({best.name}, {best.method})"
    floor = best.mean("unlearning", "random_feature_score")
    text += f"; the same procedure on random features: {shown(*floor)}." if np.isfinite(floor[0]) else "."
    vanilla = next((run for run in runs if run.arm == "vanilla"), best)
    for test in paired_tests([(best, vanilla)], *SCORE) if vanilla is not best else []:
        text += f" Against {vanilla.title}, seed by seed: {test['difference']:+.3f}"
        if np.isfinite(test["p"]):
            text += f" (paired t-test, {test['n']} shared seeds, p {test['p']:.2g}, not corrected for having"
            text += " picked the highest)"
        text += "."
    return text


def score(run: Run) -> float:
    return run.mean(*SCORE)[0]
