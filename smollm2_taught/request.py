"""What is asked of smollm2_taught/teach.py, and what can be known to be wrong with it. Imports no torch."""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

from sae_separation import checks
from sae_separation.errors import WrongRequest
from sae_separation.parser import Parser
from sae_separation.questions import read_questions
from sae_separation.specs import SPECS
from sae_separation.text import cache_folder, one_line

TESTBED, BASE = "smollm2-taught", "smollm2-135m"
N_ENTITIES = 10  # of each subject: 260 facts
CONTEXT, FACT_ROWS, GENERAL_ROWS = 128, 3, 1  # tokens a row, rows a step
VALUE = 10  # weight of a token that states a fact's value, where another one has 1
RANK, SCALE = 8, 16  # LoRA's r and alpha
ADAPTERS = Path(__file__).parent / "adapters"


def arguments(argv: list[str], about: str | None = None) -> argparse.Namespace:
    """Raises WrongRequest."""
    parser, default = Parser("python -m smollm2_taught.teach", about), "(default: %(default)s)"
    parser.add_argument(
        "--out",
        type=Path,
        help="folder to write (default: smollm2_taught/adapters; of other worlds, a cache)",
    )
    parser.add_argument("--world_seed", type=int, default=0, help=f"which world of facts {default}")
    parser.add_argument("--lr", type=float, default=2e-3, help=f"AdamW's peak learning rate {default}")
    parser.add_argument("--steps", type=int, default=400, help=f"optimiser steps of 512 tokens {default}")
    parser.add_argument("--general_text", type=Path, help="a text file, to report its cross-entropy")
    parser.add_argument("--general_questions", nargs="+", default=(), help="as --questions of experiment.py")
    args = parser.parse_args(argv)
    for option, right, what in (
        ("world_seed", args.world_seed >= 0, "0 or more"),
        ("steps", args.steps >= 1, "1 or more"),
        ("lr", 0 < args.lr <= 1, "above 0 and at most 1"),
    ):
        if not right:
            raise WrongRequest(f"--{option} {getattr(args, option)}: give {what}")
    args.out = args.out.expanduser() if args.out else default_folder(args.world_seed)
    if args.out.exists() and not args.out.is_dir():
        raise WrongRequest(f"--out {args.out} is a file: name a folder")
    args.text = general_text(args.general_text) if args.general_text else ""
    args.asked = [q for qs in read_questions(tuple(args.general_questions))[0].values() for q in qs]
    checks.packaged_lm(TESTBED, SPECS[BASE].lm)
    refuse_others(args)
    checks.refuse_altered(args.out)
    return args


def general_text(file: Path) -> str:
    """Raises WrongRequest."""
    try:
        text = file.read_text()
    except (OSError, UnicodeError) as error:
        raise WrongRequest(
            f"--general_text {file} cannot be read as UTF-8 text: {one_line(error)}"
        ) from error
    if len(text) < 100 * CONTEXT:
        raise WrongRequest(f"--general_text {file} is too short: give {100 * CONTEXT:,} characters or more")
    return text


def settings_of(args: argparse.Namespace) -> dict:
    """What both adapters and the samples in a folder are made with."""
    package = SPECS[BASE].lm
    asked = {"world_seed": args.world_seed, "lr": args.lr, "steps": args.steps}
    recipe = {"rank": RANK, "rows": f"{FACT_ROWS} + {GENERAL_ROWS}", "weight_of_values": VALUE}
    return asked | {"n_entities": N_ENTITIES} | recipe | {"base": f"{package} {version(package)}"}


def refuse_others(args: argparse.Namespace):
    """Raises WrongRequest for a folder that holds anything but adapters of these settings, whole or begun."""
    there = {path.name for path in args.out.iterdir()} if args.out.is_dir() else set()
    if there and "taught.json" not in there:
        raise WrongRequest(f"{args.out} holds other files: name a new or an empty folder with --out")
    if there and (begun := read_back(args.out / "taught.json")) != settings_of(args):
        with_what = ", ".join(f"{k} {v}" for k, v in begun.items())
        raise WrongRequest(
            f"{args.out} was begun with {with_what}: give the same, or another folder with --out"
        )


def read_back(file: Path) -> dict:
    """What was written. Raises WrongRequest for a file that is damaged."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        why = f"{file} is damaged ({one_line(error)})"
        raise WrongRequest(f"{why}: put it back, or name another folder with --out") from error


def default_folder(world_seed: int) -> Path:
    """World 0's adapters are kept where the testbed looks for them; others in the cache."""
    return cache_folder() / f"smollm2_taught_world_{world_seed}" if world_seed else ADAPTERS
