"""A run read back from its folder: settings, results, SAEs, and the cells by which knowledge is switched off.
Imports no torch.

    run = load_run("run_6")
    run.config["alpha"], run.results["robustness"]["means"]["worst_case_score"]
    sae = run.sae(seed=0)                            # a sae_lens SAE, or a methods.Method
    cell = run.cell(seed=0)                          # the best one; run.cells(seed=0) has all, by name
    lm, tokenizer = run.load_lm()
"""

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_separation import run_folder
from sae_separation.errors import WrongRequest
from sae_separation.specs import CUSTOM, SPECS

NAMING = (  # settings of a cell that tell it from the others of its grid
    "retain_threshold",
    "selection",
    "n_features",
    "strength",
    "retain_share",
    "threshold",
    "step",
    "intervention",
    "write",
    "multiplier",
)
# evaluations that choose a cell, all by the same rule (evals/cells.py)
CHOOSING = ("robustness", "questions", "features", "depth", "relearning")
REPEATING = ("features", "n_tokens", "limits", "guard")  # what else belongs to a cell; the rest was measured


@dataclass(frozen=True)
class Cell:
    """One setting of an intervention. `name`: the evaluation that chose it (one of CHOOSING, or "unlearning",
    "unlearning_conditional" and "unlearning_guardrail", the last two under a guard), else its settings.
    `settings`, as they were recorded; `needed`, what repeats it beside them and the weights: each feature's
    unit, and the mean of the stream over retain text [D]."""

    name: str
    settings: dict
    needed: dict = field(repr=False)

    @property
    def described(self) -> str:
        """Its settings in a line, without the features."""
        return settings_of(self.settings)


def settings_of(cell: dict) -> str:
    """In a line, without the features: retain_threshold=0.01,n_features=10,write=zero. A gate's threshold
    follows from its retain_share, and the clamp is the intervention where none is named."""
    given = {"threshold"} if "retain_share" in cell else set()
    given |= {"intervention"} if cell.get("intervention") == "clamp" else set()
    names = [name for name in NAMING if name in cell and name not in given]
    values = (cell[name] for name in names)
    shown = (f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return ",".join(f"{name}={value}" for name, value in zip(names, shown))


@dataclass(frozen=True)
class SavedRun:
    """A complete run. `config`: every setting; `testbed`: LM, text and questions as they were recorded;
    `results`: final_info.json."""

    folder: Path
    config: dict
    testbed: dict
    results: dict = field(repr=False)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.config["seeds"])

    def the_seed(self, seed: int | None) -> int:
        """One of the run's seeds; the first for None. Raises WrongRequest for another."""
        seed = self.seeds[0] if seed is None else seed
        if seed not in self.seeds:
            raise WrongRequest(f"{self.folder} has no seed {seed}: its seeds are {list(self.seeds)}")
        return seed

    def sae_folder(self, seed: int | None = None) -> Path:
        """Where the SAE of a seed is (the first for None). Raises WrongRequest where its files are not there
        (they are not committed) or not as they were written."""
        seed = self.the_seed(seed)
        run_folder.refuse_without_saes(self.folder, [seed])
        return run_folder.sae_folder(self.folder, seed)

    def sae(self, seed: int | None = None, device: Any = "cpu") -> Any:
        """The SAE of a seed as sae_lens reads it, or what the method of a run without one has fitted
        (methods.Method). Raises as `sae_folder`."""
        folder = self.sae_folder(seed)
        from sae_separation.export import load_exported

        return load_exported(folder, device)

    def cells(self, seed: int | None = None) -> dict[str, Cell]:
        """All cells of a seed's evaluations that can be repeated, by name, the best one first. Raises
        WrongRequest for a file that is not as it was written."""
        seed = self.the_seed(seed)
        robustness, unlearning = (
            run_folder.details_of(self.folder, seed, section) for section in ("robustness", "unlearning")
        )
        found = (*self._chosen(seed), *allowed(unlearning), *others(robustness, unlearning))
        return {cell.name: cell for cell in found}

    def _chosen(self, seed: int) -> list[Cell]:
        """The cell that SAEBench's rule chose on half of the questions, from the first of CHOOSING that has
        recorded it."""
        for section in CHOOSING:
            details = run_folder.details_of(self.folder, seed, section)
            if found := repeatable({section: (details.get("cell"), details.get("needed", {}))}):
                return found
        return []

    def cell(self, seed: int | None = None, name: str | None = None) -> Cell:
        """A cell by its name; for None the best one: the one that was chosen on half of the questions, else
        the best that unlearning allows. Raises WrongRequest where there is none."""
        seed = self.the_seed(seed)
        cells = self.cells(seed)
        best = next((cells[k] for k in (*CHOOSING, "unlearning") if k in cells), None)
        found = best if name is None else cells.get(name)
        if found is not None:
            return found
        where = f"{self.folder} seed {seed}"
        if not cells:
            raise WrongRequest(f"{where} has no cell that can be repeated: {self._without_cells()}")
        if name is None:
            why = "no cell that was tried keeps 0.99 of the retain questions"
            raise WrongRequest(f"{where} has no best cell ({why}): name one, as {next(iter(cells))}")
        near = difflib.get_close_matches(name, cells, n=3, cutoff=0.0)
        raise WrongRequest(f"{where} has no cell {name}; the nearest of {len(cells)}: {' or '.join(near)}")

    def _without_cells(self) -> str:
        if self.config["arm"] == "oracle":
            return "the oracle is an LM of its own, and no intervention"
        again = f"python experiment.py --out_dir={self.folder} --evals unlearning robustness"
        return f"evaluate it with {again} (and its other options)"

    def load_lm(self, lm: str = "", device: str = "cpu") -> tuple[Any, Any]:
        """The run's LM and its tokenizer, or an `lm` of the same layers (a folder or a hub name) in its
        place. Raises WrongRequest where it cannot be had, or where the run's own has other weights now."""
        from sae_separation import checks
        from sae_separation.lm import load_lm, load_tokenizer
        from sae_separation.testbeds import lm_folder

        name = self.testbed["name"] if self.testbed["name"] in SPECS else CUSTOM
        said = os.path.expanduser(lm)
        if lm and checks.lm_is_local(said):
            checks.check_lm_folder(Path(said))
        folder, found = lm_folder(CUSTOM, said) if lm else lm_folder(name, self.config["lm"])
        then = self.testbed.get("sources", {}).get("lm", {})
        if not lm and found.get("sha256") != then.get("sha256"):
            why = f"the LM of {self.folder}, {self.config['lm']}, has other weights than it was trained on"
            raise WrongRequest(f"{why}: bring them back, or give another --lm")
        tokenizer = load_tokenizer(folder, self.document_end)
        return load_lm(folder, device), tokenizer

    @property
    def document_end(self) -> str:
        """The token that parts documents, where it is not the one that the tokenizer names (specs.Spec)."""
        return SPECS[self.testbed["name"]].document_end if self.testbed["name"] in SPECS else ""


