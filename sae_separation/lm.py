"""The LM: its layers, its precision, its residual stream, stopped and resumed at a layer."""

import contextlib
import gc
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import beartype  # noqa: F401  (before nnsight: it gives `object` a method that beartype's import trips over)
import nnsight
import torch
from torch import Tensor
from transformers import DynamicCache

from sae_separation import process
from sae_separation.errors import RunFailed, WrongRequest
from sae_separation.exam import Batch, Residuals, logits_at
from sae_separation.losses import has_bf16
from sae_separation.questions import Question
from sae_separation.text import Text, one_line


@dataclass
class Testbed:
    """Everything an experiment needs to know about the world outside the SAE.

    `hook_name` is the LM's own module name; its output, after `layer` (counted from 0), is resid_post of
    width `d_in`. `questions` maps a subject to its questions, `forget_subject` is one of its keys, all others
    are retain subjects. `scoring` is "letter" (SAEBench's) or "cloze"; `prompt_format` is SAEBench's name of
    a chat format, or None. `clamp_scale` is "feature" when SAEBench's multipliers count in units of a
    feature's own mean active value, or "absolute" when they are activation units as in SAEBench; `sweep`
    changes the sweep's settings, and core is measured on `n_held_out` contexts of each domain, and
    methods without an SAE are fitted on `n_fitted`. `exam_lm`, if
    there is one, is asked the questions in place of `lm`; `shared_stems` and `mixed_lengths` say how its rows
    can be laid out (Exam), and in rows of at most `alone_up_to` tokens the last layer can be run where it is
    read alone (SplitLM.logits_of). `defaults` are config fields that depend on the LM, `published` core
    metrics of others to print beside ours; `describe` goes into config.json and `notes` into warnings.json.
    `general` are held-out samples of what a taught LM was, if it is one.
    `oracle` is the folder of an LM that is like `lm` but never read what is to be forgotten, if there is one.
    With `load_weights`, `lm` is a structure without weights until that is called; it will run on `device`.
    """

    name: str
    lm: Any  # a transformers.PreTrainedModel; torch names none of its attributes
    tokenizer: Any
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
    exam_lm: Any | None = None
    shared_stems: bool = False
    mixed_lengths: bool = True
    alone_up_to: float = 0
    n_held_out: int = 128
    n_fitted: int = 512
    published: dict = field(default_factory=dict)
    general: list[str] = field(default_factory=list)
    oracle: Path | None = None
    notes: list[str] = field(default_factory=list)
    load_weights: Callable[[], None] | None = None
    runs_on: str = "cpu"

    @property
    def device(self) -> torch.device:
        if self.load_weights is None:
            return self.lm.device
        return torch.device("cuda" if self.runs_on == SPLIT else self.runs_on)

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


def decoder_layers(lm: Any) -> torch.nn.ModuleList:
    """The LM's stack of decoder layers: the longest ModuleList whose length is its config's
    num_hidden_layers.

    Raises WrongRequest for a model without one.
    """
    for module in lm.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == lm.config.num_hidden_layers:
            return module
    raise WrongRequest(
        f"--lm: {type(lm).__name__} has no stack of {lm.config.num_hidden_layers} decoder layers: give a"
        " decoder-only LM"
    )


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


def load_tokenizer(folder: Path, document_end: str = ""):
    """Raises WrongRequest for a folder without one, and for a tokenizer that has neither EOS nor BOS."""
    from transformers import AutoTokenizer

    try:
        with without_bars():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise WrongRequest(
            f"--lm {folder}: its tokenizer cannot be loaded ({one_line(error)}); save one beside the LM"
        ) from error
    if document_end:
        tokenizer.bos_token = tokenizer.eos_token = document_end
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.bos_token
    if tokenizer.eos_token_id is None:
        raise WrongRequest(
            f"--lm {folder}: its tokenizer names neither an EOS nor a BOS token to part documents with; set"
            " one and save it anew"
        )
    return tokenizer


LARGE = 3e9  # bytes of weights that are not spread out to float32
SPLIT = "auto"  # the device of an LM whose layers are placed over all GPUs (transformers' device_map)


def dtype_of(folder: Path) -> torch.dtype:
    """The precision in which the LM in a folder is loaded."""
    large = sum(f.stat().st_size for f in folder.glob("*.safetensors")) > LARGE
    return torch.bfloat16 if large else torch.float32


