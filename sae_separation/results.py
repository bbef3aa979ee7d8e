"""Metrics of a run folder's exported SAEs: records by seed, sections over seeds, warnings.

    measure(folder, "eval", seed, record, rows, evaluator, maker, bar)        # makes eval/seed*.json
    summary_of("geometry", records)                                           # a section of final_info.json
    finished = Finished(folder, config, testbed, tracking)                    # a run that is complete
    finished.finish(rows, finished.measure(rows, evaluator, maker, 0, bar))   # gains sections

A record is what eval/seed*_metrics.json holds of one SAE: the sha256 of its files, and by section the
metrics, the notes (warnings) and what made them. torch is imported where it is used.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sae_separation import evals, process, progress, ranks, run_folder
from sae_separation.config import BY_LAMBDA
from sae_separation.errors import RunFailed, WrongRequest
from sae_separation.evals import Row
from sae_separation.files import Unusable, as_json, read_sealed, seal, write_json
from sae_separation.specs import ASKED
from sae_separation.tracking import Tracking

SHOWN = {"training": ("tokens_trained", "l1_coefficient", "alpha", "tokens_per_second")}


# Settings that are younger than committed runs: at this value a run is the same as without them
YOUNGER = {
    "label_noise": 0.0,
    "bandwidth": 0.5,
    "target_overlap": 0.1,
    "alpha_directions": 0.1,
    "least_cosine": 0.8,
}


def what_trained(config: dict, testbed: dict) -> list[dict]:
    """The settings and the testbed of a run without what only its evaluations need: the run's identity."""
    asked = ("questions", "exam_lm", "oracle")
    sources = {k: v for k, v in testbed.get("sources", {}).items() if k not in asked}
    testbed = {k: v for k, v in testbed.items() if k not in ("scoring", "clamp_scale")} | {"sources": sources}
    config = {k: v for k, v in config.items() if k not in ("evals", *ASKED) and v != YOUNGER.get(k, ...)}
    return json.loads(json.dumps([config, testbed]))


def described(testbed) -> dict:
    """A testbed as config.json records it."""
    names = ("name", "hook_name", "d_in", "scoring", "clamp_scale")
    return {name: getattr(testbed, name) for name in names} | testbed.describe


def new_record(files: dict[str, str]) -> dict:
    return {"files": files, "sections": {}, "notes": {}, "made_by": {}}


def read_record(path: Path) -> dict | None:
    """A record; None if there is no such file. Older records list their notes, which were all of the
    unlearning evaluation. Raises Unusable."""
    record = read_sealed(path)
    if record is None:
        return None
    notes = record["notes"] if isinstance(record["notes"], dict) else {"unlearning": record["notes"]}
    return {k: record[k] for k in ("files", "sections")} | {
        "notes": notes,
        "made_by": record.get("made_by", {}),
    }


def maker(evaluator) -> dict:
    """What makes a section: the commit, the settings of the sweep and of the questions, and the precision in
    which the LM is asked."""
    settings = evaluator.settings | evaluator.asked
    return {"git": run_folder.commit_of_code(), "settings": settings, "lm_runs_in": evaluator.runs_in}


def measure(
    folder: Path, part: str, seed: int, record: dict, rows: Sequence[Row], evaluator, made_by: dict, bar
):
    """Evaluate one exported SAE: the `rows` that its record lacks, or that another commit or other settings
    made.

    Each is written into `part` of the run folder when it is done, and not done again. Raises RunFailed."""
    from sae_separation.export import load_exported

    sae = None
    for row in rows:
        bar.set_postfix_str(f"{folder.name} seed {seed}: {row.name}")
        made = record["made_by"].get(row.section, {})
        if row.section in record["sections"] and {k: made.get(k) for k in made_by} == made_by:
            progress.done_before(bar, row.seconds)
            continue
        if sae is None:
            sae = load_exported(run_folder.sae_folder(folder, seed), evaluator.testbed.lm.device)
        began = time.monotonic()
        with process.global_state_kept(seed=seed), progress.section.of(bar, row.seconds):
            metrics, details, notes = row.measure(evaluator, sae, seed, f"{folder.name}_seed{seed}")
        took = {"date": time.strftime("%Y-%m-%d %H:%M:%S %z"), "seconds": time.monotonic() - began}
        write_json(folder / part / f"seed{seed}_{row.section}.json", details, indent=None)
        record["sections"][row.section], record["notes"][row.section] = metrics, notes
        record["made_by"][row.section] = made_by | took
        with process.signals.held():
            write_json(run_folder.record_of(folder, seed, part), seal(record))
        process.signals.something_is_kept()


