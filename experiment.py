"""Does an adaptive orthogonality loss make a sparse autoencoder (SAE) separate knowledge?

    python experiment.py --out_dir=run_1                     # run 1 of the plan, nothing else needed
    python experiment.py --out_dir run_0 run_1 run_6         # several runs on one pass of the LM
    python experiment.py --out_dir=mine/it --arm=fixed --alpha=0.3 --seeds 0 1 2 3 4
    python experiment.py --out_dir=mine --arm fixed adaptive --alpha 0.1 1    # a grid: 4 runs, in mine/
    python experiment.py --out_dir=mine/it --arm=fixed --dry_run              # says what it would do
    python experiment.py --out_dir=run_1                     # again: an interrupted run goes on
    python plot.py                                           # figures over all run folders

The file reads in the order in which data flows: plan and arms (their losses: losses.py) -> OrthogonalSAE
(on what the activation stream gives: stream.py) -> trainer (a batch by hand: gradients.py) -> training loop
over runs (run.py) -> the command, with its evaluations (evals/). Letters at the end of names are dimensions:
B batch rows, D d_in, F d_sae, G groups."""

import python_version  # noqa: F401  (first: refuses a Python that this does not work with)

# isort: split
import signal

if __name__ == "__main__":  # Ctrl-C while the next lines are imported: an end without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import atexit
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sae_separation.errors import Interrupted, begin, finish

if __name__ == "__main__":  # from here on, whatever ends the command ends with its exit code and one line
    begin()

from sae_separation import checkpoint, dry_run, evals, process, ranks, results, resume, run_folder
from sae_separation import config as settings
from sae_separation.arms import (
    BOTH,
    CHUNKS,
    DIRECTIONS,
    FEATURES,
    FORGET_GROUP,
    GROUPS,
    HINGES,
    NEAR_START,
    Arm,
)
from sae_separation.config import BY_LAMBDA, Command, check, one_pass, passes, to_train
from sae_separation.saved_run import refuse_without_features

STARTED = time.monotonic()

# -------------------------------------------------------------------------------- plan and arms

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
    # told the labels, without orthogonality or without an SAE
    "run_11": {"arm": "vanilla_selected"},
    "run_12": {"arm": "difference_of_means"},
    "run_13": {"arm": "leace"},
    "run_14": {"arm": "linear_gate"},
    "run_15": {"arm": "mlp_gate"},
    "run_16": {"arm": "token_list"},
    "run_17": {"arm": "mean_guard"},
    "run_18": {"arm": "bayes_guard"},
    "run_19": {"arm": "rmu"},
    "run_20": {"arm": "npo"},
    "run_21": {"arm": "oracle"},
    # told the labels too: directions alone, directions and firing; in other ways
    "run_22": {"arm": "adaptive_directions", "alpha": 0.1},
    "run_23": {"arm": "adaptive_both", "alpha": 1.0},
    "run_24": {"arm": "gsae", "alpha": 10.0},
    "run_25": {"arm": "routed"},
    # told nothing: controls
    "run_26": {"arm": "soft_frozen_decoder"},
    "run_27": {"arm": "frozen_encoder"},
    # told the labels, and reads the tokens before: in the stream, or in SAE features
    "run_28": {"arm": "context_gate"},
    "run_29": {"arm": "feature_gate", "features_of": "run_0"},
    "run_30": {"arm": "feature_gate", "features_of": "run_9"},
    "run_31": {"arm": "feature_gate", "features_of": "run_6"},
    "run_32": {"arm": "feature_gate", "features_of": "run_27"},  # the control: encoders were never trained
}


ARMS = {
    "vanilla": Arm(),
    "frozen_decoder": Arm(trains_decoder=False),
    "frozen_encoder": Arm(trains_encoder=False),
    "soft_frozen_decoder": Arm(options=NEAR_START),
    "fixed": Arm(loss="all_pairs_grad", prepare="rows_and_gram"),
    "grouped": Arm(
        loss="grouped_grad", prepare="groups_and_pairs", longest=8, uses_groups=True, options=GROUPS
    ),
    "adaptive": Arm(firing_loss="domain_hinges", steers=("sharing",), options=FORGET_GROUP | HINGES),
    "adaptive_directions": Arm(
        loss="forget_overlap_grad",
        prepare="all_and_retain_rate",
        longest=1,
        steers=("overlap",),
        options=FORGET_GROUP | DIRECTIONS,
    ),
    "adaptive_both": Arm(
        loss="forget_overlap_grad",
        prepare="all_and_retain_rate",
        longest=1,
        firing_loss="domain_hinges",
        steers=("sharing", "overlap"),
        options=FORGET_GROUP | DIRECTIONS | HINGES | BOTH,
    ),
    "gsae": Arm(firing_loss="group_cross_entropy", options=FORGET_GROUP),
    "routed": Arm(routed=True, options=FORGET_GROUP),
    "ortsae": Arm(loss="ortsae_grad", prepare="chunks_of_rows", every=5, gentle=7.5e-4, options=CHUNKS),
    "vanilla_selected": Arm(selected=True),
    "loaded": Arm(trains_sae=False, loads_sae=True),  # SAEs that were trained elsewhere (--evaluate)
}
GATES = ("linear_gate", "mlp_gate", "context_gate", "token_list", "mean_guard", "bayes_guard")
METHODS = ("difference_of_means", "leace", *GATES, "rmu", "npo", "oracle")  # methods.FITTED
ARMS |= {method: Arm(trains_sae=False) for method in METHODS}
ARMS["feature_gate"] = Arm(trains_sae=False, options=FEATURES)


