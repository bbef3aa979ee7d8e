"""Testbeds: which LM, which text, which questions.

    testbed = load("micro")          # or "auto", or a specs.DataConfig
    testbed.lm, testbed.tokenizer, testbed.hook_name, testbed.d_in
    testbed.forget.train, testbed.forget.held_out, testbed.questions["biology"]

A testbed is one object, so that the LM, the layer, the text and the questions of an experiment cannot come
apart.
"""

import gc
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
from torch import Tensor

from sae_separation import checks
from sae_separation.checks import ADAPTER, first_can_be_had
from sae_separation.config import Config, Request, complete
from sae_separation.errors import RunFailed, WrongRequest
from sae_separation.exam import Batch, Exam, logits_at, most_positions, pad_alone
from sae_separation.files import gigabytes
from sae_separation.lm import (
    SPLIT,
    SplitLM,
    Testbed,
    load_lm,
    load_tokenizer,
    low_precision,
    structure_of,
    without_bars,
)
from sae_separation.progress import set_up
from sae_separation.questions import Question, check_subjects, read_questions
from sae_separation.specs import (
    AUTO,
    CUSTOM,
    SPECS,
    DataConfig,
    Spec,
    defaults_of,
    lm_path,
    spec_of,
    start_of_paths,
)
from sae_separation.text import (
    LONGEST,
    Text,
    cache_folder,
    check_amount,
    check_overlap,
    one_line,
    read_local,
    read_text,
    split_text,
)

C = TypeVar("C", bound=Config)


def load(
    wanted: DataConfig | str = "auto",
    tokens: int | None = None,
    least_tokens: int = 1,
    examined: bool = True,
    split_lm: bool = False,
    weights: bool = True,
) -> Testbed:
    """The testbed that is wanted: text and questions first, for they are wrong more often, then the LM.

    `tokens` to train on (None: the testbed's default) say how much text is read from the hub; text of fewer
    tokens than `least_tokens`, or than a context, is refused; `examined` says whether questions will be
    asked; with `split_lm` the LM's layers are placed over all GPUs; without `weights` the LM's are left to
    `load_weights`. Raises WrongRequest and RunFailed.
    """
    wanted = DataConfig(testbed=wanted) if isinstance(wanted, str) else wanted
    name = wanted.name if wanted.name != "auto" else AUTO[0 if first_can_be_had() else 1]
    row = SPECS[name]
    spec = spec_of(wanted, row)
    device = device_for(spec, split_lm)
    set_up.begin("reading the questions")
    world = World.of(lm_path(row, spec.lm)) if row.has_world else None
    if world and spec.questions == row.questions:
        questions, asked, notes = world.questions, [{"source": f"world {world.seed}"}], []
    else:
        start = start_of_paths(row, "questions", spec.questions)
        questions, asked, notes = read_questions(spec.questions, start)
    if questions:
        check_subjects(questions, spec.forget_subject)
    texts, described = {}, dict[str, Any](questions=asked)
    for option in ("forget_text", "retain_text"):
        set_up.begin(f"reading the {option.replace('_', ' ')}")
        if world and getattr(spec, option) == getattr(row, option):
            texts[option], described[option] = world.text(option, spec.forget_entities)
        else:  # 8 characters a token, and half of the tokens are of each domain
            sources, n_characters = getattr(spec, option), 4 * (tokens or spec.defaults["tokens"])
            start = start_of_paths(row, option, sources)
            documents, described[option], left_out = read_text(
                option, sources, max(16_000_000, n_characters), start
            )
            texts[option], notes = documents, notes + left_out
    if all(isinstance(t, list) for t in texts.values()):
        notes = notes + check_overlap(*texts.values())
    texts = {option: split_text(t) if isinstance(t, list) else t for option, t in texts.items()}
    read_local.cache_clear()
    set_up.begin("loading the LM")
    folder, described["lm"] = lm_folder(name, spec.lm)
    oracle = oracle_in(folder, {} if row.taught else described)  # of adapters `lm` tells
    assert spec.layer is not None, "checks.missing refuses that"
    checks.check_layer(spec.layer, checks.check_lm_folder(folder))
    tokenizer = load_tokenizer(folder, spec.document_end)
    for option, text in texts.items():
        check_amount(option, text, tokenizer, max(least_tokens, spec.defaults["context_size"]))
    if examined:
        check_questions(spec, questions, tokenizer, json.loads((folder / "config.json").read_text()))
    testbed = Testbed(
        name=name,
        lm=None,
        tokenizer=tokenizer,
        layer=spec.layer,
        forget=texts["forget_text"],
        retain=texts["retain_text"],
        questions=questions,
        forget_subject=spec.forget_subject,
        scoring=spec.scoring,
        prompt_format=spec.prompt_format,
        clamp_scale=spec.clamp_scale,
        defaults=defaults_of(spec),
        describe={"lm": spec.lm, "sources": described} | ({"world_seed": world.seed} if world else {}),
        sweep=spec.sweep,
        n_held_out=spec.n_held_out,
        n_fitted=spec.n_fitted,
        published=spec.published,
        general=world.general[:HELD_OUT] if world else [],
        oracle=oracle,
        notes=notes,
        runs_on=device,
    )
    give_lm(testbed, folder, weights)
    if spec.exam_lm and examined:
        exam_folder, described["exam_lm"] = lm_folder(name, spec.exam_lm)
        testbed.exam_lm = load_lm(exam_folder, device)
    if examined and questions:
        lay_out(testbed)
    return testbed


