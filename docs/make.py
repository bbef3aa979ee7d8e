"""Writes what the documents quote from the committed run folders: make docs

In README.md, docs/results.md and docs/reliability.md (of tests/faults.json), what stands between <!--
NAME --> and <!-- /NAME --> is made anew. In notes.txt, the numbers `section.metric = mean ± standard
error` and the intervals under each run's heading are, and the table of paired tests. All other text is
left as it is. `--check` writes nothing: exit code 1 where a document is out of date.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import plot  # noqa: E402  (the checkout's, from wherever this is started)

SMOLLM2 = ("run_0", "run_6", "run_9")
SHORT = (  # the columns of README's table
    ("core", "explained_variance", "explained variance"),
    ("geometry", "mean_max_cosine", "mean max cosine"),
    ("unlearning", "unlearning_score", "unlearning score"),
    ("unlearning", "unlearning_score_guardrail", "with guardrail"),
)
REFERENCE, BASELINE, VARIANTS = "run_6", "run_0", ("run_7", "run_8")
INTERVALS = "95 % bootstrap intervals of the unlearning score over questions, seed by seed: "


def runs_in(folders: list[Path]) -> list[plot.Run]:
    """Complete runs, all of one commit. Raises SystemExit for others: documents quote no mixture."""
    runs, skipped = plot.find_runs(folders)
    commits = {run.config.get("git") for run in runs}
    if skipped or len(commits) != 1:
        reason = "; ".join(skipped) or f"runs of several commits: {', '.join(sorted(map(str, commits)))}"
        raise SystemExit(f"error: {reason}; make them anew by one command (CONTRIBUTING.md, Results)")
    return runs


def short_table(runs: list[plot.Run]) -> str:
    rows = [[f"{run.name}: {run.label}", *(plot.shown(*run.mean(s, m)) for s, m, _ in SHORT)] for run in runs]
    return plot.markdown(["run", *(title for _, _, title in SHORT)], rows)


def provenance(runs: list[plot.Run]) -> str:
    seeds = {len(run.seeds) for run in runs}
    return (
        f"Mean ± standard error over {' or '.join(map(str, seeds))} seeds. Commit `{runs[0].config['git']}`."
    )


def lead(runs: list[plot.Run]) -> str:
    """What the lead rests on, in numbers."""
    by_name = {run.name: run for run in runs}
    reference, vanilla = by_name[REFERENCE], by_name[BASELINE]
    l0 = [run.mean("core", "l0")[0] for run in runs]
    others = [run for run in runs if run.name not in (REFERENCE, *VARIANTS)]
    tested = plot.paired_tests([(reference, run) for run in runs if run is not reference], *plot.SCORE)
    largest = max(test["holm"] for test in tested if test["b"] in others)
    forget, retain = (reference.mean("unlearning", f"{d}_accuracy")[0] for d in ("forget", "retain"))
    explained = reference.mean(*plot.EXPLAINED)[0] - vanilla.mean(*plot.EXPLAINED)[0]
    scores = [run.mean(*plot.SCORE)[0] for run in (reference, vanilla)]
    return (
        f"`adaptive` ({REFERENCE}) leaves {forget:.2f} of the known forget questions right (chance is 0.25) "
        f"and {retain:.3f} of the retain questions.\n"
        f"Its unlearning score is {scores[0]:.2f}, vanilla's {scores[1]:.2f}; its explained variance is "
        f"{explained:+.3f} against vanilla's.\n"
        f"Mean L0 lies between {min(l0):.1f} and {max(l0):.1f}. Paired t-tests over seeds, Holm's correction "
        f"over {len(tested)} comparisons:\n"
        f"p is at most {largest:.2g} against every arm but its own variants ({', '.join(VARIANTS)})."
    )


def faults_table() -> str:
    """The fault campaign's trials, one row for all faults that are to end alike."""
    alike: dict[str, list[dict]] = {}
    for rows in json.loads((ROOT / "tests/faults.json").read_text()).values():
        for row in rows:
            alike.setdefault(row["outcome"], []).append(row)
    table = []
    for outcome, rows in alike.items():
        names = dict.fromkeys(re.sub(r" \([^()]*\)$", "", row["fault"]) for row in rows)
        tried, passed = (str(sum(row[key] for row in rows)) for key in ("tried", "as it should"))
        table.append([", ".join(names), tried, passed, outcome])
    return plot.markdown(["fault", "trials", "passed", "expected"], table)


def filled(path: Path, blocks: dict[str, str]) -> str:
    """The document with each block between its markers. Raises SystemExit for markers that are not there."""
    text = path.read_text()
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not found or not ended:
            raise SystemExit(f"error: {path.name}: the markers {begin} and {end} are missing; put them back")
        text = f"{before}{begin}\n{block}\n{end}{after}"
    return text


def quoted_anew(text: str, runs: list[plot.Run]) -> str:
    """notes.txt with the numbers of today's run folders, at the digits they are quoted with."""
    by_name = {run.name: run for run in runs}
    heads = re.split(r"(?m)^(?=## )", text)

    def of(run: plot.Run, part: str) -> str:
        def number(found: re.Match) -> str:
            digits = len(found[3].partition(".")[2])
            return f"{found[1]}.{found[2]} = {plot.shown(*run.mean(found[1], found[2]), f'.{digits}f')}"

        part = re.sub(r"(\w+)\.([\w.]+) = (-?[\d.]+) ± [\d.]+", number, part)
        details = run.evals.get("unlearning", [])
        intervals = ["[{:.3f}, {:.3f}]".format(*d["unlearning_score_bootstrap_95"]) for d in details]
        return re.sub(f"{re.escape(INTERVALS)}.*", INTERVALS + ", ".join(intervals), part)

    names = [re.match(r"## (run_\d+):", part) for part in heads]
    text = "".join(
        of(by_name[name[1]], part) if name and name[1] in by_name else part
        for name, part in zip(names, heads)
    )
    table = plot.against_table(by_name[REFERENCE], runs)
    return re.sub(rf"(?m)^\| {REFERENCE} less \|.*\n(\|.*\n)+", f"{table}\n".replace("\\", r"\\"), text)


def documents() -> dict[Path, str]:
    """What the documents should hold."""
    runs = runs_in([ROOT / name for name in plot.labels if (ROOT / name).exists()])
    smollm2 = runs_in([ROOT / "smollm2" / name for name in SMOLLM2])
    readme, results, notes = (ROOT / name for name in ("README.md", "docs/results.md", "notes.txt"))
    reliability = ROOT / "docs/reliability.md"
    tables = {"lead": lead(runs), "results": plot.summary_table(runs), "smollm2": plot.summary_table(smollm2)}
    tables |= {"results-from": provenance(runs), "smollm2-from": provenance(smollm2)}
    return {
        readme: filled(readme, {"results": f"{short_table(runs)}\n\n{provenance(runs)}"}),
        results: filled(results, tables),
        reliability: filled(reliability, {"faults": faults_table()}),
        notes: quoted_anew(notes.read_text(), runs),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if out of date")
    args = parser.parse_args()
    stale = {path: text for path, text in documents().items() if path.read_text() != text}
    for path, text in stale.items():
        if not args.check:
            path.write_text(text)
        state = "is out of date: run make docs" if args.check else "written"
        print(f"{path.relative_to(ROOT)} {state}", file=sys.stderr if args.check else sys.stdout)
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
