"""What can be asked of a run, and how a command line becomes requests. Imports no torch.

    Request                                          # what is asked; None or empty is left to the testbed
    complete(request, Config, name, defaults, d_in)  # the same settings, every one with its value

Both get the arms' own options from the table of arms (`with_arms`). The bounds of a setting stand beside it.
"""

import argparse
import copy
import difflib
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

import simple_parsing

from sae_separation import evals, grid, tracking
from sae_separation.errors import WrongRequest
from sae_separation.run_folder import is_complete
from sae_separation.specs import CUSTOM, SPECS, TESTBEDS, DataConfig, Scoring, defaults_of

OF_METHODS = ("arm", "seeds", "context_size", *(f.name for f in fields(DataConfig)))  # that train no SAE
Activation = Literal["relu", "jumprelu", "batchtopk", "matryoshka", "softk"]
ACTIVATION_NAMES = get_args(Activation)
BY_LAMBDA = ("relu", "jumprelu")  # sparse by lambda's price; the others keep k features
BY_K = ("batchtopk", "matryoshka", "softk")

# ---- settings and their bounds


@dataclass(frozen=True)
class Bounds:
    """What a number, or each of several, may be: at least `least` and more than `above`, at most `most` and
    less than `below`. `activations`: those under which it does something, if not all. `cut_to`: d_in or
    d_sae, to which a larger one is cut. `within`: another setting that it may not exceed, where it does
    something."""

    least: float = 0
    most: float | None = None
    above: float | None = None
    below: float | None = None
    activations: tuple[str, ...] = ACTIVATION_NAMES
    cut_to: str = ""
    within: str = ""

    def check(self, name: str, value: float):
        """Raises WrongRequest for a value out of bounds."""
        most, said = self.most or 1e30, f"{value:.6g}"
        if isinstance(value, int):
            most, said = self.most or 1e12, str(value)
        if value > most or self.below is not None and value >= self.below:
            limit = f"of at most {most:.15g}" if self.below is None else f"below {self.below:g}"
            raise WrongRequest(f"--{name} is {said}: give a smaller number, {limit}")
        if not value >= self.least or self.above is not None and value <= self.above:
            limit = f"of at least {self.least:g}" if self.above is None else f"above {self.above:g}"
            raise WrongRequest(f"--{name} is {said}: give a finite number {limit}")


def option(default, help: str | None = None, metavar: str | None = None, **bounds) -> Any:
    """A dataclass field for the command line, with its Bounds. Its help is `help`, or the text under it."""
    how: dict[str, Any] = {"help": help, "metavar": metavar}
    how = {k: v for k, v in how.items() if v is not None}
    return simple_parsing.field(default=default, metadata={"bounds": Bounds(**bounds)}, **how)


def bounds_of(f) -> Bounds:
    return f.metadata.get("bounds", Bounds())


