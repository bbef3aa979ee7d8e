"""Does an adaptive orthogonality loss make a sparse autoencoder (SAE) separate knowledge?

    python experiment.py --out_dir=run_1                     # run 1 of the plan, nothing else needed
    python experiment.py --out_dir run_0 run_1 run_6         # several runs on one pass of the LM
    python experiment.py --out_dir=mine --arm=fixed --alpha=0.3 --seeds 0 1 2 3 4
    python experiment.py --out_dir=run_1                     # again: an interrupted run goes on, a finished one says so
    python plot.py                                           # figures over all run folders

The file reads in the order in which data flows: plan and arms (config.py, losses.py) ->
activation stream -> OrthogonalSAE (its products: sparse.py) -> trainer -> run (evaluated by evaluation.py) ->
main. DIMENSIONS in names: B batch rows, D d_in, F d_sae, G feature groups.
"""

import python_version  # noqa: F401  (first: refuses a Python that this does not work with)

# isort: split
import atexit
import inspect
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

from sae_separation.errors import (
    Interrupted,
    RunFailed,
    WrongRequest,
    keep_output_open,
    leave_at_once,
    stops,
    tell,
    tell_uncaught,
)

if __name__ == "__main__":  # from here on, whatever ends the command ends with its exit code and one line
    keep_output_open()
    sys.excepthook = tell_uncaught
    for number in stops():
        signal.signal(number, leave_at_once)

from sae_separation import checkpoint, evals, process, results, run_folder
from sae_separation import config as settings
from sae_separation.config import Command, check, one_pass, option, to_train
from sae_separation.files import (
    CannotWrite,
    Unusable,
    seal,
    sync,
    write_json,
    write_whole,
    writing,
)
from sae_separation.specs import ASKED, CUSTOM

STARTED = time.monotonic()

# ------------------------------------------------------------------------------------------- plan and arms

PLAN = {
    "run_0": {"arm": "vanilla"},
    "run_1": {"arm": "fixed", "alpha": 0.1},
    "run_2": {"arm": "grouped", "alpha": 0.1},
    "run_3": {"arm": "grouped", "alpha": 0.01},
    "run_4": {"arm": "grouped", "alpha": 0.5},
    "run_5": {"arm": "grouped", "alpha": 1.0},
    "run_6": {"arm": "adaptive", "alpha": 1.0},
    "run_7": {
        "arm": "adaptive",
        "alpha": 1.0,
        "alpha_start": 0.1,
        "loss_warmup_steps": 100,
        "unlock_steps": 30,
    },
    "run_8": {"arm": "adaptive", "alpha": 1.0, "activation": "batchtopk"},
    "run_9": {"arm": "ortsae", "alpha": 0.25},
    "run_10": {"arm": "frozen_decoder"},
}


@dataclass(frozen=True)
class Arm:
    """One row of the study: alpha times a loss on the rows of W_dec, or a loss on firing that holds alpha.

    `pull`, `prepare` and `firing` name functions of losses.py: it needs torch, and a request is read without.
    Each is given those of the row's `options` that are among its parameters.

    pull(W_dec, seen, part, parts): gives a losses.Pull for a part of the rows at a time; `seen` is the SAE's
        groups where the arm `uses_groups`, else what prepare(W_dec) gave at the start of a round over all.
    firing(pre, forget, alpha): the loss and its gradient by the pre-activations of the forget features.

    `every`: the least steps of a round, whose pulls weigh as much as the round has steps. `longest`: the
    most, with alpha times the learning rate up to `gentle`, and fewer beyond: FVU is then within
    1 % of the variance all along of what it is with rounds of `every` (tested; notes.txt). `steered`: alpha
    follows the measured sharing of the first --forget_features features towards --target_sharing.
    """

    pull: str = ""
    prepare: str = ""
    firing: str = ""
    options: dict = field(default_factory=dict)
    every: int = 1
    longest: int = 16
    gentle: float = 3e-4
    uses_groups: bool = False
    steered: bool = False
    trains_decoder: bool = True

    @property
    def has_loss(self) -> bool:
        return bool(self.pull or self.firing)

    def function(self, name: str, config: settings.Config, **more) -> Callable | None:
        """The function of losses.py, given what it takes of the options and of `more`; None for no name."""
        if not name:
            return None
        given = {option: getattr(config, option) for option in self.options} | more
        takes = inspect.signature(getattr(losses, name)).parameters
        return partial(getattr(losses, name), **{k: v for k, v in given.items() if k in takes})


CHUNKS = {"chunk_size": option(512, "ortsae: features a random chunk", least=2, cut_to="d_sae")}
ARMS = {
    "vanilla": Arm(),
    "frozen_decoder": Arm(trains_decoder=False),
    "fixed": Arm(pull="pull_all_pairs", prepare="gram"),
    "grouped": Arm(
        pull="pull_grouped",
        longest=8,
        uses_groups=True,
        options={
            "group_size": option(64, "grouped: features a group, at most d_in", least=2, cut_to="d_in"),
            "group_update_steps": option(
                100,
                "grouped: optimiser steps between two formations of the groups, to the nearest round over "
                "all of them",
                least=1,
            ),
        },
    ),
    "adaptive": Arm(
        firing="domain_hinges",
        steered=True,
        options={
            "forget_features": option(
                40, "adaptive: features kept for the forget domain", least=1, within="d_sae"
            ),
            "margin": option(
                1.0,
                "adaptive: distance from 0, in units of u, that a forget feature's pre-activation keeps on "
                "retain text",
            ),
            "gap_weight": option(
                10.0, "adaptive: weight of the loss on forget tokens that no forget feature fires on"
            ),
            "target_sharing": option(
                0.0005,
                "adaptive: firing of the forget features on retain text over that on forget text, "
                "which alpha is steered to",
                above=0,
                most=1,
            ),
        },
    ),
    "ortsae": Arm(
        pull="pull_ortsae",
        prepare="chunks_of_rows",
        every=5,
        gentle=7.5e-4,
        options=CHUNKS,
    ),
}


@settings.with_arms(ARMS)
class Request(settings.Request):
    """What is asked of one run. What is None or empty takes the testbed's default."""


@settings.with_arms(ARMS)
class Config(settings.Config):
    """One run with every setting."""


def parse_command(argv: Sequence[str]) -> tuple[Command, list[Request]]:
    """The command and one request per run folder (config.parse_command). Raises WrongRequest."""
    return settings.parse_command(argv, PLAN, ARMS, Request, __doc__ or "")


def unfinished(command: Command, configs: list[Request]) -> tuple[Command, list[Request]]:
    """What of the command is left to do: runs to train, and complete ones to evaluate where evaluations are named; other
    complete runs are named and left alone. This process owns the folders that are left.

    Raises WrongRequest for a folder that is no folder, cannot be written, has another owner, holds a run made with other
    settings, or is to be evaluated and holds no SAE.
    """
    left = []
    for out_dir in map(Path, command.out_dir):
        run_folder.refuse_place(out_dir)
    run_folder.refuse_same(command.out_dir)
    for out_dir, config in zip(map(Path, command.out_dir), configs):
        run_folder.refuse_foreign(out_dir, config.seeds)
        if (out_dir / "config.json").exists() and not command.overwrite:
            made = run_folder.read_run_json(out_dir / "config.json", {"requested", "config"})
            complete = run_folder.is_complete(out_dir) and run_folder.read_run_json(
                out_dir / "final_info.json", {"training"}
            )
            again = complete and command.evals not in ((), ("none",))
            refuse_other_settings(out_dir, config, made, bool(complete), again)
            if not complete:
                run_folder.refuse_lost_result(out_dir)
            if complete:
                for changed in run_folder.changed_files(out_dir):
                    print(f"warning: {changed}", file=sys.stderr)
            if again:
                run_folder.refuse_without_saes(out_dir, made["config"]["seeds"])
                config = as_made(config, made)
            elif complete:
                print(f"{out_dir} is complete: {out_dir / 'final_info.json'} (--overwrite starts anew)")
                if lacking := [r.name for r in evals.ROWS if r.section not in complete] * (not config.skip):
                    how = "the same command adds them with"
                    print(f"{out_dir} lacks evaluations; {how} --evals {' '.join(lacking)}")
                run_folder.clear_left(out_dir)
                process.remove_left("saebench")
                continue
        if out_dir.is_dir():
            run_folder.lock(out_dir)
        left.append((str(out_dir), config))
    return replace(command, out_dir=tuple(d for d, _ in left)), [c for _, c in left]