def device_for(spec: Spec, split_lm: bool) -> str:
    """Where a testbed's LM is placed, as load_lm takes it."""
    return SPLIT if split_lm else "cuda" if torch.cuda.is_available() and spec.gpu else "cpu"


def give_lm(testbed: Testbed, folder: Path, weights: bool):
    """Load a testbed's LM, and check it; without `weights` its structure alone, until `load_weights` is
    called. Raises WrongRequest."""

    def load_weights():
        testbed.lm, testbed.load_weights = load_lm(folder, testbed.runs_on), None
        gc.freeze()  # checks stop the LM, which is followed by a collection: not of all that was imported
        set_up.begin("checking the LM")
        check_ids(testbed)
        check_lm(testbed)

    if weights:
        load_weights()
    else:
        testbed.lm, testbed.load_weights = structure_of(folder), load_weights


def of_request(request: Request, asks: bool, split_lm: bool, weights: bool) -> Testbed:
    """The LM and the text of a request, and the questions where an evaluation asks some; without `weights`
    the LM's are not loaded before they are needed. Raises WrongRequest."""
    least = max(request.batch_size, request.context_size or 0)
    testbed = load(request, request.tokens, least, asks, split_lm, weights)
    if request.testbed == "auto" and testbed.name != CUSTOM:
        print(f"testbed: auto means {testbed.name}")
    return testbed


def resolve(request: Request, kind: type[C], testbed: Testbed) -> C:
    """Every setting of a run, as a Config of this kind; what is left open takes the testbed's default. Raises
    WrongRequest."""
    config = complete(request, kind, testbed.name, testbed.defaults, testbed.d_in)
    longest = most_positions(testbed.lm.config.to_dict())
    if config.context_size > longest:
        more = f"is more than the {longest} positions of the LM"
        raise WrongRequest(f"--context_size {config.context_size} {more}")
    return config


def lm_folder(name: str, lm: str) -> tuple[Path, dict]:
    """The folder that holds an LM's files, in the cache if it comes from the hub or a package; and the record
    for config.json."""
    row = SPECS[name]
    if row.lm_is == "packaged":
        return unpacked_lm(name, row.lm)
    path = lm_path(row, lm)
    if row.taught:
        return taught_lm(name, row.taught, path)
    if path.is_dir():
        return path, {"source": lm, "sha256": sha256_of_weights(path)}
    from sae_separation import hub

    revision = hub.revision(lm)
    kept = checks.lm_snapshot(lm, revision)
    try:
        with hub.plain_errors(lm):
            from huggingface_hub import HfApi

            files = [f for f in HfApi().list_repo_files(lm, revision=revision) if LM_FILES.fullmatch(f)]
    except RunFailed:
        files = [p.name for p in kept.iterdir()] if kept else []
        if not files:
            raise
    if not any(f.endswith(".safetensors") for f in files):
        raise WrongRequest(
            f"--lm {lm} holds no .safetensors: pickled weights are not loaded; give an LM that has them"
        )
    files.sort(key=lambda f: f.endswith(".safetensors"))  # the small ones first: they can be wrong
    return hub.fetch(lm, files, revision, "model")[0].parent, {"source": lm, "revision": revision}