def refuse_out_of_bounds(settings: Any):
    """Raises WrongRequest for a number in a dataclass that is out of its field's bounds."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                bounds_of(f).check(f.name, number)


@dataclass(kw_only=True)
class Settings:
    """The settings of a run for which no testbed has a default of its own."""

    arm: str = "vanilla"
    """which orthogonality loss (see ARMS)"""
    seeds: tuple[int, ...] = option((0, 1, 2), most=2**31 - 1)
    """one SAE a seed, trained side by side on one LM pass"""

    batch_size: int = option(2048, least=2, most=2**20)
    """activations an optimiser step"""
    buffer_tokens: int = option(131_072, least=1, most=2**26)
    """activations that are collected and shuffled at once"""

    activation: Activation = "relu"
    """how features compete: relu (sparse by lambda), jumprelu (a threshold for each, learned; lambda prices
    L0), batchtopk (the k B largest of a batch), matryoshka (the same, and the first features reconstruct by
    themselves), softk (soft k-winners-take-all)"""
    temperature: float = option(0.3, above=0, activations=("softk",))
    """softk: the gate's temperature at the start; it falls to 0 by the time the learning rate decays"""
    bandwidth: float = option(0.5, above=0, activations=("jumprelu",))
    """jumprelu: width, in units of u, of the band around a threshold whose pre-activations teach it"""
    l1: float = option(0.03, activations=BY_LAMBDA)
    """lambda, weight of the sparsity loss: where it starts, or stays without a target"""

    alpha: float = option(0.1)
    """weight of the orthogonality loss (adaptive: where its steering starts)"""
    alpha_start: float = option(0.0)
    """alpha curriculum: alpha starts here and rises geometrically to --alpha half-way; 0: no curriculum"""
    loss_warmup_steps: int = option(0)
    """steps over which lambda and alpha count from 0 to full"""

    layer_norm: bool = False
    """feed the SAE layer-normalised activations"""
    skip: float = option(0.0, below=1)
    """share of the centred input that goes past the features; not in the SAELens format, so it needs --evals
    none"""
    orthogonal_init: bool = False
    """start from blocks of orthonormal decoder rows"""
    feature_dropout: float = option(0.0, below=1)
    """share of the features left out of each batch"""
    unlock_steps: int = option(0)
    """progressive unlocking: a quarter of the features, and every so many steps a tenth more; 0: all at
    once"""

    lr: float = option(3e-3, above=0)
    """Adam's learning rate after warm-up"""
    feature_lr_power: float = option(0.0)
    """a feature's learning rate is multiplied by (mean firing rate / its own) to this power, within 0.1 to
    10"""
    grad_clip: float = option(0.0)
    """largest norm of the gradient over all parameters; 0: any"""
    grad_accumulation: int = option(1, least=1)
    """batches whose mean gradient makes one optimiser step"""
    warmup_steps: int = option(100)
    """steps over which the learning rate rises from 0"""
    decay_fraction: float = option(0.2, most=1)
    """last part of training over which the learning rate falls to 0"""
    compile: bool = False
    """torch.compile for the SAE's part of a step, made for GPUs: a wait at the start, dense products only; on
    a CPU sparse ones are faster"""
    resample_steps: int = option(50)
    """steps between two resamplings of dead features, until the learning rate decays; 0: never"""
    dead_tokens: int = option(50_000, least=1)
    """a feature that has not fired for so many tokens is dead"""

    time_budget_minutes: float = option(110.0, above=0)
    """training stops when seven tenths of this are used, set-up and the time before an interruption counted
    in; the rest is left for evaluation, which is not cut short"""

    untrained: ClassVar[frozenset[str]] = frozenset()  # the arms that train no SAE
    without_sae: ClassVar[frozenset[str]] = frozenset()  # those that have none

    def __post_init__(self):
        refuse_out_of_bounds(self)
        refuse_what_does_not_fit(self)

    def matters(self, f) -> bool:
        """Whether a setting, given as its dataclass field, does something in this run."""
        own = f.metadata.get("arms", ())  # the arms that it is an option of; none: it is of all
        if self.arm in self.untrained and f.name not in OF_METHODS and self.arm not in own:
            return False
        return self.activation in bounds_of(f).activations and (not own or self.arm in own)


@dataclass(kw_only=True)
class Request(Settings, DataConfig):
    """What is asked of one run. What is None or empty takes the testbed's default."""

    tokens: int | None = option(None, least=1, most=10**12)
    """activations to train on, per SAE"""
    context_size: int | None = option(None, least=8, most=2**20)
    """tokens a context, the leading BOS included"""
    d_sae: int | None = option(None, least=2, most=2**22)
    """features"""
    k: int | None = option(None, activations=BY_K)
    """batchtopk, matryoshka, softk: active features a token"""
    target_l0: float | None = option(None, activations=BY_LAMBDA)
    """mean active features a token that lambda is steered to; 0 keeps lambda at --l1"""


@dataclass(kw_only=True)
class Config(Settings):
    """One run with every setting: what a Request leaves open is the testbed's (`complete`)."""

    testbed: str
    lm: str
    layer: int
    forget_text: tuple[str, ...]
    forget_entities: int | None
    retain_text: tuple[str, ...]
    questions: tuple[str, ...]
    forget_subject: str
    scoring: Scoring
    tokens: int
    context_size: int
    d_sae: int
    k: int
    target_l0: float


def refuse_what_does_not_fit(settings: Any):
    """Raises WrongRequest for settings of a Request or a Config that do not fit together. None fits all."""
    if not settings.seeds or len(set(settings.seeds)) != len(settings.seeds):
        raise WrongRequest(f"--seeds {settings.seeds}: give at least one, each once")
    if settings.buffer_tokens < 4 * settings.batch_size:
        need = f"must hold at least 4 batches of {settings.batch_size} to shuffle them"
        raise WrongRequest(f"--buffer_tokens {settings.buffer_tokens} {need}")
    steered = settings.activation in BY_LAMBDA and settings.target_l0 != 0  # None is the testbed's target
    if steered and not settings.l1:
        remedy = "start from a small number, or give --target_l0 0"
        raise WrongRequest(f"--l1 0 cannot be steered to a target L0: {remedy}")
    if settings.d_sae is not None:
        refuse_more_than_features(settings)
    for f in fields(settings):
        limit, value = bounds_of(f).within, getattr(settings, f.name)
        most = getattr(settings, limit) if limit else None
        if most is not None and value > most and settings.matters(f):
            raise WrongRequest(f"--{f.name} {value} must be at most --{limit} {most}")
    if settings.tokens is not None and settings.arm not in settings.untrained:
        refuse_few_steps(settings)


