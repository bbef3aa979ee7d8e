"""One run: its trainers, its log, its checkpoints, its results.

run = Run(out_dir, requested, config, testbed, n_steps, tracking)
run.start(make_trainer, saved)                   # anew, or as a checkpoint holds them
run.step(x, forget, log=True)                    # every seed that has not failed
run.look()                                       # a trainer whose state is not finite has failed
run.save(position)
done = run.measure(rows, evaluator, made_by, train_seconds, bar)
run.finish(rows, done)                           # final_info.json, last

Of several ranks (ranks.py) each has some of a run's SAEs: it trains them (`here`), exports them and measures
them. Rank 0 writes the run's own files, and stands in for the trainers of others (`Elsewhere`).
"""

import contextlib
import copy
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sae_separation import checkpoint, evals, loaded, methods, process, progress, ranks, results, run_folder
from sae_separation.config import Config, Request, bytes_of_training
from sae_separation.errors import RunFailed, WrongRequest
from sae_separation.evals.evaluator import Evaluator
from sae_separation.export import export, save
from sae_separation.files import CannotWrite, Unusable, seal, sync, write_json, write_whole, writing
from sae_separation.lm import Testbed
from sae_separation.losses import omega_between_domains, sharing
from sae_separation.saved_run import features_run
from sae_separation.shards import WHOLE
from sae_separation.tracking import Tracking, Untracked


class Trains(Protocol):
    """What a run needs of a trainer: one SAE of one seed."""

    sae: Any
    seed: int
    steps: int
    n_steps: int
    resampled: int
    history: list[dict]  # one record a logged step
    failed: str  # why it does not go on; "" while it does
    about: dict  # what its SAE's cfg.json says of it

    def labels(self, forget: Tensor, document: Tensor | None) -> Tensor: ...
    def step(self, x: Tensor, forget: Tensor, look: bool) -> dict[str, Tensor]: ...
    def state(self) -> tuple[dict[str, Tensor], dict]: ...
    def restore(self, tensors: dict[str, Tensor], facts: dict): ...
    def refuse_nonfinite(self, named: dict[str, Tensor]): ...
    def out_of_reach(self) -> list[str]: ...
    def gather(self, to: int): ...


class Elsewhere:
    """A trainer that another rank has, as far as that rank has told."""

    def __init__(self, seed: int):
        self.seed, self.failed, self.facts = seed, "", {}
        self.history: list[dict] = []

    def hear(self, facts: dict):
        """What its rank says of it: facts as of `Trainer.state`, with what is new of the history."""
        self.history += facts["history"]
        self.facts, self.failed = facts | {"history": self.history}, facts["failed"]

    def state(self) -> tuple[dict, dict]:
        return {}, self.facts

    def restore(self, tensors: dict[str, Tensor], facts: dict):
        self.hear(facts)