def by_metric(values: Sequence[dict]) -> dict[str, list]:
    """Metrics of one seed after the other -> the values of all seeds by metric."""
    out: dict[str, list] = {}
    for metrics in values:
        for name, value in metrics.items():
            out.setdefault(name, []).append(value)
    return out


def summarise(metrics: dict[str, list]) -> dict[str, dict]:
    """Means and standard errors over seeds; None where a seed's value is undefined."""
    import numpy as np

    means, stderrs, by_seed = {}, {}, {}
    for name, values in metrics.items():
        by_seed[name] = [None if v is None or not math.isfinite(v) else v for v in values]
        whole = None not in by_seed[name]
        means[name] = float(np.mean(values)) if whole else None
        several = whole and len(values) > 1
        stderrs[name] = float(np.std(values, ddof=1) / math.sqrt(len(values))) if several else None
    return {"means": means, "stderrs": stderrs, "final_info_dict": by_seed}


def undefined(section: str, summary: dict, seeds: Sequence[int]) -> list[str]:
    """Warnings of metrics that some seeds lack: one for all metrics that the same seeds lack."""
    lacking: dict[tuple[int, ...], list[str]] = {}
    for name, values in summary["final_info_dict"].items():
        some = tuple(seed for seed, value in zip(seeds, values) if value is None)
        lacking.setdefault(some, []).append(name)
    return [
        f"{section}: {', '.join(names)} undefined for seeds {list(some)}: each mean is null"
        for some, names in lacking.items()
        if some
    ]


def summary_of(section: str, records: dict[int, dict]) -> dict:
    """A section of final_info.json from the records of all seeds: metrics, what made them, seconds."""
    made = [record["made_by"][section] for record in records.values()]
    took = {"date": max(m["date"] for m in made), "seconds": sum(m["seconds"] for m in made)}
    metrics = by_metric([record["sections"][section] for record in records.values()])
    return summarise(metrics) | {"made_by": made[0] | took}


def doubts(training: dict, core: dict, config, d_in: int) -> list[str]:
    """Warnings that a seed's metrics call for: its numbers are not to be taken at their face."""
    if "final_l0" not in training:  # of a method that needs no SAE
        return []
    warnings, l0 = [], core.get("l0", training["final_l0"])
    if l0 is None:  # of an SAE that was trained elsewhere, and core was not measured
        return []
    fvu, dead = training["final_fvu"] or 0, training.get("frac_dead") or 0
    target = config.target_l0 if config.activation in BY_LAMBDA else config.k
    if target and abs(l0 - target) > 2:
        warnings.append(f"L0 is {l0:.1f}, more than 2 from the target {target:g}")
    no_better = "no better than predicting the mean"
    if fvu >= 1:
        warnings.append(f"fraction of variance unexplained is {fvu:.3f}: {no_better}")
    if (core.get("explained_variance") or 1) <= 0:
        explained = core["explained_variance"]
        warnings.append(f"explained variance on held-out text is {explained:.3f}: {no_better}")
    if not 0 < l0 <= d_in:
        warnings.append(f"L0 is {l0:.1f}, outside (0, d_in]")
    if 1 - core.get("frac_alive", 1 - dead) > 0.5:
        warnings.append("more than half of the features are dead")
    return warnings


def warnings_of(
    rows: Sequence[Row], records: dict[int, dict], training: dict[int, dict], config, d_in: int
) -> list[str]:
    """The warnings that the metrics of all seeds call for, and the notes of the evaluations of these rows."""
    warnings = []
    for seed, record in records.items():
        core = record["sections"].get("core", {})
        warnings += [f"seed {seed}: {text}" for text in doubts(training[seed], core, config, d_in)]
        there = [row.section for row in rows if row.section in record["sections"]]
        notes = [note for section in there for note in record["notes"].get(section, [])]
        warnings += [f"seed {seed}: {note}" for note in notes]
    for section in (row.section for row in rows):
        values = [record["sections"][section] for record in records.values() if section in record["sections"]]
        warnings += undefined(section, summarise(by_metric(values)), list(records))
    return warnings


