"""The LM: its layers, its precision, its residual stream, stopped and resumed at a layer."""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sae_separation.errors import RunFailed, WrongRequest
from sae_separation.exam import Batch, logits_at
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
    changes the sweep's settings, and core is measured on `n_held_out` contexts of each domain. `exam_lm`, if
    there is one, is asked the questions in place of `lm`; `shared_stems` and `mixed_lengths` say how its rows
    can be laid out (Exam). `defaults` are config fields that depend on the LM, `published` core metrics of
    others to print beside ours; `describe` goes into config.json and `notes` into warnings.json.
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


def load_lm(folder: Path, device: str) -> torch.nn.Module:
    """The LM in `folder`, frozen; in float32, or in bfloat16 when its files are LARGE.

    Raises WrongRequest for files that are no whole LM.
    """
    from transformers import AutoModelForCausalLM

    large = sum(f.stat().st_size for f in folder.glob("*.safetensors")) > LARGE
    try:
        with without_bars():
            lm, told = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.bfloat16 if large else torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # whatever transformers, safetensors and json raise for files that are none
        if isinstance(error, MemoryError | RunFailed | WrongRequest):
            raise
        raise WrongRequest(
            f"--lm {folder} cannot be loaded ({one_line(error)}); save it anew with transformers"
        ) from error
    missing = sorted(told["missing_keys"])
    if missing:
        raise WrongRequest(
            f"--lm {folder} lacks {len(missing)} weights, first {missing[0]}: save it anew, whole"
        )
    if large:  # probabilities need more than bfloat16 has

        def to_float(module, args, output):
            output.logits = output.logits.float()

        lm.register_forward_hook(to_float)
    return lm.eval().requires_grad_(False).to(device)


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


def fast_lm_tokens(lm: torch.nn.Module) -> int:
    """Tokens of an LM batch. On a CPU a layer's widest activations are 16 MB (fp32): larger batches are no
    faster, and take more memory."""
    config = lm.config
    return (
        16_384
        if lm.device.type == "cuda"
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


def massive(resid: Tensor, among: Tensor) -> Tensor:
    """Which of the rows `among` [...] (bool) of resid [..., D] have over 10 times their median norm. Some LMs
    keep attention sinks in a few tokens at the start of a text (Sun et al., Massive Activations, arXiv
    2402.17762): they hold most of the squared norm and nothing of what the text says, so no SAE is trained or
    measured on them."""
    norm = resid.norm(dim=-1)
    return among & (norm > 10 * norm[among].median())


def hidden_of(put_out) -> Tensor:
    """The hidden state [row, pos, D] in what a decoder layer puts out: that, or a tuple or list around it."""
    return put_out[0] if isinstance(put_out, tuple | list) else put_out


class InterventionLM:
    """What SAEBench's sweep needs of an LM (`cfg`, `add_hook`, `reset_hooks`), on any decoder-only LM.

    Interventions act on resid_post of the hook layer. The layers up to it do not depend on them: their output
    is kept with each batch and only the layers above run again, on the rows that an intervention changed,
    once for every change. `told` remembers those answers until it is cleared or the batch is gone; one may
    differ from an answer in another batch by rounding.
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
        """The batch's resid under the hook, which gets the batch where SAEBench's hooks have their hook point
        (unused by them); as it is where SAEBench's hook has no feature to clamp (None)."""
        changed = self.hook(batch.resid, hook=batch)
        return batch.resid if changed is None else changed

    @contextlib.contextmanager
    def resumed_from(self, resid: Tensor):
        """Inside, the layers below the hook pass their input on, and the hook layer puts out `resid`."""
        as_put_out = self.as_put_out
        as_lm = as_put_out(resid.to(self.lm.dtype))
        replaced = self.layers[: self.layer + 1]
        before = [
            vars(layer).get("forward") for layer in replaced
        ]  # nnsight puts one of its own on each layer
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
        """read(batch, logits [row, n, vocab]) [row, ...], under the hook if there is one; one batch is always
        read in one way."""
        if self.hook is None:
            return read(batch, logits_at(self.lm, batch.tokens, batch.positions, **batch.seen(self.lm)))
        if batch.resid is None:
            batch.resid = self.resid(batch.tokens, **batch.seen(self.lm))
            batch.trained = batch.trained & ~massive(batch.resid, batch.trained)
        if batch.plain is None:
            batch.plain = self._resumed(batch, batch.resid, read)
        resid = self._changed(batch)
        touched = (resid != batch.resid).flatten(1).any(1).nonzero()[:, 0].tolist()
        keys = {
            row: (row, hashlib.blake2b(resid[row].cpu().numpy(), digest_size=16).digest()) for row in touched
        }
        told = self.told.setdefault(batch, {})
        new = [row for row, key in keys.items() if key not in told]
        if new:
            told.update(zip([keys[row] for row in new], self._resumed(batch.take(new), resid[new], read)))
        out = batch.plain.clone()
        if touched:
            out[touched] = torch.stack([told[keys[row]] for row in touched])
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


def shared_proxy(lm: InterventionLM, testbed: Testbed, most_bytes: int = 2**29):
    """The LM as a sae_lens HookedProxyLM that does once a batch what SAEBench core asks of it for every SAE
    alike: the clean pass, the zero-ablated pass, and the layers up to the hook. At most `most_bytes` are
    kept; what was not is made again."""
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
            def run():
                return super(SharedProxy, self).run_with_hooks(tokens, fwd_hooks=fwd_hooks, **kwargs)

            if getattr(fwd_hooks[0][1], "__name__", "") == "standard_zero_ablate_hook":
                return once("ablated", tokens, run)
            with lm.resumed_from(once("resid", tokens, lambda: lm.resid(tokens))):
                return run()

        def run_with_cache(self, tokens, **kwargs):
            with lm.resumed_from(once("resid", tokens, lambda: lm.resid(tokens))):
                return super().run_with_cache(tokens, **kwargs)

        def forward(self, tokens, **kwargs):
            def run():
                return super(SharedProxy, self).forward(tokens, **kwargs)

            return (
                run()
                if any(point.fwd_hooks for point in self.hook_dict.values())
                else once("clean", tokens, run)
            )

    testbed.layers[testbed.layer].register_forward_hook(list_as_tuple)  # sae_lens' hook ignores lists
    return SharedProxy(testbed.lm, testbed.tokenizer, hook_names=[testbed.hook_name])


def list_as_tuple(module, args, output):
    return tuple(output) if isinstance(output, list) else output
