"""What `adaptive` owes to the size of its group, to right labels, and to the activation.

    make controls                                                       # the runs, and then
    python -m studies.controls reproduced reproduced/controls/*         # into studies/controls.json

The first folder holds run_0 and run_6 as they are planned; each of the others holds one of them or both,
made with one option changed, and is named for it. A run with another number of options changed is refused.
Of every run the file keeps a few metrics by seed, and what they differ by from the planned run's on the same
seeds: the mean, and its 95 % interval (Student's t over seeds).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sae_separation import process
from sae_separation.errors import WrongRequest
from sae_separation.plots import folders, tables
from studies.worlds import shown

METRICS = {  # name -> section and metric of a run
    "mean of forms": ("robustness", "mean_score"),
    "left at most": ("robustness", "knowledge_left_max"),
    "kept at least": ("robustness", "kept_at_worst"),
    "standard": ("robustness", "standard_score"),
    "depth": ("depth", "depth_score"),
    "explained variance": ("core", "explained_variance"),
    "L0": ("core", "l0"),
    "alive": ("core", "frac_alive"),
}
PLANNED = ("run_0", "run_6")


def row_of(run: folders.Run, control: str) -> dict[str, Any]:
    """Raises WrongRequest for a run that lacks a metric."""
    by_seed = {name: run.by_seed(*where) for name, where in METRICS.items()}
    if lacking := [name for name, of in by_seed.items() if not of or not np.isfinite([*of.values()]).all()]:
        raise WrongRequest(f"{run.folder} lacks {', '.join(lacking)}: --evals core robustness depth")
    return {
        "run": run.name,
        "control": control,
        "trained_at": run.config["git"],
        "by_seed": {name: {str(seed): value for seed, value in of.items()} for name, of in by_seed.items()},
    }


def runs_in(folder: Path) -> list[folders.Run]:
    """Those of PLANNED. Raises WrongRequest where there is none, or one that is not complete."""
    there = [folder / name for name in PLANNED if (folder / name).exists()]
    runs, skipped = folders.find_runs(there)
    if skipped or not runs:
        why = "; ".join(skipped) or "neither run_0 nor run_6 is in it: give the folder that holds them"
        raise WrongRequest(f"{folder}: {why}")
    return runs


def changed(run: folders.Run, planned: folders.Run) -> dict[str, Any]:
    """The option that a run has another value of than the planned one. Raises WrongRequest for none or
    several."""
    of, as_planned = run.config["config"], planned.config["config"]
    found = {k: v for k, v in of.items() if v != as_planned.get(k) and k != "seeds"}
    if len(found) != 1:
        raise WrongRequest(f"{run.folder}: {sorted(found) or 'nothing'} differs, and one option may")
    return found


def less(of: dict[str, float], planned: dict[str, float]) -> dict:
    """Mean difference on seeds that both have, of which there must be one, and its interval."""
    each = np.array([of[seed] - planned[seed] for seed in of if seed in planned])
    out = {"difference": float(each.mean())}
    if len(each) > 1:
        out["plus_minus_95"] = float(stdtrit(len(each) - 1, 0.975) * each.std(ddof=1) / len(each) ** 0.5)
    return out


def collected(planned: Path, others: list[Path]) -> list[dict]:
    """Rows of the table, the planned runs first."""
    of_plan = {run.name: run for run in runs_in(planned)}
    rows = [row_of(run, "as planned") for run in of_plan.values()]
    for folder in others:
        for run in runs_in(folder):
            if run.name not in of_plan or not set(run.seeds) & set(of_plan[run.name].seeds):
                raise WrongRequest(f"{planned} holds no {run.name} with a seed of {run.folder}")
            option = changed(run, of_plan[run.name])
            row = row_of(run, folder.name.replace("_", " ")) | {"changed": option}
            reference = next(of["by_seed"] for of in rows if of["run"] == run.name)
            row["less_planned"] = {name: less(of, reference[name]) for name, of in row["by_seed"].items()}
            rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: mean ± standard error over seeds, and of the mean of forms what it differs by."""
    out = []
    for row in rows:
        apart, said = row.get("less_planned", {}).get("mean of forms"), "-"
        if apart:
            half = apart.get("plus_minus_95", np.nan)
            said = tables.shown(apart["difference"], half, "+.2f").replace("± +", "± ")
        values = [shown(list(row["by_seed"][name].values())) for name in METRICS]
        out.append([folders.labels[row["run"]], row["control"], said, *values])
    return tables.markdown(["method", "control", "mean of forms less planned", *METRICS], out)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("planned", type=Path, help="folder of run_0 and run_6")
    parser.add_argument("controls", nargs="+", type=Path, help="folders of runs with one option changed")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("controls.json"))
    args = parser.parse_args()
    rows = collected(args.planned, args.controls)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    sys.exit(process.exit_code_of(main))
