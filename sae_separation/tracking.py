"""Experiment trackers: a run's log, while it trains, and its results, in trackio, wandb or TensorBoard.

    with Tracking("wandb") as tracking:                  # the tracked runs of a command; "none" for none
        tracked = tracking.follow(folder, about, records)    # a run folder's own, begun or gone on with
        tracked.log(records)                             # lines of train_log.jsonl
        tracked.results(info)                            # final_info.json, after which it is complete

A run folder is one tracked run, with a metric a seed ("fvu/seed0"). Its id, and the last step that was sent,
stand in tracking.jsonl of the folder: a run that is resumed goes on in the same tracked run, from the step
behind that. Each tracker is a package of its own, imported where it is used.
"""

import contextlib
import contextvars
import importlib
import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal, Protocol

from sae_separation.errors import RunFailed, WrongRequest
from sae_separation.files import write_whole, writing

Name = Literal["none", "trackio", "wandb", "tensorboard"]
PROJECT = "sae-separation"


class Tracker(Protocol):
    """One tracked run of one of the trackers, open for writing. `where`: what to look at, or to type."""

    where: str

    def log(self, values: dict[str, float], step: int): ...
    def results(self, values: dict[str, float], step: int): ...
    def end(self, complete: bool): ...


class Wandb:
    """A run of Weights & Biases: offline where no account is known or WANDB_MODE says so."""

    def __init__(self, folder: Path, run_id: str, settings: dict):
        # seconds between two writes of its file: what a killed process loses
        os.environ.setdefault("WANDB__TRANSACTION_LOG_FLUSH_INTERVAL", "1")
        import wandb

        known = "WANDB_MODE" in os.environ or wandb.login(prompt=False)
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=run_id,
                name=folder.name,
                config=settings,
                resume="allow",
                reinit="create_new",  # a command may train several runs
                mode=None if known else "offline",
                settings=wandb.Settings(console="off", silent=True),  # what a run prints stays as it is
            )
        except wandb.Error as error:
            why = f"wandb cannot begin a run ({' '.join(str(error).split())})"
            remedy = "mend that, or set WANDB_MODE=offline, and give the same command again"
            raise RunFailed(f"{why}: {remedy}") from error
        local = f"{self.run.settings.sync_dir} (wandb sync uploads it)"
        self.where = local if self.run.offline else str(self.run.url)

    def log(self, values: dict[str, float], step: int):
        self.run.log(values, step=step, commit=True)

    def results(self, values: dict[str, float], step: int):
        self.run.summary.update(values)

    def end(self, complete: bool):
        self.run.finish(exit_code=0 if complete else 1)


class Trackio:
    """A run of trackio, in its local database (or where its TRACKIO_ variables send it)."""

    def __init__(self, folder: Path, run_id: str, settings: dict):
        how = {"project": PROJECT, "name": f"{folder.name}-{run_id}", "config": settings, "embed": False}
        # in a context of its own: trackio ends the run that it has begun in the same one
        init = partial(importlib.import_module("trackio").init, **how, resume="allow")
        self.run = contextvars.copy_context().run(init)
        self.where = f"trackio show --project {PROJECT}"

    def log(self, values: dict[str, float], step: int):
        self.run.log(values, step=step)

    def results(self, values: dict[str, float], step: int):
        self.run.log(values, step=step)

    def end(self, complete: bool):
        self.run.finish()


class TensorBoard:
    """Event files in tensorboard/ of the run folder."""

    def __init__(self, folder: Path, run_id: str, settings: dict):
        from torch.utils.tensorboard import SummaryWriter

        self.files = folder / "tensorboard" / run_id
        with writing(self.files):
            self.writer = SummaryWriter(str(self.files))
        self.where = f"tensorboard --logdir {folder}"

    def log(self, values: dict[str, float], step: int):
        with writing(self.files):
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()

    def results(self, values: dict[str, float], step: int):
        self.log(values, step)

    def end(self, complete: bool):
        self.writer.close()


TRACKERS: dict[str, Callable[[Path, str, dict], Tracker]] = {
    "trackio": Trackio,
    "wandb": Wandb,
    "tensorboard": TensorBoard,
}


