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

import numpy as np
from scipy.special import stdtrit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sae_separation import results  # noqa: E402  (the checkout's)
from sae_separation.plots import folders, tables  # noqa: E402
from studies import controls as of_controls  # noqa: E402
from studies import worlds as of_worlds  # noqa: E402

SMOLLM2 = ("run_0", "run_6", "run_9")
SHORT = ("standard", "worst case", "left at most", "kept at least")  # the columns of README's table
OF_README = [f"run_{i}" for i in (0, 1, 6, 9, 15, 16, 17, 19, 21)]  # its rows
# columns that say something of gates in context
OF_GATES = ("standard", "worst case", "left at most", "kept at least", "mean", "choice: worst case")
OF_GATES += (
    "choice: left",
    "choice: kept",
    "4 bits: left",
    "depth",
    "relearned",
    "same entity",
    "seconds",
)
REFERENCE, BASELINE = "run_6", "run_0"
# column -> metric of known_truth.json, digits, whether with its difference to the baseline
KNOWN_TRUTH: dict[str, tuple[str, str, bool]] = {
    "MCC": ("mcc", ".3f", True),
    "MCC, forget": ("mcc_forget", ".3f", True),
    "MCC, others": ("mcc_others", ".3f", True),
    "uniqueness": ("uniqueness", ".3f", True),
    "precision": ("precision", ".3f", False),
    "recall": ("recall", ".3f", False),
    "F1": ("f1_score", ".3f", True),
    "expl. var.": ("explained_variance", ".3f", True),
    "L0": ("sae_l0", ".2f", False),
    "dead": ("dead_latents", ".0f", False),
    "Ω": ("omega", ".2f", False),
}
# runs that are told the labels less the best of those that need no SAE, and the two halves less one of them;
# runs that are told nothing less the one without a loss on directions
TOLD = [(f"run_{i}", "run_15") for i in (6, 7, 8, 11, 22, 23, 24, 25, 19, 20)] + [("run_23", "run_6")]
UNTOLD = [(f"run_{i}", "run_0") for i in (1, 2, 3, 4, 5, 9, 10, 26, 27)]
OF_DIFFERENCES = ("mean", "standard", "left at most", "depth")
OF_TAUGHT = [("run_6", "run_0"), ("run_6", "run_15"), ("run_23", "run_6"), ("run_9", "run_0")]
TAUGHT_DIFFERENCES = ("mean", "left at most", "kept at least", "same entity", "4 bits: left")
INTERVALS = "95 % bootstrap intervals of the unlearning score over questions, seed by seed: "


def runs_in(where: list[Path], by_section: bool = False) -> list[folders.Run]:
    """Complete runs: all SAEs trained at one commit and evaluated at one, and all methods that need none; or
    each method, and each section of a kind. Raises SystemExit for others: documents quote no mixture."""
    runs, skipped = folders.find_runs(where)
    of_kinds = [commits for some in by_kind(runs).values() for commits in commits_of(some)]
    commits = [*trained_at(runs).values(), *sections_at(runs).values()] if by_section else of_kinds
    if skipped or any(len(some) != 1 for some in commits):
        several = ", ".join(sorted(map(str, set().union(*commits))))
        reason = "; ".join(skipped) or f"runs of several commits: {several}"
        raise SystemExit(f"error: {reason}; make them anew by one command (CONTRIBUTING.md, Results)")
    return runs


def by_kind(runs: list[folders.Run]) -> dict[str, list[folders.Run]]:
    """SAEs, and the methods that need none, which a change of training leaves as they are."""
    kinds = {"SAEs": with_saes(runs), "without an SAE": [run for run in runs if "core" not in run.info]}
    return {kind: some for kind, some in kinds.items() if some}


def commits_of(runs: list[folders.Run]) -> tuple[set, set]:
    """Those that runs were trained at, and those that they were evaluated at (older folders name none)."""
    trained = {run.config.get("git") for run in runs}
    made = {part["made_by"]["git"] for run in runs for part in run.info.values() if "made_by" in part}
    return trained, made or trained


def trained_at(runs: list[folders.Run]) -> dict[str, set[str]]:
    """The commits at which each method was trained."""
    out: dict[str, set[str]] = {}
    for run in runs:
        out.setdefault(run.label, set()).add(run.config["git"])
    return out