def refuse_other_settings(out_dir: Path, config: Request, made: dict, complete: bool, again: bool):
    """Raises WrongRequest where a folder's run was `made` with other settings than the ones wanted. Of a complete run
    that is evaluated `again` those count that were asked for; what evaluations alone need counts for neither that one
    nor a run that goes on."""
    wanted = json.loads(json.dumps(asdict(config)))
    default, planned = (
        json.loads(json.dumps(asdict(c))) for c in (Request(), Request(**PLAN.get(out_dir.name, {})))
    )
    asked = default | made["requested"]  # a setting that is newer than the folder had its default
    differs = [k for k, v in wanted.items() if v not in (asked[k], made["config"].get(k), "auto")]
    if complete and set(config.seeds) <= set(asked["seeds"]):  # more seeds than asked for
        differs = [k for k in differs if k != "seeds"]
    if again or not complete:
        differs = [k for k in differs if k not in ASKED]
    if again:
        differs = [k for k in differs if wanted[k] != planned[k]]
    if differs:
        told = ", ".join(f"{k} {made['config'].get(k)} there, {wanted[k]} wanted" for k in differs)
        remedy = "name another folder, or --overwrite it"
        raise WrongRequest(f"--out_dir {out_dir} holds a run with other settings ({told}); {remedy}")


def as_made(config: Request, made: dict) -> Request:
    """The settings that a complete run was made with, and what is wanted for its evaluation."""
    known = {f.name: made["requested"][f.name] for f in fields(Request) if f.name in made["requested"]}
    known |= {k: getattr(config, k) for k in ASKED if getattr(config, k)}
    testbed = made["config"]["testbed"]
    known |= {"testbed": "auto" if testbed == CUSTOM else testbed}
    return replace(Request(), **{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})


if __name__ == "__main__":  # answer --help and wrong requests before anything heavy is imported
    atexit.register(run_folder.unlock)
    try:
        COMMAND, CONFIGS = unfinished(*parse_command(sys.argv[1:]))
        if not CONFIGS:
            sys.exit(0)
        check(COMMAND, CONFIGS)
    except Exception as error:
        sys.exit(tell(error, began=False))

import contextlib
import gc
import hashlib
from collections.abc import Iterator
from itertools import islice

import beartype  # noqa: F401  (before nnsight, which gives `object` a method that beartype's import trips over)
import nnsight
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sae_separation import losses, testbeds
from sae_separation.evaluation import Evaluator, evaluation_contexts
from sae_separation.exam import most_positions, special_ids
from sae_separation.export import export
from sae_separation.lm import Testbed, bfloat16_twins, fast_lm_tokens, hidden_of, massive, parameters_as
from sae_separation.losses import (
    firing_profile,
    form_groups,
    has_bf16,
    omega_between_domains,
    random_signs,
    sharing,
)
from sae_separation.sparse import (
    ACTIVATIONS,
    SPARSE_SHARE,
    DenseFeatures,
    cache_blocks,
    remove_radial,
    sparse_features,
)

# ------------------------------------------------------------------------------------------------ activation stream