def refuse_more_than_features(settings: Any):
    """Raises WrongRequest where as many features are to be active as there are."""
    k, target, most = settings.k, settings.target_l0, settings.d_sae
    if settings.activation in BY_K and k is not None and not 1 <= k < most:
        raise WrongRequest(f"--k {k} must lie in [1, --d_sae {most})")
    if settings.activation in BY_LAMBDA and target is not None and target >= most:
        raise WrongRequest(f"--target_l0 {target:g} must be under --d_sae {most}")


def refuse_few_steps(settings: Any):
    """Raises WrongRequest for fewer optimiser steps than training takes."""
    steps = settings.tokens // settings.batch_size
    if steps < 100:
        why = f"{steps} steps of --batch_size {settings.batch_size}: training takes at least 100"
        raise WrongRequest(f"--tokens {settings.tokens} is {why}")
    if settings.unlock_steps and 8 * settings.unlock_steps >= steps:
        why = f"all features are open after 8 times that, but training takes {steps} steps"
        raise WrongRequest(f"--unlock_steps {settings.unlock_steps}: {why}")


def bytes_of_training(configs: Sequence[Config], d_in: int, n_blocks: int = 1) -> int:
    """What training surely needs: weights and Adam's moments of every SAE, one SAE's gradients and features,
    and so many blocks of activations."""
    weights = [8 * d_in * c.d_sae for c in configs]  # bytes of W_enc and W_dec
    need = sum(3 * len(c.seeds) * w for c, w in zip(configs, weights))
    need += max(w + 6 * c.batch_size * c.d_sae for c, w in zip(configs, weights))
    return need + n_blocks * 4 * configs[0].buffer_tokens * d_in


class Arm(Protocol):
    """What is asked here of a row in the table of arms."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Its own options: name -> `option`."""
        ...

    @property
    def has_loss(self) -> bool:
        """Whether alpha weighs anything."""
        ...

    @property
    def trains_sae(self) -> bool:
        """Whether it trains an SAE."""
        ...

    @property
    def has_sae(self) -> bool:
        """Whether it has one, or is a method that needs none."""
        ...

    @property
    def loads_sae(self) -> bool:
        """Whether it is of SAEs that were trained elsewhere."""
        ...


def offered(arms: Mapping[str, Arm]) -> list[str]:
    """The arms that --arm takes. SAEs that were trained elsewhere come with --evaluate."""
    return [name for name, row in arms.items() if not row.loads_sae]


S = TypeVar("S", bound=Settings)


def with_arms(arms: Mapping[str, Arm]) -> Callable[[type[S]], type[S]]:
    """A class decorator: a Request or a Config with the names of these arms, and their own options."""
    own = {name: made for row in arms.values() for name, made in row.options.items()}

    def add(kind: type[S]) -> type[S]:
        with_loss = {f.name: f for f in fields(kind) if f.name in ("alpha", "alpha_start")}
        for name, made in (with_loss | own).items():
            users = [
                arm for arm, row in arms.items() if name in row.options or name in with_loss and row.has_loss
            ]
            metadata = {**made.metadata, "arms": tuple(users)}
            setattr(kind, name, field(default=made.default, metadata=metadata))
            kind.__annotations__[name] = type(made.default)
        kind.__annotations__["arm"] = Literal[tuple(offered(arms))]
        kind.arm = Settings.arm
        kind.untrained = frozenset(arm for arm, row in arms.items() if not row.trains_sae)
        kind.without_sae = frozenset(arm for arm, row in arms.items() if not row.has_sae)
        return dataclass(kw_only=True)(kind)

    return add


def complete(request: Request, kind: type[S], testbed: str, defaults: Mapping[str, Any], d_in: int) -> S:
    """The Config of a Request on a testbed: what is left open takes the `defaults`, and what cannot be larger
    than d_in or d_sae is cut to it. Raises WrongRequest for what does not fit together."""
    settings: dict[str, Any] = {f.name: getattr(request, f.name) for f in fields(request)}
    settings |= {name: default for name, default in defaults.items() if settings[name] in (None, "", ())}
    most = {"": float("inf"), "d_in": d_in, "d_sae": settings["d_sae"]}
    cut = {f.name: bounds_of(f).cut_to for f in fields(request)}
    settings |= {name: min(settings[name], most[to]) for name, to in cut.items() if to}
    settings["testbed"] = testbed
    return kind(**settings)


# ---- the command


