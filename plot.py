"""Figures, tables and a report from run folders alone.

    python plot.py [run_0 run_1 ...]    (default: every run_* folder here)

Needs numpy, scipy, matplotlib and Jinja2 only. Folders that are not complete are skipped, and the reason is
printed. Figures are written as robustness.png and so on, with --format svg or pdf as robustness.svg or .pdf;
the report as report.html, one page that needs nothing else; all into the current folder, each whole or not at
all; the table goes to the screen. A method has one colour in every figure. † marks a run whose warnings.json
is not empty, or whose files are not as they were written. A figure whose data no run has is left out, and
the reason is printed. Exit code 2: a wrong request, 1: a file could not be written; one last line on
stderr says what is wrong.
"""

import argparse
import errno
import os
import signal
import sys
import tempfile
from pathlib import Path

from sae_separation import process
from sae_separation.errors import (
    Interrupted,
    RunFailed,
    WrongRequest,
    keep_output_open,
    leave_at_once,
    plain,
    stops,
    tell,
)
from sae_separation.files import REMEDIES


def stdout_lost(error: OSError):
    """The table is what was asked for: raises RunFailed where it cannot be written, as on a full disk. Where
    the reader has gone (| head) the work goes on."""
    if not isinstance(error, BrokenPipeError):
        raise RunFailed(f"stdout cannot be written: {error.strerror}; send it elsewhere") from error


if __name__ == "__main__":  # before what takes long to import
    keep_output_open(stdout_lost)
    for ending in stops():
        signal.signal(ending, leave_at_once)
try:
    from sae_separation.plots import figures, report, tables
    from sae_separation.plots.folders import Run, find_runs, say
except (ImportError, OSError) as missing:  # an OSError where matplotlib has no room for its cache
    if __name__ != "__main__":
        raise
    remedy = "free disk space" if isinstance(missing, OSError) else "pip install -r requirements.txt"
    sys.exit(tell(RunFailed(f"what plot.py needs cannot be imported: {missing}; {remedy}")))


class Parser(argparse.ArgumentParser):
    """Ends as every other wrong request does, and writes as everything else is written."""

    def error(self, message):
        raise WrongRequest(f"{message}; python plot.py --help lists the options")

    def print_help(self, file=None):
        say(self.format_help().rstrip())


def named(folders: list[Path]) -> list[Path]:
    """The folders of the command. Raises WrongRequest for one that is not there or is given twice."""
    real = [os.path.realpath(folder) for folder in folders]
    for i, folder in enumerate(folders):
        if not os.path.lexists(folder):
            raise WrongRequest(f"{folder}: there is no such folder; name folders that experiment.py wrote")
        if real[i] in real[:i]:
            raise WrongRequest(f"{folder} is given twice (as {folders[real.index(real[i])]}); leave one out")
    return folders or [p for p in Path().glob("run_*") if os.path.isdir(p) or not os.path.exists(p)]


def run_named(name: str, runs: list[Run]) -> Run:
    """The run of --against. Raises WrongRequest where there is none, or nothing to compare it with."""
    reference = next((run for run in runs if run.name == plain(name)), None)
    if reference is None:
        there = ", ".join(run.name for run in runs)
        raise WrongRequest(f"--against {name}: no complete run of that name; there are {there}")
    if len(runs) == 1:
        raise WrongRequest(f"--against {name}: there is no other complete run to compare it with")
    return reference


OURS = figures.SIGNATURE, b"<title>Knowledge separation in sparse autoencoders</title>"


def is_ours(path: Path) -> bool:
    """Whether a file says that this program wrote it."""
    content = path.read_bytes()
    return any(mark in content for mark in OURS)


def write(name: str, content: bytes):
    """A file in the current folder, whole or not at all: what stood there stays until the new one is there.

    Raises RunFailed where that cannot be, or where what stands there is not a file or is write-protected."""
    try:
        target = Path(os.path.realpath(name))
        if os.path.lexists(target) and not os.path.isfile(target):
            raise RunFailed(f"{name} cannot be written: what stands there is not a file; move it away")
        if os.path.lexists(target) and not is_ours(target):
            raise RunFailed(f"{name} would be replaced, and is none of this program's: move it away")
        if os.path.lexists(target) and not os.access(target, os.W_OK):
            raise RunFailed(f"{name} cannot be written: it is write-protected; move it away or permit it")
        with tempfile.TemporaryDirectory(prefix=".plot_", dir=target.parent) as beside:
            part = Path(beside, target.name)
            part.write_bytes(content)
            part.replace(target)
    except OSError as error:
        remedies = REMEDIES | {errno.ENOENT: "start this in a folder that can be written"}
        remedy = remedies.get(error.errno or errno.ENOENT, remedies[errno.ENOENT])
        raise RunFailed(f"{name} cannot be written: {error.strerror}; {remedy}") from error
    say(f"wrote {name}")


def draw(runs: list[Run], kind: str) -> list[report.Picture]:
    """Write the figures; the PNGs of them for the report, whatever their format."""
    pictures = []
    for drawer, (title, words) in figures.FIGURES.items():
        name, figure = f"{drawer.__name__}.{kind}", drawer(runs)
        if isinstance(figure, str):
            say(f"no {name}: {figure}")
            continue
        content = figures.content(figure, kind)
        write(name, content)
        png = content if kind == "png" else figures.content(figure, "png")
        width, height = (round(96 * inches) for inches in figure.get_size_inches())
        pictures.append(report.Picture(drawer.__name__, title, words, png, width, height))
    return pictures


def show():
    """What the command asks for. Raises WrongRequest, and RunFailed for what cannot be written."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="run folders (default: run_* here)")
    parser.add_argument("--table", action="store_true", help="print the table and draw nothing")
    parser.add_argument(
        "--against",
        metavar="RUN",
        help="print paired t-tests of this run against each other one, and draw nothing",
    )
    parser.add_argument(
        "--format", choices=("png", "svg", "pdf"), default="png", help="of the figures (default: %(default)s)"
    )
    args = parser.parse_args()
    runs, skipped = find_runs(named(args.folders))
    if not runs:
        others = [p.parent.name for p in sorted(Path().glob("*/final_info.json"))] if not args.folders else []
        remedy = "make one with python experiment.py --out_dir=run_0"
        if others:
            remedy = f"name folders: python plot.py {' '.join(others[:3])}{' ...' * (len(others) > 3)}"
        raise WrongRequest(f"no complete run folder to plot; {remedy}")
    if args.against is not None:
        return say(tables.against_table(run_named(args.against, runs), runs))
    say(tables.summary_table(runs))
    if tables.by_worst_case(runs):
        say("\n" + tables.ruler_table(runs))
    if args.table:
        return
    for text in tables.cautions(runs, []):
        say(text)
    write("report.html", report.render(runs, skipped, draw(runs, args.format)).encode())


def main() -> int:
    """Exit code of the command. But for 0, the last line on stderr says why."""
    try:
        with process.signals:
            show()
        return 0
    except Interrupted as stop:
        return tell(Interrupted(stop.number, "every file that was written is whole"))
    except Exception as error:
        return tell(error, take_less="give fewer run folders at once")


if __name__ == "__main__":
    CODE = main()
    for ending in stops():  # all is written and told
        signal.signal(ending, signal.SIG_IGN)
    sys.exit(CODE)
