"""An LM of transformers with the knowledge of one domain switched off, as a run's evaluation did it.

    with switched_off(lm, "run_6", seed=0) as off:   # the run's best cell, which off.cell names
        lm.generate(...)

The intervention acts on resid_post of the run's hook layer, on the tokens that SAEs are trained on alone: not
on special tokens, padding, the first token of a text and massive ones.
"""

import contextlib
import os
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import Cache

from sae_separation.errors import WrongRequest
from sae_separation.exam import Residuals, special_ids
from sae_separation.interventions import ChosenFeatures, calibrated, feature_hook
from sae_separation.lm import hidden_of, load_tokenizer, massive, parameters_as
from sae_separation.methods import OF_ROWS, Method
from sae_separation.saved_run import Cell, SavedRun, load_run

_switched: WeakSet[Any] = WeakSet()  # LMs inside a `with`


def switched_off(
    lm: Any,
    run: str | os.PathLike | SavedRun,
    *,
    seed: int | None = None,
    cell: str | None = None,
    tokenizer: Any = None,
) -> "SwitchedOff":
    """A context manager: inside, `lm` is under a cell of a run, with the SAE (or method) of one seed.

    `lm` is the LM that the run was made on, loaded by transformers, on any device. `seed`: for None the run's
    first. `cell`: a name of run.cells(seed); for None the best one. `tokenizer` says which tokens are
    special; for None it is loaded from where the LM came from.

    Raises WrongRequest for a run, a cell or SAEs that are not there, and an LM without the run's hook layer.
    """
    run = run if isinstance(run, SavedRun) else load_run(run)
    wanted = run.cell(seed, cell)
    layer = hook_layer(lm, run)
    special = special_ids(tokenizer or tokenizer_of(lm, run))
    device = next(layer.parameters()).device
    return SwitchedOff(lm, layer, special.to(device), run.sae(seed, device), wanted)


def hook_layer(lm: Any, run: SavedRun) -> Any:
    """The layer of an LM on which the run intervenes. Raises WrongRequest for another LM's."""
    name, d_in = run.testbed["hook_name"], run.testbed["d_in"]
    there = f"{run.folder} was made on {run.config['lm']}"
    try:
        layer = lm.get_submodule(name)
    except AttributeError:
        raise WrongRequest(f"{there}, and {type(lm).__name__} has no layer {name}: give that LM") from None
    width = lm.config.get_text_config().hidden_size
    if width != d_in:
        raise WrongRequest(f"{there}, whose stream is {d_in} wide, and this LM's is {width}: give that LM")
    return layer


def tokenizer_of(lm: Any, run: SavedRun) -> Any:
    """From where an LM was loaded. Raises WrongRequest where there is none."""
    remedy = "give switched_off(..., tokenizer=tokenizer)"
    if not lm.name_or_path:
        raise WrongRequest(f"this LM does not say where it was loaded from: {remedy}")
    try:
        return load_tokenizer(Path(lm.name_or_path), run.document_end)
    except WrongRequest as error:
        why = f"no tokenizer can be loaded from {lm.name_or_path}, where this LM came from"
        raise WrongRequest(f"{why}: {remedy}") from error