@dataclass
class Command:
    """Where the runs of a command go, and how they are kept."""

    out_dir: tuple[str, ...] = ()
    """run folders; run_0, run_1, ... are the plan's runs, another name needs --arm. Of a grid (several
    values of --arm or of numbers) one folder, in which each run has its own"""
    dry_run: bool = False
    """say what would be done, what it takes and what would be written, and do nothing"""
    overwrite: bool = False
    """start anew in a folder that holds a run"""
    evals: tuple[str, ...] = option(
        (),
        help="which evaluations, or none; if none are named,"
        f" {', '.join(row.name for row in evals.rows_of(()))} of a run that is trained. Those named are made"
        " of a complete run, too, or made anew",
        metavar=f"{{{','.join((*evals.names(), 'none'))}}} ...",
    )
    evaluate: tuple[str, ...] = option(
        (),
        help="SAEs that were trained elsewhere, one a seed, to be evaluated in place of training: folders, or"
        " owner/name/folder on the hub, in the formats of SAELens, dictionary_learning and sparsify; layer"
        " and LM are those that they name",
    )
    saes: tuple = simple_parsing.field(default=(), cmd=False)  # those, as loaded.find describes them
    shard_features: bool = False
    """with torchrun: split the features of every SAE over the ranks, for SAEs that one device cannot hold"""
    split_lm: bool = False
    """place the LM's layers over all GPUs, for an LM that one cannot hold (pip install accelerate)"""
    checkpoint_seconds: float = option(60.0)
    """training time between two checkpoints, at least; writing them takes at most a fiftieth of it"""
    activations: str | None = option(None, metavar="FOLDER")
    """keep the activations there that the LM computes, and train from those that are there: the same results,
    and the LM is run once for many commands"""
    activations_dtype: Literal["exact", "bf16"] = "exact"
    """of those: 4 bytes a number, 2 where the LM runs in bfloat16; or rounded to 2, which is not the same
    training"""
    track: tracking.Name = "none"
    """send the log and the results to an experiment tracker, too (pip install it)"""

    def __post_init__(self):
        refuse_out_of_bounds(self)
        self.out_dir = tuple(map(os.path.expanduser, self.out_dir))
        if self.activations is not None:
            self.activations = os.path.expanduser(self.activations)
            if not self.activations:
                raise WrongRequest("--activations is empty: name a folder")
        for name in set(self.evals) - {*evals.names(), "none"}:
            why = f"argument --evals: {refused_choice(name, (*evals.names(), 'none'))}"
            raise WrongRequest(f"{why} (--help lists the options)")
        if len(set(self.evals)) != len(self.evals):
            raise WrongRequest(f"--evals {' '.join(self.evals)}: give each once")
        if "none" in self.evals and len(self.evals) > 1:
            raise WrongRequest(f"--evals {' '.join(self.evals)}: none stands alone")


# Settings of the LM pass, which all runs of a command share. All others are a run's own.
ONE_PASS = (
    *(f.name for f in fields(DataConfig)),
    "tokens",
    "context_size",
    "batch_size",
    "buffer_tokens",
    "time_budget_minutes",
)


def whole_number(text: str) -> int:
    """200000, 200_000, 200k, 3M, 1B or 4e5. Raises argparse.ArgumentTypeError for what is no whole number."""
    digits, power = text[:-1], {"k": 3, "m": 6, "b": 9}.get(text[-1:].lower())
    try:
        number = Decimal(text) if power is None else Decimal(digits).scaleb(power)
    except ArithmeticError:
        number = Decimal("nan")
    if number.is_finite() and number.adjusted() > 30:
        raise argparse.ArgumentTypeError(f"{text} is too large: give a smaller number")
    if not number.is_finite() or number != number.to_integral_value():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number (200000, 200_000, 200k, 3M, 4e5)")
    return int(number)