@settings.with_arms(ARMS)
class Request(settings.Request):
    """What is asked of one run. What is None or empty takes the testbed's default."""


@settings.with_arms(ARMS)
class Config(settings.Config):
    """One run with every setting."""


def parse_command(argv: Sequence[str]) -> tuple[Command, list[Request]]:
    """The command and one request per run folder (config.parse_command). Raises WrongRequest."""
    about = (__doc__ or "").rpartition("\n\n")[0]  # the last paragraph is about this file
    return settings.parse_command(argv, PLAN, ARMS, Request, about)


def unfinished(command: Command, requests: Sequence[Request]) -> tuple[Command, list[Request]]:
    """What of the command is left to do (resume.unfinished): nothing in a dry run, which says what it would
    be. Raises WrongRequest."""
    command, left = resume.unfinished(command, requests, PLAN)
    refuse_without_features(*to_train(command, left))
    if command.dry_run:
        dry_run.tell(command, left, Config)
        return replace(command, out_dir=()), []
    return command, left


if __name__ == "__main__":  # answer --help and wrong requests before anything heavy is imported
    atexit.register(run_folder.unlock)
    try:
        with ranks.one_voice():
            COMMAND, CONFIGS = unfinished(*parse_command(sys.argv[1:]))
        if not CONFIGS:
            sys.exit(0)
        check(COMMAND, CONFIGS)
    except Exception as error:
        sys.exit(ranks.tell(error, began=False))

with process.without_collections():
    from itertools import islice

    import torch
    from torch import Tensor
    from tqdm import tqdm

    from sae_separation import losses, openmp, progress, testbeds
    from sae_separation.adam import clip, own_learning_rates
    from sae_separation.blocks import ActivationBlock
    from sae_separation.devices import upload
    from sae_separation.evals.evaluator import Evaluator, evaluation_contexts
    from sae_separation.gradients import Terms, accumulate_grads
    from sae_separation.kept import cache_of
    from sae_separation.lm import Testbed
    from sae_separation.losses import has_bf16
    from sae_separation.resample import resample
    from sae_separation.rounds import Rounds, steps_of_round
    from sae_separation.run import (
        Run,
        UntrainedRun,
        evaluate_runs,
        refuse_more_than_memory,
        runs_of,
        share_news,
    )
    from sae_separation.shards import WHOLE, Shard
    from sae_separation.sparse import ACTIVATIONS, JUMPS, hold_near, remove_radial, unit_rows
    from sae_separation.start import directions, set_biases
    from sae_separation.stream import ActivationStream, works_ahead
    from sae_separation.testbeds import resolve
    from sae_separation.tracking import Tracking

# -------------------------------------------------------------------------------- the SAE


