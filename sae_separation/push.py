"""Put the SAEs of a run, and its results, on the Hugging Face hub. A repository is private unless --public
is given; pushing again renews it, in one commit.

    python -m sae_separation.push run_6 owner/name
    python -m sae_separation.push run_6 owner/name --seed 0 --public
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from sae_separation import evals, process, run_folder
from sae_separation.card import model_card, without_folders
from sae_separation.errors import Interrupted, WrongRequest, finish, keep_output_open, tell
from sae_separation.files import as_json
from sae_separation.parser import Parser
from sae_separation.text import HUB_NAME

PUSHED = re.compile(  # what this program puts into a repository, and the hub itself
    r"README\.md|\.gitattributes|final_info\.json|eval/seed\d+_\w+\.json"
    r"|sae_seed\d+/(cfg\.json|sae_weights\.safetensors)"
)


QUOTING = (
    "features",
    "questions",
)  # their details quote text and questions, which may not be ours to publish


def seeds_to_push(folder: Path, asked: Sequence[int]) -> list[int]:
    """The seeds of a complete run whose SAEs are there, all or those `asked` for. Raises WrongRequest for
    what is no such run, or not as it was written."""
    if not run_folder.holds_settings(folder):
        what = "a folder that experiment.py wrote, with config.json and final_info.json"
        raise WrongRequest(f"{folder} holds no run of this program: give {what}")
    if not run_folder.is_complete(folder):
        why = f"{folder} is not complete: {folder / 'final_info.json'} is not there"
        raise WrongRequest(f"{why}; the command that began the run goes on with it")
    config = run_folder.read_run_json(folder / "config.json", {"requested", "config"})["config"]
    info = run_folder.read_run_json(folder / "final_info.json", {"training"})
    if "final_l0" not in info["training"]["means"]:
        raise WrongRequest(f"{folder} holds no SAE that was trained here: --arm {config['arm']} trains none")
    if unknown := [seed for seed in asked if seed not in config["seeds"]]:
        there = " ".join(map(str, config["seeds"]))
        raise WrongRequest(f"--seed {unknown[0]}: the seeds of {folder} are {there}")
    for changed in run_folder.changed_files(folder):
        raise WrongRequest(f"{changed}; a run is pushed as it was written, or not at all")
    seeds = sorted(set(asked)) or config["seeds"]
    run_folder.refuse_without_saes(folder, seeds)
    return seeds


def contents(repo: str, folder: Path, seeds: list[int]) -> dict[str, bytes | Path]:
    """What goes into the repository: its path there -> its bytes, or the file that has them."""
    info = json.loads((folder / "final_info.json").read_bytes())
    files: dict[str, bytes | Path] = {
        "README.md": model_card(repo, folder, seeds).encode(),
        "final_info.json": as_json(without_folders(info)),
    }
    for seed in seeds:
        measured = [row.section for row in evals.ROWS if row.section in info and row.section not in QUOTING]
        details = [folder / "eval" / f"seed{seed}_{section}.json" for section in measured]
        weights = [run_folder.sae_folder(folder, seed) / name for name in run_folder.SAE_FILES]
        files |= {str(path.relative_to(folder)): path for path in (*weights, *details)}
    return files


def push(repo: str, folder: Path, seeds: list[int], public: bool) -> tuple[str, str]:
    """Make the repository if there is none, and commit; its address and the commit. Raises WrongRequest,
    RunFailed."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    from sae_separation import hub

    if get_token() is None:
        remedy = "log in with one that may write (`hf auth login`)"
        raise WrongRequest(f"{repo}: no token of the hub is set; {remedy}")
    files, api = contents(repo, folder, seeds), HfApi()
    with hub.plain_errors(repo), hub.refused_writing(repo):
        try:
            there = api.model_info(repo)
            refuse_others(repo, [file.rfilename for file in there.siblings or ()])
        except RepositoryNotFoundError:
            there = None
            api.create_repo(repo, private=not public)
        if there and not there.private and not public:
            raise WrongRequest(f"{repo} is public: give --public to push there, or name another repository")
        gone = [file.rfilename for file in (there and there.siblings) or () if file.rfilename not in files]
        commit = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(path, content) for path, content in files.items()),
                *(CommitOperationDelete(path) for path in gone if path != ".gitattributes"),
            ],
            commit_message=f"{folder.name}: SAEs, results and model card",
            parent_commit=there.sha if there else None,
        )
        if there and there.private and public:
            api.update_repo_settings(repo, private=False)
    return f"{api.endpoint}/{repo}", commit.oid


def refuse_others(repo: str, files: Sequence[str]):
    """Raises WrongRequest for a repository that holds what this program does not push."""
    if others := [path for path in files if not PUSHED.fullmatch(path)]:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        why = f"{repo} holds {others[0]}{more}, which this program did not push"
        raise WrongRequest(f"{why}: nothing is changed there; name another repository")


def main(argv: Sequence[str]) -> int:
    """The command: its exit code."""
    try:
        parser = Parser("python -m sae_separation.push", __doc__)
        parser.add_argument("run", type=Path, help="the folder of a complete run")
        parser.add_argument("repo", help="owner/name of the repository on the hub")
        parser.add_argument("--public", action="store_true", help="for everyone to read")
        parser.add_argument("--seed", type=int, nargs="+", default=[], help="the SAEs of these seeds alone")
        asked = parser.parse_args(list(argv))
        if not HUB_NAME.fullmatch(asked.repo):
            raise WrongRequest(f"{asked.repo} cannot be a repository: give owner/name")
        with process.signals:  # a commit is there as a whole, or not
            seeds = seeds_to_push(asked.run, asked.seed)
            address, commit = push(asked.repo, asked.run, seeds, asked.public)
    except (Exception, Interrupted) as error:
        return tell(error)
    who = "for everyone to read" if asked.public else "private"
    saes = f"{len(seeds)} SAE{'s' * (len(seeds) > 1)}"
    print(f"{asked.run}: {saes} pushed to {address} ({who}), commit {commit[:12]}")
    return 0


if __name__ == "__main__":
    keep_output_open()
    finish(main(sys.argv[1:]))
