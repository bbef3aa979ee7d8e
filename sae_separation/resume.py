"""What of a command is left to do: runs to train, runs to go on with, complete runs to evaluate. Imports no
torch."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from sae_separation import evals, loaded, process, ranks, run_folder
from sae_separation.config import Command, Request
from sae_separation.errors import WrongRequest
from sae_separation.specs import ASKED, CUSTOM, SPECS, defaults_of

R = TypeVar("R", bound=Request)


def unfinished(
    command: Command, requests: Sequence[R], plan: Mapping[str, dict[str, Any]]
) -> tuple[Command, list[R]]:
    """The command and the requests of the runs that are left to train, or to evaluate where evaluations are
    named. Other complete runs are named and left alone. This process holds the lock of every folder that is
    left; in a dry run of none, and nothing is written.

    Raises WrongRequest for a folder that is no folder, cannot be written, has another owner, holds a run made
    with other settings, or is to be evaluated and holds no SAE.
    """
    folders = [Path(name) for name in command.out_dir]
    owns = ranks.here.first and not command.dry_run
    for folder in folders:
        run_folder.refuse_place(folder)
    run_folder.refuse_same(command.out_dir)
    left = []
    for folder, request in zip(folders, requests):
        run_folder.refuse_foreign(folder, request.seeds)
        if (folder / "config.json").exists() and not command.overwrite:
            planned = replace(type(request)(), **plan.get(folder.name, {}))
            if command.saes:
                loaded.refuse_others(folder, command.saes)
            again = to_go_on(folder, request, planned, command.evals)
            if again is None:
                if owns:
                    run_folder.clear_left(folder)
                    process.remove_left("saebench")
                continue
            request = again
        if folder.is_dir() and owns:
            run_folder.lock(folder)
        left.append((str(folder), request))
    return replace(command, out_dir=tuple(name for name, _ in left)), [request for _, request in left]


def to_go_on(folder: Path, request: R, planned: R, evaluations: tuple[str, ...]) -> R | None:
    """The request for a folder that holds a run: as it was made where it is complete and to be evaluated;
    None where it is complete, which is then said. Raises WrongRequest."""
    made = run_folder.read_run_json(folder / "config.json", {"requested", "config"})
    if not run_folder.is_complete(folder):
        refuse_differing(folder, request, made, differing(request, made, without=ASKED))
        refuse_changed_row(folder, request, made)
        run_folder.refuse_lost_result(folder)
        return request
    info = run_folder.read_run_json(folder / "final_info.json", {"training"})
    evaluated = evaluations not in ((), ("none",))
    differs = differing(request, made, without=ASKED if evaluated else ())
    if set(request.seeds) <= set(made["requested"].get("seeds", ())):  # more seeds than asked for
        differs = [name for name in differs if name != "seeds"]
    if evaluated:  # what was not asked for by name is as it was made
        differs = [name for name in differs if getattr(request, name) != getattr(planned, name)]
    refuse_differing(folder, request, made, differs)
    refuse_changed_row(folder, request, made)
    for changed in run_folder.changed_files(folder):
        print(f"warning: {changed}", file=sys.stderr)
    if evaluated:
        run_folder.refuse_without_saes(folder, made["config"]["seeds"])
        return as_made(request, made)
    print(f"{folder} is complete: {folder / 'final_info.json'} (--overwrite starts anew)")
    rows = [row for row in evals.rows_of(()) if row.fits(request)]
    lacking = [row.name for row in rows if row.section not in info]
    if (
        evaluations != ("none",)
        and lacking
        and all(run_folder.has_sae(folder, seed) for seed in made["config"]["seeds"])
    ):
        print(f"{folder} lacks evaluations; the same command adds them with --evals {' '.join(lacking)}")
    return None


def differing(request: Request, made: dict, without: Sequence[str]) -> list[str]:
    """The settings in which a run was `made` otherwise than is wanted, but for some that only evaluations
    need."""
    wanted = json.loads(json.dumps(asdict(request)))
    default = json.loads(json.dumps(asdict(type(request)())))
    asked = default | made["requested"]  # a setting that is newer than the folder had its default
    differs = [k for k, v in wanted.items() if v not in (asked[k], made["config"].get(k), "auto")]
    return [name for name in differs if name not in without]


def refuse_differing(folder: Path, request: Request, made: dict, differs: list[str]):
    """Raises WrongRequest, naming the settings that differ, if there are any."""
    wanted = json.loads(json.dumps(asdict(request)))
    if differs:
        asked = {k: "the default" if wanted[k] in (None, "", []) else wanted[k] for k in differs}
        said = ", ".join(f"{k} {made['config'].get(k)} there, {v} wanted" for k, v in asked.items())
        remedy = "name another folder, or --overwrite it"
        raise WrongRequest(f"--out_dir {folder} holds a run with other settings ({said}); {remedy}")


def refuse_changed_row(folder: Path, request: Request, made: dict):
    """Raises WrongRequest where a setting was left to the testbed's row, still is, and the row has changed
    since; not for what only evaluations need."""
    testbed = made["config"].get("testbed")
    row = json.loads(json.dumps(defaults_of(SPECS[testbed]))) if testbed in SPECS else {}
    asked = asdict(request)
    left = [k for k in row if asked[k] in (None, "", ()) and made["requested"].get(k) in (None, "", [])]
    changed = [k for k in left if k not in ASKED and made["config"].get(k, row[k]) != row[k]]
    if changed:
        what = ", ".join(f"{k} {made['config'][k]} there, {row[k]} now" for k in changed)
        remedy = "name another folder, or --overwrite it"
        raise WrongRequest(
            f"--out_dir {folder} holds a run with other settings of --testbed {testbed} ({what}); {remedy}"
        )


def as_made(request: R, made: dict) -> R:
    """The settings that a complete run was made with, and what is wanted for its evaluation."""
    known = {f.name: made["requested"][f.name] for f in fields(request) if f.name in made["requested"]}
    known |= {name: getattr(request, name) for name in ASKED if getattr(request, name)}
    testbed = made["config"]["testbed"]
    known |= {"testbed": "auto" if testbed == CUSTOM else testbed}
    return replace(type(request)(), **{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})