def print_summary(name: str, folder: Path, info: dict, warnings: list[str], rows, published: dict):
    """The last lines of a run: the metrics that the rows show, and every warning."""

    for section, names in (SHOWN | {row.section: row.shown for row in rows}).items():
        means, stderrs = (info.get(section, {}).get(kind, {}) for kind in ("means", "stderrs"))
        for metric in (metric for metric in names if metric in means):
            print(f"{name} {section}.{metric}: {number(means[metric])} +- {number(stderrs[metric])}")
    for metric, value in published.items():
        if metric in (means := info.get("core", {}).get("means", {})):
            theirs = f"{value} in dictionary_learning's end-to-end test of a standard SAE"
            print(f"{name} core.{metric}: {number(means[metric])} here, {theirs}")
    for text in warnings:
        print(f"{name} warning: {text}")
    if info:
        print(f"{name} complete: {folder / 'final_info.json'}")


def number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4g}"


class Outcome(NamedTuple):
    """What a run of a command came to: final_info.json, {} without one; and which of its seeds failed ("mine
    seed 0"), and why."""

    name: str
    info: dict
    failed: list[tuple[str, str]]


def refuse_failed(outcomes: Sequence[Outcome]):
    """Raises RunFailed where a seed of a run has failed, with the first one's reason. Of several ranks the
    first one does, which then has written all."""
    failed = [failure for outcome in outcomes for failure in outcome.failed]
    if failed and ranks.here.first:
        where = ", ".join(where for where, _ in failed)
        raise RunFailed(f"{failed[0][1]} (no final_info.json where a seed failed: {where})")


def print_table(outcomes: Sequence[Outcome], rows: Sequence[Row]):
    """`table` of the runs that are complete, as wide as the terminal."""
    width = shutil.get_terminal_size((110, 24)).columns
    print(table([outcome for outcome in outcomes if outcome.info], rows, width))


def table(outcomes: Sequence[Outcome], rows: Sequence[Row], width: int) -> str:
    """The metrics that the rows show, for people: a line a metric and a column a run, as many columns beside
    each other as fit into so many characters. Mean ± standard error, n/a where there is none."""
    lines: list[list[str]] = [["", *(outcome.name for outcome in outcomes)]]
    for section, metrics in (SHOWN | {row.section: row.shown for row in rows}).items():
        parts = [outcome.info.get(section, {}) for outcome in outcomes]
        there = [m for m in metrics if any(m in part.get("means", {}) for part in parts)]
        lines += [[section, *[""] * len(outcomes)]] if there else []
        lines += [[f"  {metric}", *(cell(part, metric) for part in parts)] for metric in there]
    widths = [max(map(len, column)) for column in zip(*lines)]
    blocks, first = [], 1
    while first < len(widths):
        last = first + 1
        while last < len(widths) and widths[0] + sum(w + 2 for w in widths[first : last + 1]) <= width:
            last += 1
        shown = (0, *range(first, last))
        blocks.append(
            "\n".join("  ".join(line[i].ljust(widths[i]) for i in shown).rstrip() for line in lines)
        )
        first = last
    return "\n\n".join(blocks)


def cell(part: dict, metric: str) -> str:
    """Mean and standard error of a metric in a section of final_info.json; "" where it is not there."""
    if metric not in part.get("means", {}):
        return ""
    mean, stderr = part["means"][metric], part["stderrs"][metric]
    return number(mean) if mean is None or stderr is None else f"{mean:.4g} ± {stderr:.2g}"