class SwitchedOff:
    """An LM under a `cell`, inside `with`; it can be entered again, and several times one after the other.

    `sees_rows`: the cell decides on whole rows (guardrail, mean_guard, bayes_guard). It takes a row as it
    stands, and a token that was read may be changed when the row has grown. So it needs the whole row in
    every pass: generate with use_cache=False. All other cells look at single tokens. With a KV cache they
    give what one plain pass gives, but for massive tokens, which are known by the median norm of what was
    read so far.
    """

    def __init__(self, lm: Any, layer: Any, special: Tensor, sae: Any, cell: Cell):
        self.lm, self.layer, self.special, self.cell = lm, layer, special, cell
        self.weights = sae.weights(cell.settings) if isinstance(sae, Method) else {}
        self.hook = sae.hook(cell.settings) if isinstance(sae, Method) else of_features(sae, cell)
        guards = isinstance(sae, Method) and sae.kind in OF_ROWS
        self.sees_rows = guards or cell.settings.get("intervention") == "guardrail"
        # of the pass that has begun: tokens, and which are no padding, [row, pos], and how many came before
        self._reading: tuple[Tensor, Tensor, int] | None = None
        self._norms = torch.empty(0, 0)  # of the stream on what was read [row, pos], NaN where never touched

    def __enter__(self) -> "SwitchedOff":
        if self.lm in _switched:
            raise WrongRequest("this LM is switched off already: leave that `with` before the next one")
        with contextlib.ExitStack() as stack:
            _switched.add(self.lm)
            stack.callback(_switched.discard, self.lm)
            stack.enter_context(parameters_as(self._replaced()))
            if self.hook is not None:
                before = self.lm.register_forward_pre_hook(self._begin, with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(self.layer.register_forward_hook(self._change).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        self._reading, self._norms = None, torch.empty(0, 0)
        self._stack.close()

    def _replaced(self) -> list[tuple[torch.nn.Parameter, Tensor]]:
        """Parameters of the LM with what the cell puts in their place. Raises WrongRequest for another
        LM's."""
        named = dict(self.lm.named_parameters())
        for name in self.weights:
            if name not in named:
                raise WrongRequest(f"{type(self.lm).__name__} has no weight {name}: give the run's LM")
        return [(named[name], weight.to(named[name])) for name, weight in self.weights.items()]

    def _begin(self, lm, args: tuple, kwargs: dict):
        """A forward pass begins. Raises WrongRequest for one whose tokens are not known."""
        tokens = kwargs["input_ids"] if "input_ids" in kwargs else args[0] if args else None
        if tokens is None:
            raise WrongRequest("the LM is given no input_ids: which tokens are special cannot be known")
        caches = (value for value in kwargs.values() if isinstance(value, Cache))  # by whatever name
        n_before = sum(int(cache.get_seq_length()) for cache in caches)
        mask = kwargs.get("attention_mask")
        if n_before and self.sees_rows:
            why = f"the cell {self.cell.name} looks at whole rows and was given a part of one"
            raise WrongRequest(f"{why}: generate with use_cache=False")
        rows, n_read = self._norms.shape
        if n_before > n_read or n_before and len(tokens) != rows:
            why = f"the KV cache holds {n_before} tokens a row that were not read inside this `with`"
            raise WrongRequest(f"{why}: begin with an empty cache")
        real = torch.ones_like(tokens, dtype=torch.bool)
        if mask is not None and mask.dim() == 2:
            real = mask[:, -tokens.shape[1] :].bool()
        self._reading = tokens, real, n_before

    def _change(self, layer, args: tuple, put_out):
        """What the hook layer puts out, with the knowledge switched off."""
        if self._reading is None:
            raise WrongRequest("the hook layer ran by itself: call the LM as a whole")
        (tokens, real, n_before), self._reading = self._reading, None
        assert self.hook is not None, "this is no hook without one"
        hidden = hidden_of(put_out)
        resid = hidden.float()
        tokens, real = tokens.to(resid.device), real.to(resid.device)
        may_be = real & ~torch.isin(tokens, self.special)
        if not n_before:
            may_be[torch.arange(len(real)), real.int().argmax(1)] = False  # the first of a row
        trained = self._not_massive(resid, may_be, n_before)
        changed = self.hook(resid, hook=Residuals(resid, trained, tokens))
        if changed is None:
            return put_out
        changed = changed.to(hidden.dtype)
        return changed if isinstance(put_out, Tensor) else type(put_out)([changed, *put_out[1:]])

    def _not_massive(self, resid: Tensor, may_be: Tensor, n_before: int) -> Tensor:
        """Of the tokens that may be touched [row, pos] (bool), those that are not massive among what was read
        so far."""
        norms = resid.norm(dim=-1).masked_fill(~may_be, torch.nan)
        before = self._norms[:, :n_before] if n_before else norms[:, :0]
        self._norms = torch.cat([before, norms], 1)
        return may_be & ~massive(resid, may_be, before[~before.isnan()])


def of_features(sae: Any, cell: Cell):
    """The intervention of a cell on an SAE's features, with the units and means that were recorded."""
    device, recorded = sae.W_dec.device, cell.needed["units"]
    unit = torch.ones(len(sae.W_dec), device=device)
    chosen = torch.tensor(sorted(map(int, recorded)))
    unit[chosen] = torch.tensor([recorded[str(i)] for i in chosen.tolist()], device=device)
    if cell.settings.get("intervention", "clamp") != "clamp":  # a guard has recorded its own features alone
        chosen = torch.tensor(sorted(cell.settings["features"]))
    features = calibrated(ChosenFeatures(sae, chosen, unit), cell.settings)
    retain_mean = torch.tensor(cell.needed.get("retain_mean", []), device=device)
    return feature_hook(features, cell.settings, retain_mean)