def real_number(text: str) -> float:
    """As float, but raises argparse.ArgumentTypeError."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number (0.3, 3e-3)") from None


LOOK_LIKE_FIGURES = str.maketrans("oOlI", "0011")


def as_numbers(option: str, text: str, is_whole: bool) -> str:
    """What may be meant by a text that is no number, as the end of a message: a decimal point, several
    values, figures in place of letters; "" where it is none of these."""

    read = whole_number if is_whole else real_number

    def are_numbers(*texts: str) -> bool:
        try:
            for one in texts:
                read(one)
        except argparse.ArgumentTypeError:
            return False
        return True

    text = text.translate(LOOK_LIKE_FIGURES).strip(",")
    has_thousands = is_whole and re.fullmatch(r"\d{1,3}(,\d{3})+", text)
    values, joined = text.split(","), text.replace(",", "" if has_thousands else ".")
    if are_numbers(joined):
        return f"; did you mean {option} {joined}?"
    if not are_numbers(*values):
        return ""
    return f"; several values stand apart, without commas: {option} {' '.join(values)}"


def as_options(settings: Mapping[str, Any]) -> str:
    """Settings as on a command line."""
    texts = {name: f"{value:g}" if isinstance(value, float) else value for name, value in settings.items()}
    return " ".join(f"--{name} {text}" for name, text in texts.items())


GROUPS = {  # of --help; what an arm brings stands with the losses
    "data": (*(f.name for f in fields(DataConfig)), "context_size"),
    "model": (
        "d_sae",
        "activation",
        "k",
        "temperature",
        "bandwidth",
        "layer_norm",
        "skip",
        "orthogonal_init",
    ),
    "loss": ("arm", "l1", "target_l0", "alpha", "alpha_start", "loss_warmup_steps"),
    "training": (
        *("seeds", "tokens", "batch_size", "buffer_tokens", "lr", "warmup_steps", "decay_fraction"),
        *("feature_lr_power", "grad_clip", "grad_accumulation", "feature_dropout", "unlock_steps"),
        *("resample_steps", "dead_tokens", "compile"),
    ),
    "run": (
        *("out_dir", "evals", "evaluate", "dry_run", "overwrite", "track", "checkpoint_seconds"),
        *("activations", "activations_dtype", "shard_features", "split_lm", "time_budget_minutes", "help"),
    ),
}
ABOUT = {
    "data": "the LM, the text and the questions",
    "model": "the SAE",
    "loss": "what it is trained for",
    "training": "how",
    "run": "where it goes, and how it is evaluated",
}


def group_of(name: str) -> str:
    """The group of --help that an option stands in."""
    return next((group for group, names in GROUPS.items() if name in names), "loss")


def did_you_mean(text: str, choices: Iterable[str]) -> str:
    """The choice that looks most like what was said, as the end of a message; "" where none does."""
    near = difflib.get_close_matches(text, list(choices), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def refused_choice(text: str, choices: Collection[str]) -> str:
    """Why a text that is none of the choices is refused: the one that looks like it, else all of them."""
    rest = did_you_mean(text, choices) or f" (choose from {', '.join(map(repr, choices))})"
    return f"invalid choice: {text!r}{rest}"


def as_text(value: Any) -> str:
    """A value as one gives it on the command line: 3M, 0 1 2; of many long ones the first one."""
    if isinstance(value, tuple):
        texts = list(map(str, value))
        return " ".join(texts) if len(texts) < 2 or len(" ".join(texts)) < 60 else f"{texts[0]} ..."
    if isinstance(value, int) and value and value % 10**5 == 0:
        return f"{value / 10**6:g}M"
    return f"{value:g}" if isinstance(value, float) else str(value)


def default_text(name: str, default: Any) -> str:
    """What --help says of a default: the testbeds' own where they bring one, "" where there is none."""
    users: dict[str, list[str]] = {}
    for testbed, spec in SPECS.items():
        if (value := defaults_of(spec).get(name)) not in (None, "", ()):
            users.setdefault(as_text(value), []).append("--lm" if testbed == CUSTOM else testbed)
    by_testbed = [f"{value} with {', '.join(testbeds)}" for value, testbeds in users.items()]
    if len(users) == 1 and sum(map(len, users.values())) == len(SPECS):
        by_testbed = list(users)
    if not by_testbed and (default in (None, "", (), argparse.SUPPRESS) or default is False):
        return ""
    return f" (default: {'; '.join(by_testbed) or as_text(default)})"


