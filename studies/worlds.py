"""What holds in other worlds: other facts, other names, another LM that learnt them.

    make worlds                                                     # the LMs, the runs, and then
    python -m studies.worlds reproduced/in_context reproduced/worlds/*    # into studies/worlds.json

Each folder named here holds the runs of one world. Of every run the file keeps a few metrics by seed.
Compared is a gate on an SAE's features with each method that is told the same labels, on seeds they share:

difference   the mean over seeds of each world, and the mean of those
interval_95  of that mean, Student's t with the worlds as the sample: the test of a mixed model with worlds at
             random, as every world has as many seeds
stouffer_p   one-sided: each world's paired t-test over its seeds, put together by Stouffer's rule. It asks
             whether the gate is better in these worlds, not in others. None where seeds do not vary.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sae_separation import process
from sae_separation.errors import WrongRequest
from sae_separation.plots import folders, tables

METRICS = {  # name -> section and metric of a run
    "worst_case": ("choice", "worst_case_score"),
    "mean_of_forms": ("choice", "mean_score"),
    "left": ("choice", "knowledge_left_max"),
    "kept": ("choice", "kept_at_worst"),
    "worst_case_by_saebench": ("robustness", "worst_case_score"),
    "mean_of_forms_by_saebench": ("robustness", "mean_score"),
    "unseen_worst_case": ("robustness", "unseen_worst_case_score"),
    "unseen_left": ("robustness", "unseen_knowledge_left_max"),
    "depth": ("depth", "depth_score"),
    "explained_variance": ("core", "explained_variance"),
}
COMPARED = ("worst_case", "mean_of_forms", "worst_case_by_saebench", "mean_of_forms_by_saebench")
REFERENCE = "run_29"
BASELINES = ("run_28", "run_15")


def world_of(runs: list[folders.Run], folder: Path) -> str:
    """By whose questions they were measured. Raises WrongRequest for runs of several worlds, or of none."""
    made = [part["made_by"] for run in runs for part in run.info.values() if "made_by" in part]
    worlds = {str(source["source"]) for by in made for source in by["settings"]["questions"]}
    if len(worlds) != 1:
        raise WrongRequest(f"{folder}: runs of {sorted(worlds) or 'no world'}, and one is wanted")
    return worlds.pop()


def collected(folder: Path) -> tuple[str, dict]:
    """The world of a folder of runs, and of every run the metrics by seed that all its seeds have. Raises
    WrongRequest for a folder without complete runs."""
    runs, skipped = folders.find_runs(sorted(path.parent for path in folder.glob("run_*/final_info.json")))
    if skipped or not runs:
        raise WrongRequest(f"{folder}: {'; '.join(skipped) or 'no complete run'}")
    rows = {}
    for run in runs:
        by_seed = {name: run.by_seed(*where) for name, where in METRICS.items()}
        by_seed = {name: of for name, of in by_seed.items() if of and np.isfinite([*of.values()]).all()}
        commits = {s: part["made_by"]["git"] for s, part in run.info.items() if "made_by" in part}
        rows[run.name] = {"label": run.label, "trained_at": run.config["git"], "evaluated_at": commits}
        rows[run.name]["by_seed"] = {name: {str(s): v for s, v in of.items()} for name, of in by_seed.items()}
    return world_of(runs, folder), rows


def compared(by_world: list[list[float]]) -> dict:
    """Differences of each world by seed."""
    means, n = np.array([np.mean(d) for d in by_world]), len(by_world)
    out = {"by_world": means.tolist(), "difference": float(means.mean())}
    if n > 1:
        stderr = means.std(ddof=1) / n**0.5
        out["interval_95"] = (means.mean() + np.array([-1, 1]) * stdtrit(n - 1, 0.975) * stderr).tolist()
    z = [one_sided_z(np.array(d)) for d in by_world]
    defined = [score for score in z if score is not None]
    out["stouffer_p"] = float(ndtr(-np.sum(defined) / n**0.5)) if len(defined) == n else None
    return out


def one_sided_z(differences: np.ndarray) -> float | None:
    """The normal score of a paired t-test that the mean is above 0."""
    n = len(differences)
    stderr = differences.std(ddof=1) / n**0.5 if n > 1 else 0.0
    return float(ndtri(stdtr(n - 1, differences.mean() / stderr))) if stderr > 1e-12 else None


def comparisons(worlds: dict[str, dict]) -> list[dict]:
    """The reference with each baseline, by each of COMPARED that all have."""
    out = []
    for name in BASELINES:
        for metric in COMPARED:
            by_world = []
            for rows in worlds.values():
                x, y = (rows.get(run, {}).get("by_seed", {}).get(metric, {}) for run in (REFERENCE, name))
                by_world.append([x[s] - y[s] for s in x if s in y])
            if all(by_world):
                about = {"of": REFERENCE, "less": name, "metric": metric}
                out.append(about | compared(by_world))
    return out


def table(worlds: dict[str, dict]) -> str:
    """Markdown: a row a world and a run, mean ± standard error over seeds; the metrics that some run has."""
    measured = {name for runs in worlds.values() for run in runs.values() for name in run["by_seed"]}
    columns, rows = [name for name in METRICS if name in measured], []
    for world, runs in worlds.items():
        for run in runs.values():
            by_seed = [list(run["by_seed"].get(name, {}).values()) for name in columns]
            rows.append([world, run["label"], *(shown(values) for values in by_seed)])
    return tables.markdown(["world", "method", *(name.replace("_", " ") for name in columns)], rows)


def differences(comparisons: list[dict]) -> str:
    """Markdown: the reference less each baseline."""
    rows = []
    for row in comparisons:
        low, high = row.get("interval_95", (np.nan, np.nan))
        by_world = ", ".join(f"{d:+.2f}" for d in row["by_world"])
        of_mean = tables.shown(row["difference"], (high - low) / 2, "+.2f").replace("± +", "± ")
        p = "-" if row["stouffer_p"] is None else f"{row['stouffer_p']:.2g}"
        names = [folders.labels[row[key]] for key in ("of", "less")]
        rows.append([*names, row["metric"].replace("_", " "), by_world, of_mean, p])
    head = ["of", "less", "metric", "by world", "mean ± 95 % over worlds", "Stouffer p, one-sided"]
    return tables.markdown(head, rows)


def shown(values: list[float]) -> str:
    if not values:
        return "-"
    stderr = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return tables.shown(float(np.mean(values)), float(stderr), ".2f")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="of the runs of one world each")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("worlds.json"))
    args = parser.parse_args()
    rows = sorted((collected(folder) for folder in args.folders), key=lambda row: row[0])
    if len(worlds := dict(rows)) < len(rows):
        raise WrongRequest(f"a world in two folders, and one is wanted: {[w for w, _ in rows]}")
    found = {"worlds": worlds, "comparisons": comparisons(worlds)}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(worlds), differences(found["comparisons"]), sep="\n\n")


if __name__ == "__main__":
    sys.exit(process.exit_code_of(main))