@dataclass
class ActivationBlock:
    """Shuffled activations x [rows, D] (fp32, unscaled) and whether each row's text was forget text [rows] (bool)."""

    x: Tensor
    forget: Tensor

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Whole batches only: up to size - 1 rows of a block are left over."""
        for start in range(0, len(self.x) - size + 1, size):
            yield self.x[start : start + size], self.forget[start : start + size]

    def without(self, places: Tensor) -> "ActivationBlock":
        """All rows but those at `places`, which the last rows take; nothing else is moved."""
        n = len(self.x) - len(places)
        kept_at_end = torch.ones(len(places), dtype=torch.bool, device=places.device)
        kept_at_end[places[places >= n] - n] = False
        for t in (self.x, self.forget):
            t[places[places < n]] = t[n:][kept_at_end]
        return ActivationBlock(self.x[:n], self.forget[:n])

    @classmethod
    def blank(cls, d_in: int, device: torch.device) -> "ActivationBlock":
        """What a trainer is made from whose state then comes from a checkpoint."""
        return cls(torch.ones(2, d_in, device=device), torch.zeros(2, dtype=torch.bool, device=device))


class ActivationStream:
    """resid_post of one layer, from the LM through nnsight, as shuffled blocks.

    Half of the contexts are forget text and half retain text, in every LM batch. The LM is stopped after the hook layer
    and runs in bfloat16 where the machine has it. Rows of special tokens (BOS, EOS, padding) and massive ones are left out.
    """

    def __init__(
        self,
        testbed: Testbed,
        context_size: int,
        buffer_tokens: int,
        seed: int = 0,
        lm_tokens: int | None = None,
    ):
        self.device, self.d_in = testbed.lm.device, testbed.d_in
        self.traced = nnsight.NNsight(testbed.lm)
        self.hook = self.traced.get(testbed.hook_name)
        self.special = special_ids(testbed.tokenizer).to(self.device)
        self.low_precision = bfloat16_twins(testbed) if has_bf16(self.device) else []
        self.n_contexts = max(
            2, (lm_tokens or fast_lm_tokens(testbed.lm)) // context_size // 2 * 2
        )  # per LM batch
        self.n_lm_batches = max(1, round(buffer_tokens / (self.n_contexts * (context_size - 1))))
        self.passes = {"forget": 0, "retain": 0}  # over the text, begun so far
        self.texts = [
            testbeds.packed_contexts(
                getattr(testbed, d).train,
                testbed.tokenizer,
                context_size,
                seed,
                on_pass=partial(self.passes.__setitem__, d),
            )
            for d in self.passes
        ]
        self.seed, self.block_index, self.block = seed, 0, None
        self.with_massive = 0.0  # share of the block's contexts that hold a massive row
        process.make_collections_short()

    @torch.no_grad()
    def activations(self, tokens: Tensor) -> Tensor:
        """resid_post [context, pos, D] of tokens [context, pos], in the precision that the LM runs in."""
        with parameters_as(self.low_precision), self.traced.trace(tokens, use_cache=False) as tracer:
            resid = self.hook.output.save()
            tracer.stop()
        return hidden_of(resid)

    def next_block(self) -> ActivationBlock:
        """The LM's output goes straight to its shuffled place: one buffer, one LM batch, no copy of the buffer. The stream lets go of the block before."""
        self.block = None
        process.return_freed_memory()
        half = self.n_contexts // 2
        batches = [
            torch.tensor([c for text in self.texts for c in islice(text, half)], device=self.device)
            for _ in range(self.n_lm_batches)
        ]
        kept = [(~torch.isin(tokens, self.special)).flatten().nonzero()[:, 0] for tokens in batches]
        n, first, sinks, with_sinks = sum(map(len, kept)), 0, [], 0
        order = torch.randperm(
            n, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + self.block_index)
        )
        self.block_index += 1
        places = torch.empty_like(order).scatter_(0, order, torch.arange(n)).to(self.device)
        x, forget = (
            torch.empty(n, self.d_in, device=self.device),
            torch.empty(n, dtype=torch.bool, device=self.device),
        )
        for tokens, rows in zip(batches, kept):
            place = places[first : first + len(rows)]
            with process.signals.held():  # neither nnsight nor the LM's weights are to be left in the middle
                resid = self.activations(tokens).flatten(0, 1).index_select(0, rows).float()
            gc.collect()  # a trace leaves its frames, and they the LM's activations, in cycles: hundreds of megabytes until Python comes by itself
            x.index_copy_(0, place, resid)
            forget.index_copy_(0, place, rows < half * tokens.shape[1])
            sink = massive(resid, torch.ones_like(rows, dtype=torch.bool))
            sinks.append(place[sink])
            with_sinks += len((rows[sink] // tokens.shape[1]).unique())
            first += len(rows)
        self.block = ActivationBlock(x, forget).without(torch.cat(sinks))
        self.with_massive = with_sinks / sum(map(len, batches))
        process.return_freed_memory()
        return self.block

    def skip_blocks(self, n: int):
        """Go on behind the first n blocks, without the LM: a block is a function of the text, the seed and its index."""
        for text in self.texts:
            contexts = n * self.n_lm_batches * (self.n_contexts // 2)
            next(islice(text, contexts, contexts), None)
        self.block_index = n


# ------------------------------------------------------------------------------------------------ the SAE


@dataclass
class Terms:
    """What one pass measured, on the device: 0-d tensors, how often each feature `fired` on retain and forget rows [2, F], and a `sketch`
    of which rows [F, K] (features.py)."""

    fvu: Tensor
    l1: Tensor
    l0: Tensor
    fired: Tensor
    firing: Tensor | None
    sketch: Tensor | None


class OrthogonalSAE(torch.nn.Module):
    """f = act((u - b_dec) W_enc + b_enc),  u_hat = f W_dec + b_dec + skip (u - b_dec),  rows of W_dec of unit norm.

    W_enc [D, F] (kept as its transpose W_enc_FD), b_enc [F], W_dec [F, D], b_dec [D]. u is x scaled by `scale` s, which makes the mean of ||u||² equal d_in, or
    with `layer_norm` x less its mean over its own standard deviation; x_hat undoes that. Any leading shape. act is one of
    ACTIVATIONS. Statistics and state live in buffers, so that they move and are saved with the module:
    `rate` [2, F] firing rate on retain and forget text (exponential moving average over batches), `idle` [F] tokens since the
    feature last fired, `groups` [G, size] indices of the features of each group (-1: none), `unlocked` how many features take
    part (the first ones), `threshold` (batchtopk) and `temperature` (softk) of the activation function, `active` features a row
    of the last batch trained on.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        seed: int,
        scale: float = 1.0,
        activation: str = "relu",
        k: int = 16,
        layer_norm: bool = False,
        skip: float = 0.0,
        orthogonal_init: bool = False,
    ):
        super().__init__()
        self.activation, self.k, self.layer_norm, self.skip = activation, k, layer_norm, skip
        generator = torch.Generator().manual_seed(seed)
        W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        if orthogonal_init:  # blocks of d_in orthonormal rows, as near to orthogonal as d_sae rows can be
            W_dec = torch.cat(
                [torch.nn.init.orthogonal_(block, generator=generator) for block in W_dec.split(d_in)]
            )
        self.W_dec = torch.nn.Parameter(W_dec)
        start = (
            1.0 if activation == "relu" else 0.5
        )  # measured: the other way round, FVU ends a tenth and a sixth higher (notes.txt)
        self.W_enc_FD = torch.nn.Parameter(
            start * W_dec
        )  # W_encᵀ: a feature's weights lie side by side, as their gradient comes out of a sparse product
        self.b_enc = torch.nn.Parameter(torch.zeros(d_sae))
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))
        self.register_buffer("scale", torch.tensor(1.0 if layer_norm else float(scale)))
        self.register_buffer("rate", torch.zeros(2, d_sae))
        self.register_buffer("idle", torch.zeros(d_sae, dtype=torch.long))
        self.register_buffer("groups", torch.full((1, 1), -1))
        self.register_buffer("unlocked", torch.tensor(d_sae))
        self.register_buffer("threshold", torch.tensor(0.0))
        self.register_buffer("temperature", torch.tensor(0.0))
        self.register_buffer("active", torch.tensor(math.inf))

    @property
    def W_enc(self) -> Tensor:
        return self.W_enc_FD.T

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u [..., D], and the mean and the size that lead back: x = u · size + mean. Layer norm as SAELens has it."""
        if not self.layer_norm:
            return x * self.scale, torch.zeros_like(self.scale), 1 / self.scale
        mean, size = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return (x - mean) / (size + 1e-5), mean, size

    def pre_activations(self, u: Tensor, some: slice = slice(None), out_FB: Tensor | None = None) -> Tensor:
        """Of u [B, D], less b_dec, for all or some features: [B, F], or written into out [F, B], in the precision of u."""
        W_FD, b_F = self.W_enc_FD[some].to(u), self.b_enc[some].to(u)
        return (
            torch.addmm(b_F, u, W_FD.T)
            if out_FB is None
            else torch.addmm(b_F[:, None], W_FD, u.T, out=out_FB)
        )

    def encode(self, x: Tensor) -> Tensor:
        """x [..., D] in the LM's units -> f [..., F] in units of u."""
        pre = (self.normalise(x)[0] - self.b_dec) @ self.W_enc + self.b_enc
        if (
            self.activation == "batchtopk"
        ):  # at inference a feature stands for itself: above the threshold that training met
            f = torch.relu(pre) * (pre > self.threshold)
        else:
            f = ACTIVATIONS[self.activation](pre, self)[0]
        return (
            f
            if self.unlocked == f.shape[-1]
            else f * (torch.arange(f.shape[-1], device=f.device) < self.unlocked)
        )

    def decode(self, f: Tensor, x: Tensor) -> Tensor:
        """f [..., F] of x [..., D] -> x_hat [..., D] in the LM's units; x matters for `layer_norm` and `skip` only."""
        u, mean, size = self.normalise(x)
        return (f @ self.W_dec + self.b_dec + self.skip * (u - self.b_dec)) * size + mean

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), x)

    @property
    def affinity(self) -> Tensor:
        """a = (p_forget - p_retain) / (p_forget + p_retain) in [-1, 1], [F]; 0 for a feature that never fired."""
        total = self.rate.sum(0)
        return (self.rate[1] - self.rate[0]) / total.clamp(min=1e-12)

    def loss_terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """FVU and mean Σ f / √d_in of x [B, D], differentiable: the plain twin of `accumulate_grads` (relu, softk)."""
        f = self.encode(x)
        return (self.decode(f, x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum(), f.sum() / len(
            x
        ) / math.sqrt(x.shape[1])

    @torch.no_grad()
    def accumulate_grads(
        self,
        x: Tensor,
        forget: Tensor,
        l1: Tensor,
        dtype: torch.dtype,
        firing_loss: tuple[slice, Callable] | None = None,
        gain_F: Tensor | None = None,
        weight: float = 1.0,
        signs_BK: Tensor | None = None,
    ) -> Terms:
        """Add `weight` times the gradients of FVU + (l1 · mean Σ f + firing_loss) / √d_in to .grad, by hand, and measure the terms.

        x [B, D] in the LM's units, forget [B] (bool), l1 a 0-d tensor; firing_loss, if given, is a slice of features and what maps
        their pre-activations [B, G] and forget [B] to its value and its gradient by these; gain [F], if given, multiplies
        each feature (0: it takes no part); signs [B, K], if given, are summed for each feature over the rows that it fires on.
        Matrix products run in `dtype` and accumulate in fp32, weights stay fp32; in
        bfloat16 a product's entries, counts of firing among them, are right to 0.4 %. Five products instead of autograd's
        six: x needs no gradient, and that of b_dec through the encoder is one matrix-vector product. Where few features were
        active in the last batch, on a CPU and not compiled, all but the first are sparse (SparseFeatures).
        """
        B, D = x.shape
        u_BD, _, size = self.normalise(x)
        variance = (x - x.mean(0)).pow(2).sum()
        u_BD = u_BD - self.b_dec
        if (
            x.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and self.active < SPARSE_SHARE[dtype] * len(self.b_enc)
        ):
            features = sparse_features(self, u_BD, dtype, gain_F, forget)
        else:
            f_BF, slope_BF = ACTIVATIONS[self.activation](self.pre_activations(u_BD.to(dtype)), self)
            features = DenseFeatures(f_BF, slope_BF, gain_F, forget)
        error_BD = features.decode(self.W_dec).sub_(u_BD, alpha=1 - self.skip)
        d_out_BD, per_row = error_BD * (size**2 * (2 * weight / variance)), 1 / (B * math.sqrt(D))
        d_W_dec, d_W_enc_FD, d_b_enc = features.gradients(d_out_BD, u_BD, self.W_dec, l1 * per_row * weight)
        if firing_loss:
            group, loss = firing_loss
            firing, d_firing = loss(self.pre_activations(u_BD, group), forget)
            d_firing *= weight / math.sqrt(D)
            d_W_enc_FD[group] += d_firing.T @ u_BD
            d_b_enc[group] += d_firing.sum(0)
        d_b_dec = (1 - self.skip) * d_out_BD.sum(0) - self.W_enc @ d_b_enc
        for parameter, grad in (
            (self.W_dec, d_W_dec),
            (self.W_enc_FD, d_W_enc_FD),
            (self.b_enc, d_b_enc),
            (self.b_dec, d_b_dec),
        ):
            if parameter.requires_grad:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        fired_2F, total = features.counts()
        self.active.copy_(fired_2F.sum() / B)
        return Terms(
            (error_BD * size).pow(2).sum() / variance,
            total * per_row,
            self.active.clone(),
            fired_2F,
            firing / math.sqrt(D) if firing_loss else None,
            None if signs_BK is None else features.sketch(signs_BK),
        )

    @torch.no_grad()
    def normalise_decoder(self):
        for W in cache_blocks(self.W_dec):
            W /= W.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def update_statistics(self, fired_2F: Tensor, n_forget: Tensor, n_rows: int, decay: float = 0.99):
        """Fold one batch's firing counts into `rate` and `idle`; a domain absent from the batch keeps its rate."""
        for domain, n in ((0, n_rows - n_forget), (1, n_forget)):
            self.rate[domain] = torch.where(
                n > 0,
                decay * self.rate[domain] + (1 - decay) * fired_2F[domain] / n.clamp(min=1),
                self.rate[domain],
            )
        self.idle += n_rows
        self.idle[fired_2F.sum(0) > 0] = 0


ROWS_A_STEP = 1024  # that a loss on W_dec looks at, where an arm's bounds allow it


def round_steps(config: Config) -> int:
    """Optimiser steps in which omega visits every row of W_dec: as many as leave ROWS_A_STEP rows to each, within the arm's bounds."""
    arm = ARMS[config.arm]
    longest = round(arm.longest * min(1.0, arm.gentle / max(config.alpha * config.lr, 1e-30)))
    return max(arm.every, min(longest, math.ceil(config.d_sae / ROWS_A_STEP)))


# ------------------------------------------------------------------------------------------------ trainer


class Trainer:
    """One SAE in training: Adam, unit decoder rows, lambda steered to the target L0, dead features resampled."""

    def __init__(self, config: Config, seed: int, d_in: int, n_steps: int, first_block: ActivationBlock):
        self.config, self.arm, self.seed, self.n_steps = config, ARMS[config.arm], seed, n_steps
        device, x = first_block.x.device, first_block.x
        self.dtype = torch.bfloat16 if has_bf16(device) else torch.float32
        scale = math.sqrt(
            d_in / (sum(part.pow(2).sum() for part in x.split(4096)) / len(x)).item()
        )  # in parts: no copy of the block
        self.sae = OrthogonalSAE(
            d_in,
            config.d_sae,
            seed,
            scale,
            config.activation,
            config.k,
            config.layer_norm,
            config.skip,
            config.orthogonal_init,
        ).to(device)
        self.steered_l0 = config.target_l0 if config.activation == "relu" else 0.0
        with torch.no_grad():
            self.sae.b_dec.copy_(sum(self.sae.normalise(part)[0].sum(0) for part in x.split(4096)) / len(x))
            if (
                config.activation == "relu"
            ):  # start sparse, near the target: many features to bring down run lambda up, or are killed together
                l0 = 2 * (config.target_l0 or d_in / 8)
                rows = x[: min(4096, max(1, 2**22 // config.d_sae))]
                pre = (self.sae.normalise(rows)[0] - self.sae.b_dec) @ self.sae.W_enc
                self.sae.b_enc -= torch.quantile(pre.flatten()[: 2**22], 1 - min(0.5, l0 / config.d_sae))
                self.sae.active.fill_(l0)
        self.sae.W_dec.requires_grad_(self.arm.trains_decoder)
        if config.compile:
            self.sae.accumulate_grads = torch.compile(self.sae.accumulate_grads)
        self.generator = torch.Generator().manual_seed(seed)
        self.adam = torch.optim.Adam(self.sae.parameters(), lr=config.lr, betas=(0.9, 0.999), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, self._lr_factor)
        self.log_l1 = torch.tensor(
            math.log(config.l1) if config.l1 and config.activation == "relu" else -math.inf, device=device
        )
        self.log_alpha = torch.tensor(
            math.log(config.alpha) if config.alpha and self.arm.has_loss else -math.inf,
            device=device,
        )
        self.l0 = torch.tensor(self.steered_l0 or 0.0, device=device)  # moving average that steers lambda
        self.options = {name: getattr(config, name) for name in self.arm.options}
        self.prepare = self.arm.function(self.arm.prepare, config, generator=self.generator)
        self.pull = self.arm.function(self.arm.pull, config)
        self.firing = self.arm.function(self.arm.firing, config)
        self.round = round_steps(config)
        self.held = torch.zeros(0, device=device)  # what omega keeps in a round
        self.omega = torch.tensor(0.0, device=device)  # of the rows last visited
        self.steps, self.resampled = 0, 0
        self.history: list[dict] = []  # one record a logged step
        self.failed = ""  # why it does not go on

    # what a checkpoint holds
    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Everything that the next step depends on, and the log: tensors by name, and facts for JSON."""
        tensors = {f"sae.{k}": v for k, v in self.sae.state_dict().items()}
        tensors |= {
            "generator": self.generator.get_state(),
            "log_l1": self.log_l1,
            "log_alpha": self.log_alpha,
            "l0": self.l0,
            "omega": self.omega,
            "held": self.held,
        }
        for name, parameter in self.sae.named_parameters():
            tensors |= {f"adam.{name}.{k}": v for k, v in self.adam.state.get(parameter, {}).items()}
            tensors |= {} if parameter.grad is None else {f"grad.{name}": parameter.grad}
        return tensors, {
            name: getattr(self, name) for name in ("seed", "steps", "resampled", "history", "failed")
        } | {"updates": self.schedule.last_epoch}

    def restore(self, tensors: dict[str, Tensor], facts: dict):
        """Take over what `state` gave."""
        self.steps, self.resampled, self.history, self.failed = (
            facts[name] for name in ("steps", "resampled", "history", "failed")
        )
        if self.failed:
            return
        tensors = {name: t.to(self.l0.device) for name, t in tensors.items()}
        under = lambda prefix: {
            name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)
        }
        self.sae.groups = torch.empty_like(tensors["sae.groups"])
        self.sae.load_state_dict(under("sae."))
        self.generator.set_state(tensors["generator"].cpu())
        self.log_l1, self.log_alpha, self.l0, self.omega, self.held = (
            tensors[name] for name in ("log_l1", "log_alpha", "l0", "omega", "held")
        )
        for name, parameter in self.sae.named_parameters():
            parameter.grad = tensors.get(f"grad.{name}")
            if moments := under(f"adam.{name}."):
                self.adam.state[parameter] = moments
        self.schedule.last_epoch = facts["updates"]
        for group, lr in zip(self.adam.param_groups, self.schedule.base_lrs):
            group["lr"] = lr * self._lr_factor(facts["updates"])

    # what depends on the time in training alone
    def _lr_factor(self, update: int) -> float:
        step = update * self.config.grad_accumulation
        rise = min(1.0, (step + 1) / max(self.config.warmup_steps, 1))
        return rise * min(1.0, (self.n_steps - step) / max(self.config.decay_fraction * self.n_steps, 1))

    def _loss_factors(self) -> tuple[float, float]:
        """Loss warm-up and alpha curriculum: what lambda and alpha are multiplied by now."""
        config = self.config
        warm = min(1.0, (self.steps + 1) / max(config.loss_warmup_steps, 1))
        left = max(0.0, 1 - 2 * self.steps / self.n_steps)
        return warm, warm * (
            (config.alpha_start / config.alpha) ** left if config.alpha_start and config.alpha else 1.0
        )

    def _unlock_and_cool(self):
        """Progressive unlocking, and softk's falling temperature."""
        sae, config = self.sae, self.config
        if config.unlock_steps:
            sae.unlocked.fill_(
                math.ceil(min(1.0, 0.25 + 0.1 * (self.steps // config.unlock_steps)) * config.d_sae)
            )
            sae.idle[sae.unlocked :] = 0
        if config.activation == "softk":
            sae.temperature.fill_(
                config.temperature
                * max(0.0, 1 - self.steps / max((1 - config.decay_fraction) * self.n_steps - 1, 1))
            )

    def _gain(self) -> Tensor | None:
        """What each feature is multiplied by in this batch, [F]: 0 for locked ones and for feature dropout; None for all 1."""
        sae, p = self.sae, self.config.feature_dropout
        if not p and not self.config.unlock_steps:
            return None
        gain = (torch.arange(self.config.d_sae, device=sae.unlocked.device) < sae.unlocked).float()
        return gain * (torch.rand(len(gain), generator=self.generator) >= p).to(gain) / (1 - p) if p else gain

    # one step
    def step(self, x: Tensor, forget: Tensor) -> dict[str, Tensor]:
        """One batch x [B, D]; returns its loss terms as 0-d tensors (`omega` as it was when last computed, in
        `loss` with its plain weight alpha). Raises RunFailed, before anything is updated, if one of them or a gradient is not finite."""
        sae, config = self.sae, self.config
        self._unlock_and_cool()
        updates, batches_left = divmod(self.steps, config.grad_accumulation)
        update_now = batches_left == config.grad_accumulation - 1
        regroup = False
        if self.arm.uses_groups and update_now:
            rounds = max(1, round(self.options["group_update_steps"] / self.round))
            regroup = updates % (self.round * rounds) == 0
        signs = random_signs(len(x), 16, self.generator).to(x.device) if regroup else None
        (l1_factor, alpha_factor), share = self._loss_factors(), 1 / config.grad_accumulation
        l1, alpha = self.log_l1.exp() * l1_factor, self.log_alpha.exp() * alpha_factor
        firing_loss = None
        if self.firing and config.alpha:
            firing_loss = slice(0, self.options["forget_features"]), partial(self.firing, alpha=alpha)
        terms = sae.accumulate_grads(x, forget, l1, self.dtype, firing_loss, self._gain(), share, signs)
        measured = {"fvu": terms.fvu, "l0": terms.l0, "l1_coefficient": l1, "alpha": alpha}
        loss = terms.fvu + l1 * terms.l1
        if firing_loss:
            measured["omega_firing"] = terms.firing
            loss = loss + terms.firing
        if regroup and terms.fvu.isfinite():
            profile = firing_profile(terms.sketch, sae.affinity)
            sae.groups = form_groups(profile, self.options["group_size"]).to(x.device)
        pulled = (
            self._pull(alpha, updates % self.round) if self.pull and config.alpha and update_now else None
        )
        if self.pull and config.alpha and (updates or update_now):
            measured["omega"] = self.omega
            loss = loss + alpha * self.omega
        measured["loss"] = loss
        grads = {f"gradient of {name}": p.grad for name, p in sae.named_parameters() if p.grad is not None}
        if (
            not torch.stack([loss, *(grad.sum() for grad in grads.values())]).isfinite().all()
        ):  # one look a step; what is wrong, afterwards
            self.refuse_non_finite(
                {"activations of the LM": x} | dict(sae.named_parameters()) | measured | grads
            )
        if update_now:
            self._update(pulled)
        sae.update_statistics(terms.fired, forget.sum(), len(x))
        self._steer(terms)
        self.steps += 1
        if (
            config.resample_steps
            and self.steps % config.resample_steps == 0
            and self.steps < (1 - config.decay_fraction) * self.n_steps
        ):
            self._resample(x)
        return measured

    @torch.no_grad()
    def _pull(self, alpha: Tensor, part: int) -> tuple[Tensor, Tensor] | None:
        """Add alpha times omega's gradient to W_dec's, for the rows of one part of a round, times the steps of the round; returns both."""
        sae = self.sae
        if part == 0 and self.prepare:
            self.held = self.prepare(sae.W_dec)
        seen = sae.groups if self.arm.uses_groups else self.held
        if self.pull is None or (pull := self.pull(sae.W_dec, seen, part, self.round)) is None:
            return None
        self.omega, rows, grad = pull
        grad *= self.round * alpha
        sae.W_dec.grad.index_add_(0, rows, grad)
        return rows, grad

    @torch.no_grad()
    def _as_if_at_every_step(self, rows: Tensor, grad: Tensor):
        """Take from Adam's second moment what a pull adds to it by coming at once: (n αp)² in n steps, where n / every times (every αp)² were
        meant. rows [R] are the pull's, grad [R, D] is n αp. Without it the pull is weakened (notes.txt)."""
        if self.round > self.arm.every:
            squares = self.adam.state[self.sae.W_dec]["exp_avg_sq"]
            too_much = (1 - self.arm.every / self.round) * (1 - self.adam.param_groups[0]["betas"][1])
            squares.index_copy_(
                0, rows, squares.index_select(0, rows).addcmul_(grad, grad, value=-too_much).clamp_(min=0)
            )

    def _update(self, pulled: tuple[Tensor, Tensor] | None):
        """Take the optimiser's step on the gradients gathered."""
        sae, config = self.sae, self.config
        if self.arm.trains_decoder:
            remove_radial(sae.W_dec.grad, sae.W_dec)
        norm = (
            torch.nn.utils.clip_grad_norm_(sae.parameters(), config.grad_clip) if config.grad_clip else None
        )
        if config.feature_lr_power:
            with self._own_learning_rates():
                self.adam.step()
        else:
            self.adam.step()
        if pulled:
            rows, grad = pulled
            self._as_if_at_every_step(
                rows, grad if norm is None else grad * (config.grad_clip / norm).clamp(max=1)
            )
        self.adam.zero_grad()
        self.schedule.step()
        if self.arm.trains_decoder:
            sae.normalise_decoder()

    @contextlib.contextmanager
    def _own_learning_rates(self):
        """Inside, the optimiser's change of each feature's weights is multiplied by (mean rate / its rate)^power."""
        sae = self.sae
        rate = sae.rate.mean(0)
        factor = (
            (rate.mean().clamp(min=1e-12) / rate.clamp(min=1e-12))
            .pow(self.config.feature_lr_power)
            .clamp(0.1, 10.0)
        )
        shaped = ((sae.W_enc_FD, factor[:, None]), (sae.b_enc, factor), (sae.W_dec, factor[:, None]))
        before = [p.detach().clone() for p, _ in shaped]
        yield
        for (p, f), old in zip(shaped, before):
            p.data.copy_(old.lerp(p.data, f.expand_as(old)))

    def refuse_non_finite(self, named: dict[str, Tensor]):
        """Raises RunFailed, naming the tensors with entries that are not finite, if there are any."""
        told = [t for name, values in named.items() if (t := checkpoint.describe_nonfinite(name, values))]
        if told:
            remedy = (
                "see to the LM, its dtype and --layer"
                if "activations of the LM" in told[0]
                else "lower --lr or --alpha"
            )
            more = f"; {len(told) - 4} more" if len(told) > 4 else ""
            raise RunFailed(
                f"{'; '.join(told[:4])}{more} at step {self.steps} of arm {self.config.arm}, seed {self.seed}: {remedy}"
            )

    @torch.no_grad()
    def _steer(self, terms: Terms):
        """Multiply lambda by (L0 / target)^0.01, L0 averaged over some 10 steps, and alpha by (sharing / target)^0.01, sharing
        the firing of the forget group on retain text over that on forget text, averaged over some 100 steps. Alpha stays in [0.01, 100]:
        a target out of reach would drive it up without end, and beyond 100 the group no longer fires on what it is kept for."""
        if self.steered_l0:
            self.l0 = 0.9 * self.l0 + 0.1 * terms.l0
            self.log_l1 += 0.01 * (self.l0.clamp(min=1e-3) / self.config.target_l0).log().clamp(-1, 1)
        if self.arm.steered and self.config.alpha:
            on_retain, on_forget = self.sae.rate[:, : self.options["forget_features"]].sum(1)
            measured = on_retain / on_forget.clamp(min=1e-12)
            off = (measured / self.options["target_sharing"]).clamp(min=1e-3)
            self.log_alpha += 0.01 * off.log().clamp(-1, 1)
            self.log_alpha.clamp_(math.log(1e-2), math.log(100.0))

    @torch.no_grad()
    def _resample(self, x: Tensor):
        """Point dead features at badly reconstructed rows of the batch (drawn by squared error), with the living's mean encoder
        norm and bias and fresh Adam moments (after Bricken et al., Towards Monosemanticity, 2023, appendix on resampling)."""
        sae = self.sae
        dead = (sae.idle >= self.config.dead_tokens).nonzero()[:, 0]
        if not len(dead):
            return
        error = torch.cat(
            [part - sae(part) for part in x.split(256)]
        )  # in parts: [B, F] of a large dictionary is larger than its weights
        chosen = torch.multinomial(
            error.pow(2).sum(1).cpu(), min(len(dead), len(x)), generator=self.generator
        ).to(x.device)
        dead = dead[: len(chosen)]
        direction = torch.nn.functional.normalize(error[chosen], dim=1)
        alive = sae.idle < self.config.dead_tokens
        size, bias = (
            (sae.W_enc_FD[alive].norm(dim=1).mean(), sae.b_enc[alive].mean()) if alive.any() else (1.0, 0.0)
        )
        if self.arm.trains_decoder:
            sae.W_dec[dead] = direction
        else:
            direction = sae.W_dec[dead]
        sae.W_enc_FD[dead] = size * direction
        sae.b_enc[dead] = bias
        sae.idle[dead] = 0
        for parameter in (sae.W_dec, sae.W_enc_FD, sae.b_enc):
            for moment in ("exp_avg", "exp_avg_sq") if parameter.requires_grad else ():
                self.adam.state[parameter][moment][dead] = 0.0
        self.resampled += len(dead)


# ------------------------------------------------------------------------------------------------ run


class Run:
    """One run folder: its trainers, its log, its checkpoints, its results."""

    def __init__(self, out_dir: str, requested: Request, config: Config, testbed: Testbed, n_steps: int):
        self.folder, self.config, self.testbed, self.n_steps = Path(out_dir), config, testbed, n_steps
        self.about = {
            "requested": asdict(requested),
            "config": asdict(config),
            "testbed": results.described(testbed),
        }
        identity = results.what_trained(self.about["config"], self.about["testbed"])
        self.made_by = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.warnings: list[str] = list(testbed.notes)
        self.passes: dict[str, int] = {}  # over each domain's text, by the stream

    def start(self, block: ActivationBlock, saved: tuple[dict, dict] | None):
        """Make the trainers and the log: anew from the stream's first block, or as a checkpoint holds them. Raises WrongRequest, RunFailed."""
        run_folder.make(self.folder)
        run_folder.refuse_foreign(self.folder, self.config.seeds)
        run_folder.lock(self.folder)
        run_folder.remove_half_written(self.folder)
        if not saved:
            run_folder.start_anew(self.folder)
        for part in ("checkpoints", "eval"):
            (self.folder / part).mkdir(exist_ok=True)
        self.trainers = [
            Trainer(self.config, seed, self.testbed.d_in, self.n_steps, block) for seed in self.config.seeds
        ]
        about = self.about | run_folder.provenance()
        if saved:
            tensors, facts = saved
            self.warnings = facts["warnings"]
            try:
                for i, (trainer, known) in enumerate(zip(self.trainers, facts["trainers"])):
                    trainer.restore(
                        {
                            name.removeprefix(f"{i}."): t
                            for name, t in tensors.items()
                            if name.startswith(f"{i}.")
                        },
                        known,
                    )
            except (KeyError, RuntimeError) as error:
                raise WrongRequest(
                    f"{self.folder} was begun by another version of this program, which keeps other state ({error}): --overwrite it"
                ) from error
            step = facts["position"]["step"]
            print(f"{self.folder} goes on at step {step} of {self.n_steps}")
            before = run_folder.read_run_json(self.folder / "config.json", {"requested", "config"})
            if others := [
                k
                for k in ("versions", "hardware", "git")
                if before.get(k) != json.loads(json.dumps(about[k]))
            ]:
                self.warnings.append(
                    f"begun with other {', '.join(others)} than it went on with at step {step}: not the same bits as in one go"
                )
        else:
            write_json(self.folder / "config.json", seal(about))
        records = sorted(
            (record for trainer in self.trainers for record in trainer.history),
            key=lambda record: record["step"],
        )  # stable: seeds in order
        write_whole(
            self.folder / "train_log.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode()
        )
        self.log = (self.folder / "train_log.jsonl").open("a")

    def tell_restart(self):
        """Say that an earlier start is lost, where there is no checkpoint of it; as a warning where they were
        removed."""
        if (self.folder / "config.json").exists():
            print(f"{self.folder} was begun before and holds no checkpoint: it starts again at step 0")
            if not (self.folder / "checkpoints").is_dir():
                self.warnings.append("begun before, and its checkpoints were gone: trained again from step 0")

    @property
    def training(self) -> list[Trainer]:
        """The trainers that have not failed."""
        return [trainer for trainer in self.trainers if not trainer.failed]

    def step(self, x: Tensor, forget: Tensor, log: bool):
        """One step of every seed; one that fails is told and left behind."""
        for trainer in self.training:
            with self._left_behind(trainer):
                measured = trainer.step(x, forget)
                if log:
                    trainer.refuse_non_finite(dict(trainer.sae.named_parameters()))
                    trainer.history.append(self._record(trainer, measured))
                    with writing(self.folder / "train_log.jsonl"):
                        self.log.write(json.dumps(trainer.history[-1]) + "\n")
                        self.log.flush()

    @contextlib.contextmanager
    def _left_behind(self, trainer: Trainer):
        """Inside, RunFailed is the failure of this trainer alone."""
        try:
            yield
        except CannotWrite:
            raise
        except RunFailed as failed:
            trainer.failed = str(failed)
            tqdm.write(f"{self.folder}: seed {trainer.seed} failed: {failed}", file=sys.stderr)

    def save(self, at: checkpoint.Position):
        """Write a checkpoint. A trainer whose state is not finite has failed and leaves no tensors."""
        tensors, facts = {}, []
        for i, trainer in enumerate(self.trainers):
            with self._left_behind(trainer):
                if not trainer.failed:
                    state = trainer.state()[0]
                    trainer.refuse_non_finite(
                        {name: t for name, t in state.items() if not name.startswith("log_")}
                    )
                    tensors |= {f"{i}.{name}": t for name, t in state.items()}
            facts.append(trainer.state()[1])
        checkpoint.save(
            self.folder,
            at.step,
            tensors,
            {"made_by": self.made_by, "position": asdict(at), "warnings": self.warnings, "trainers": facts},
        )

    def _record(self, trainer: Trainer, measured: dict[str, Tensor]) -> dict:
        sae = trainer.sae
        return (
            {"seed": trainer.seed, "step": trainer.steps, "tokens": trainer.steps * self.config.batch_size}
            | {k: v.item() for k, v in measured.items()}
            | {
                "frac_dead": (sae.idle >= self.config.dead_tokens).float().mean().item(),
                "sharing": sharing(sae.rate).item(),
                "between_domains": omega_between_domains(sae.W_dec.detach(), sae.affinity).item(),
            }
        )

    def progress(self) -> str:
        last = self.training[-1].history[-1:] if self.training else []
        return f"{self.folder.name}: " + (f"fvu {last[0]['fvu']:.3f} l0 {last[0]['l0']:.1f}" if last else "-")

    def evaluate(self, rows, evaluator: Evaluator | None, made_by: dict, train_seconds: float, bar: tqdm):
        """Export every SAE, evaluate what was exported, and write final_info.json, last and whole; not if a seed has failed."""
        training, records = {}, {}
        for trainer in self.training:
            with self._left_behind(trainer):
                measured = self._training(trainer, train_seconds)
                record = self._exported(trainer)
                results.measure(self.folder, "eval", trainer.seed, record, rows, evaluator, made_by, bar)
                training[trainer.seed], records[trainer.seed] = measured, record
                self.warnings += [f"seed {trainer.seed}: {text}" for text in self._cut_short(trainer)]
        self.warnings += results.warnings_of(rows, records, training, self.config, self.testbed.d_in)
        failed = [t for t in self.trainers if t.failed]
        self.warnings += [f"seed {t.seed} failed: {t.failed}" for t in failed]
        write_json(self.folder / "warnings.json", self.warnings)
        self.info = {}
        if not failed:
            self.info = {"training": results.summarise(results.by_metric(list(training.values())))}
            self.info |= {row.section: results.summary_of(row.section, records) for row in rows}
            run_folder.write_result(self.folder, self.info)
            run_folder.clear_complete(self.folder)  # not before: one killed in between would be lost

    def _exported(self, trainer: Trainer) -> dict:
        """Export the SAE, once, if SAELens' format holds it: the record of its files' checksums and of what was measured on them."""
        folder = run_folder.sae_folder(self.folder, trainer.seed)
        path = run_folder.record_of(self.folder, trainer.seed)
        if self.config.skip:
            return results.new_record({})
        try:
            record = results.read_record(path)
        except Unusable as why:
            print(f"warning: {why}; evaluated anew")
            record = None
        if record is None:
            record = results.new_record({})
            write_json(path, seal(record))  # by which the SAE's folder is known to be this run's
        if record["files"] and run_folder.files_of(folder) == record["files"]:
            return record
        if record["files"]:
            print(
                f"warning: {folder} is not as it was written: the checksum of a file is wrong; exported anew"
            )
        trainer.sae.temperature.zero_()  # above 0 only where the time budget ended training, which is warned of
        with writing(folder):
            run_folder.remove_part(folder, "sae_seed*")
            folder.mkdir(exist_ok=True)
            export(
                trainer.sae,
                folder,
                {
                    "model_name": self.testbed.name,
                    "hook_name": self.testbed.hook_name,
                    "hook_layer": self.testbed.layer,
                    "context_size": self.config.context_size,
                    "prepend_bos": True,
                },
            )
            for file in (*run_folder.written(folder, "sae_seed*"), folder):
                sync(file)
        record = results.new_record(run_folder.files_of(folder))
        with process.signals.held():
            write_json(path, seal(record))
        return record

    def _training(self, trainer: Trainer, seconds: float) -> dict:
        if not trainer.history:
            raise RunFailed("the time budget ended before the first step: raise --time_budget_minutes")
        tail = trainer.history[-max(1, len(trainer.history) // 20) :]
        mean = lambda key: float(np.mean([r[key] for r in tail]))
        tokens = trainer.steps * self.config.batch_size
        return {
            "tokens_trained": tokens,
            "final_loss": mean("loss"),
            "final_fvu": mean("fvu"),
            "final_l0": mean("l0"),
            "l1_coefficient": tail[-1]["l1_coefficient"],
            "alpha": tail[-1]["alpha"],
            "frac_dead": tail[-1]["frac_dead"],
            "resampled": trainer.resampled,
            "train_seconds": seconds,
            "tokens_per_second": tokens / seconds,
        } | {f"{domain}_text_passes": n for domain, n in self.passes.items()}

    def _cut_short(self, trainer: Trainer) -> list[str]:
        """What its training alone tells of why a seed's numbers are not to be taken at their face."""
        told = []
        losses = [record["loss"] for record in trainer.history]
        if len(losses) > 1 and np.mean(losses[-max(1, len(losses) // 20) :]) >= losses[0]:
            told.append("the loss did not fall")
        if trainer.steps < trainer.n_steps:
            told.append(f"the time budget ended training after {trainer.steps} of {trainer.n_steps} steps")
        return told


def train(
    runs: list[Run],
    stream: ActivationStream,
    at: checkpoint.Position,
    n_steps: int,
    started: float,
    deadline: float,
    interval: float,
):
    """Train all SAEs of all runs on one LM pass, from a position (whose block the stream holds) to n_steps, the deadline (time.monotonic()) or the last one's failure.

    A checkpoint of every run is written every `interval` seconds, less often when that would take over a fiftieth of the time,
    at the end, and when a signal comes (Interrupted goes on).
    """
    began, size = time.monotonic(), runs[0].config.batch_size
    before, next_save = replace(at), began + interval
    at.together = tuple(sorted(run.folder.name for run in runs))

    def save():
        nonlocal next_save
        now = time.monotonic()
        at.train_seconds, at.used_seconds, at.written = (
            before.train_seconds + now - began,
            before.used_seconds + now - started,
            at.written + 1,
        )
        at.passes = dict(stream.passes)
        for run in runs:
            run.save(at)
        process.signals.something_is_kept()
        spent = time.monotonic() - now
        next_save = now + spent + max(interval, 50 * spent)

    going = lambda: at.step < n_steps and time.monotonic() < deadline and any(run.training for run in runs)

    def train_on_block():
        for x, forget in islice(stream.block.batches(size), at.batch, None):
            with process.signals.held():
                for run in runs:
                    run.step(x, forget, log=at.step % 25 == 0 or at.step == n_steps - 1)
                at.step, at.batch = at.step + 1, at.batch + 1
                if time.monotonic() > next_save and going():
                    save()
            bar.update(size)
            if not going():
                return
        with process.signals.held():
            at.block, at.batch = at.block + 1, 0
        bar.set_postfix_str(", ".join(run.progress() for run in runs[:3]))

    with tqdm(
        total=n_steps * size,
        initial=at.step * size,
        unit="tok",
        unit_scale=True,
        desc="training",
        mininterval=2,
    ) as bar:
        try:
            while going():
                train_on_block()
                if going():
                    stream.next_block()
        except Interrupted as stop:
            process.signals.taken()
            with process.signals.held():
                save()
            stop.told = (
                f"at step {at.step} of {n_steps}; the same command (without --overwrite) goes on from there"
            )
            raise
        if any(run.training for run in runs):
            with process.signals.held():
                at.over = True
                save()


def refuse_more_than_memory(configs: list[Config], testbed: Testbed):
    """Raises WrongRequest when the memory left does not hold what training surely needs: weights and Adam's moments of every SAE,
    one SAE's gradients and features, and a block of activations that is shuffled."""
    weights = [8 * testbed.d_in * c.d_sae for c in configs]  # bytes of W_enc and W_dec
    need = sum(3 * len(c.seeds) * w for c, w in zip(configs, weights)) + max(
        w + 6 * c.batch_size * c.d_sae for c, w in zip(configs, weights)
    )
    need += 8 * configs[0].buffer_tokens * testbed.d_in
    left = process.memory_left(testbed.lm.device)
    if need > left:
        raise WrongRequest(
            f"training needs at least {need / 1e9:.1f} GB of memory and {left / 1e9:.1f} GB are left: lower --d_sae, --batch_size, --buffer_tokens, or the number of --seeds or run folders"
        )


def run_experiments(command: Command, configs: list[Request], started: float):
    """Train the runs that are not complete, from where their checkpoints stand, and evaluate all of them."""
    process.keep_freed_memory()
    names, asked = to_train(command, configs)
    one_pass(names, asked)
    complete = [pair for pair in zip(command.out_dir, configs) if pair[0] not in names]
    if complete or not command.overwrite and any(checkpoint.steps_in(Path(name)) for name in names):
        process.signals.something_is_kept()
    rows = evals.rows_of(command.evals)
    wanted = (asked or configs)[0]
    least = max(wanted.batch_size, wanted.context_size or 0)
    testbed = testbeds.load(wanted, wanted.tokens, least, any(row.asks for row in rows))
    if wanted.testbed == "auto" and testbed.name != CUSTOM:
        print(f"testbed: auto means {testbed.name}")
    resolved = [resolve(c, testbed) for c in asked]
    context_size = one_pass(names, resolved).context_size if asked else resolve(wanted, testbed).context_size
    finished = [results.Finished(Path(name), resolve(config, testbed), testbed) for name, config in complete]
    if rows:
        evaluation_contexts(testbed, context_size)  # refuses text that is too short before training
    runs, train_seconds = [], 0.0
    if asked:
        runs, train_seconds = train_runs(command, asked, resolved, names, testbed, bool(rows), started)
    some_left = finished or any(run.training for run in runs)
    evaluator = Evaluator(testbed, context_size) if rows and some_left else None
    made_by = results.maker(evaluator) if evaluator else {}
    parts = len(rows) * sum(len(run.training) for run in runs)
    parts += len(rows) * sum(len(run.seeds) for run in finished)
    with tqdm(total=parts, desc="evaluating", unit="part") as bar:
        for run in runs:
            run.evaluate(rows, evaluator, made_by, train_seconds, bar)
        for run in finished:
            run.evaluate(rows, evaluator, made_by, bar)
    print("---")
    for run in (*runs, *finished):
        told = run.info, run.warnings, evals.ROWS, testbed.published
        results.print_summary(run.folder.name, run.folder, *told)
    print(f"total_seconds: {time.monotonic() - started:.0f}")
    failed = [(run, trainer) for run in runs for trainer in run.trainers if trainer.failed]
    if failed:
        where = ", ".join(f"{run.folder} seed {trainer.seed}" for run, trainer in failed)
        raise RunFailed(f"{failed[0][1].failed} (no final_info.json where a seed failed: {where})")


def train_runs(
    command: Command,
    asked: list[Request],
    resolved: list[Config],
    names: list[str],
    testbed: Testbed,
    evaluated: bool,
    started: float,
) -> tuple[list[Run], float]:
    """Train all runs that are not complete on one pass of the LM; the runs, and the seconds that training took."""
    shared = one_pass(names, resolved)
    n_steps = shared.tokens // shared.batch_size
    refuse_more_than_memory(resolved, testbed)
    runs = [Run(out_dir, *pair, testbed, n_steps) for out_dir, *pair in zip(names, asked, resolved)]
    saved = None if command.overwrite else checkpoint.newest_common({run.folder: run.made_by for run in runs})
    if not saved and not command.overwrite:
        for run in runs:
            run.tell_restart()
    at = checkpoint.Position(**saved[0][1]["position"]) if saved else checkpoint.Position()
    if at.over:
        stream, block = None, ActivationBlock.blank(testbed.d_in, testbed.lm.device)
    else:
        stream = ActivationStream(testbed, shared.context_size, shared.buffer_tokens)
        stream.skip_blocks(at.block)
        block = stream.next_block()
        if evaluated and not saved and stream.with_massive > 1 / 8:
            Evaluator(testbed, shared.context_size)  # refuses an LM that it would refuse after training
    for run, state in zip(runs, saved or [None] * len(runs)):
        run.start(block, state)
    del saved, state, block
    if not at.over:
        deadline = started + 0.7 * 60 * shared.time_budget_minutes - at.used_seconds
        train(runs, stream, at, n_steps, started, deadline, command.checkpoint_seconds)
    for run in runs:
        run.passes = at.passes
        run.warnings += [
            f"the {domain} text is short: training read it {n} times"
            for domain, n in at.passes.items()
            if n > 10
        ]
    print("; ".join(f"{domain} text: pass {n}" for domain, n in at.passes.items()))
    return runs, at.train_seconds


def resolve(request: Request, testbed: Testbed) -> Config:
    """Every setting of a run; what is left open takes the testbed's default. Raises WrongRequest."""
    config = settings.complete(request, Config, testbed.name, testbed.defaults, testbed.d_in)
    longest = most_positions(testbed.lm.config.to_dict())
    if config.context_size > longest:
        more = f"is more than the {longest} positions of the LM"
        raise WrongRequest(f"--context_size {config.context_size} {more}")
    return config


def main(command: Command, configs: list[Request], started: float | None = None) -> int:
    """Exit code of the command; `started` is when its time began to count (time.monotonic())."""
    try:
        with process.signals, process.global_state_kept():
            run_experiments(command, configs, time.monotonic() if started is None else started)
        return 0
    except (Exception, Interrupted) as error:
        return tell(error)
    finally:
        run_folder.unlock()


def leave(number, frame):
    """A signal handler for the time when all is written and told: a signal only ends the process sooner."""
    os._exit(CODE)


if __name__ == "__main__":
    CODE = main(COMMAND, CONFIGS, STARTED)
    sys.stdout.flush()
    for number in stops():
        signal.signal(number, leave)
    sys.exit(CODE)