@contextlib.contextmanager
def loading(folder: Path):
    """Inside, transformers is quiet (it imports most of itself there), and what it raises for files that are
    no LM becomes a WrongRequest."""
    try:
        with without_bars(), process.without_collections():
            yield
    except Exception as error:  # whatever transformers, safetensors and json raise
        if isinstance(error, MemoryError | RunFailed | WrongRequest):
            raise
        raise WrongRequest(
            f"--lm {folder} cannot be loaded ({one_line(error)}); save it anew with transformers"
        ) from error


def structure_of(folder: Path) -> Any:
    """The LM in a folder without its weights (on torch's device meta). Raises WrongRequest."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with loading(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, dtype=dtype_of(folder), trust_remote_code=False)


def load_lm(folder: Path, device: str) -> Any:
    """The LM in `folder`, frozen; in float32, or in bfloat16 when its files are LARGE. Of a SPLIT one
    accelerate moves what goes from layer to layer; its `device` is that of its first layers, which takes its
    input and gives its logits.

    Raises WrongRequest for files that are no whole LM, and for one that the GPUs together cannot hold.
    """
    from transformers import AutoModelForCausalLM

    dtype = dtype_of(folder)
    with loading(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            device_map=device if device == SPLIT else None,
        )
    lm, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise WrongRequest(
            f"--lm {folder} lacks {len(missing)} weights, first {missing[0]}: save it anew, whole"
        )
    if dtype == torch.bfloat16:  # probabilities need more than bfloat16 has

        def to_float(module, args, output):
            output.logits = output.logits.float()

        lm.register_forward_hook(to_float)
    lm.eval().requires_grad_(False)
    if device != SPLIT:
        return lm.to(device)
    if any(p.is_meta for p in lm.parameters()):  # in the CPU's memory, or on the disk
        raise WrongRequest(f"--split_lm: the GPUs together cannot hold --lm {folder}: give it more of them")
    return lm


def device_of(lm: Any) -> str:
    """Where load_lm is to place another LM so that it lies as this one."""
    return SPLIT if hasattr(lm, "hf_device_map") else str(lm.device)


def bfloat16_twins(testbed: Testbed) -> list[tuple[torch.nn.Parameter, Tensor]]:
    """The fp32 parameters that the LM needs up to the hook, each with a copy in bfloat16; buffers (rotary
    frequencies) stay as they are."""
    head = testbed.lm.get_output_embeddings()
    unused = {
        id(p)
        for module in (*testbed.layers[testbed.layer + 1 :], *([head] if head else []))
        for p in module.parameters()
    }
    unused -= {
        id(p) for p in testbed.lm.get_input_embeddings().parameters()
    }  # of which the head may be a view
    return [
        (p, p.detach().to(torch.bfloat16))
        for p in testbed.lm.parameters()
        if id(p) not in unused and p.dtype == torch.float32
    ]


def fast_lm_tokens(testbed: Testbed) -> int:
    """Tokens of an LM batch. On a CPU a layer's widest activations are 16 MB (fp32): larger batches are no
    faster (in exams of SmolLM2-135M a tenth slower, and more of them is padding), and take more memory."""
    config = testbed.lm.config
    return (
        16_384
        if testbed.device.type == "cuda"
        else 2**22 // (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    )


@contextlib.contextmanager
def parameters_as(twins: list[tuple[torch.nn.Parameter, Tensor]]):
    """Inside, each parameter holds its twin's values: no autocast, which would cast every weight and keep an
    fp32 residual stream."""
    before = [p.data for p, _ in twins]
    try:
        for p, twin in twins:
            p.data = twin
        yield
    finally:
        for (p, _), old in zip(twins, before):
            p.data = old


def massive(resid: Tensor, among: Tensor | None = None, earlier: Tensor | None = None) -> Tensor:
    """Which of the rows `among` [...] (bool; None: all) of resid [..., D] have over 10 times their median
    norm, for which the norms of `earlier` rows [n] of the same text count, too. Some LMs keep attention sinks
    in a few tokens at the start of a text (Sun et al., Massive Activations, arXiv 2402.17762): they hold most
    of the squared norm and nothing of what the text says, so no SAE is trained or measured on them."""
    norm = resid.norm(dim=-1)
    if among is None:
        return norm > 10 * norm.median()
    norms = norm[among] if earlier is None else torch.cat([earlier, norm[among]])
    return among & (norm > 10 * norms.median())


def hidden_of(put_out) -> Tensor:
    """The hidden state [row, pos, D] in what a decoder layer puts out: that, or a tuple or list around it."""
    return put_out[0] if isinstance(put_out, tuple | list) else put_out


class Reached(Exception):
    """A pass is where it was to stop."""


class LastKeys(DynamicCache):
    """Keys and values of the last layer, in place of a cache: the first pass stops when it has them, and the
    next one attends to them. Of the layers before nothing is kept."""

    def __init__(self, last: int):
        super().__init__()
        self.last, self.kept = last, None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        if layer_idx < self.last:
            return key_states, value_states
        if self.kept is None:
            self.kept = key_states, value_states
            raise Reached
        return self.kept


class SplitLM:
    """A frozen LM, split behind its hook layer: `resid` runs the lower part, and `resumed_from` the upper
    one.

    This is the one place where an LM is stopped, in training and in evaluation alike, and the one where its
    layers are replaced.
    """

    def __init__(self, testbed: Testbed):
        self.lm, self.layers, self.layer = testbed.lm, testbed.layers, testbed.layer
        self.alone_up_to = testbed.alone_up_to
        self.hook_name = testbed.hook_name
        self.traced: Any = nnsight.NNsight(testbed.lm)
        self.hook_point: Any = self.traced.get(self.hook_name)

    def resid(self, tokens: Tensor, **seen) -> Tensor:
        """resid_post [row, pos, D] of the hook layer, in the precision that the LM runs in, on the device
        that takes its input; the LM is stopped there. `seen` is what it is given beside the tokens
        (Batch.seen)."""
        return hidden_of(self._put_out(tokens, **seen)).to(self.lm.device)

    def _put_out(self, tokens: Tensor, **seen):
        """What the hook layer puts out: a hidden state, or a tuple or list that begins with it."""
        with process.signals.held():  # nnsight is not to be left in the middle of a trace
            put_out = self._trace(tokens, **seen)
        # A trace leaves its frames, and they the LM's activations, in cycles: 500 MB, were Python to decide.
        # Evaluation stops an LM some 40 times, 1 s of collections in all: nnsight can be the one way.
        gc.collect()
        return put_out

    @torch.no_grad()
    def _trace(self, tokens: Tensor, **seen):
        with self.traced.trace(tokens, use_cache=False, **seen) as tracer:
            put_out = self.hook_point.output.save()
            tracer.stop()
        return put_out

    @contextlib.contextmanager
    def resumed_from(self, resid: Tensor, at: int | None = None):
        """Inside, the layers below layer `at` (None: the hook layer) pass their input on, and that one puts
        out `resid`."""
        as_put_out = self.as_put_out
        as_lm = as_put_out(resid.to(self.lm.dtype))

        def pass_on(hidden_states, *args, **kwargs):
            return as_put_out(hidden_states)

        def put_in(hidden_states, *args, **kwargs):
            return as_lm

        *lower, hook = self.layers[: (self.layer if at is None else at) + 1]
        before = [vars(layer).get("forward") for layer in (*lower, hook)]  # nnsight puts its own there
        for layer in lower:
            layer.forward = pass_on
        hook.forward = put_in
        try:
            yield
        finally:
            for layer, forward in zip((*lower, hook), before):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def logits_of(self, batch: Batch, changed: contextlib.AbstractContextManager | None = None) -> Tensor:
        """Logits [row, n, vocab] where a batch is read, and no other is unembedded; within `changed`, what
        lies below the last layer. Where the LM allows it, that one makes keys and values of all tokens, and
        the rest only of those that are read."""
        read, n = batch.positions, batch.tokens.shape[1]
        whole = read is None or 2 * read.shape[1] > n or n > self.alone_up_to
        with changed or contextlib.nullcontext():
            if whole or self.layer + 1 == len(self.layers):
                return logits_at(self.lm, batch.tokens, read, **batch.seen(self.lm))
            into, keys = self.to_the_last(batch)
        return self.read_alone(batch, into, keys)

    def to_the_last(self, batch: Batch) -> tuple[Tensor, LastKeys]:
        """What goes into the last layer [row, pos, D], and its keys and values."""
        keys, into = LastKeys(len(self.layers) - 1), []

        def keep(module, args, kwargs):
            into.append(args[0] if args else kwargs["hidden_states"])

        handle = self.layers[-1].register_forward_pre_hook(keep, with_kwargs=True)
        seen = batch.seen(self.lm)
        try:
            self.lm(batch.tokens, use_cache=False, **seen | {self.cache_is: keys})
        except Reached:
            return into[0], keys
        finally:
            handle.remove()
        raise NotImplementedError(f"{type(self.lm).__name__} keeps no keys in a cache")

    def read_alone(self, batch: Batch, into: Tensor, keys: LastKeys) -> Tensor:
        """`logits_of` by the last layer's input and keys."""
        at = batch.positions
        assert at is not None
        rows, after = torch.arange(len(at), device=at.device)[:, None], torch.arange(batch.tokens.shape[1])
        places, mask = at, torch.zeros(len(at), 1, *at.shape[1:], len(after), device=at.device)
        if batch.places is not None and batch.mask is not None:
            places, mask = batch.places[rows, at], batch.mask[rows, 0, at][:, None]
        else:
            mask.masked_fill_((after.to(at.device) > at[..., None])[:, None], torch.finfo(torch.float32).min)
        seen = {"position_ids": places, "attention_mask": mask.to(self.lm.dtype), self.cache_is: keys}
        read = into.to(at.device)[rows, at]
        with self.resumed_from(read, len(self.layers) - 2):
            return self.lm(batch.tokens[rows, at], use_cache=False, **seen).logits

    @cached_property
    def cache_is(self) -> str:
        """The name by which the LM takes a cache: later versions of transformers have another."""
        taken = inspect.signature(type(self.lm).forward).parameters
        return "cache" if "cache" in taken else "past_key_values"

    @cached_property
    def as_put_out(self) -> Callable:
        """Gives a hidden state the form in which the layers put it out: by itself, or before None in a tuple
        or list."""
        put_out = self._put_out(torch.zeros(1, 1, dtype=torch.long, device=self.lm.device))
        form, beside = type(put_out), [None] * (len(put_out) - 1)

        def itself(hidden: Tensor):
            return hidden

        def first_of_several(hidden: Tensor):
            return form([hidden, *beside])

        return itself if isinstance(put_out, Tensor) else first_of_several