def sections_at(runs: list[folders.Run]) -> dict[str, set[str]]:
    """The commits at which each section was measured; of each kind apart where those of the kinds differ."""
    found: dict[str, dict[str, set[str]]] = {}
    for kind, some in by_kind(runs).items():
        for run in some:
            for section, part in run.info.items():
                if "made_by" in part:
                    found.setdefault(section, {}).setdefault(kind, set()).add(part["made_by"]["git"])
    out: dict[str, set[str]] = {}
    for section, kinds in found.items():
        alike = len({frozenset(commits) for commits in kinds.values()}) == 1
        out |= {section if alike else f"{section} ({kind})": commits for kind, commits in kinds.items()}
    return out


def over_seeds(runs: list[folders.Run]) -> str:
    seeds = sorted({len(run.seeds) for run in runs})
    if seeds == [1]:
        return "One seed."
    return f"Mean ± standard error over {' or '.join(map(str, seeds))} seeds."


def provenance_by_section(runs: list[folders.Run]) -> str:
    trained, measured = by_commit(trained_at(runs)), by_commit(sections_at(runs))
    return f"{over_seeds(runs)} Trained: {trained}. Measured: {measured}."


def by_commit(at: dict[str, set[str]]) -> str:
    """What was made at each commit: a, b at `c`; d at `e`."""
    named: dict[str, list[str]] = {}
    for what, (commit,) in at.items():
        named.setdefault(commit, []).append(what)
    return "; ".join(f"{', '.join(some)} at `{commit}`" for commit, some in sorted(named.items()))


def provenance(runs: list[folders.Run]) -> str:
    """Over how many seeds, and the commits, of each kind if they differ."""
    at: dict[str, str] = {}
    for kind, some in by_kind(runs).items():
        (trained,), (evaluated,) = commits_of(some)
        at[kind] = f"commit `{trained}`" + ("" if evaluated == trained else f", evaluated at `{evaluated}`")
    if len({*at.values()}) == 1:
        said = next(iter(at.values())).capitalize()
    else:
        said = "; ".join(f"{kind}: {commits}" for kind, commits in at.items())
    return f"{over_seeds(runs)} {said}."


def lead(runs: list[folders.Run]) -> str:
    """What the ruler says, in numbers."""
    ranked = tables.by_worst_case(runs)
    above = [run for run in ranked if run.mean(*tables.WORST)[0] > 0]
    named = ", ".join(f"{run.label} {run.mean(*tables.WORST)[0]:.2f}" for run in above)
    return "\n".join(
        [
            f"In the worst case {len(above)} of {len(ranked)} rows score above 0: {named}.",
            of_best(ranked),
            *(of_one(run) for run in ranked if run.name in (REFERENCE, BASELINE)),
            of_dictionaries(runs),
        ]
    )


def of_best(runs: list[folders.Run]) -> str:
    """Of SAEBench's rule, what it calls best."""

    def standard(run: folders.Run) -> float:
        return run.mean(*tables.RULER["standard"])[0]

    best = max(runs, key=standard)
    return f"SAEBench's rule calls {best.label} the best ({standard(best):.2f})."


def of_one(run: folders.Run) -> str:
    standard, left, kept = (
        run.mean(*tables.RULER[head])[0] for head in ("standard", "left at most", "kept at least")
    )
    return (
        f"`{run.label}` ({run.name}) scores {standard:.2f} by that rule; asked in every form, it leaves "
        f"up to {left:.2f} of the knowledge and keeps down to {kept:.2f} of the retain questions."
    )


def with_saes(runs: list[folders.Run]) -> list[folders.Run]:
    return [run for run in runs if "core" in run.info]