def load_run(folder: str | os.PathLike) -> SavedRun:
    """The complete run in a folder. Raises WrongRequest for a folder that holds none, and for files that are
    not as they were written."""
    folder = Path(folder).expanduser()
    if not (folder / "config.json").exists():
        raise WrongRequest(f"{folder} is no run folder: it holds no config.json")
    made = run_folder.read_run_json(folder / "config.json", {"requested", "config"})
    if not run_folder.is_complete(folder):
        raise WrongRequest(f"{folder} is not complete: give the command that made it again, and it goes on")
    results = run_folder.read_run_json(folder / "final_info.json", {"training"})
    return SavedRun(folder, made["config"], made.get("testbed", {}), results)


def features_run(out_dir: str | os.PathLike, features_of: str) -> SavedRun:
    """The run whose SAEs' features the run in out_dir reads: a bare name is a folder beside out_dir. Raises
    WrongRequest."""
    named = Path(features_of).expanduser()
    return load_run(Path(out_dir).parent / named if named.name == features_of else named)


def refuse_without_features(names: Iterable[str], requests: Iterable[Any]):
    """Raises WrongRequest where a gate is to read the features of SAEs that are not there."""
    for out_dir, request in zip(names, requests):
        if request.arm != "feature_gate":
            continue
        if not request.features_of:
            raise WrongRequest(
                "--arm feature_gate reads features of a run's SAEs: name it with --features_of"
            )
        source = features_run(out_dir, request.features_of)
        if source.config["arm"] in request.without_sae:
            why = f"is a run of {source.config['arm']}, which has no SAE"
            raise WrongRequest(f"--features_of {source.folder} {why}: name a run that has")
        if source.config.get("activation") == "softk" or source.config.get("layer_norm"):
            why = "features that compete (softk) or whose input is layer-normalised"
            raise WrongRequest(f"--features_of {source.folder} has {why}: name a run with others")
        for seed in request.seeds:
            source.sae_folder(seed)


def allowed(unlearning: dict) -> list[Cell]:
    """The best cell that unlearning allows under each intervention, from its details."""
    cells = {}
    for how, cell in unlearning.get("best", {}).items():
        name = "unlearning" if how == "clamp" else f"unlearning_{how}"
        cells[name] = cell, {"units": unlearning.get("units", {})}
    return repeatable(cells)


def repeatable(cells: dict[str, tuple[dict | None, dict]]) -> list[Cell]:
    """Those of the named settings, each with what is needed beside them, that can be repeated."""
    return [
        Cell(name, without_measures(cell), needed)
        for name, (cell, needed) in cells.items()
        if cell is not None and can_be_repeated(cell, needed)
    ]


def others(robustness: dict, unlearning: dict) -> list[Cell]:
    """The cells of the grid of robustness, else of unlearning."""
    if robustness.get("frontier"):
        grid, needed = robustness["frontier"], robustness["needed"]
    else:
        grid, needed = unlearning.get("sweep", []), {"units": unlearning.get("units", {})}
    return repeatable({settings_of(cell): (cell, needed) for cell in grid})


def without_measures(cell: dict) -> dict:
    return {name: cell[name] for name in (*NAMING, *REPEATING) if name in cell}


def can_be_repeated(cell: dict, needed: dict) -> bool:
    """Whether it changes anything, and all that it takes was recorded: units of its features, and what a
    guard has from retain text (older versions recorded neither)."""
    if "n_features" not in cell:
        return bool(without_measures(cell))
    features = cell.get("features", ())
    has_units = set(map(str, features)) <= needed.get("units", {}).keys()
    is_clamp = cell.get("intervention", "clamp") == "clamp"
    return bool(features) and has_units and (is_clamp or "limits" in cell or "guard" in cell)
