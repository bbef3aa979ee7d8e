"""Figures and tables from run folders alone: python plot.py [run_0 run_1 ...]    (default: every run_* folder here)

Needs numpy and matplotlib only. Folders that are not complete are skipped, and the reason is printed. Figures are written
as PNGs into the current folder, the table to the screen.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

labels = {
    "run_0": "vanilla",
    "run_1": "fixed",
    "run_2": "grouped, α 0.1",
    "run_3": "grouped, α 0.01",
    "run_4": "grouped, α 0.5",
    "run_5": "grouped, α 1",
    "run_6": "adaptive",
    "run_9": "ortsae",
    "run_10": "frozen decoder",
}

# Okabe & Ito's palette, told apart by the colour-blind; line styles and markers tell the rest apart in print
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
MARKERS = "osD^vP*Xd<>"
STYLES = ["-", "--", "-.", ":"]
TABLE = (
    ("core", "l0", "L0"),
    ("core", "explained_variance", "expl. var."),
    ("core", "ce_loss_score", "CE recovered"),
    ("core", "frac_alive", "alive"),
    ("unlearning", "unlearning_score", "unlearning"),
    ("unlearning", "random_feature_score", "random floor"),
    ("corpus_unlearning", "forget_ce_gain_at_retain_ce_cost_0.05", "forget CE gain"),
    ("geometry", "omega", "Ω"),
    ("geometry", "mean_max_cosine", "mean max cos"),
)


class Run:
    """One complete run folder. Raises ValueError with the reason when it is not complete or not readable."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
        if not (folder / "final_info.json").is_file():
            raise ValueError("no final_info.json: the run is not complete")
        try:
            self.info = json.loads((folder / "final_info.json").read_text())
            self.config = json.loads((folder / "config.json").read_text())
            self.log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
            self.warnings = json.loads((folder / "warnings.json").read_text())
            self.seeds = self.config["config"]["seeds"]
            self.evals = {s: [json.loads(p.read_text()) for seed in self.seeds if (p := folder / "eval" / f"seed{seed}_{s}.json").is_file()] for s in self.info}
            if not self.info["training"]["means"] or {r["seed"] for r in self.log} != set(self.seeds):
                raise ValueError("training results or logs of some seeds are missing")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"not a run's files ({type(error).__name__}: {error})") from error
        self.label = labels.get(self.name, self.name)

    def mean(self, section: str, metric: str) -> tuple[float, float]:
        """Mean and standard error over seeds; nan where the run has none."""
        means, stderrs = (self.info.get(section, {}).get(k, {}) for k in ("means", "stderrs"))
        return tuple(np.nan if v is None else v for v in (means.get(metric), stderrs.get(metric)))

    def sweeps(self, section: str) -> list[list[dict]]:
        """The sweep's cells of each seed that has any."""
        return [details["sweep"] for details in self.evals.get(section, []) if details.get("sweep")]


def find_runs(folders: list[Path]) -> list[Run]:
    runs = []
    for folder in sorted(set(folders), key=lambda p: [(not t.isdigit(), int(t) if t.isdigit() else 0, t) for t in p.name.split("_")]):
        try:
            runs.append(Run(folder))
        except ValueError as reason:
            print(f"skipping {folder}: {reason}", file=sys.stderr)
    return runs


def style(i: int) -> dict:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)]}


def save(figure, name: str):
    figure.tight_layout()
    figure.savefig(name, dpi=150)
    plt.close(figure)
    print(f"wrote {name}")