class Parser(simple_parsing.ArgumentParser):
    """Reads numbers as people write them, and raises WrongRequest for what it does not take. `several`:
    options that take one value here, and on the command line may have a grid of them."""

    def __init__(self, several: Collection[str] = (), **how):
        super().__init__(**how, allow_abbrev=False)
        self.register("type", int, whole_number)
        self.register("type", float, real_number)
        self.several = several
        self.argv: list[str] = []

    def parse_known_args(self, args=None, namespace=None, attempt_to_reorder=False):
        self.argv = list(args or [])
        return super().parse_known_args(args, namespace, attempt_to_reorder)

    def error(self, message: str):
        literal = r"invalid typing\.Literal\[(.*)\] value: (.*)"
        message = re.sub(literal, r"invalid choice: \2 (choose from \1)", message)
        if unknown := re.match("unrecognized arguments: (.*)", message):
            message += self._why_unrecognized(unknown[1].split()[0])
        elif wrong := re.fullmatch(r"(.*)invalid choice: '(.*)' \(choose from (.*)\)", message):
            message = wrong[1] + refused_choice(wrong[2], re.findall("[^', ]+", wrong[3]))
        elif wrong := re.match(r"argument (\S+): (.*) is not a (whole )?number", message):
            message += as_numbers(wrong[1], wrong[2], bool(wrong[3]))
        raise WrongRequest(f"{message} (--help lists the options)")

    def _why_unrecognized(self, text: str) -> str:
        """What may be wrong with an argument that belongs to no option, as the end of a message."""
        if text.startswith("-"):
            return did_you_mean(text.split("=")[0], self._option_string_actions)
        before = self.argv[: self.argv.index(text)] if text in self.argv else []
        option, equals, value = next((a for a in reversed(before) if a.startswith("-")), "").partition("=")
        action = self._option_string_actions.get(option)
        one = action is not None and action.nargs in (None, "?")
        if one and option.lstrip("-") not in self.several:
            return f"; {option} takes one value"
        said = f"{option} {value} {text}" if equals and action else "--out_dir run_0 run_1"
        return f"; several values follow their option without =, as in {said}"

    def format_help(self) -> str:
        """The options by GROUPS."""
        formatter, shown = self._get_formatter(), {group: [] for group in GROUPS}
        for action in self._actions:
            name = action.dest.rpartition(".")[2]
            entry = copy.copy(action)
            entry.default = argparse.SUPPRESS  # it stands in the text
            if "bool" in str(action.metavar):
                entry.option_strings, entry.nargs = action.option_strings[:1], 0
            elif action.nargs == "?":
                entry.metavar = str(action.metavar).strip("[]")
            text = str(action.help).removesuffix(" (default: %(default)s)")
            entry.help = f"{text}{default_text(name, action.default)}".replace("%", "%%")
            shown[group_of(name)].append(entry)
        formatter.add_text(f"usage: {self.prog} --out_dir FOLDER [FOLDER ...] [--option VALUE ...]")
        formatter.add_text(self.description)
        for group, entries in shown.items():
            formatter.start_section(group)
            formatter.add_text(ABOUT[group])
            formatter.add_arguments(sorted(entries, key=position))
            formatter.end_section()
        return formatter.format_help()


def position(action: argparse.Action) -> tuple[int, bool]:
    """Where an option stands in its group: in the order of GROUPS, and then what an arm brings."""
    name = action.dest.rpartition(".")[2]
    names = GROUPS[group_of(name)]
    return (names.index(name), False) if name in names else (len(names), True)


R = TypeVar("R", bound=Request)


def parse_command(
    argv: Sequence[str], plan: Mapping[str, dict], arms: Mapping[str, Arm], kind: type[R], description: str
) -> tuple[Command, list[R]]:
    """The command and one request per run folder: the plan's settings, then what the command line says.

    Says what the plan gives to each folder and which runs a grid is, and warns of options without effect.
    Raises WrongRequest.
    """

    def parser(**planned) -> Parser:
        made = Parser(grid_options(kind), prog="experiment.py", description=description)
        made.add_arguments(kind, dest="request", default=kind(**planned))
        made.add_arguments(Command, dest="command")
        return made

    rest, several = grid.split(argv, grid_options(kind))
    plain, lines = parser(), list(grid.combinations(rest, several))
    parsed = plain.parse_args(lines[0])  # --help ends here: what checks imports is not waited for
    from sae_separation import checks, loaded

    command, first = parsed.command, parsed.request
    given = {found[1] for found in map(grid.OPTION.match, argv) if found}
    if loads := bool(command.evaluate):
        first = loaded.command(command, first, given, several, plan)
    lacking = {} if loads else lacking_names(command.out_dir, given, plan, offered(arms))
    refuse_evaluations(command.evals, given, first)
    checks.refuse_missing(lacking | checks.missing(first, evals.rows_of(command.evals)), argv)
    if several:
        cells = [first, *(plain.parse_args(line).request for line in lines[1:])]
        command.out_dir, requests = runs_of_a_grid(command.out_dir, cells, several, plan)
        messages = [about_grid(command.out_dir, requests, several)]
    elif loads:
        requests, messages = [first], []
    else:
        planned = [plan.get(Path(out_dir).name, {}) for out_dir in command.out_dir]
        requests = [parser(**settings).parse_args(list(argv)).request for settings in planned]
        messages = [
            of_the_plan(out_dir, settings, given, request)
            for out_dir, settings, request in zip(command.out_dir, planned, requests)
            if settings
        ]
    refuse_twins(command.out_dir, requests)
    for message in messages:
        print(message)
    if idle := without_effect(command, given, requests):
        print(f"warning: without effect: {idle}", file=sys.stderr)
    return command, requests


def grid_options(kind: type[Request]) -> list[str]:
    """The options that may be given several values, for a run each: the arm, and numbers."""
    numbers = (int, float, int | None, float | None)
    of_the_command = ("time_budget_minutes",)
    return ["arm", *(f.name for f in fields(kind) if f.type in numbers and f.name not in of_the_command)]