def of_dictionaries(runs: list[folders.Run]) -> str:
    """What the SAEs of the two compare in."""
    by_name = {run.name: run for run in runs}
    explained = by_name[REFERENCE].mean(*tables.EXPLAINED)[0] - by_name[BASELINE].mean(*tables.EXPLAINED)[0]
    l0 = [run.mean("core", "l0")[0] for run in with_saes(runs)]
    return (
        f"Mean L0 of the SAEs lies between {min(l0):.1f} and {max(l0):.1f}; the explained variance of "
        f"{REFERENCE} is {explained:+.3f} against vanilla's."
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
    return tables.markdown(["fault", "trials", "passed", "expected"], table)


def known_truth_table(found: dict) -> str:
    """A row a dictionary: means over seeds, with the difference to the baseline where it has an interval."""

    def cell(of: dict, digits: str, paired: bool) -> str:
        text = format(of["mean"], digits)
        if not paired or of["interval_95"] is None or of["interval_95"] == [0, 0]:
            return text
        low, high = of["interval_95"]
        return f"{text} ({of['less_baseline']:+{digits}} ± {(high - low) / 2:{digits}})"

    table = [
        [name, *(cell(row[metric], digits, paired) for metric, digits, paired in KNOWN_TRUTH.values())]
        for name, row in found["summary"].items()
    ]
    return tables.markdown(["dictionary", *KNOWN_TRUTH], table)


def known_truth() -> str:
    """The table, and what it was made of; where it is yet to be made, how."""
    path = ROOT / "benchmarks/known_truth.json"
    if not path.exists():
        return "Not measured yet: `python benchmarks/known_truth.py`."
    found = json.loads(path.read_text())
    seeds, settings = list(found["seeds"].values()), found["settings"]
    world, targets = seeds[0]["world"], sorted({str(seed["world"]["target_l0"]) for seed in seeds})
    commits = sorted({seed["made_by"]["git"] for seed in seeds})
    about = [
        f"{len(seeds)} {'seeds' if len(seeds) > 1 else 'seed'}",
        f"{world['true_features']:,} true features, d_in {world['d_in']}, d_sae {world['d_sae']:,}",
        f"{settings['samples']:,} samples in batches of {settings['batch_size']:,}",
        f"target L0 {' or '.join(targets)}",
        f"commit `{'`, `'.join(commits)}`",
    ]
    return f"{known_truth_table(found)}\n\n{'; '.join(about)}."


def gates_table() -> str:
    """A row a gate of studies/gates.json, per world: the cell that SAEBench's rule chose, and what the others
    leave and keep. Where it is yet to be made, how."""
    path = ROOT / "studies/gates.json"
    if not path.exists():
        return "Not measured yet: `python -m studies.gates`."
    table, commits = [], set()
    for world, rows in json.loads(path.read_text()).items():
        for name, row in rows.items():
            best = row["chosen"]
            said = [f"{best[key]:.2f}" if best else "n/a" for key in ("worst_case_score", "mean_score")]
            allowed = [c["knowledge_left_max"] for c in row["cells"] if c["worst_case_score"] > 0]
            said.append(f"{1 - min(allowed):.2f}" if allowed else "0")
            each = (f"{c['knowledge_left_max']:.2f} / {c['kept_at_worst']:.3f}" for c in row["cells"])
            table.append([world, name, *said, ", ".join(each)])
            commits.add(row["made_by"]["git"])
    head = ["world", "gate", "worst case", "mean of forms", "best cell's", "left at most / kept at least"]
    return f"{tables.markdown(head, table)}\n\nCommit `{'`, `'.join(sorted(commits))}`, one seed."


def worlds(name: str) -> str:
    """The tables of a file of studies/worlds.py, and at which commits its runs were made. Where it is yet to
    be made, how."""
    path = ROOT / f"studies/{name}.json"
    if not path.exists():
        return "Not measured yet: `make worlds`."
    found = json.loads(path.read_text())
    runs = [run for rows in found["worlds"].values() for run in rows.values()]
    trained = sorted({run["trained_at"] for run in runs})
    measured = sorted({commit for run in runs for commit in run["evaluated_at"].values()})
    about = f"Trained at `{'`, `'.join(trained)}`, measured at `{'`, `'.join(measured)}`."
    blocks = [of_worlds.table(found["worlds"])]
    if found["comparisons"]:
        blocks.append(of_worlds.differences(found["comparisons"]))
    return "\n\n".join([*blocks, about])


def controls() -> str:
    """The table of studies/controls.py, and at which commits its runs were trained. Where it is yet to be
    made, how."""
    path = ROOT / "studies/controls.json"
    if not path.exists():
        return "Not measured yet: `make controls`."
    rows = json.loads(path.read_text())
    seeds = sorted({seed for row in rows for seed in row["by_seed"]["L0"]})
    trained = "`, `".join(sorted({row["trained_at"] for row in rows}))
    return f"{of_controls.table(rows)}\n\n{len(seeds)} seeds, trained at `{trained}`."


def differences(
    runs: list[folders.Run], pairs: list[tuple[str, str]], of: tuple[str, ...] = OF_DIFFERENCES
) -> str:
    """Markdown: pairs of runs by these columns, seed by seed, with the 95 % interval of Student's t; p of the
    paired t-test of the first, after Holm's correction over the rows."""
    by_name = {run.name: run for run in runs}
    asked = [(by_name[a], by_name[b]) for a, b in pairs if a in by_name and b in by_name]
    found = [tables.paired_tests(asked, *tables.RULER[head]) for head in of]
    rows = []
    for tests in zip(*found, strict=True):
        assert len({(test["a"].name, test["b"].name) for test in tests}) == 1, "every pair has every metric"
        halves = [stdtrit(test["n"] - 1, 0.975) * test["stderr"] for test in tests]
        cells = [tables.shown(test["difference"], half, "+.2f") for test, half in zip(tests, halves)]
        p = f"{tests[0]['holm']:.2g}" if np.isfinite(tests[0]["holm"]) else "-"
        rows.append([tests[0]["a"].label, tests[0]["b"].label, *(c.replace("± +", "± ") for c in cells), p])
    heads = [head.replace("mean", "mean of forms") for head in of]
    return tables.markdown(["of", "less", *heads, "p of the first (Holm)"], rows)


def layers_table() -> str:
    """Where the taught LM looks its facts up."""
    row = json.loads((ROOT / "studies/layers.json").read_text())["smollm2-taught, world 0"]
    forget, retain = row["forget"], row["retain"]
    columns = {"layer": row["layers"], "LM above": forget["lm_above"], "oracle above": forget["oracle_above"]}
    columns |= {"readout, LM": forget["readout_lm"], "readout, oracle": forget["readout_oracle"]}
    columns |= {
        f"{name}, retain": retain[name.replace(" ", "_").lower()] for name in ("LM above", "oracle above")
    }
    cells = [[str(layer), *(f"{value:.2f}" for value in of)] for layer, *of in zip(*columns.values())]
    return f"{tables.markdown(list(columns), cells)}\n\nCommit `{row['made_by']['git']}`."


def right_in(details: dict, how: str, of_forget: bool, with_cell: bool) -> float:
    """The share that is right in a format, with the cell or without, of the questions that did not choose it
    (evals/answers.py)."""
    place, right = details["columns"].index(how), []
    for row in details["rows"]:
        subject, _, _, half, answer = *row[:4], row[place]
        if half == "reporting" and answer is not None and (subject == "biology") == of_forget:
            right.append(answer is True or answer[with_cell] is True)
    return float(np.mean(right))


def answers_table(runs: list[folders.Run]) -> str:
    """Accuracy in the formats that the taught LM answers, on questions that did not choose the cell."""
    asked = {
        f"{'biology' if of_forget else 'the others'}, {how}": (how, of_forget)
        for of_forget in (True, False)
        for how in ("cloze", "prose")
    }

    def row(label: str, seeds: list[dict], with_cell: bool) -> list[str]:
        found = results.summarise(
            {head: [right_in(d, *of, with_cell) for d in seeds] for head, of in asked.items()}
        )
        means = ((folders.finite(found[kind][head]) for kind in ("means", "stderrs")) for head in asked)
        return [label, *(tables.shown(mean, stderr, ".2f") for mean, stderr in means)]

    runs = [run for run in runs if run.evals.get("questions")]
    rows = [row("nothing switched off", run.evals["questions"][:1], False) for run in runs[:1]]
    rows += [row(run.label, run.evals["questions"], True) for run in runs]
    return tables.markdown(["method", *asked], rows)


def some_forms_tables(runs: list[folders.Run]) -> list[str]:
    """The ruler over the forms in which the oracle, which was never told, keeps as much as is asked for (in
    the others even it has 0), and over those by cloze."""
    (oracle,) = (run for run in runs if run.label == "oracle")
    (asked,) = (details["forms"] for details in oracle.evals["robustness"])
    kept = [row["form"] for row in asked if row["kept_enough"]]
    by_cloze = [row["form"] for row in asked if row["form"].startswith("cloze")]
    return [
        f"Over the {len(kept)} of {len(asked)} forms in which the oracle keeps enough:",
        some_forms_table(runs, kept),
        f"Over the {len(by_cloze)} forms by cloze, one of which chose the cells, on other questions:",
        some_forms_table(runs, by_cloze),
    ]


def some_forms_table(runs: list[folders.Run], forms: list[str]) -> str:
    rows = []
    for run in tables.by_worst_case(runs):
        found = results.summarise(over_forms(run.evals["robustness"], forms))
        means, stderrs = found["means"], found["stderrs"]
        cells = (tables.shown(means[head], folders.finite(stderrs[head]), ".2f") for head in means)
        rows.append([run.label, *cells])
    return tables.markdown(["method", *means], rows)


def over_forms(by_seed: list[dict], forms: list[str]) -> dict[str, list[float]]:
    """The ruler's columns over some of the forms, by seed."""
    found: dict[str, list[float]] = {}
    for details in by_seed:
        by_form = {row["form"]: row for row in details["forms"]}
        some = [by_form[form] for form in forms]
        most, failed = max(row["left"] for row in some), sum(not row["kept_enough"] for row in some)
        found.setdefault("worst case", []).append(0.0 if failed else 1 - most)
        found.setdefault("left at most", []).append(most)
        found.setdefault("kept at least", []).append(min(row["kept"] for row in some))
        found.setdefault("forms that keep too little", []).append(failed)
    return found


def taught() -> str:
    """The tables of the study on the LM that was taught its facts: the ruler, differences in it, the answers,
    the SAEs by SAEBench's measures, and at which commits they were made. Where it is yet to be made, how."""
    runs = runs_in([path.parent for path in ROOT.glob("taught/*/final_info.json")], by_section=True)
    if not runs:
        return "Not made yet: `make taught`."
    blocks = [answers_table(runs), tables.summary_table(runs), provenance_by_section(runs)]
    if tables.by_worst_case(runs):
        of_pairs = differences(runs, OF_TAUGHT, TAUGHT_DIFFERENCES)
        blocks[:0] = [tables.ruler_table(runs), *some_forms_tables(runs), of_pairs]
    return "\n\n".join(blocks)


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


def quoted_anew(text: str, runs: list[folders.Run]) -> str:
    """notes.txt with the numbers of today's run folders, at the digits they are quoted with."""
    by_name = {run.name: run for run in runs}
    heads = re.split(r"(?m)^(?=## )", text)

    def of(run: folders.Run, part: str) -> str:
        def number(found: re.Match) -> str:
            digits = len(found[3].partition(".")[2])
            return f"{found[1]}.{found[2]} = {tables.shown(*run.mean(found[1], found[2]), f'.{digits}f')}"

        part = re.sub(r"(\w+)\.([\w.]+) = (-?[\d.]+)(?: ± [\d.]+)?", number, part)
        details = run.evals.get("unlearning", [])
        scored = [d["unlearning_score_bootstrap_95"] for d in details if "unlearning_score_bootstrap_95" in d]
        intervals = ["[{:.3f}, {:.3f}]".format(*interval) for interval in scored]
        return re.sub(f"{re.escape(INTERVALS)}.*", INTERVALS + ", ".join(intervals), part)

    names = [re.match(r"## (run_\d+):", part) for part in heads]
    text = "".join(
        of(by_name[name[1]], part) if name and name[1] in by_name else part
        for name, part in zip(names, heads)
    )
    table = tables.against_table(by_name[REFERENCE], with_saes(runs))
    return re.sub(rf"(?m)^\| {REFERENCE} less \|.*\n(\|.*\n)+", f"{table}\n".replace("\\", r"\\"), text)


def documents() -> dict[Path, str]:
    """What the documents should hold."""
    runs = runs_in([ROOT / name for name in folders.labels if (ROOT / name).exists()])
    smollm2 = runs_in([ROOT / "smollm2" / name for name in SMOLLM2])
    unseen = runs_in([path.parent for path in ROOT.glob("unseen/*/final_info.json")])
    readme, of_results, notes = (ROOT / name for name in ("README.md", "docs/results.md", "notes.txt"))
    reliability = ROOT / "docs/reliability.md"
    filled_in = {"lead": lead(runs), "ruler": tables.ruler_table(runs)}
    filled_in |= {"results": tables.summary_table(with_saes(runs)), "smollm2": tables.summary_table(smollm2)}
    short = tables.ruler_table([run for run in runs if run.name in OF_README], SHORT)
    filled_in |= {"results-from": provenance(runs), "smollm2-from": provenance(smollm2)}
    filled_in |= {"told": differences(runs, TOLD), "untold": differences(runs, UNTOLD)}
    filled_in |= {"unseen-from": provenance(unseen)}
    in_context = runs_in([path.parent for path in ROOT.glob("in_context/*/final_info.json")], by_section=True)
    gates_in_context = f"{tables.ruler_table(in_context, OF_GATES)}\n\n{provenance_by_section(in_context)}"
    filled_in |= {"known-truth": known_truth(), "gates": gates_table(), "in-context": gates_in_context}
    filled_in |= {"controls": controls(), "layers": layers_table(), "taught": taught()}
    filled_in |= {"worlds": worlds("worlds"), "worlds-two-writes": worlds("worlds_two_writes")}
    return {
        readme: filled(readme, {"results": f"{short}\n\n{provenance(runs)}"}),
        of_results: filled(of_results, filled_in),
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