ORACLE = "oracle"  # the folder of an LM's oracle, in the LM's own


LM_FILES = re.compile(
    r"[\w.-]+\.json|model[\w.-]*\.safetensors|[\w.-]+\.model|merges\.txt|vocab\.txt"
)  # no pickle among them


def oracle_in(folder: Path, described: dict[str, Any]) -> Path | None:
    """The folder of an LM's oracle, if it has one, which is then described."""
    oracle = folder / ORACLE
    if not oracle.is_dir():
        return None
    described[ORACLE] = {"sha256": sha256_of_weights(oracle)}
    return oracle


def sha256_of_weights(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached(name: str, doing: str, make: Callable[[Path], None], places: Sequence[str] = (".",)) -> Path:
    """A folder of the cache with an LM in each of its `places`; where it is not there yet, of what `make`
    writes into the path it is given. Raises WrongRequest for one of which a file is missing or cut short."""
    folder = cache_folder() / name

    def lacks(whole: Path) -> list[str]:
        files = ("config.json", "tokenizer.json", "model.safetensors")
        return [str(Path(place) / f) for place in places for f in files if not is_whole(whole / place / f)]

    if folder.exists():
        if lost := lacks(folder):
            why = f"{lost[0]} is missing or cut short"
            raise WrongRequest(f"{folder} is not whole: {why}; remove the folder, and it is made anew")
        return folder
    print(f"{doing} once, into {folder}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside, without_bars():
        made = Path(beside) / "made"
        make(made)
        assert not lacks(made), f"{doing} has left out {lacks(made)}"
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.exists():  # else another process was first
                raise
    return folder


def is_whole(file: Path) -> bool:
    """Whether a file is there, and JSON or safetensors to its end."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def save_lm(lm: Any, tokenizer: Any, folder: Path):
    """Both, as transformers saves them; of several ranks any can, for each makes its own and the first to be
    done names it. (transformers' own choice is that ranks but the first leave the weights out.) Raises
    RunFailed where there is no room for them."""
    needed = sum(p.numel() * p.element_size() for p in lm.parameters())
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        why = f"the LM takes {gigabytes(needed)}, and {gigabytes(free)} are free in {cache_folder()}"
        raise RunFailed(f"{why}: free some, or name another folder for caches in XDG_CACHE_HOME")

    def on_every_rank(is_main_process: bool) -> bool:
        return True

    lm.should_save_on_this_rank = on_every_rank
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def unpacked_lm(testbed: str, package: str) -> tuple[Path, dict]:
    """The LM in a Python package as transformers saves it, dequantised once from the package's GGUF file."""
    from importlib.metadata import version

    file = checks.packaged_lm(testbed, package)

    def make(folder: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        lm: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        lm.hf_quantizer = None  # plain weights now, and saved as such
        if hasattr(lm.config, "quantization_config"):
            del lm.config.quantization_config
        save_lm(lm, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), folder)

    name = f"{testbed}-{version(package)}-{file.stat().st_size}"
    folder = cached(name, f"dequantising {file.name}", make)
    return folder, {"source": f"{package} {version(package)}", "file": file.name, "sha256": sha256(file)}


def adapted(base: str, adapter: Path) -> Any:
    """The packaged LM of the testbed `base`, an adapter's changes merged into its weights."""
    from peft import PeftModel

    lm = load_lm(unpacked_lm(base, SPECS[base].lm)[0], "cpu")
    merged: Any = PeftModel.from_pretrained(lm, adapter).merge_and_unload()
    return merged.eval().requires_grad_(False)


def taught_lm(testbed: str, base: str, adapter: Path) -> tuple[Path, dict]:
    """The LM that an adapter makes of a packaged one, and its oracle, as transformers saves them, merged once
    and kept in the cache; and the record for config.json."""
    made_of, record = unpacked_lm(base, SPECS[base].lm)
    files = [place + name for place in ("", f"{ORACLE}/") for name in ADAPTER]
    digests = {record["file"]: record["sha256"]} | {file: sha256(adapter / file) for file in files}
    record |= {"sha256": digests}

    def make(folder: Path):
        for place in (".", ORACLE):
            save_lm(adapted(base, adapter / place), load_tokenizer(made_of), folder / place)

    named = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:16]
    return cached(f"{testbed}-{named}", f"merging {adapter}", make, (".", ORACLE)), record


def check_ids(testbed: Testbed):
    """Raises WrongRequest for a tokenizer that can give a text ids of which the LM has no embedding.

    Nothing is padded: a pad token with no other role counts only where the text or a question spells it out.
    """
    tokenizer, n = testbed.tokenizer, testbed.lm.get_input_embeddings().num_embeddings
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= n}
    for pad in pad_alone(tokenizer) & beyond.keys():
        read = [part["text"] for t in (testbed.forget, testbed.retain) for part in (t.train, t.held_out)]
        asked = [" ".join(q.texts) for qs in testbed.questions.values() for q in qs]
        if not any(beyond[pad] in text for part in (*read, asked) for text in part):
            del beyond[pad]
    if beyond:
        most = max(beyond)
        why = f"its tokenizer gives ids up to {most} ({beyond[most]!r}), its weights have {n} rows"
        why += ": they belong to different LMs; save the right tokenizer beside the LM"
        raise WrongRequest(f"--lm {testbed.defaults['lm']}: {why}")


@torch.no_grad()
def check_lm(testbed: Testbed):
    """Raises WrongRequest for an LM that looks ahead, or whose layers cannot be resumed as SplitLM resumes
    them."""
    lm, split = testbed.lm, SplitLM(testbed)
    said, kind = f"--lm {testbed.defaults['lm']}", type(lm).__name__
    n = min(len(testbed.tokenizer), lm.get_input_embeddings().num_embeddings)
    tokens = torch.randint(0, n, (2, 8), generator=torch.Generator().manual_seed(0)).to(lm.device)
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % n
    every = torch.arange(7, device=lm.device).expand(2, -1)
    try:
        plain, ahead = logits_at(lm, tokens, every), logits_at(lm, other, every)
        with split.resumed_from(split.resid(tokens)):
            resumed = logits_at(lm, tokens, every)
        with low_precision(lm):
            logits_at(lm, tokens, every)
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        why = f"cannot be stopped and resumed at a layer ({one_line(error)})"
        raise WrongRequest(f"{said}: {kind} {why}; give another LM") from error

    def near(logits: Tensor) -> bool:
        return bool((logits - plain).float().abs().max() <= 0.02 * plain.float().std())

    if not torch.isfinite(plain).all():
        why = f"its logits are not finite; its weights are damaged, or too large for {lm.dtype}"
        raise WrongRequest(f"{said}: {why}")
    if not near(ahead):
        raise WrongRequest(f"{said}: {kind} looks ahead: it is not causal; give a decoder-only LM")
    if not near(resumed):
        why = f"gives other answers when it is resumed at layer {testbed.layer}"
        raise WrongRequest(f"{said}: {kind} {why}; give another LM")


WINDOWS = (  # as configs name how many tokens some of an LM's layers see
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "attention_window_size",
    "attention_chunk_size",
    "local_attention",
)


@torch.no_grad()
def lay_out(testbed: Testbed):
    """Find out how rows can be laid out for the LM that is asked (`shared_stems`, `mixed_lengths`), and how
    they can be read (`alone_up_to`), so that no answer depends on it.

    A shared row brings a mask and places of its own. The mask takes the place of a layer's window or chunk,
    so no row may be longer than one; for the rest, the longest question is asked in both ways. Padding behind
    a row is seen by none of its tokens, but some LMs (dynamic and long RoPE) place a token by the batch's
    length: the shortest row is run as it is and padded to the longest, or to a context where that is longer.
    There it is also read at two places by the last layer alone, which again brings a mask and places.
    """
    lm = testbed.exam_lm or testbed.lm
    questions = [q for some in testbed.questions.values() for q in some]
    same = 1e-4 if lm.dtype == torch.float32 else 0.1  # in probability; other batches round otherwise

    def exam_of(questions: list[Question], **how) -> Exam:
        how |= dict(prompt_format=testbed.prompt_format, device=lm.device)
        return Exam(testbed.tokenizer, questions, testbed.scoring, **how)

    def ask(questions: list[Question], shared_stems: bool) -> Tensor:
        exam = exam_of(questions, shared_stems=shared_stems)
        return exam.probs(lambda batch: logits_at(lm, batch.tokens, batch.positions, **batch.seen(lm)))

    batches = exam_of(questions, shared_stems=False, mixed_lengths=False).batches
    shortest = batches[0].take([0])
    most = min(max(testbed.context_size, batches[-1].tokens.shape[1]), most_positions(lm.config.to_dict()))
    padding = (0, int(most) - shortest.tokens.shape[1])
    padded = torch.nn.functional.pad(shortest.tokens, padding)
    one, other = (
        logits_at(lm, tokens, shortest.positions).softmax(-1) for tokens in (shortest.tokens, padded)
    )
    testbed.mixed_lengths = bool((one - other).abs().max() <= same)
    config = lm.config.get_text_config()
    window = min(getattr(config, name, None) or math.inf for name in WINDOWS)
    assert shortest.positions is not None
    is_so = padded.shape[1] <= window and reads_alone(testbed, lm, padded, shortest.positions, same)
    testbed.alone_up_to = window if is_so else 0
    last = exam_of(questions).batches[-1]
    if testbed.scoring == "cloze" and testbed.mixed_lengths and last.tokens.shape[1] <= window:
        longest = questions[(last.rows or [])[-1]]
        try:
            shared = ask([longest], True)
        except (TypeError, ValueError, RuntimeError):  # it takes no such mask
            return
        testbed.shared_stems = bool((shared - ask([longest], False)).abs().max() <= same)


def reads_alone(testbed: Testbed, lm, tokens: Tensor, positions: Tensor, same: float) -> bool:
    """Whether the last layer, run where a row is read alone, gives what the whole pass gives."""
    batch = Batch(tokens, tokens >= 0, torch.cat([positions // 2, positions], 1))
    split = SplitLM(replace(testbed, lm=lm, alone_up_to=math.inf))
    try:
        alone = split.logits_of(batch).softmax(-1)
    except Exception as error:  # whatever an LM raises that has no such cache, mask or places
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        return False
    return bool((alone - logits_at(lm, tokens, batch.positions).softmax(-1)).abs().max() <= same)


def check_questions(spec: Spec, by_subject: dict[str, list[Question]], tokenizer, config: dict):
    """Raises WrongRequest for letters of more than one token, for a choice or value that the tokenizer gives
    no token, and for a question longer than the LM's positions by its `config`."""
    most = most_positions(config)
    for subject, questions in by_subject.items():
        choices = [(q, choice) for q in questions for choice in (*q.choices, *q.values)]
        tokens = tokenizer([choice for _, choice in choices], add_special_tokens=False)["input_ids"]
        if [] in tokens:
            question, choice = choices[tokens.index([])]
            of = f"{question.question[:LONGEST]!r} ({subject})"
            why = f"the choice {choice[:LONGEST]!r} of {of} is no token of this LM's tokenizer"
            raise WrongRequest(f"--questions: {why}: rewrite it or take the question out")
        exam = Exam(tokenizer, questions, spec.scoring, prompt_format=spec.prompt_format)
        longest = max(batch.tokens.shape[1] for batch in exam.batches)
        if longest > most:
            why = (
                f"one about {subject} has {longest} tokens with its choices, and the LM has {most} positions"
            )
            raise WrongRequest(f"--questions: {why}: take it out")


def packed_contexts(
    dataset,
    tokenizer,
    context_size: int,
    seed: int,
    repeat=True,
    on_pass: Callable[[int], object] | None = None,
) -> Iterator[list[int]]:
    """Contexts of `context_size` tokens: BOS, then documents one after the other, each closed by EOS.

    Every pass over the data set has its own order; `on_pass` is called with the number of each. Without
    `repeat`, one pass, and a last partial context is dropped. Raises RunFailed when a whole pass of many
    yields no context.
    """
    return (c for c, _ in drawn_contexts(dataset, tokenizer, context_size, seed, repeat, on_pass))


def draw_of(document: str) -> float:
    """A number in [0, 1) of a document: the same wherever and whenever it is read."""
    return zlib.crc32(document.encode(errors="surrogatepass")) / 2**32


def drawn_contexts(
    dataset,
    tokenizer,
    context_size: int,
    seed: int,
    repeat=True,
    on_pass: Callable[[int], object] | None = None,
) -> Iterator[tuple[list[int], list[float]]]:
    """`packed_contexts`, each with `draw_of` the document that each token is of."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    bos = eos if bos is None else bos
    rest, draws, epoch, made = [], [], 0, 0
    while epoch == 0 or repeat:
        if on_pass is not None:
            on_pass(epoch + 1)
        for documents in dataset.shuffle(seed=seed + epoch).iter(batch_size=16):  # books: 200 MB of ids
            found = tokenizer(documents["text"], add_special_tokens=False)["input_ids"]
            for text, ids in zip(documents["text"], found):
                rest += ids + [eos] if ids else []
                draws += [draw_of(text)] * (len(ids) + 1) if ids else []
            size = context_size - 1
            for start in range(0, len(rest) - size + 1, size):
                made += 1
                yield [bos] + rest[start : start + size], [0.0] + draws[start : start + size]
            used = len(rest) // size * size
            rest, draws = rest[used:], draws[used:]
        epoch += 1
        if not made and repeat:
            raise RunFailed(f"the text holds {len(rest)} tokens, fewer than one context of {context_size}")


HELD_OUT = 64  # of a taught LM's own samples: no adapter learns from them


@dataclass
class World:
    """An embedded LM's invented world (see micro_pythia/): biology is to be forgotten, five subjects stay.

    Text is the LM's own kind of reading (prose, open questions, multiple-choice sheets with other option sets
    than the evaluated ones): 24,000 documents a domain to train on and 3,000 held out. Where an LM of general
    text was taught the world, a third as many, and with those that stay the `general` text that it read
    meanwhile: samples of the untaught LM, of which HELD_OUT are held out.
    """

    seed: int
    n_entities: int | None
    questions: dict[str, list[Question]]
    general: list[str]

    @classmethod
    def of(cls, folder: Path) -> "World":
        questions, *_ = read_questions((str(folder / "questions.json"),))
        report, samples = json.loads((folder / "report.json").read_text()), folder / "general.jsonl"
        lines = samples.read_text().splitlines() if samples.exists() else []
        general = [json.loads(line)["text"] for line in lines]
        return cls(report["world_seed"], report.get("n_entities"), questions, general)

    def text(self, option: str, forget_entities: int | None = None) -> tuple[Text, list[dict]]:
        """The forget text (about so many of its entities; None: all) or the retain text, and the record for
        config.json."""
        from micro_pythia import world

        told, subjects = world.World(self.seed, self.n_entities), world.RETAIN
        record, general = {"source": f"world {self.seed}"}, self.general
        if option == "forget_text":
            subjects, general = (world.FORGET,), []
            if forget_entities is not None:
                told, record = told.only(forget_entities), record | {"entities": forget_entities}
        if general:
            record |= {"samples": len(general)}
        n = 1_000 if self.general else 3_000
        documents = told.documents(9 * n, subjects, seed=1)
        parts = documents[: 8 * n] + general[HELD_OUT:], documents[8 * n :] + general[:HELD_OUT]
        text = Text(*(datasets.Dataset.from_dict({"text": part}) for part in parts))
        return text, [record]