def training_curves(runs: list[Run]):
    """FVU, L0, λ and sharing between domains over training: mean over seeds, band from least to most."""
    panels = (("fvu", "fraction of variance unexplained"), ("l0", "L0"), ("l1_coefficient", "λ"), ("sharing", "share of firing common to both domains"))
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True)
    for axis, (key, title) in zip(axes.flat, panels):
        for i, run in enumerate(runs):
            tokens = sorted({r["tokens"] for r in run.log})
            curves = np.array([[r[key] for r in run.log if r["seed"] == seed] for seed in run.seeds])
            axis.plot(np.array(tokens) / 1e6, curves.mean(0), label=run.label, **style(i))
            axis.fill_between(np.array(tokens) / 1e6, curves.min(0), curves.max(0), color=style(i)["color"], alpha=0.15, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_yscale("linear" if key == "sharing" else "log")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("training tokens (millions)")
    save(figure, "training_curves.png")


def frontier(cells: list[dict], cost: str, gain: str, lowest: bool) -> tuple[np.ndarray, np.ndarray]:
    """The cells that no other cell beats on both axes, by falling retain quality."""
    best, xs, ys = None, [], []
    for cell in sorted(cells, key=lambda c: c[cost], reverse=lowest):
        value = cell[gain]
        if best is None or (value < best if lowest else value > best):
            best = value
            xs.append(cell[cost])
            ys.append(value)
    return np.array(xs), np.array(ys)


def unlearning_tradeoff(runs: list[Run]):
    """Forget against retain under SAEBench's sweep: question accuracy, and cross-entropy on held-out text. One thin curve a
    seed, joined by the arm's colour; chance and SAEBench's retain bound drawn in."""
    figure, (questions, corpus) = plt.subplots(1, 2, figsize=(11, 4.6))
    for i, run in enumerate(runs):
        for n, cells in enumerate(run.sweeps("unlearning")):
            x, y = frontier([{"retain_accuracy": 1.0, "forget_accuracy": 1.0}] + cells, "retain_accuracy", "forget_accuracy", lowest=True)
            questions.step(x, y, where="post", marker=MARKERS[i % len(MARKERS)], markersize=3, linewidth=1, alpha=0.8, label=run.label if n == 0 else None, **style(i))
        floor = run.mean("unlearning", "random_feature_score")[0]
        if np.isfinite(floor):
            questions.axhline(1 - floor, color=style(i)["color"], linewidth=0.6, alpha=0.6, linestyle=":")
        for n, cells in enumerate(run.sweeps("corpus_unlearning")):
            x, y = frontier([{"retain_ce_cost": 0.0, "forget_ce_gain": 0.0}] + cells, "retain_ce_cost", "forget_ce_gain", lowest=False)
            corpus.step(np.maximum(x, 1e-4), y, where="post", marker=MARKERS[i % len(MARKERS)], markersize=3, linewidth=1, alpha=0.8, label=run.label if n == 0 else None, **style(i))
    questions.axhline(0.25, color="grey", linewidth=1)
    questions.annotate("chance", (0.99, 0.255), xycoords=("axes fraction", "data"), ha="right", fontsize=8, color="grey")
    questions.axvline(0.99, color="grey", linewidth=1, linestyle=":")
    questions.annotate("SAEBench's bound (0.99)", (0.989, 0.03), xycoords=("data", "axes fraction"), rotation=90, ha="left", fontsize=7, color="grey")
    questions.set(xlabel="accuracy on known retain questions", ylabel="accuracy on known forget questions", xlim=(1.01, 0.5), ylim=(0, 1.03), title="questions (lower: more unlearned; dotted: random features)")
    corpus.set(xlabel="cross-entropy added on retain text (nats a token)", ylabel="cross-entropy added on forget text", xscale="log", title="held-out text")
    for axis in (questions, corpus):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    save(figure, "unlearning_tradeoff.png")


def summary_table(runs: list[Run]) -> str:
    """Markdown: mean ± standard error over seeds."""

    def shown(run: Run, section: str, metric: str) -> str:
        mean, stderr = run.mean(section, metric)
        return "-" if np.isnan(mean) else f"{mean:.3f}" if np.isnan(stderr) else f"{mean:.3f} ± {stderr:.3f}"

    head = ["run", "arm", "seeds"] + [title for _, _, title in TABLE] + ["warnings"]
    rows = [[r.name, r.label, str(len(r.seeds))] + [shown(r, s, m) for s, m, _ in TABLE] + [str(len(r.warnings))] for r in runs]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="run folders (default: run_* here)")
    parser.add_argument("--table", action="store_true", help="print the table and draw nothing")
    args = parser.parse_args()
    runs = find_runs(args.folders or [p for p in Path().glob("run_*") if p.is_dir()])
    if not runs:
        print("error: no complete run folder to plot; make one with python experiment.py --out_dir=run_0", file=sys.stderr)
        return 2
    print(summary_table(runs))
    if args.table:
        return 0
    training_curves(runs)
    unlearning_tradeoff(runs)
    for run in runs:
        for text in run.warnings:
            print(f"{run.name} warning: {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