def check(name: str):
    """Raises WrongRequest for a tracker whose package is not installed. Imports nothing."""
    found = importlib.util.find_spec(name) if name in TRACKERS else None
    if name in TRACKERS and (found is None or found.origin is None):  # wandb/ in the current folder is none
        raise WrongRequest(f"--track {name} needs the package {name}: pip install {name}")


class Untracked:
    """Stands for a tracked run where nobody asked for one."""

    def log(self, records: Sequence[Mapping]):
        """Send the records (lines of train_log.jsonl, steps in order) that were not sent yet."""

    def results(self, info: Mapping[str, Mapping]):
        """Send the means of sections of final_info.json, and end: the tracked run is complete."""


class Tracked(Untracked):
    """The tracked run of a run folder. Left without `results` it is marked as failed, where there is such a
    mark."""

    def __init__(self, name: str, folder: Path, settings: dict):
        """Raises WrongRequest for a tracking.jsonl that cannot be read."""
        self.name, self.path, self.complete = name, folder / "tracking.jsonl", False
        known = sent_before(self.path)
        mine = known.setdefault(name, {"tracker": name, "id": uuid.uuid4().hex[:8], "step": 0})
        self.id, self.step = mine["id"], mine["step"]
        self.tracker = TRACKERS[name](folder, self.id, settings)
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in known.values()).encode())
        print(f"{folder} is tracked: {self.tracker.where}")

    def log(self, records: Sequence[Mapping]):
        for step, group in groupby(records, key=_step):
            if step > self.step:
                self._note(step)  # first: killed in between, a step is missing and none is there twice
                self.tracker.log(by_seed(list(group)), step)

    def results(self, info: Mapping[str, Mapping]):
        means = {f"{name}/{metric}": mean for name in info for metric, mean in info[name]["means"].items()}
        self.tracker.results({name: mean for name, mean in means.items() if mean is not None}, self.step)
        self.complete = True
        self.tracker.end(complete=True)

    def __enter__(self) -> "Tracked":
        return self

    def __exit__(self, *_):
        if not self.complete:
            self.tracker.end(complete=False)

    def _note(self, step: int):
        self.step = step
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps({"tracker": self.name, "id": self.id, "step": step}) + "\n")


def sent_before(path: Path) -> dict[str, dict]:
    """The last line of each tracker in tracking.jsonl, by its name; a line that was being written when its
    process died is left out. Raises WrongRequest for other damage."""
    try:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        known = {line["tracker"]: line for line in map(json.loads, lines)}
        for line in known.values():
            _, _ = str(line["id"]), int(line["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{path} cannot be read ({error})"
        raise WrongRequest(f"{what}: remove it to begin a new tracked run, or leave out --track") from error
    return known


def by_seed(records: Sequence[Mapping]) -> dict[str, float]:
    """One step's records of all seeds as metrics of their tracked run."""
    values = {"tokens": records[0]["tokens"]}
    for record in records:
        metrics = {name: v for name, v in record.items() if name not in ("seed", "step", "tokens")}
        values |= {f"{name}/seed{record['seed']}": v for name, v in metrics.items()}
    return values


def _step(record: Mapping) -> int:
    return record["step"]


class Tracking(contextlib.ExitStack):
    """The tracked runs of a command, ended together."""

    def __init__(self, name: str = "none"):
        super().__init__()
        self.name = name

    def follow(self, folder: Path, about: Mapping, records: Sequence[Mapping] = ()) -> Untracked:
        """The tracked run of a run folder that is there, begun or gone on with; `about`: its config.json,
        `records`: its log so far."""
        if self.name not in TRACKERS:
            return Untracked()
        tracked = self.enter_context(Tracked(self.name, folder, about["config"] | {"git": about["git"]}))
        tracked.log(records)
        return tracked

    def evaluated(self, folder: Path, sections: Mapping[str, Mapping | None]):
        """Send what was measured on a complete run now, and of its log what was not sent before. None: of a
        section without a meaning for the run."""
        log, about = folder / "train_log.jsonl", json.loads((folder / "config.json").read_bytes())
        lines = log.read_text().splitlines() if log.exists() else []
        measured = {name: section for name, section in sections.items() if section is not None}
        self.follow(folder, about, [json.loads(line) for line in lines]).results(measured)