def runs_of_a_grid(
    out_dirs: Sequence[str],
    cells: Sequence[R],
    several: Mapping[str, Sequence[str]],
    plan: Mapping[str, dict],
) -> tuple[tuple[str, ...], list[R]]:
    """The folders of a grid's runs in its one folder, and their requests. What has no effect in a run is left
    at its default, and runs that then are the same are one. Raises WrongRequest."""
    options = " ".join(f"--{name} {' '.join(values)}" for name, values in several.items())
    if len(out_dirs) > 1:
        why = f"{options} is a grid of runs, and goes into one folder"
        raise WrongRequest(f"--out_dir {' '.join(out_dirs)}: {why}: name one")
    parent = out_dirs[0]
    if Path(parent).name in plan or (Path(parent) / "config.json").exists():
        what = "is one run of the plan" if Path(parent).name in plan else "holds a run"
        raise WrongRequest(f"--out_dir {parent} {what}, and {options} is a grid of runs: name another folder")
    runs: dict[str, R] = {}
    for cell in cells:
        varied = [f for f in fields(cell) if f.name in several and f.name != "arm"]
        idle = {f.name: f.default for f in varied if not cell.matters(f)}
        settings = {f.name: getattr(cell, f.name) for f in varied if f.name not in idle}
        runs[str(Path(parent, grid.folder_name(cell.arm, settings)))] = replace(cell, **idle)
    return tuple(runs), list(runs.values())


def about_grid(out_dirs: Sequence[str], requests: Sequence[Request], several: Mapping) -> str:
    """How many runs a grid is, how many SAEs, and on how many passes of the LM."""
    passes = len({shared_by_a_pass(request) for request in requests})
    varied = " x ".join(f"{len(values)} {name}" for name, values in several.items())
    n_seeds = sum(len(request.seeds) for request in requests)
    on = "one pass of the LM" if passes == 1 else f"{passes} passes of the LM, one after the other"
    places = [Path(out_dir) for out_dir in out_dirs]
    names = ", ".join(place.name for place in places[:6]) + (", ..." if len(places) > 6 else "")
    runs = f"{len(places)} run{'s' if len(places) > 1 else ''}"
    seeds = f"{n_seeds} seed{'s' if n_seeds > 1 else ''} in all"
    return f"grid ({varied}): {runs} with {seeds}, on {on}, in {places[0].parent}: {names}"


def refuse_twins(out_dirs: Sequence[str], requests: Sequence[Request]):
    """Raises WrongRequest for two folders of one name, and for two runs with the same settings."""
    names = [Path(out_dir).name for out_dir in out_dirs]
    if len(set(names)) != len(names):
        raise WrongRequest(f"--out_dir gives two runs one name: {' '.join(out_dirs)}")
    for i, request in enumerate(requests):
        if request in requests[:i]:
            twins = f"{out_dirs[requests.index(request)]} {out_dirs[i]}"
            remedy = "(options are for all runs): leave one out"
            raise WrongRequest(f"--out_dir {twins} are two runs with the same settings {remedy}")


def refuse_unknown_names(request: Request, arms: Mapping[str, Arm]):
    """Raises WrongRequest for what the command line refuses by itself."""
    for name, known in (("arm", offered(arms)), ("testbed", TESTBEDS), ("activation", ACTIVATION_NAMES)):
        said = getattr(request, name)
        if said not in known:
            raise WrongRequest(f"--{name}: {refused_choice(said, known)}")


def refuse_evaluations(named: tuple[str, ...], given: set[str], request: Request):
    """Raises WrongRequest for --evals without a name, and for evaluations of what cannot be exported."""
    if "evals" in given and not named:
        raise WrongRequest(f"--evals: give at least one ({', '.join(evals.names())}), or none")
    if request.skip and named != ("none",):
        why = "cannot be held by the SAELens format that the evaluations read"
        raise WrongRequest(f"--skip {request.skip} {why}: give --evals none to train without them")


def lacking_names(
    out_dirs: Sequence[str], given: set[str], plan: Mapping[str, dict], arms: Iterable[str]
) -> dict[str, tuple[str, str]]:
    """What is missing to know which runs are asked for, as in `checks.missing`."""
    unplanned = [out_dir for out_dir in out_dirs if Path(out_dir).name not in plan]
    if not out_dirs or "" in out_dirs:
        what = f"name a run of the plan ({', '.join(plan)}), or another folder and --arm"
        return {"out_dir": ("mine/it" if "arm" in given else "mine/run_1", what)}
    if unplanned and "arm" not in given:
        what = f"not in the plan ({', '.join(plan)}); give its --arm ({', '.join(arms)})"
        return {"arm": ("vanilla", f"{' '.join(unplanned)} is {what}")}
    return {}


