"""What a command would do, what it takes and what it would write: --dry_run. Nothing is written, no LM is
loaded, no torch imported.

    tell(command, requests, Config)
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sae_separation import checkpoint, checks, config, evals, kept, run_folder
from sae_separation.config import Command, Config, Request
from sae_separation.errors import WrongRequest
from sae_separation.files import Unusable, gigabytes
from sae_separation.specs import AUTO, SPECS, DataConfig, defaults_of, spec_of
from sae_separation.text import cache_folder


def tell(command: Command, requests: Sequence[Request], kind: type[Config]):
    """Print it, a paragraph a pass of the LM, of the runs that are left to do. Raises WrongRequest for what
    can be known to be wrong."""
    config.check(command, requests)
    parts = config.passes(command, requests)
    for number, (part, some) in enumerate(parts, 1):
        if len(parts) > 1:
            print(f"pass {number} of {len(parts)} of the LM:")
        for line in Pass(part, some, kind).lines():
            print(line)
    print("dry run: nothing was done" + ("" if parts else ", and nothing is left to do"))


class Pass:
    """Runs that share one pass of the LM: their settings as far as they are known without the LM."""

    def __init__(self, command: Command, requests: Sequence[Request], kind: type[Config]):
        self.command, self.request = command, requests[0]
        self.folders = [Path(name) for name in command.out_dir]
        self.testbed = self._testbed(requests[0])
        spec = spec_of(requests[0], SPECS[self.testbed])
        self.spec, self.lm = spec, checks.lm_here(self.testbed, spec.lm)
        self.d_in = self.lm and checks.width_of(self.lm)
        self.rows = evals.rows_of(command.evals)
        self.trained = set(map(Path, config.to_train(command, requests)[0]))
        # what is cut to d_in cannot be known without it, and counts for nothing here
        self.configs = [
            config.complete(r, kind, self.testbed, defaults_of(spec), self.d_in or 2**30) for r in requests
        ]
        # the step at which all that train an SAE go on; None where they start
        self.at = None if command.overwrite else checkpoint.step_to_go_on_at(list(self.with_saes))

    @staticmethod
    def _testbed(request: DataConfig) -> str:
        return request.name if request.name != "auto" else AUTO[0 if checks.first_can_be_had() else 1]

    @property
    def with_saes(self) -> dict[Path, Config]:
        """The settings of the runs whose SAEs are to be trained, by folder."""
        pairs = zip(self.folders, self.configs)
        return {folder: c for folder, c in pairs if folder in self.trained and c.arm not in c.untrained}

    def _work_left(self) -> float:
        """Of training, behind the last checkpoints."""
        left = [(max(0, c.tokens - (self.at or 0) * c.batch_size), c) for c in self.with_saes.values()]
        return sum(work(tokens, c.d_sae, c.seeds) for tokens, c in left)

    def lines(self) -> list[str]:
        out, files = [], dict[str, list[str]]()
        for folder, of in zip(self.folders, self.configs):
            out.append(f"{folder}: {self._done(folder, of)}{self._state(folder)}")
            files.setdefault(", ".join(self._written(folder, of)), []).append(folder.name)
        auto = " (what auto means now)" if self.request.name == "auto" else ""
        out.append(f"  testbed: {self.testbed}{auto}")
        out.append(f"  LM: {self.spec.lm}, layer {self.spec.layer}, {self._where()}")
        for name in ("forget_text", "retain_text"):
            out.append(f"  {name.replace('_', ' ')}: {' '.join(getattr(self.spec, name))}")
        if asking := [row.name for row in self.rows if row.asks]:
            out.append(f"  questions (for {', '.join(asking)}): {' '.join(self.spec.questions)}")
        out += [f"  memory: {self._memory()}", f"  disk: {self._disk()}", f"  time: {self._time()}"]
        if self.command.activations and self.with_saes:
            out.append(f"  activations: {self._activations()}")
        return out + [f"  would write into {', '.join(names)}: {some}" for some, names in files.items()]

    def _done(self, folder: Path, of: Config) -> str:
        """What would be done with one run."""
        seeds = f"seeds {' '.join(map(str, of.seeds))}"
        named = ", ".join(row.name for row in self.rows if row.fits(of)) or "no evaluation"
        if folder not in self.trained:
            return f"complete; its SAEs are evaluated ({seeds}): {named}"
        if of.arm in of.without_sae:
            return f"arm {of.arm}, fitted without an SAE ({seeds}); {named}"
        if self.command.saes:
            given = ", ".join(sae.given for sae in self.command.saes)
            return f"SAEs of {of.d_sae} features that were trained elsewhere, {given} ({seeds}); {named}"
        steps = f"{of.tokens // of.batch_size} steps of {of.batch_size} activations"
        saes = f"{len(of.seeds)} SAE{'s' if len(of.seeds) > 1 else ''} of {of.d_sae} features ({seeds})"
        return f"arm {of.arm}, {saes}, {steps}; {named}"

    def _written(self, folder: Path, of: Config) -> list[str]:
        """The files of one run that would be written."""
        files = [f"eval/seed*_{row.section}.json" for row in self.rows if row.fits(of)]
        if folder in self.trained:
            files = ["config.json", "sae_seed*/", "eval/seed*_metrics.json", *files]
            files += [] if of.arm in of.untrained else ["train_log.jsonl", "checkpoints/ (until complete)"]
        return [*files, "warnings.json", "checksums.json", "final_info.json"]

    def _state(self, folder: Path) -> str:
        """What is there of a run, and what becomes of it."""
        out = ""
        if folder in self.trained and (folder / "config.json").exists():
            if self.command.overwrite:
                out = "; what is there of a run is removed (--overwrite)"
            elif self.at is not None and folder in self.with_saes:
                out = f"; goes on at step {self.at}"
            elif steps := checkpoint.steps_in(folder):
                lost = f"the checkpoint of step {steps[-1]} is not in all folders that are trained together"
                out = f"; starts again at step 0, for {lost}"
            else:
                out = "; begun before, without a checkpoint"
        if (folder / ".lock").exists():
            out += f"; locked, by {(folder / '.lock').read_text(errors='replace').strip() or 'a process'}"
            out += ": refused while that works on it"
        return out

    def _where(self) -> str:
        base = SPECS[self.spec.taught] if self.spec.taught else self.spec
        if self.lm is None and base.lm_is == "packaged":
            return f"to be unpacked from the package {base.lm} into {cache_folder()}"
        if self.lm is None:
            return "not on this machine: to be fetched"
        size = sum(file.stat().st_size for file in self.lm.glob("*.safetensors"))
        return f"{'taught from ' if self.spec.taught else ''}{gigabytes(size)} in {self.lm}"

    def _memory(self) -> str:
        if not self.with_saes:
            return "that of the LM, the text and the evaluations"
        if self.d_in is None:
            return "not known before the LM is here (--d_sae, --batch_size and --buffer_tokens count)"
        need, on_gpu = (
            gigabytes(config.bytes_of_training(list(self.with_saes.values()), self.d_in, n)) for n in (1, 2)
        )
        two_blocks = self.spec.gpu and not self.command.activations
        more = f" (on a GPU {on_gpu}, as the next activations are made meanwhile)" if two_blocks else ""
        return f"at least {need} to train{more}, and the LM, the text and the evaluations"

    def _disk(self) -> str:
        place = next(p for p in self.folders[0].absolute().parents if p.exists())
        free = f"{gigabytes(shutil.disk_usage(place).free)} are free in {place}"
        if self.d_in is None:
            return f"not known before the LM is here; {free}"
        saes = sum(4 * len(c.seeds) * (2 * self.d_in + 1) * c.d_sae for c in self.with_saes.values())
        some = "some MB of results a run"
        if saes:
            some = (
                f"{gigabytes(saes)} of SAEs, {gigabytes(6 * saes)} of checkpoints until complete, and {some}"
            )
        return f"{some}; {free}"

    def _activations(self) -> str:
        if self.d_in is None:
            return "not known before the LM is here"
        first = next(iter(self.with_saes.values()))
        said = kept.said_of(self.testbed, defaults_of(self.spec), first)
        return kept.foreseen(self.command, said, first.tokens, self.d_in)

    def _time(self) -> str:
        """By what finished runs of the testbed took, beside these or in the current folder; other machines
        differ."""
        places = {f.parent.resolve() for f in self.folders} | {Path().resolve()}
        known = [run for place in sorted(places) for run in finished(place)]
        known = [
            run
            for run in known
            if (run.config["testbed"], run.config.get("lm")) == (self.testbed, self.spec.lm)
        ]
        if not known:
            return (
                f"not known: no finished run of {self.testbed} with this LM lies beside the folders or here"
            )
        parts, names = [], ", ".join(run.name for run in known[:4]) + (", ..." if len(known) > 4 else "")
        if self.with_saes:
            training = seconds_of_training(known, self._work_left())
            parts.append("training not known" if training is None else f"{minutes(training)} of training")
        parts.append(self._time_of_evaluations(known))
        said = [part for part in parts if part]
        if not said:
            return "not known: no evaluation is asked for, and what is fitted has no time of its own"
        if all(part.endswith("not known") for part in said):
            return f"{' and '.join(said)}: {names} did not do it"
        return f"{' and '.join(said)}, in proportion to what {names} took"

    def _time_of_evaluations(self, known: Sequence["Finished"]) -> str:
        total, lacking = 0.0, []
        for row in self.rows:
            of_it = [s for run in known if (s := run.seconds_a_seed(row.section)) is not None]
            n_seeds = sum(len(c.seeds) for c in self.configs if row.fits(c))
            if of_it:
                total += n_seeds * sum(of_it) / len(of_it)
            elif n_seeds:
                lacking.append(row.name)
        if lacking and not total:
            return "evaluation not known"
        without = f" (without {', '.join(lacking)}: not known)" if lacking else ""
        return f"{minutes(total)} of evaluation{without}" if self.rows else ""


@dataclass
class Finished:
    """A complete run: the name of its folder, its settings and its results."""

    name: str
    config: dict
    info: dict

    def seconds_a_seed(self, section: str) -> float | None:
        """What an evaluation took; None where it was not made."""
        made_by = self.info.get(section, {}).get("made_by")
        return made_by and made_by["seconds"] / len(self.config["seeds"])

    @property
    def trained(self) -> float | None:
        """Seconds that its pass of the LM took, the same in every run on it; None of a method without an
        SAE."""
        means = self.info["training"]["means"]
        return means["train_seconds"] if "final_l0" in means else None

    @property
    def work(self) -> float:
        """What training grows with: tokens x features x seeds."""
        return work(
            self.info["training"]["means"]["tokens_trained"], self.config["d_sae"], self.config["seeds"]
        )


def work(tokens: float, d_sae: int, seeds: Sequence[int]) -> float:
    return tokens * d_sae * len(seeds)


def finished(place: Path) -> list[Finished]:
    """The complete runs in a folder that can be read."""
    out = []
    for path in sorted(place.glob("*/final_info.json")):
        try:
            made = run_folder.read_run_json(path.parent / "config.json", {"requested", "config"})
            info = run_folder.read_run_json(path, {"training"})
        except (WrongRequest, Unusable):
            continue
        out.append(Finished(path.parent.name, made["config"], info))
    return out


def seconds_of_training(known: Sequence[Finished], work_left: float) -> float | None:
    """In proportion to the pass of the LM, among these runs, that trained most. None where none trained an
    SAE."""
    passes: dict[float, float] = {}
    for run in known:
        if run.trained is not None:
            passes[run.trained] = passes.get(run.trained, 0) + run.work
    if not passes:
        return None
    seconds = max(passes, key=passes.__getitem__)
    return seconds * work_left / passes[seconds]


def minutes(seconds: float) -> str:
    return f"about {round(seconds / 60)} min" if seconds >= 60 else f"about {round(seconds)} s"