class Finished:
    """A complete run whose exported SAEs are evaluated: it gains sections, or they are renewed."""

    def __init__(self, folder: Path, config, testbed, tracking: Tracking | None = None):
        """Raises WrongRequest where the LM or the text is not the one the SAEs were trained on."""
        self.folder, self.config, self.testbed = folder, config, testbed
        self.tracking = tracking or Tracking()
        made = run_folder.read_run_json(folder / "config.json", {"requested", "config"})
        now, then = (what_trained({}, t)[1] for t in (described(testbed), made.get("testbed", {})))
        differs = [k for k in then if k in now and now[k] != then[k]]
        if config.context_size != made["config"]["context_size"]:
            differs.append("context_size")
        if differs:
            why = f"{folder} was trained on another LM or text ({', '.join(differs)} differ)"
            raise WrongRequest(f"{why}: its SAEs can be evaluated on the same ones only")
        self.seeds = made["config"]["seeds"]
        owners = ranks.deal(len(self.seeds))
        self.here = [seed for seed, owner in zip(self.seeds, owners) if owner == ranks.here.rank]
        self.info = run_folder.read_run_json(folder / "final_info.json", {"training"})
        try:
            self.warnings = json.loads((folder / "warnings.json").read_text())
        except (OSError, ValueError) as error:
            why = f"{folder / 'warnings.json'} cannot be read ({error})"
            raise WrongRequest(f"{why}; bring it back, or train again into another folder") from error

    def seconds_to_evaluate(self, rows: list[Row]) -> float:
        """About how long that takes on the embedded testbed: what its bar counts."""
        return len(self.here) * evals.seconds_of(rows, self.config)

    def failures(self) -> list[tuple[str, str]]:
        """None: its evaluation fails as a whole."""
        return []

    def measure(self, rows: Sequence[Row], evaluator, made_by: dict, train_seconds: float, bar) -> list:
        """Measure every SAE that is this rank's: [seed, record] each. Raises RunFailed, the run as it was;
        WrongRequest where a record is gone."""
        rows = [row for row in rows if row.fits(self.config)]
        files = {seed: self._known(seed)["files"] for seed in self.seeds}
        (self.folder / "evaluating").mkdir(exist_ok=True)
        measured = {seed: self._begun(seed, files[seed]) for seed in self.here}
        for seed, record in measured.items():
            try:
                measure(self.folder, "evaluating", seed, record, rows, evaluator, made_by, bar)
            except RunFailed as failed:
                raise RunFailed(f"{self.folder} seed {seed}: {failed}; the run is as it was") from failed
        return [list(pair) for pair in measured.items()]

    def finish(self, rows: Sequence[Row], measured: list):
        """Renew what the run folder says, with what all ranks have measured."""
        if not ranks.here.first:
            return
        rows = [row for row in rows if row.fits(self.config)]
        known = {seed: self._known(seed) for seed in self.seeds}
        of_seed = dict(measured)
        with process.signals.held():
            self._renew(rows, known, {seed: of_seed[seed] for seed in self.seeds})
        self.tracking.evaluated(self.folder, {row.section: self.info.get(row.section) for row in rows})

    def _known(self, seed: int) -> dict:
        """What was measured on an SAE before."""
        path = run_folder.record_of(self.folder, seed)
        record = read_record(path)
        if record is None:
            raise WrongRequest(f"{path} is missing; bring it back, or train again into another folder")
        return record

    def _begun(self, seed: int, files: dict) -> dict:
        """What an earlier start of this evaluation has measured."""
        try:
            record = read_record(run_folder.record_of(self.folder, seed, "evaluating"))
        except Unusable as why:
            print(f"warning: {why}; evaluated anew", file=sys.stderr)
            record = None
        return record if record and record["files"] == files else new_record(files)

    def _renew(self, rows: Sequence[Row], known: dict[int, dict], measured: dict[int, dict]):
        """Write final_info.json, warnings.json, eval/ and checksums.json with the new sections."""
        by_seed = self.info["training"]["final_info_dict"]
        training = {s: {k: v[i] for k, v in by_seed.items()} for i, s in enumerate(self.seeds)}
        renewed = {
            seed: {
                k: v if k == "files" else v | {r.section: measured[seed][k][r.section] for r in rows}
                for k, v in record.items()
            }
            for seed, record in known.items()
        }
        old, new = (
            warnings_of(rows, records, training, self.config, self.testbed.d_in)
            for records in (known, renewed)
        )
        for text in old:
            if text in self.warnings and text not in new:
                self.warnings.remove(text)
        self.warnings += [text for text in new if text not in self.warnings]
        self.info |= {row.section: summary_of(row.section, renewed) for row in rows}
        contents = {}
        for seed, record in renewed.items():
            for name in (f"seed{seed}_{row.section}.json" for row in rows):
                contents[f"eval/{name}"] = (self.folder / "evaluating" / name).read_bytes()
            contents[f"eval/seed{seed}_metrics.json"] = as_json(seal(record))
        contents |= {"warnings.json": as_json(self.warnings), "final_info.json": as_json(self.info)}
        run_folder.renew(self.folder, contents)
        run_folder.clear_complete(self.folder)