def of_the_plan(out_dir: str, planned: Mapping[str, Any], given: set[str], request: Request) -> str:
    """What the plan says of a run, and what is given in its place: all of it, or WrongRequest is raised."""
    says = f"{out_dir}: run {Path(out_dir).name.removeprefix('run_')} of the plan: {as_options(planned)}"
    changed = as_options({k: now for k, v in planned.items() if (now := getattr(request, k)) != v})
    rest = [f"--{k}" for k in planned if k not in given]
    if changed and rest:
        remedy = f"name another folder and its --arm, or give {' '.join(rest)} too"
        raise WrongRequest(f"--out_dir {says}, which {changed} contradicts: {remedy}")
    return f"{says}; in its place {changed}" if changed else says


def without_effect(command: Command, given: Iterable[str], requests: Sequence[Request]) -> str:
    """Which of the options given do nothing in which runs."""
    out = []
    for out_dir, request in zip(command.out_dir, requests):
        idle = {"arm": idle_in_arm(command, request), "activation": list[str]()}
        for f in fields(request):
            if f.name in given and not request.matters(f):
                by = "activation" if request.activation not in bounds_of(f).activations else "arm"
                idle[by].append(f"--{f.name}")
        runs = {by: f"in {out_dir} ({by} {getattr(request, by)})" for by in idle}
        out += [f"{' '.join(options)} {runs[by]}" for by, options in idle.items() if options]
    return ", ".join(out)


def idle_in_arm(command: Command, request: Request) -> list[str]:
    """Options of the command that do nothing in a run, as its arm trains no SAE or has none."""
    idle = ["--activations"] if command.activations and request.arm in request.untrained else []
    rows = evals.rows_of(command.evals) if command.evals else []
    return idle + [f"--evals {row.name}" for row in rows if not row.fits(request)]


def one_pass(
    out_dirs: Sequence[str], runs: Sequence[Settings], names: Sequence[str] = ONE_PASS
) -> SimpleNamespace:
    """The settings that all runs share, and no others. Raises WrongRequest where they differ."""
    for name in names if runs else ():
        values = [getattr(run, name) for run in runs]
        if any(value != values[0] for value in values):
            each = ", ".join(f"{out_dir} {value}" for out_dir, value in zip(out_dirs, values))
            remedy = "give it one value, or train these runs by commands of their own"
            raise WrongRequest(f"--{name} differs between runs on one pass of the LM ({each}): {remedy}")
    return SimpleNamespace(**{name: getattr(run, name) for run in runs[:1] for name in names})


def shared_by_a_pass(request: Settings, names: Sequence[str] = ONE_PASS) -> tuple:
    """What a run shares with all others on its pass of the LM."""
    return tuple(getattr(request, name) for name in names)


def passes(command: Command, requests: Sequence[R]) -> list[tuple[Command, list[R]]]:
    """The runs of a command by pass of the LM, each part a command of its own. A complete run, which is to be
    evaluated, joins the first pass on its LM, text and questions."""
    of_data = (*(f.name for f in fields(DataConfig)), "context_size")
    trained, parts = to_train(command, requests)[0], dict[tuple, list[int]]()
    complete = [out_dir not in trained for out_dir in command.out_dir]
    for i in sorted(range(len(requests)), key=complete.__getitem__):
        data, whole = shared_by_a_pass(requests[i], of_data), shared_by_a_pass(requests[i])
        same_data = (key for key in parts if key[0] == data)
        key = next(same_data, (data, None)) if complete[i] else (data, whole)
        parts.setdefault(key, []).append(i)
    return [
        (replace(command, out_dir=tuple(command.out_dir[i] for i in part)), [requests[i] for i in part])
        for part in map(sorted, sorted(parts.values(), key=min))
    ]


def check(command: Command, requests: Sequence[Request]):
    """Refuse what can be known to be wrong before anything heavy is imported. Raises WrongRequest."""
    from sae_separation import checks, kept

    tracking.check(command.track)
    kept.refuse_place(command.activations, command.out_dir)
    if command.activations is None and command.activations_dtype != Command.activations_dtype:
        raise WrongRequest("--activations_dtype is about --activations: give that, too")
    if command.split_lm:
        checks.check_split_lm()
    if command.shard_features:
        for request in requests:
            checks.check_shards(request)
    for _, some in passes(command, requests):
        checks.check(some[0], evals.rows_of(command.evals))


def to_train(command: Command, requests: Sequence[R]) -> tuple[list[str], list[R]]:
    """The run folders that are not complete, or are to be overwritten, and what is asked for them."""
    left = [
        (out_dir, request)
        for out_dir, request in zip(command.out_dir, requests)
        if command.overwrite or not is_complete(Path(out_dir))
    ]
    return [out_dir for out_dir, _ in left], [request for _, request in left]