class StreamLM:
    """The LM that the stream runs up to the hook, in bfloat16 where the machine has it. Its weights, where
    they are not there yet, are loaded for the first tokens."""

    def __init__(self, testbed: Testbed):
        self.testbed = testbed

    @cached_property
    def split(self) -> SplitLM:
        if self.testbed.load_weights:
            self.testbed.load_weights()
        return SplitLM(self.testbed)

    @cached_property
    def low_precision(self) -> list[tuple[torch.nn.Parameter, Tensor]]:
        return bfloat16_twins(self.testbed) if has_bf16(self.split.lm.device) else []

    @torch.no_grad()
    def resid(self, tokens: Tensor) -> Tensor:
        """resid_post [row, pos, D] of the hook layer, in the precision that the LM runs in."""
        with parameters_as(self.low_precision):
            return self.split.resid(tokens)


@dataclass
class Asked:
    """What an LM gave for a batch: the residual stream at its hook layer; what was read of it without an
    intervention [row, ...]; and, of the rows that interventions changed, by row and digest of the changed
    stream."""

    residuals: Residuals
    plain: Tensor
    answers: dict[tuple[int, bytes], Tensor] = field(default_factory=dict)


LEAST_IN_BF16 = 10_000_000  # parameters; smaller LMs are no faster in it