class OrthogonalSAE(torch.nn.Module):
    """f = act((u - b_dec) W_enc + b_enc),  u_hat = f W_dec + b_dec + skip (u - b_dec),  rows of W_dec of unit
    norm.

    W_enc [D, F] (kept as its transpose W_enc_FD), b_enc [F], W_dec [F, D], b_dec [D]. u is x scaled by
    `scale`, which makes the mean of ||u||² equal d_in, or with `layer_norm` x less its mean over its own
    standard deviation; x_hat undoes that. Any leading shape. act is one of ACTIVATIONS. Statistics and state
    live in buffers, so that they move and are saved with the module: `rate` [2, F] firing rate on forget and
    retain text (exponential moving average over batches), `idle` [F] tokens since the feature last fired,
    `groups` [G, size] indices of the features of each group (-1: none), `unlocked` how many features take
    part (the first ones), `threshold` (batchtopk, matryoshka) and `temperature` (softk) of the activation
    function, `active` features a row of the last batch trained on. Thresholds of jumprelu are trained: exp of
    log_threshold [F]. With a `shard` F is that share of the features (shards.py); `unlocked` and `groups`
    count all.
    """

    scale: Tensor
    rate: Tensor
    idle: Tensor
    groups: Tensor
    unlocked: Tensor
    threshold: Tensor
    temperature: Tensor
    active: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        seed: int,
        scale: float = 1.0,
        activation: str = "relu",
        k: int = 16,
        bandwidth: float = 0.5,
        layer_norm: bool = False,
        skip: float = 0.0,
        orthogonal_init: bool = False,
        shard: Shard = WHOLE,
    ):
        super().__init__()
        self.shard = shard
        self.activation, self.k, self.bandwidth = activation, k, bandwidth
        self.layer_norm, self.skip = layer_norm, skip
        W_dec = directions(d_sae, d_in, seed, orthogonal_init, shard)
        n = len(W_dec)
        self.W_dec = torch.nn.Parameter(W_dec)
        # measured: the other way round, FVU ends a tenth and a sixth higher (notes.txt)
        start = 1.0 if activation in BY_LAMBDA else 0.5
        # W_encᵀ: a feature's weights lie side by side, as their gradient comes out of a sparse product
        self.W_enc_FD = torch.nn.Parameter(start * W_dec)
        self.b_enc = torch.nn.Parameter(torch.zeros(n))
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))
        if activation == "jumprelu":
            self.log_threshold = torch.nn.Parameter(torch.zeros(n))
        self.register_buffer("scale", torch.tensor(1.0 if layer_norm else float(scale)))
        self.register_buffer("rate", torch.zeros(2, n))
        self.register_buffer("idle", torch.zeros(n, dtype=torch.long))
        self.register_buffer("groups", torch.full((1, 1), -1))
        self.register_buffer("unlocked", torch.tensor(d_sae))
        self.register_buffer("threshold", torch.tensor(0.0))
        self.register_buffer("temperature", torch.tensor(0.0))
        self.register_buffer("active", torch.tensor(math.inf))

    @property
    def W_enc(self) -> Tensor:
        return self.W_enc_FD.T

    @property
    def thresholds(self) -> Tensor:
        """Above which a feature fires at inference: [F], or 0-d of all alike."""
        return self.log_threshold.exp() if self.activation == "jumprelu" else self.threshold

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u [..., D], and the mean and the size that lead back: x = u · size + mean. Layer norm as SAELens
        has it."""
        if not self.layer_norm:
            return x * self.scale, torch.zeros_like(self.scale), 1 / self.scale
        mean, size = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return (x - mean) / (size + 1e-5), mean, size

    def pre_activations(self, u: Tensor, some: slice = slice(None), out_FB: Tensor | None = None) -> Tensor:
        """Of u [B, D], less b_dec, for all or some features: [B, F], or written into out [F, B]; in u's
        precision."""
        W_FD, b_F = self.W_enc_FD[some].to(u), self.b_enc[some].to(u)
        if out_FB is None:
            return torch.addmm(b_F, u, W_FD.T)
        return torch.addmm(b_F[:, None], W_FD, u.T, out=out_FB)

    def encode(self, x: Tensor) -> Tensor:
        """x [..., D] in the LM's units -> f [..., F] in units of u."""
        pre = (self.normalise(x)[0] - self.b_dec) @ self.W_enc + self.b_enc
        if self.activation in JUMPS:  # at inference a feature is by itself: above its threshold of training
            f = torch.relu(pre) * (pre > self.thresholds)
        else:
            f = ACTIVATIONS[self.activation](pre, self)[0]
        (unlocked,) = self.shard.within([int(self.unlocked)], n := f.shape[-1])
        return f if unlocked == n else f * (torch.arange(n, device=f.device) < unlocked)

    def decode(self, f: Tensor, x: Tensor) -> Tensor:
        """f [..., F] of x [..., D] -> x_hat [..., D] in the LM's units; x counts for `layer_norm` and `skip`
        only."""
        u, mean, size = self.normalise(x)
        return (self.shard.sum(f @ self.W_dec) + self.b_dec + self.skip * (u - self.b_dec)) * size + mean

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), x)

    @property
    def affinity(self) -> Tensor:
        """a = (p_forget - p_retain) / (p_forget + p_retain) in [-1, 1], [F]; 0 for a feature that never
        fired."""
        total = self.rate.sum(0)
        return (self.rate[0] - self.rate[1]) / total.clamp(min=1e-12)

    def loss_terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """FVU and mean Σ f / √d_in of x [B, D], differentiable: the plain twin of `accumulate_grads` (relu,
        softk)."""
        f = self.encode(x)
        fvu = (self.decode(f, x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        return fvu, f.sum() / len(x) / math.sqrt(x.shape[1])

    @torch.no_grad()
    def update_statistics(self, fired_2F: Tensor, n_forget: Tensor, n_rows: int, decay: float = 0.99):
        """Fold one batch's firing counts into `rate` and `idle`; a domain absent from the batch keeps its
        rate."""
        for rate_F, fired_F, n in zip(self.rate, fired_2F, (n_forget, n_rows - n_forget)):
            new_F = decay * rate_F + (1 - decay) * fired_F / n.clamp(min=1)
            rate_F.copy_(torch.where(n > 0, new_F, rate_F))
        self.idle += n_rows
        self.idle.masked_fill_(fired_2F.sum(0) > 0, 0)


# -------------------------------------------------------------------------------- trainer


class Trainer:
    """One SAE in training: Adam, unit decoder rows, lambda steered to the target L0, dead features
    resampled.

    A GPU works behind the host, which waits for it where a number there decides what comes next. That is put
    off to the steps that are logged (`step` with `look`): whether all is finite, forming groups, resampling.
    On a CPU every step is looked at (`always_looks`).
    """

    def __init__(
        self,
        config: settings.Config,
        seed: int,
        d_in: int,
        n_steps: int,
        first_block: ActivationBlock,
        shard: Shard = WHOLE,
    ):
        self.config, self.arm, self.seed = config, ARMS[config.arm], seed
        self.n_steps, self.shard = n_steps, shard
        device, x = first_block.x.device, first_block.x
        self.dtype = torch.bfloat16 if has_bf16(device) else torch.float32
        parts = (part.pow(2).sum() for part in x.split(4096))  # in parts: no copy of the block
        scale = math.sqrt(d_in / (sum(parts, start=x.new_zeros(())) / len(x)).item())
        options = config.activation, config.k, config.bandwidth, config.layer_norm, config.skip
        options = d_in, config.d_sae, seed, scale, *options, config.orthogonal_init
        self.sae = OrthogonalSAE(*options, shard).to(device)
        for name in ("groups", "unlocked", "temperature"):  # what the host decides, it does not ask a GPU for
            setattr(self.sae, name, getattr(self.sae, name).cpu())
        self.steered_l0 = config.target_l0 if config.activation in BY_LAMBDA else 0.0
        set_biases(self.sae, config, x)
        self.sae.W_dec.requires_grad_(self.arm.trains_decoder)
        self.sae.W_enc_FD.requires_grad_(self.arm.trains_encoder)
        self.accumulate_grads, self.remove_radial, self.unit_rows = accumulate_grads, remove_radial, unit_rows
        if config.compile:
            self.accumulate_grads = torch.compile(accumulate_grads)
            self.remove_radial, self.unit_rows = torch.compile(remove_radial), torch.compile(unit_rows)
        self.generator = torch.Generator().manual_seed(seed)
        self.adam = torch.optim.Adam(self.sae.parameters(), lr=config.lr, betas=(0.9, 0.999), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, self._lr_factor)
        l1 = config.l1 if config.activation in BY_LAMBDA else 0.0
        alpha = config.alpha if self.arm.has_loss else 0.0
        self.log_l1 = torch.tensor(math.log(l1) if l1 else -math.inf, device=device)
        self.log_alpha = torch.tensor(math.log(alpha) if alpha else -math.inf, device=device)
        self.l0 = torch.tensor(self.steered_l0 or 0.0, device=device)  # moving average that steers lambda
        self.options = {name: getattr(config, name) for name in self.arm.options}
        self.scalars = ["log_l1", "log_alpha", "l0", "omega"]  # of a checkpoint
        if "alpha_directions" in self.options:
            start = math.log(self.options["alpha_directions"]) if alpha else -math.inf
            self.log_alpha_directions = torch.tensor(start, device=device)
            self.scalars.append("log_alpha_directions")
        # a function of the seed: no checkpoint need hold it
        self.start_FD = self.sae.W_dec.detach().clone() if "least_cosine" in self.options else None
        self.rounds = self._rounds() if self.arm.loss and alpha else None
        self.firing_loss = (
            self.arm.function(self.arm.firing_loss, config) if self.arm.firing_loss and alpha else None
        )
        self.omega = torch.tensor(0.0, device=device)  # of the rows last visited
        self.always_looks = device.type == "cpu"
        self.x_sum = torch.tensor(0.0, device=device)  # of the batches since the last look
        self.due: list[str] = []  # at the next look: "groups", "resample"
        self.steps, self.resampled = 0, 0
        self.history: list[dict] = []  # one record a logged step
        self.about = {"selected": True} if self.arm.selected else {}
        self.failed = ""  # why it does not go on

    def _rounds(self) -> Rounds:
        config, arm = self.config, self.arm
        about = {"generator": self.generator, "rate": self.sae.rate, "shard": self.shard}
        prepare = arm.function(arm.prepare, config, **about)
        steps = steps_of_round(config.d_sae, config.alpha * config.lr, arm.every, arm.longest, arm.gentle)
        return Rounds(arm.function(arm.loss, config, shard=self.shard), prepare, steps, arm.every)

    # what a checkpoint holds
    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Everything that the next step depends on, and the log: tensors by name, and facts for JSON."""
        tensors = {f"sae.{name}": t for name, t in self.sae.state_dict().items()}
        tensors |= {name: getattr(self, name) for name in self.scalars}
        tensors |= {"generator": self.generator.get_state()} | (self.rounds.state() if self.rounds else {})
        for name, parameter in self.sae.named_parameters():
            tensors |= {f"adam.{name}.{k}": v for k, v in self.adam.state.get(parameter, {}).items()}
            tensors |= {} if parameter.grad is None else {f"grad.{name}": parameter.grad}
        names = ("seed", "steps", "resampled", "history", "failed", "due")
        facts = {name: getattr(self, name) for name in names}
        return tensors, facts | {"updates": self.schedule.last_epoch}

    def restore(self, tensors: dict[str, Tensor], facts: dict):
        """Take over what `state` gave, of all features."""
        for name in ("steps", "resampled", "history", "failed"):
            setattr(self, name, facts[name])
        self.due = facts.get("due", [])  # checkpoints from before there was anything to put off lack it
        if self.failed:
            return
        tensors = {name: t.to(self.l0.device) for name, t in self.shard.parts(tensors).items()}
        self.sae.groups = torch.empty_like(tensors["sae.groups"], device="cpu")
        self.sae.load_state_dict(checkpoint.under("sae.", tensors))
        self.generator.set_state(tensors["generator"].cpu())
        for name in self.scalars:
            setattr(self, name, tensors[name])
        if self.rounds:
            self.rounds.restore(tensors)
        for name, parameter in self.sae.named_parameters():
            parameter.grad = tensors.get(f"grad.{name}")
            if moments := checkpoint.under(f"adam.{name}.", tensors):
                self.adam.state[parameter] = moments
        self.schedule.last_epoch = facts["updates"]
        for group, lr in zip(self.adam.param_groups, self.schedule.base_lrs):
            group["lr"] = lr * self._lr_factor(facts["updates"])

    def gather(self, to: int):
        """Training is over: one rank takes all features, to its CPU."""
        self.shard.gather_module(self.sae, to)
        self.shard = WHOLE

    # what depends on the time in training alone
    def _lr_factor(self, update: int) -> float:
        step = update * self.config.grad_accumulation
        rise = min(1.0, (step + 1) / max(self.config.warmup_steps, 1))
        return rise * min(1.0, (self.n_steps - step) / max(self.config.decay_fraction * self.n_steps, 1))

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """lambda, alpha, and alpha of the loss on directions (the same where the arm has one loss) at this
        step: loss warm-up, and alpha's curriculum."""
        config = self.config
        warm = min(1.0, (self.steps + 1) / max(config.loss_warmup_steps, 1))
        rise = 1.0
        if config.alpha_start and config.alpha:
            rise = (config.alpha_start / config.alpha) ** max(0.0, 1 - 2 * self.steps / self.n_steps)
        alpha, directions = (log.exp() * (warm * rise) for log in (self.log_alpha, self.of_directions))
        return self.log_l1.exp() * warm, alpha, directions

    def _unlock_and_cool(self):
        """Progressive unlocking, and softk's falling temperature."""
        sae, config = self.sae, self.config
        if config.unlock_steps:
            share = min(1.0, 0.25 + 0.1 * (self.steps // config.unlock_steps))
            sae.unlocked.fill_(math.ceil(share * config.d_sae))
            sae.idle[self.shard.within([int(sae.unlocked)], len(sae.idle))[0] :] = 0
        if config.activation == "softk":
            steps = max((1 - config.decay_fraction) * self.n_steps - 1, 1)
            sae.temperature.fill_(config.temperature * max(0.0, 1 - self.steps / steps))

    def _gain(self) -> Tensor | None:
        """What each feature is multiplied by in this batch, [F]: 0 for locked ones and for feature dropout;
        None for all 1."""
        sae, p = self.sae, self.config.feature_dropout
        if not p and not self.config.unlock_steps:
            return None
        gain = (torch.arange(self.config.d_sae) < sae.unlocked).float()
        if p:
            gain = gain * (torch.rand(len(gain), generator=self.generator) >= p).to(gain) / (1 - p)
        return upload(self.shard.own(gain), sae.b_enc.device)

    def labels(self, forget: Tensor, document: Tensor | None) -> Tensor:
        """What the trainer is told of the rows' domain [B]: wrong for --label_noise of the documents, by
        their numbers and the seed."""
        noise = self.options.get("label_noise", 0.0)
        if not noise or document is None:
            return forget
        turned = self.seed * (math.sqrt(5) - 1) / 2 % 1.0  # another seed, other documents
        return forget ^ ((document + turned) % 1.0 < noise)

    # one step
    def step(self, x: Tensor, forget: Tensor, look: bool = True) -> dict[str, Tensor]:
        """One batch x [B, D]; returns its loss terms as 0-d tensors (`omega` as it was when last computed, in
        `loss` with its plain weight alpha). Raises RunFailed, with `look` or on a CPU, before anything is
        updated, if one of them or a gradient is not finite."""
        sae, config = self.sae, self.config
        look = look or self.always_looks
        self._unlock_and_cool()
        updates, batch = divmod(self.steps, config.grad_accumulation)
        update_now = batch == config.grad_accumulation - 1
        if self.arm.uses_groups and update_now and self._groups_are_due(updates):
            self._put_off("groups")
        regroup = look and self._takes_up("groups")
        signs = upload(losses.random_signs(len(x), 16, self.generator), x.device) if regroup else None
        weights = l1, alpha, alpha_directions = self._weights()
        firing_loss = None
        if self.firing_loss:
            firing_loss = self.options["forget_features"], partial(self.firing_loss, alpha=alpha)
        routed = self.options["forget_features"] if self.arm.routed else 0
        how = self.dtype, firing_loss, self._gain(), 1 / config.grad_accumulation, signs, routed
        terms = self.accumulate_grads(sae, x, forget, l1, *how)
        if terms.sketch is not None and terms.fvu.isfinite():
            about = self.shard.gather(terms.sketch), self.shard.gather(sae.affinity)
            profile = losses.firing_profile(*about)
            sae.groups = losses.form_groups(profile, self.options["group_size"])
        visited = None
        if self.rounds and update_now:
            visited = self.rounds.add_gradient(sae.W_dec, sae.groups, updates, alpha_directions)
            self.omega = self.omega if visited is None else visited.value
        measured = self._measured(terms, *weights, with_omega=bool(self.rounds and (updates or update_now)))
        if look:
            self._refuse_nonfinite_step(x, measured)
        else:
            self.x_sum += x.sum()
        if update_now:
            self._update(visited)
        sae.update_statistics(terms.fired, forget.sum(), len(x))
        self._steer(terms)
        self.steps += 1
        still = self.steps < (1 - config.decay_fraction) * self.n_steps
        if config.resample_steps and self.steps % config.resample_steps == 0 and still:
            self._put_off("resample")
        if look and self._takes_up("resample"):
            dead = sae.idle >= config.dead_tokens
            # pointed at a row, a feature of the forget group would fire on retain text under a risen alpha;
            # what forget text needs of the group its own hinge brings back
            kept = self.options["forget_features"] if self.firing_loss and self.arm.steers else 0
            how = self.start_FD, self.options.get("least_cosine", -1.0), kept
            self.resampled += resample(sae, dead, x, self.adam, self.generator, *how)
        return measured

    def _put_off(self, what: str):
        """To this step or the next one that is looked at."""
        self.due = sorted({*self.due, what})

    def _takes_up(self, what: str) -> bool:
        """Whether it is due; afterwards it no longer is."""
        due, self.due = what in self.due, [other for other in self.due if other != what]
        return due

    def _groups_are_due(self, updates: int) -> bool:
        """Every --group_update_steps, to the nearest round over all groups."""
        steps = self.rounds.steps if self.rounds else 1
        rounds = max(1, round(self.options["group_update_steps"] / steps))
        return updates % (steps * rounds) == 0

    def _measured(
        self, terms: Terms, l1: Tensor, alpha: Tensor, alpha_directions: Tensor, with_omega: bool
    ) -> dict[str, Tensor]:
        measured = {"fvu": terms.fvu, "l0": terms.l0, "l1_coefficient": l1, "alpha": alpha}
        loss = terms.fvu + l1 * terms.l1
        if terms.nested is not None:
            measured["nested_fvu"] = terms.nested
            loss = loss + terms.nested - terms.fvu
        if terms.firing is not None:
            measured["omega_firing"] = terms.firing
            loss = loss + terms.firing
        if with_omega:
            measured["omega"] = self.omega
            loss = loss + alpha_directions * self.omega
        if "sharing" in self.arm.steers:
            measured["group_sharing"] = self._group_sharing()
        if "overlap" in self.arm.steers:
            measured |= {"overlap": self._overlap(), "alpha_directions": alpha_directions}
        return measured | {"loss": loss}

    def _refuse_nonfinite_step(self, x: Tensor, measured: dict[str, Tensor]):
        """One look; what is wrong, if anything is, afterwards. Raises RunFailed."""
        named = dict(self.sae.named_parameters())
        grads = {f"gradient of {name}": p.grad for name, p in named.items() if p.grad is not None}
        sums = [measured["loss"], self.x_sum, *(grad.sum() for grad in grads.values())]
        if not self.shard.sum(torch.stack(sums)).isfinite().all():
            seen = {
                "activations of the LM": x,
                "activations of the LM, their sum since the last look": self.x_sum,
            }
            self.refuse_nonfinite(seen | named | measured | grads)
        self.x_sum.zero_()

    def refuse_nonfinite(self, named: dict[str, Tensor]):
        """Raises RunFailed, naming the tensors with entries that are not finite, if there are any."""
        where = f"at step {self.steps} of arm {self.config.arm}, seed {self.seed}"
        with self.shard.failing_together():
            checkpoint.refuse_nonfinite(named, where)

    def _update(self, visited: losses.DecoderGrad | None):
        """Take the optimiser's step on the gradients gathered."""
        sae, config = self.sae, self.config
        if self.arm.trains_decoder and sae.W_dec.grad is not None:
            self.remove_radial(sae.W_dec.grad, sae.W_dec)
        if config.grad_clip:
            norm = clip(sae, config.grad_clip)
            if visited is not None:
                visited.grad.mul_((config.grad_clip / norm).clamp(max=1))
        if config.feature_lr_power:
            with own_learning_rates(sae, config.feature_lr_power):
                self.adam.step()
        else:
            self.adam.step()
        if self.rounds and visited is not None:
            moment, beta2 = self.adam.state[sae.W_dec]["exp_avg_sq"], self.adam.param_groups[0]["betas"][1]
            self.rounds.correct_moment(moment, visited.rows, visited.grad, beta2)
        self.adam.zero_grad()
        self.schedule.step()
        if self.arm.trains_decoder:
            self.unit_rows(sae.W_dec)
        if self.start_FD is not None:
            hold_near(sae.W_dec, self.start_FD, self.options["least_cosine"])

    @torch.no_grad()
    def _steer(self, terms: Terms):
        """Multiply lambda by (L0 / target)^0.01, L0 averaged over some 10 steps, and alpha by (sharing /
        target)^0.01, that of directions by (overlap / target)^0.01. Alpha stays in [0.01, 100], that of
        directions in [0.001, 10]: a target out of reach would drive it up without end, and beyond 100 the
        group no longer fires on what it is kept for."""
        if self.steered_l0:
            self.l0 = 0.9 * self.l0 + 0.1 * terms.l0
            self.log_l1 += 0.01 * (self.l0.clamp(min=1e-3) / self.config.target_l0).log().clamp(-1, 1)
        if self.config.alpha and "sharing" in self.arm.steers:
            off = (self._group_sharing() / self.options["target_sharing"]).clamp(min=1e-3)
            self.log_alpha += 0.01 * off.log().clamp(-1, 1)
            self.log_alpha.clamp_(math.log(1e-2), math.log(100.0))
        if self.rounds and "overlap" in self.arm.steers:
            off = (self._overlap() / self.options["target_overlap"]).clamp(min=1e-3)
            self.of_directions.add_(0.01 * off.log().clamp(-1, 1)).clamp_(math.log(1e-3), math.log(10.0))

    def out_of_reach(self) -> list[str]:
        """Warnings of what alpha is steered to, where training ended more than ten times above it."""
        if not self.config.alpha:
            return []
        seen = {"sharing": self._group_sharing, "overlap": self._overlap}
        messages = []
        for name in self.arm.steers:
            measured, target = seen[name]().item(), self.options[f"target_{name}"]
            if measured > 10 * target:
                ends = f"the forget features' {name} is {measured:.2g} at the end, the target {target:g}"
                messages.append(f"{ends}: {self.config.arm} had no effect yet, give it more --tokens")
        return messages

    @property
    def of_directions(self) -> Tensor:
        """log of alpha of the loss on directions: of an arm with two losses a second one."""
        return self.log_alpha_directions if "alpha_directions" in self.options else self.log_alpha

    def _group_sharing(self) -> Tensor:
        """Firing of the forget group on retain text over that on forget text, over some 100 steps."""
        rate = self.sae.rate
        (n,) = self.shard.within([self.options["forget_features"]], rate.shape[1])
        on_forget, on_retain = self.shard.sum(rate[:, :n].sum(1))
        return on_retain / on_forget.clamp(min=1e-12)

    def _overlap(self) -> Tensor:
        """losses.forget_overlap of the forget group."""
        W_dec, n = self.sae.W_dec.detach(), self.options["forget_features"]
        return losses.forget_overlap(W_dec, self.sae.rate[1], n, self.shard)


# -------------------------------------------------------------------------------- the training loop


class TrainingLoop:
    """All SAEs of all runs on one pass of the LM, from a position (whose block the stream holds) to n_steps,
    to the deadline (time.monotonic()), or until the last one has failed.

    A checkpoint of every run is written every `interval` seconds, less often when that would take over a
    fiftieth of the time, at the end, and when a signal comes (Interrupted goes on). `started`: when the
    command's time began.
    """

    def __init__(self, runs: list[Run], stream: ActivationStream, at: checkpoint.Position, n_steps: int):
        self.runs, self.stream, self.at, self.n_steps = runs, stream, at, n_steps
        self.before, self.began = replace(at), time.monotonic()
        at.together = tuple(sorted(run.folder.name for run in runs))

    def train(self, started: float, deadline: float, interval: float):
        at, size = self.at, self.runs[0].config.batch_size
        self.started, self.deadline, self.interval = started, deadline, interval
        self.next_save, self.pace = self.began + interval, ranks.Pace(at.step)
        done, total = at.step * size, self.n_steps * size
        how = {"unit": "tok", "unit_scale": True, "desc": "training", "mininterval": 2}
        with tqdm(total=total, initial=done, **how) as bar, ranks.held():
            try:
                goes_on = self._goes_on()
                while goes_on:
                    if goes_on := self._train_on_block(size, bar):
                        self.stream.next_block()
            except Interrupted as stop:
                process.signals.taken()
                with process.signals.held():
                    if self._save():
                        where = f"at step {at.step} of {self.n_steps}"
                        stop.message = f"{where}; the same command (without --overwrite) goes on from there"
                raise
            with process.signals.held():
                at.over = True
                self._save()

    def _goes_on(self) -> bool:
        """And whether a checkpoint is due (`due`). Of several ranks all decide alike, now and then."""
        now, training = time.monotonic(), any(run.here for run in self.runs)
        said = now > self.next_save, now >= self.deadline, training
        self.due, late, training = self.pace.agree(self.at.step, *said, between=(False, False, True))
        return bool(self.at.step < self.n_steps and training and not late)

    def _train_on_block(self, size: int, bar: tqdm) -> bool:
        """Whether training goes on behind it. Only the stream then holds the block, and lets go of it before
        the next is made."""
        at, block = self.at, self.stream.block or self.stream.next_block()
        batches = zip(block.batches(size), block.documents(size))
        for (x, forget), document in islice(batches, at.batch, None):
            with process.signals.held():
                for run in self.runs:
                    log = at.step % 25 == 0 or at.step == self.n_steps - 1
                    run.step(x, forget, log, document)
                at.step, at.batch = at.step + 1, at.batch + 1
                goes_on = self._goes_on()
                if goes_on and self.due:
                    self._save()
            bar.update(size)
            if not goes_on:
                return False
            self._work_ahead(len(block.x) // size, size)
        with process.signals.held():
            at.block, at.batch = at.block + 1, 0
            share_news(self.runs)
        bar.set_postfix_str(", ".join(run.progress() for run in self.runs[:3]))
        return True

    def _work_ahead(self, n_batches: int, size: int):
        """Of the next block as much as was trained on of this one, which has n_batches."""
        at = self.at
        steps_behind = self.n_steps - (at.step - at.batch + n_batches)
        self.stream.work_ahead(at.batch / n_batches, steps_behind * size)

    def _save(self) -> bool:
        """Whether it was done. Where no SAE is finite any more the last good checkpoint stays."""
        at, now = self.at, time.monotonic()
        for run in self.runs:
            run.look()
        share_news(self.runs)
        if not any(run.training for run in self.runs):
            return False
        at.train_seconds = self.before.train_seconds + now - self.began
        at.used_seconds = self.before.used_seconds + now - self.started
        at.written, at.passes = at.written + 1, dict(self.stream.passes)
        for run in self.runs:
            run.save(at)
        process.signals.something_is_kept()
        spent = time.monotonic() - now
        self.next_save = now + spent + max(self.interval, 50 * spent)
        return True


# -------------------------------------------------------------------------------- the command


def run_experiments(
    command: Command, requests: list[Request], started: float, tracking: Tracking
) -> list[results.Outcome]:
    """Train the runs of one pass that are not complete, from where their checkpoints stand, and evaluate all
    of them."""
    process.tune_memory()
    names, asked = to_train(command, requests)
    one_pass(names, asked)
    complete = [pair for pair in zip(command.out_dir, requests) if pair[0] not in names]
    if complete or not command.overwrite and any(checkpoint.steps_in(Path(name)) for name in names):
        process.signals.something_is_kept()
    rows = evals.rows_of(command.evals)
    fitted = not all(ARMS[request.arm].trains_sae for request in asked)
    asks, weights = any(row.asks for row in rows), bool(rows or fitted) or command.activations is None
    testbed = testbeds.of_request((asked or requests)[0], asks, command.split_lm, weights)
    resolved = [resolve(request, Config, testbed) for request in asked]
    about = testbed, tracking
    finished = [results.Finished(Path(name), resolve(c, Config, testbed), *about) for name, c in complete]
    context_size = one_pass(names, resolved).context_size if asked else finished[0].config.context_size
    if rows or fitted:
        progress.set_up.begin("laying out the evaluations' contexts")
        evaluation_contexts(testbed, context_size)  # refuses text that is too short before training
    runs = runs_of(names, asked, resolved, testbed, tracking, command.saes)
    trained = [run for run in runs if not isinstance(run, UntrainedRun)]
    train_seconds = train_runs(command, trained, testbed, bool(rows), started) if trained else 0.0
    for run in runs:
        if isinstance(run, UntrainedRun):
            run.begin(anew=command.overwrite)
    ranks.barrier()  # every folder is as its evaluations need it
    progress.set_up.close()
    of_lm = partial(Evaluator, testbed, context_size)
    return evaluate_runs([*runs, *finished], rows, of_lm, train_seconds)


def train_runs(command: Command, runs: list[Run], testbed: Testbed, evaluated: bool, started: float) -> float:
    """Train all runs on one pass of the LM; the seconds that it took."""
    shared = one_pass([str(run.folder) for run in runs], [run.config for run in runs])
    n_steps = runs[0].n_steps
    for run in runs:
        run.shard = Shard(ranks.here.rank, ranks.here.size) if command.shard_features else WHOLE
    n_blocks = 1 + works_ahead(testbed.device, command.activations)
    refuse_more_than_memory([run.share for run in runs], testbed, n_blocks)
    hashes = {run.folder: run.config_hash for run in runs}
    at, saved = checkpoint.to_go_on_from(hashes, anew=command.overwrite)
    if not at.written and not command.overwrite:
        for run in runs:
            run.tell_restart()
    if at.over:
        stream, block = None, ActivationBlock.blank(testbed.d_in, testbed.device)
    else:
        progress.set_up.begin("computing the first activations")
        stream = ActivationStream(testbed, shared.context_size, shared.buffer_tokens)
        stream.kept = cache_of(command, stream, testbed, shared, n_steps)
        stream.skip_blocks(at.block)
        block = stream.next_block()
        if evaluated and not at.written and stream.with_massive > 1 / 8:
            Evaluator(testbed, shared.context_size)  # refuses an LM that it would refuse after training
    for run, state in zip(runs, saved):
        how = {"d_in": testbed.d_in, "n_steps": n_steps, "first_block": block, "shard": run.shard}
        run.start(partial(Trainer, run.config, **how), state)
        if stream and stream.kept:
            run.warnings += [text for text in stream.kept.doubts if text not in run.warnings]
    del saved, state, block, how
    progress.set_up.close()
    if stream:
        deadline = started + 0.7 * 60 * shared.time_budget_minutes - at.used_seconds
        TrainingLoop(runs, stream, at, n_steps).train(started, deadline, command.checkpoint_seconds)
    for run in runs:
        run.gather()
        run.has_read(at.passes)
    print("; ".join(f"{domain} text: pass {n}" for domain, n in at.passes.items()))
    return ranks.broadcast(at.train_seconds)


def run_passes(command: Command, requests: list[Request], started: float, tracking: Tracking):
    """All runs, pass after pass of the LM; a seed that fails stops no other run. The time of a run's own pass
    counts for its budget. Raises RunFailed where a seed has failed."""
    outcomes, parts = [], passes(command, requests)
    for number, (part, some) in enumerate(parts, 1):
        if len(parts) > 1:
            print(f"pass {number} of {len(parts)}: {', '.join(part.out_dir)}")
        with process.global_state_kept(), openmp.waits_follow_load(), progress.set_up:
            outcomes += run_experiments(part, some, time.monotonic() if number > 1 else started, tracking)
    results.print_table(outcomes, evals.ROWS)
    print(f"total_seconds: {time.monotonic() - started:.0f}")
    results.refuse_failed(outcomes)


def train(request: Request, out_dir: str | Path, evals: Sequence[str] = (), overwrite: bool = False) -> dict:
    """One run from Python, as the command makes it: trained or gone on with, then evaluated. `evals` names
    the evaluations; those made by default for (), none at all for ("none",). A complete run is read alone, or
    evaluated where evals are named. Returns what final_info.json holds.

    Raises WrongRequest before anything is written, RunFailed, and Interrupted, after which the same call goes
    on. Signals are taken in the main thread alone: call it there.
    """
    command = Command(out_dir=(str(out_dir),), evals=tuple(evals), overwrite=overwrite)
    settings.refuse_unknown_names(request, ARMS)
    settings.refuse_evaluations(command.evals, set(), request)
    try:
        left, requests = unfinished(command, [request])
        if requests:
            check(left, requests)
            with process.signals, ranks.met(), Tracking(left.track) as tracking:
                run_passes(left, requests, time.monotonic(), tracking)
    finally:
        run_folder.unlock()
    return run_folder.read_run_json(Path(command.out_dir[0]) / "final_info.json", {"training"})


def main(command: Command, configs: list[Request], started: float | None = None) -> int:
    """Exit code of the command; `started` is when its time began to count (time.monotonic())."""
    try:
        with process.signals, ranks.met(), Tracking(command.track) as tracking:
            run_passes(command, configs, time.monotonic() if started is None else started, tracking)
        return 0
    except (Exception, Interrupted) as error:
        return ranks.tell(error)
    finally:
        run_folder.unlock()


if __name__ == "__main__":
    finish(main(COMMAND, CONFIGS, STARTED))