class Run:
    """One run folder: the trainers of its seeds, its log, its checkpoints, its results.

    `config_hash` is its identity: what trained it, without what only its evaluations need.
    """

    def __init__(
        self,
        out_dir: str,
        requested: Request,
        config: Config,
        testbed: Testbed,
        n_steps: int,
        tracking: Tracking,
    ):
        self.folder, self.config, self.testbed, self.n_steps = Path(out_dir), config, testbed, n_steps
        self.tracking, self.tracked = tracking, Untracked()
        settings = {"requested": asdict(requested), "config": asdict(config)}
        self.about: dict[str, Any] = settings | {"testbed": results.described(testbed)}
        identity = results.what_trained(self.about["config"], self.about["testbed"])
        self.config_hash = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.warnings: list[str] = list(testbed.notes)
        self.passes: dict[str, int] = {}  # over each domain's text, by the stream
        self.trainers: Sequence[Any] = ()  # Trains, or Elsewhere; of a MethodRun Fit
        self.owners = [0] * len(config.seeds)  # the rank of each
        self.shard = WHOLE  # while SAEs are trained: of all of them this share of the features
        self.info: dict = {}  # final_info.json, once it is complete

    def start(self, make: Callable[[int], Trains], saved: tuple[dict, dict] | None):
        """Begin with new trainers, make(seed), or with their state as a checkpoint holds it. Raises
        WrongRequest, RunFailed."""
        mine = [self._is_here(owner) for owner in self.owners]
        made = [make(s) if is_mine else Elsewhere(s) for s, is_mine in zip(self.config.seeds, mine)]
        self.trainers = made
        if ranks.here.first:
            self._take_folder()
            if not saved:
                run_folder.start_anew(self.folder)
            for part in ("checkpoints", "eval"):
                (self.folder / part).mkdir(exist_ok=True)
        if saved:
            self._restore(*saved)
        self.n_told = [len(trainer.history) for trainer in made]  # to other ranks, of each one's history
        if ranks.here.first:
            self._begin_log(saved)

    def _take_folder(self):
        """Raises WrongRequest where it is another one's."""
        run_folder.make(self.folder)
        run_folder.refuse_foreign(self.folder, self.config.seeds)
        run_folder.lock(self.folder)
        run_folder.remove_half_written(self.folder)

    def _begin_log(self, saved: tuple[dict, dict] | None):
        """config.json, and the log as far as the run has come."""
        about = self.about | run_folder.provenance()
        if saved:
            self._warn_of_other_machine(about, saved[1]["position"]["step"])
        else:
            write_json(self.folder / "config.json", seal(about))
        records = [record for trainer in self.trainers for record in trainer.history]
        records.sort(key=_step)  # stable: seeds in order
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_whole(self.folder / "train_log.jsonl", lines.encode())
        self.log = (self.folder / "train_log.jsonl").open("a")
        self.tracked = self.tracking.follow(self.folder, about, records)

    def _restore(self, tensors: dict[str, Tensor], facts: dict):
        self.warnings = facts["warnings"]
        try:
            for i, (trainer, known) in enumerate(zip(self.trainers, facts["trainers"])):
                trainer.restore(checkpoint.under(f"{i}.", tensors), known)
        except (KeyError, RuntimeError) as error:
            what = f"was begun by another version of this program, which keeps other state ({error})"
            raise WrongRequest(f"{self.folder} {what}: --overwrite it") from error
        print(f"{self.folder} goes on at step {facts['position']['step']} of {self.n_steps}")

    def _warn_of_other_machine(self, about: dict, step: int):
        before = run_folder.read_run_json(self.folder / "config.json", {"requested", "config"})
        now = json.loads(json.dumps(about))
        others = [k for k in ("versions", "hardware", "git") if before.get(k) != now[k]]
        if others:
            what = f"begun with other {', '.join(others)} than it went on with at step {step}"
            self.warnings.append(f"{what}: not the same bits as in one go")

    def tell_restart(self):
        """Say that an earlier start is lost, where there is no checkpoint of it; as a warning where they were
        removed."""
        if (self.folder / "config.json").exists():
            print(f"{self.folder} was begun before and holds no checkpoint: it starts again at step 0")
            if not (self.folder / "checkpoints").is_dir():
                self.warnings.append("begun before, and its checkpoints were gone: trained again from step 0")

    @property
    def training(self) -> list[Any]:
        """The trainers that have not failed."""
        return [trainer for trainer in self.trainers if not trainer.failed]

    @property
    def here(self) -> dict[int, Any]:
        """Those of them that are this rank's, by their place among the seeds."""
        of_seeds = enumerate(zip(self.trainers, self.owners))
        return {i: t for i, (t, owner) in of_seeds if self._is_here(owner) and not t.failed}

    def _is_here(self, owner: int) -> bool:
        return owner == ranks.here.rank or self.shard.size > 1

    @property
    def share(self) -> Config:
        """The run with this rank's seeds alone, or none; with its share of all seeds' features."""
        share, owned = copy.copy(self.config), zip(self.config.seeds, self.owners)
        share.seeds = tuple(seed for seed, owner in owned if self._is_here(owner))
        share.d_sae //= self.shard.size
        return share

    def step(self, x: Tensor, forget: Tensor, log: bool, document: Tensor | None = None):
        """One step of every seed on x [B, D] with its labels [B] and its documents' numbers [B]; one that
        fails is told and left behind."""
        records = []
        for trainer in self.here.values():
            with self._left_behind(trainer):
                measured = trainer.step(x, trainer.labels(forget, document), look=log)
                if log:
                    trainer.refuse_nonfinite(dict(trainer.sae.named_parameters()))
                    trainer.history.append(self._record(trainer, measured))
                    records.append(trainer.history[-1])
        if records and not ranks.here.many:
            self._log(records)

    def news(self) -> list:
        """What this rank has to say of its trainers, for JSON: [place among the seeds, facts] each."""
        said = []
        for i, (trainer, owner) in enumerate(zip(self.trainers, self.owners)):
            if owner == ranks.here.rank:
                said.append([i, trainer.state()[1] | {"history": trainer.history[self.n_told[i] :]}])
                self.n_told[i] = len(trainer.history)
        return said

    def hear(self, news: list):
        """The news of all ranks: their lines of the log, and how it goes with their trainers."""
        records = []
        for i, facts in sorted(news, key=_place):
            records += facts["history"]
            if isinstance(self.trainers[i], Elsewhere):
                self.trainers[i].hear(facts)
        records.sort(key=_step)  # stable: seeds in order
        if records and ranks.here.first:
            self._log(records)

    def _log(self, records: list[dict]):
        """Lines of train_log.jsonl, which the tracked run gets, too."""
        with writing(self.folder / "train_log.jsonl"):
            self.log.write("".join(json.dumps(record) + "\n" for record in records))
            self.log.flush()
        self.tracked.log(records)

    @contextlib.contextmanager
    def _left_behind(self, trainer: Trains) -> Iterator[None]:
        """Inside, RunFailed is the failure of this trainer alone."""
        try:
            yield
        except (CannotWrite, ranks.Lost):
            raise
        except RunFailed as failed:
            trainer.failed = str(failed)
            if self.shard.rank:  # the first one says it for all
                return
            tqdm.write(f"{self.folder}: seed {trainer.seed} failed: {failed}", file=sys.stderr)

    def has_read(self, passes: dict[str, int]):
        """How often training has begun each domain's text: a warning where that is often."""
        self.passes = passes
        short = {domain: n for domain, n in passes.items() if n > 10}
        self.warnings += [f"the {d} text is short: training read it {n} times" for d, n in short.items()]

    def look(self):
        """A trainer whose state is not finite has failed."""
        for trainer in self.here.values():
            with self._left_behind(trainer):
                state = trainer.state()[0]
                logs = {name for name in state if name.startswith("log_")}  # -inf where there is no loss
                trainer.refuse_nonfinite({k: t for k, t in state.items() if k not in logs})

    def save(self, at: checkpoint.Position):
        """Write a checkpoint. A trainer that has failed leaves no tensors."""
        tensors, facts = {}, []
        for i, (trainer, owner) in enumerate(zip(self.trainers, self.owners)):
            of_trainer, known = trainer.state()
            if not trainer.failed:
                sharded = self.shard.size > 1
                of_trainer = self.shard.whole(of_trainer) if sharded else ranks.at_first(of_trainer, owner)
                tensors |= {f"{i}.{name}": t for name, t in of_trainer.items()}
            facts.append(known)
        if not ranks.here.first:
            return
        about = {"config_hash": self.config_hash, "position": asdict(at), "warnings": self.warnings}
        checkpoint.save(self.folder, at.step, tensors, about | {"trainers": facts})

    def _record(self, trainer: Trains, measured: dict[str, Tensor]) -> dict:
        sae, shard = trainer.sae, self.shard
        when = {"seed": trainer.seed, "step": trainer.steps, "tokens": trainer.steps * self.config.batch_size}
        measured = measured | {
            "frac_dead": shard.mean((sae.idle >= self.config.dead_tokens).float()),
            "sharing": sharing(shard.gather(sae.rate, 1)),
            "between_domains": omega_between_domains(sae.W_dec.detach(), sae.affinity, shard),
        }
        return when | dict(zip(measured, torch.stack(list(measured.values())).tolist()))  # one look

    def gather(self):
        """Training is over: each SAE whose features are split goes to its rank."""
        for i, trainer in self.here.items():
            trainer.gather(self.owners[i])
        self.shard = WHOLE

    def seconds_to_evaluate(self, rows) -> float:
        """About how long that takes on the embedded testbed: what its bar counts."""
        return len(self.here) * evals.seconds_of(rows, self.config)

    def failures(self) -> list[tuple[str, str]]:
        """Which seeds failed, and why."""
        return [(f"{self.folder} seed {t.seed}", t.failed) for t in self.trainers if t.failed]

    def progress(self) -> str:
        last = self.training[-1].history[-1:] if self.training else []
        return f"{self.folder.name}: " + (f"fvu {last[0]['fvu']:.3f} l0 {last[0]['l0']:.1f}" if last else "-")

    def measure(self, rows, evaluator, made_by: dict, train_seconds: float, bar: tqdm) -> list:
        """Export every SAE that is this rank's, and evaluate what was exported: [place among the seeds, what
        came of it] each, for JSON."""
        done = []
        for i, trainer in self.here.items():
            came = {}
            with self._left_behind(trainer):
                measured, warnings = self._training(trainer, train_seconds), cut_short(trainer)
                record = self._exported(trainer)
                results.measure(self.folder, "eval", trainer.seed, record, rows, evaluator, made_by, bar)
                came = {"training": measured, "record": record, "warnings": warnings}
            done.append([i, came | {"failed": trainer.failed}])
        return done

    def finish(self, rows, done: list):
        """Write final_info.json, last and whole, from what all ranks have measured; not if a seed has
        failed."""
        training, records = {}, {}
        for i, came in sorted(done, key=_place):
            if came["failed"]:
                self.trainers[i].failed = came["failed"]
                continue
            seed = self.config.seeds[i]
            training[seed], records[seed] = came["training"], came["record"]
            self.warnings += [f"seed {seed}: {text}" for text in came["warnings"]]
        if ranks.here.first:
            rows = [row for row in rows if row.fits(self.config)]
            self._write_results(rows, training, records)

    def _write_results(self, rows, training: dict[int, dict], records: dict[int, dict]):
        """warnings.json, and final_info.json unless a seed has failed."""
        self.warnings += results.warnings_of(rows, records, training, self.config, self.testbed.d_in)
        failed = [trainer for trainer in self.trainers if trainer.failed]
        self.warnings += [f"seed {trainer.seed} failed: {trainer.failed}" for trainer in failed]
        write_json(self.folder / "warnings.json", self.warnings)
        if not failed:
            self.info = {"training": results.summarise(results.by_metric(list(training.values())))}
            self.info |= {row.section: results.summary_of(row.section, records) for row in rows}
            run_folder.write_result(self.folder, self.info)
            run_folder.clear_complete(self.folder)  # not before: one killed in between would be lost
            self.tracked.results(self.info)

    def _exported(self, trainer: Trains) -> dict:
        """Export the SAE, once, if SAELens' format holds it: the record of its files' checksums and of what
        was measured on them."""
        folder = run_folder.sae_folder(self.folder, trainer.seed)
        path = run_folder.record_of(self.folder, trainer.seed)
        if self.config.skip:
            return results.new_record({})
        try:
            record = results.read_record(path)
        except Unusable as why:
            print(f"warning: {why}; evaluated anew", file=sys.stderr)
            record = None
        if record is None:
            record = results.new_record({})
            write_json(path, seal(record))  # by which the SAE's folder is known to be this run's
        if record["files"] and run_folder.files_of(folder) == record["files"]:
            return record
        if record["files"]:
            what = f"{folder} is not as it was written: the checksum of a file is wrong"
            print(f"warning: {what}; exported anew", file=sys.stderr)
        self._write_sae(trainer, folder)
        record = results.new_record(run_folder.files_of(folder))
        with process.signals.held():
            write_json(path, seal(record))
        return record

    def _write_sae(self, trainer: Trains, folder: Path):
        trainer.sae.temperature.zero_()  # above 0 where the time budget ended training (warned of)
        with exported_to(folder):
            export(trainer.sae, folder, self._about_sae() | trainer.about)

    def _about_sae(self) -> dict:
        """What cfg.json of every SAE of the run says of the LM."""
        testbed = self.testbed
        about = {"model_name": testbed.name, "hook_name": testbed.hook_name, "hook_layer": testbed.layer}
        return about | {"context_size": self.config.context_size, "prepend_bos": True}

    def _training(self, trainer: Trains, seconds: float) -> dict:
        """The section `training`: means over the last twentieth of the log."""
        if not trainer.history:
            raise RunFailed("the time budget ended before the first step: raise --time_budget_minutes")
        tail = trainer.history[-max(1, len(trainer.history) // 20) :]
        mean = {key: float(np.mean([record[key] for record in tail])) for key in ("loss", "fvu", "l0")}
        tokens = trainer.steps * self.config.batch_size
        return {
            "tokens_trained": tokens,
            "final_loss": mean["loss"],
            "final_fvu": mean["fvu"],
            "final_l0": mean["l0"],
            "l1_coefficient": tail[-1]["l1_coefficient"],
            "alpha": tail[-1]["alpha"],
            "frac_dead": tail[-1]["frac_dead"],
            **{k: v for k, v in tail[-1].items() if k in ("group_sharing", "overlap", "alpha_directions")},
            "resampled": trainer.resampled,
            "train_seconds": seconds,
            "tokens_per_second": tokens / seconds,
        } | {f"{domain}_text_passes": n for domain, n in self.passes.items()}


@dataclass
class Fit:
    """One seed of a run that trains no SAE."""

    seed: int
    failed: str = ""


class UntrainedRun(Run):
    """A run whose seeds take seconds to make, when it is evaluated: it has no log and no checkpoints.
    Subclasses say how one is written (`_write_sae`), which takes about `making` seconds, and what `training`
    says of it (`_made`)."""

    making: float = 1

    def begin(self, anew: bool):
        """Take the folder; what an interrupted start has made and measured stays. Raises WrongRequest."""
        self.trainers = [Fit(seed) for seed in self.config.seeds]
        if not ranks.here.first:
            return
        self._take_folder()
        about = self.about | run_folder.provenance()
        if anew or not (self.folder / "config.json").exists():
            run_folder.start_anew(self.folder)
            write_json(self.folder / "config.json", seal(about))
        (self.folder / "eval").mkdir(exist_ok=True)
        self.tracked = self.tracking.follow(self.folder, about)

    def seconds_to_evaluate(self, rows) -> float:
        return super().seconds_to_evaluate(rows) + len(self.here) * self.making

    def measure(self, rows, evaluator, made_by: dict, train_seconds: float, bar: tqdm) -> list:
        """Make every seed that is this rank's, and evaluate what was made: as `Run.measure`."""
        self.evaluator, done = evaluator, []
        rows = [row for row in rows if row.fits(self.config)]
        for i, fit in self.here.items():
            came = {}
            with self._left_behind(fit):
                bar.set_postfix_str(f"{self.folder.name} seed {fit.seed}: making it")
                with progress.section.of(bar, self.making):
                    record = self._exported(fit)
                results.measure(self.folder, "eval", fit.seed, record, rows, evaluator, made_by, bar)
                came = {"training": self._made(fit), "record": record, "warnings": []}
            done.append([i, came | {"failed": fit.failed}])
        return done

    def _made(self, fit: Fit) -> dict:
        raise NotImplementedError


class MethodRun(UntrainedRun):
    """A run of a method that is told the labels and needs no SAE: fitted on training text."""

    def __init__(self, out_dir: str, requested: Request, config: Config, testbed: Testbed, *more):
        """Raises WrongRequest for a method that the testbed does not allow."""
        super().__init__(out_dir, requested, config, testbed, *more)
        methods.check(config.arm, testbed)
        self.making = progress.READING if config.arm in methods.READERS else progress.FITTING

    def _made(self, fit: Fit) -> dict:
        settings = methods.load(run_folder.sae_folder(self.folder, fit.seed)).settings
        return {k: settings[k] for k in ("tokens_trained", "train_seconds")}

    def _write_sae(self, trainer: Fit, folder: Path):
        n_tokens = methods.tokens_to_fit_on(self.config.arm, self.evaluator)  # read before time is taken
        began, testbed = time.monotonic(), self.testbed
        method = self._fit(trainer.seed)
        method.settings |= {"model_name": testbed.name, "hook_name": testbed.hook_name}
        method.settings = {"tokens_trained": n_tokens} | method.settings
        method.settings["train_seconds"] = time.monotonic() - began
        with exported_to(folder):
            method.save(folder)

    def _fit(self, seed: int) -> methods.Method:
        return methods.fit(self.config.arm, self.evaluator, seed)


class FeatureGateRun(MethodRun):
    """Of a gate that reads the features of another run's SAEs, each seed those of its own."""

    def __init__(self, out_dir: str, requested: Request, config: Config, testbed: Testbed, *more):
        """Raises WrongRequest for a run on another LM or layer, or without SAEs of these seeds."""
        super().__init__(out_dir, requested, config, testbed, *more)
        self.source = features_run(out_dir, vars(config)["features_of"])
        there, here = self.source.testbed, self.about["testbed"]
        if any(there[name] != here[name] for name in ("hook_name", "d_in")) or lm_of(there) != lm_of(here):
            why = f"its SAEs are of {there['hook_name']} of {there['lm']}, this run of {here['hook_name']}"
            remedy = "give the same --lm and --layer"
            raise WrongRequest(f"--features_of {self.source.folder}: {why} of {here['lm']}: {remedy}")
        files = {str(seed): run_folder.files_of(self.source.sae_folder(seed)) for seed in config.seeds}
        self.about["features_of"] = {"config": self.source.config, "files": files}

    def _fit(self, seed: int) -> methods.Method:
        sae = self.source.sae(seed, self.evaluator.special.device)
        return methods.fit(self.config.arm, self.evaluator, seed, sae)


def lm_of(testbed: dict) -> dict | None:
    """Checksums of the LM's weights, as config.json has them."""
    return testbed.get("sources", {}).get("lm", {}).get("sha256")


class LoadedRun(UntrainedRun):
    """A run of SAEs that were trained elsewhere (loaded.py), one a seed."""

    def __init__(
        self,
        out_dir: str,
        requested: Request,
        config: Config,
        testbed: Testbed,
        *more,
        sources: Sequence[loaded.Source],
    ):
        """Raises WrongRequest for an SAE that cannot be read, or does not fit the LM."""
        super().__init__(out_dir, requested, config, testbed, *more)
        self.about["saes"] = [source.described() for source in sources]
        self.sources = dict(zip(config.seeds, sources))
        for seed, source in self.sources.items():
            found = loaded.doubts(source, loaded.read_for(testbed, source), testbed)
            self.warnings += [f"seed {seed}: {text}" for text in found]

    def _made(self, fit: Fit) -> dict:
        return dict.fromkeys(loaded.OF_TRAINING) | self.sources[fit.seed].known

    def _write_sae(self, trainer: Fit, folder: Path):
        sae = loaded.read(self.sources[trainer.seed])
        selected = {"selected": True} if sae.cfg.metadata.selected else {}
        with exported_to(folder):
            save(sae, folder, self._about_sae() | selected)


def runs_of(
    names: Sequence[str],
    asked: Sequence[Request],
    resolved: Sequence[Config],
    testbed: Testbed,
    tracking: Tracking,
    saes: Sequence[loaded.Source],
) -> list[Run]:
    """The runs of one LM pass: what is asked of each, and every setting of it; `saes` are those of a run
    whose SAEs were trained elsewhere. Raises WrongRequest."""
    runs: list[Run] = []
    for name, request, config in zip(names, asked, resolved):
        n_steps = config.tokens // config.batch_size
        made_of = name, request, config, testbed, n_steps, tracking
        if config.arm == loaded.ARM:
            runs.append(LoadedRun(*made_of, sources=saes))
        elif config.arm == "feature_gate":
            runs.append(FeatureGateRun(*made_of))
        else:
            runs.append((MethodRun if config.arm in config.without_sae else Run)(*made_of))
    for untrained in (False, True):  # each kind in turn to all ranks
        for run in runs:
            if isinstance(run, UntrainedRun) == untrained:
                run.owners = ranks.deal(len(run.config.seeds))
    return runs


def share_news(runs: Sequence[Run]):
    """All ranks tell each other how it goes with their trainers; one process alone has no news."""
    if ranks.here.many:
        for run, *news in zip(runs, *ranks.all_gather([run.news() for run in runs])):
            run.hear(sum(news, []))


def evaluate_runs(
    runs: Sequence[Run | results.Finished],
    rows: list[evals.Row],
    make_evaluator: Callable[[], Evaluator],
    train_seconds: float,
) -> list[results.Outcome]:
    """Evaluate all runs of one LM, each rank its own SAEs, and print what they came to."""
    to_evaluate = sum(run.seconds_to_evaluate(rows) for run in runs)
    with progress.bar("evaluating", to_evaluate and progress.CONTEXTS + to_evaluate) as bar:
        bar.set_postfix_str("the contexts' residual stream")
        evaluator = make_evaluator() if to_evaluate else None
        made_by = results.maker(evaluator) if evaluator else {}
        bar.update(progress.CONTEXTS)
        how = {"made_by": made_by, "train_seconds": train_seconds, "bar": bar}
        measure = methodcaller("measure", rows, evaluator, **how)
        for run, done in ranks.gathered(runs, measure):
            run.finish(rows, done)
    print("---")
    for run in runs:
        about = run.info, run.warnings, evals.ROWS, run.testbed.published
        results.print_summary(run.folder.name, run.folder, *about)
    return [results.Outcome(run.folder.name, run.info, run.failures()) for run in runs]


def _place(of_seed: list) -> int:
    """Among a run's seeds: of what is said of one (`Run.news`, `Run.measure`)."""
    return of_seed[0]


def _step(record: dict) -> int:
    return record["step"]


@contextlib.contextmanager
def exported_to(folder: Path) -> Iterator[None]:
    """Inside, the files of an SAE's folder are written; afterwards they are on the disk."""
    with writing(folder):
        run_folder.remove_part(folder, "sae_seed*")
        folder.mkdir(exist_ok=True)
        yield
        for file in (*run_folder.written(folder, "sae_seed*"), folder):
            sync(file)


def cut_short(trainer: Trains) -> list[str]:
    """What its training alone tells of why a seed's numbers are not to be taken at their face."""
    messages = []
    losses = [record["loss"] for record in trainer.history]
    if len(losses) > 1 and np.mean(losses[-max(1, len(losses) // 20) :]) >= losses[0]:
        messages.append("the loss did not fall")
    messages += trainer.out_of_reach()
    if trainer.steps < trainer.n_steps:
        messages.append(f"the time budget ended training after {trainer.steps} of {trainer.n_steps} steps")
    return messages


def refuse_more_than_memory(configs: Sequence[Config], testbed: Testbed, n_blocks: int):
    """Raises WrongRequest when the memory left does not hold what training surely needs, with so many blocks
    of activations at once."""
    need = bytes_of_training(configs, testbed.d_in, n_blocks)
    if testbed.device.type == "cpu":  # all ranks of a machine share it
        need *= ranks.here.on_machine
    left = process.memory_left(testbed.device)
    if need > left:
        what = f"training needs at least {need / 1e9:.1f} GB of memory and {left / 1e9:.1f} GB are left"
        lower = "--d_sae, --batch_size, --buffer_tokens, or the number of --seeds or run folders"
        raise WrongRequest(f"{what}: lower {lower}")