def runs_in_bf16(lm: Any) -> bool:
    """Whether an LM is asked in bfloat16, with weights in fp32: where it is not small and the machine can."""
    large = lm.dtype == torch.float32 and sum(p.numel() for p in lm.parameters()) >= LEAST_IN_BF16
    return large and has_bf16(lm.device)


@contextlib.contextmanager
def low_precision(lm: Any):
    """Inside, an LM's matmuls are in bfloat16 if it `runs_in_bf16`. The residual stream stays in fp32, and
    with it what interventions read and write; so does the unembedding: in bfloat16 logits of 20 are 0.125
    apart."""
    if not runs_in_bf16(lm):
        yield
        return
    head, kind = lm.get_output_embeddings(), lm.device.type
    before, unembed = vars(head).get("forward"), head.forward

    def in_fp32(hidden: Tensor) -> Tensor:
        with torch.autocast(kind, enabled=False):
            return unembed(hidden.float())

    head.forward = in_fp32
    try:
        with torch.autocast(kind, torch.bfloat16):
            yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before


class InterventionLM(SplitLM):
    """What SAEBench's sweep needs of an LM (`cfg`, `add_hook`, `reset_hooks`), on any decoder-only LM.

    Interventions act on resid_post of the hook layer. The layers up to it do not depend on them: they run
    once a batch, and only the layers above run again, on the rows that an intervention changed, once for
    every change. What was given is kept as long as the batch lives; an answer may differ from that in another
    batch by rounding.
    """

    def __init__(self, testbed: Testbed):
        super().__init__(testbed)
        self.cfg = SimpleNamespace(model_name=testbed.name, device=testbed.lm.device)
        self.hook: Callable | None = None
        self.asked: WeakKeyDictionary[Batch, Asked] = WeakKeyDictionary()

    def add_hook(self, name: str, hook: Callable):
        """hook(resid [row, pos, D], hook=Residuals) gives the changed stream, or None where it changes
        nothing."""
        self.hook = hook

    def reset_hooks(self):
        self.hook = None

    def forget_answers(self):
        """Let go of the answers under interventions: those of another SAE will not come again."""
        for asked in self.asked.values():
            asked.answers.clear()

    def resid(self, tokens: Tensor, **seen) -> Tensor:
        """resid_post [row, pos, D] (fp32) of the hook layer, the LM stopped there."""
        return super().resid(tokens, **seen).float()

    def residuals(self, batch: Batch) -> Residuals:
        """The batch's own, else from the LM: massive ones are then not touched."""
        if batch.residuals is not None:
            return batch.residuals
        seen = batch.seen(self.lm)
        with low_precision(self.lm):
            resid = self.resid(batch.tokens, **seen)
        return Residuals(resid, batch.trained & ~massive(resid, batch.trained), batch.tokens, seen)

    def _read(self, batch: Batch, read: Callable) -> Tensor:
        with low_precision(self.lm):
            logits = self.logits_of(batch)
        return read(batch, logits)

    def _resumed(self, batch: Batch, resid: Tensor, read: Callable) -> Tensor:
        with self.resumed_from(resid):
            return self._read(batch, read)

    @torch.no_grad()
    def ask(self, batch: Batch, read: Callable) -> Tensor:
        """read(batch, logits [row, n, vocab]) [row, ...], under the hook if there is one; one batch is always
        read in one way."""
        if self.hook is None:
            return self._read(batch, read)
        if batch not in self.asked:
            residuals = self.residuals(batch)
            self.asked[batch] = Asked(residuals, self._resumed(batch, residuals.resid, read))
        asked = self.asked[batch]
        before = asked.residuals.resid
        resid = self.hook(before, hook=asked.residuals)  # SAEBench's hooks do not look at their `hook`
        if resid is None:
            return asked.plain.clone()
        touched = (resid != before).flatten(1).any(1).nonzero()[:, 0].tolist()
        keys = {
            row: (row, hashlib.blake2b(resid[row].cpu().numpy(), digest_size=16).digest()) for row in touched
        }
        new = [row for row, key in keys.items() if key not in asked.answers]
        if new:
            answers = self._resumed(batch.take(new), resid[new], read)
            asked.answers.update(zip([keys[row] for row in new], answers))
        out = asked.plain.clone()
        if touched:
            out[touched] = torch.stack([asked.answers[keys[row]] for row in touched])
        return out

    def ce(self, batch: Batch) -> Tensor:
        """Mean next-token cross-entropy [context] (nats) of whole contexts, under the hook if there is
        one."""

        def read(batch: Batch, logits: Tensor) -> Tensor:
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none"
            )
            return losses.view(len(logits), -1).mean(1)

        return self.ask(batch, read)
