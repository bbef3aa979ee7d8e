"""Methods that remove knowledge, are told the labels, and need no SAE.

    method = fit("mlp_gate", evaluator, seed=0)
    method.save(folder)                                   # cfg.json, sae_weights.safetensors
    switch = load(folder).switch(evaluator)               # the cells of its grid, each an intervention

difference_of_means, leace: the stream of every token is edited, linearly.
linear_gate, mlp_gate, token_list: the stream of every token that a probe (or a list) takes for forget text is
overwritten.
context_gate, feature_gate: the same of a probe that reads the tokens before, too (reader.py): the stream, or
the features of an SAE.
mean_guard, bayes_guard: in every row that a classifier takes for forget text, all tokens are overwritten.
rmu, npo: the weights of the hook layer and the one before it are trained. These change every token, special
ones too; all others change only what SAEs are trained on (Residuals.trained).
oracle: no method, but the LM that never read what is to be forgotten.

All are fitted on training text: contexts of it (Evaluator.fitting), or pieces of more of it (context_gate,
feature_gate). No setting was chosen on questions that report. Sizes of the grids: 8, 5, 10,
10, 6, 6, 6, 8, 8, 6, 6, 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, mse_loss, normalize

from sae_separation import reader
from sae_separation.errors import RunFailed, WrongRequest
from sae_separation.exam import Residuals
from sae_separation.files import as_json, content_of, write_whole
from sae_separation.four_bits import rounded
from sae_separation.interventions import WRITES, written_where
from sae_separation.lm import InterventionLM, Testbed, hidden_of, parameters_as

if TYPE_CHECKING:
    from sae_separation.evals.cells import Hook
    from sae_separation.evals.evaluator import Evaluator

WEIGHTS = "sae_weights.safetensors"  # where an SAE's would be
Fitted = tuple[dict[str, Tensor], dict]  # tensors and settings

RETAIN_SHARES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # of retain tokens on which a gate fires
LOG_ODDS = (0.0, 2.0, 5.0, 10.0)  # that a guard asks for


class Method:
    """What a method has fitted: its tensors by name and its settings (JSON), with its grid of `cells`."""

    def __init__(self, kind: str, tensors: dict[str, Tensor], settings: dict):
        self.kind, self.tensors, self.settings = kind, tensors, settings
        self.scores: WeakKeyDictionary[Residuals, Tensor] = WeakKeyDictionary()

    def switch(self, evaluator: Evaluator) -> MethodSwitch:
        """Its interventions on an evaluator's LM."""
        return MethodSwitch(self, evaluator)

    def hook(self, cell: dict) -> Hook | None:
        """What a cell does to the stream; None for a method that trains the LM's weights, and the oracle."""
        kind, tensors = self.kind, self.tensors
        if kind in EDITS:
            return partial(edited, edit=EDITS[kind], tensors=tensors, strength=cell["strength"])
        return partial(gated, method=self, cell=cell) if kind in SCORES else None

    def score(self, read: Residuals) -> Tensor:
        """A gate's [row, pos] or a guard's [row, 1] log-odds (token_list: share), which all its cells compare
        with their thresholds: computed once."""
        if read not in self.scores:
            self.scores[read] = SCORES[self.kind](read, self.tensors)
        return self.scores[read]

    def weights(self, cell: dict) -> dict[str, Tensor]:
        """The weights that a cell puts in the place of the LM's own, by its names; most have none."""
        return under_step(self.tensors, cell["step"]) if "step" in cell else {}

    def save(self, folder: Path):
        """Write cfg.json and sae_weights.safetensors into a folder, made if need be."""
        from safetensors.torch import save as to_bytes

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors.items()}
        write_whole(folder / WEIGHTS, to_bytes(tensors))
        write_whole(folder / "cfg.json", as_json({"method": self.kind, "settings": self.settings}))


class MethodSwitch:
    """A method on an LM: the Switch (evals/cells.py) that needs no SAE."""

    def __init__(self, method: Method, evaluator: Evaluator):
        self.method, self.evaluator = method, evaluator
        self.lm = oracle_of(evaluator) if method.kind == "oracle" else evaluator.lm

    @property
    def needed(self) -> dict:
        """Nothing: its files hold all."""
        return {}

    def cells(self) -> list[dict]:
        """Its grid, as it was saved."""
        return self.method.settings["cells"]

    def hook(self, cell: dict) -> Hook | None:
        """The intervention of a cell; None for the oracle, which is asked as it is."""
        if self.method.kind == "oracle":
            return None
        if hook := self.method.hook(cell):
            return hook
        weights = self.method.weights(cell)
        if self.evaluator.is_in_4_bits:
            weights = rounded(self.lm.lm, weights)
        return partial(recomputed, lm=self.lm, weights=weights)

    def on(self, evaluator: Evaluator) -> MethodSwitch:
        """The same, as it was fitted, on another evaluator's LM; its own weights are rounded where that LM's
        are."""
        return MethodSwitch(self.method, evaluator)


def fit(kind: str, evaluator: Evaluator, seed: int, sae: Any = None) -> Method:
    """A method of FITTED, fitted on training text, feature_gate on an SAE; the seed plays a part in those of
    SEEDED.

    Raises WrongRequest for the oracle of a testbed without one and for an SAE that feature_gate cannot take,
    RunFailed for a loss that is not finite.
    """
    generator, of = torch.Generator().manual_seed(seed), {} if sae is None else {"sae": sae}
    tensors, settings = FITTED[kind](evaluator, generator, **of)
    return Method(kind, tensors, ({"seed": seed} if kind in SEEDED else {}) | settings)


def tokens_to_fit_on(kind: str, evaluator: Evaluator) -> int:
    """How many tokens of Evaluator.fitting a method is fitted on, which the LM has read by then; none of the
    oracle and of what reads pieces of its own."""
    if kind == "oracle" or kind in READERS:
        return 0
    return sum(contexts.tokens.numel() for contexts in evaluator.fitting.values())


def load(folder: Path, device: str | torch.device = "cpu") -> Method:
    """A method as it was saved. Raises WrongRequest for a kind that is none of FITTED."""
    from safetensors.torch import load_file

    said = json.loads(content_of(folder / "cfg.json"))
    if said["method"] not in FITTED:
        why = f"its method is {said['method']!r}, none of {', '.join(FITTED)}"
        raise WrongRequest(f"{folder / 'cfg.json'}: {why}: fit it anew")
    return Method(said["method"], load_file(folder / WEIGHTS, str(device)), said["settings"])


def is_method(folder: Path) -> bool:
    """Whether a folder's cfg.json names a method, and not an SAE."""
    path = folder / "cfg.json"
    return path.is_file() and "method" in json.loads(content_of(path))


def both(evaluator: Evaluator) -> tuple[Residuals, Residuals]:
    """The forget text and the retain text on which methods are fitted."""
    return evaluator.as_read(evaluator.fitting["forget"]), evaluator.as_read(evaluator.fitting["retain"])


def labelled(evaluator: Evaluator) -> tuple[Tensor, Tensor]:
    """The stream at the hook layer [token, D] of that text's trained tokens, and which are forget text."""
    forget, retain = (read.resid[read.trained] for read in both(evaluator))
    labels = torch.arange(len(forget) + len(retain), device=forget.device) < len(forget)
    return torch.cat([forget, retain]), labels


# Linear edits of every token


def edited(resid: Tensor, hook: Residuals, edit: Callable, tensors: dict[str, Tensor], strength: float):
    """resid [row, pos, D], edited on the tokens that may be touched."""
    return torch.where(hook.trained[..., None], edit(resid, tensors, strength), resid)


def fit_difference_of_means(evaluator: Evaluator, generator: torch.Generator) -> Fitted:
    """The direction from the mean of retain text to that of forget text."""
    x, is_forget = labelled(evaluator)
    means = {"forget_mean": x[is_forget].mean(0), "retain_mean": x[~is_forget].mean(0)}
    return means, {"cells": [{"strength": s} for s in (0, 0.5, 1, 2, 3, 5, 10, 30)]}


def along_the_difference(resid: Tensor, tensors: dict[str, Tensor], strength: float) -> Tensor:
    """resid with its place along the difference of means set to that of the retain mean (strength 0:
    ablation), or as many gaps between the means beyond it, away from forget text (a clamp)."""
    gap = tensors["forget_mean"] - tensors["retain_mean"]
    along = (resid - tensors["retain_mean"]) @ gap / gap.dot(gap)  # in gaps
    return resid - (along + strength)[..., None] * gap


def fit_leace(evaluator: Evaluator, generator: torch.Generator) -> Fitted:
    """LEACE (arXiv 2306.03819): the least change after which no linear classifier tells the domains apart."""
    from concept_erasure import LeaceEraser

    x, is_forget = labelled(evaluator)
    eraser = LeaceEraser.fit(x.double(), is_forget.double())
    assert eraser.bias is not None
    tensors = {"left": eraser.proj_left, "right": eraser.proj_right, "mean": eraser.bias}
    cells = [{"strength": s} for s in (1, 2, 4, 8, 16)]
    return {name: t.float() for name, t in tensors.items()}, {"cells": cells}


def erased(resid: Tensor, tensors: dict[str, Tensor], strength: float) -> Tensor:
    """resid, moved `strength` times as far as LEACE moves it."""
    from concept_erasure import LeaceEraser

    eraser = LeaceEraser(tensors["left"], tensors["right"], tensors["mean"])
    return resid + strength * (eraser(resid) - resid)


EDITS = {"difference_of_means": along_the_difference, "leace": erased}


# Gates, which overwrite tokens, and guards, which overwrite rows


def gated(resid: Tensor, hook: Residuals, method: Method, cell: dict) -> Tensor:
    """resid [row, pos, D], overwritten on the tokens that may be touched and score the threshold."""
    fires = hook.trained & (method.score(hook) >= cell["threshold"])
    return written_where(fires, resid, cell["write"], method.tensors["retain_mean"])


def written(cells: list[dict]) -> list[dict]:
    """Each with every write."""
    return [cell | {"write": write} for cell in cells for write in WRITES]


def gate(evaluator: Evaluator, tensors: dict[str, Tensor], score: Callable) -> Fitted:
    """A gate that fires on RETAIN_SHARES of the trained tokens of retain text."""
    _, retain = both(evaluator)
    scores = score(retain, tensors)[retain.trained].sort(descending=True).values
    cells = []
    for share in RETAIN_SHARES:
        last = max(round(share * len(scores)), 1) - 1
        cells.append({"retain_share": share, "threshold": scores[last].item()})
    return tensors | {"retain_mean": evaluator.retain_mean}, {"cells": written(cells)}


def logistic(x: Tensor, is_forget: Tensor) -> dict[str, Tensor]:
    """Logistic regression on x [n, D], standardised: weight [D] and bias of the log-odds, on x itself."""
    from sklearn.linear_model import LogisticRegression

    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    probe = LogisticRegression(max_iter=1000).fit(((x - mean) / std).cpu().numpy(), is_forget.cpu().numpy())
    weight = torch.from_numpy(probe.coef_[0]).to(x) / std
    return {"weight": weight, "bias": torch.from_numpy(probe.intercept_).to(x)[0] - weight @ mean}


def fit_linear_gate(evaluator: Evaluator, generator: torch.Generator) -> Fitted:
    """A linear probe on single tokens."""
    return gate(evaluator, logistic(*labelled(evaluator)), linear_score)


def linear_score(read: Residuals, tensors: dict[str, Tensor]) -> Tensor:
    """Log-odds of forget text [row, pos]."""
    return read.resid @ tensors["weight"] + tensors["bias"]


MLP = {"hidden": 40, "steps": 1500, "batch": 2048, "lr": 3e-3}


@torch.enable_grad()
def fit_mlp_gate(evaluator: Evaluator, generator: torch.Generator) -> Fitted:
    """A probe with one hidden layer on single tokens, trained with Adam."""
    x, is_forget = labelled(evaluator)
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)

    def uniform(*shape: int) -> Tensor:  # as torch.nn.Linear starts
        start = (2 * torch.rand(*shape, generator=generator) - 1) / shape[0] ** 0.5
        return start.to(x).requires_grad_()

    W_in, W_out = uniform(x.shape[1], MLP["hidden"]), uniform(MLP["hidden"])
    b_in, b_out = (torch.zeros(n, device=x.device, requires_grad=True) for n in (MLP["hidden"], 1))
    probe = {"W_in": W_in, "b_in": b_in, "W_out": W_out, "b_out": b_out}
    adam = torch.optim.Adam(probe.values(), MLP["lr"])
    for _ in range(MLP["steps"]):
        some = torch.randint(len(x), (MLP["batch"],), generator=generator).to(x.device)
        log_odds = mlp((x[some] - mean) / std, probe)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(log_odds, is_forget[some].float())
        adam.zero_grad()
        finite("mlp_gate", loss).backward()
        adam.step()
    probe = {name: t.detach() for name, t in probe.items()}
    probe["W_in"] = probe["W_in"] / std[:, None]  # of x itself
    probe["b_in"] = probe["b_in"] - mean @ probe["W_in"]
    tensors, settings = gate(evaluator, probe, mlp_score)
    return tensors, MLP | settings


def mlp(x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """Log-odds of forget text [...] of x [..., D]."""
    hidden = torch.relu(x @ tensors["W_in"] + tensors["b_in"])
    return hidden @ tensors["W_out"] + tensors["b_out"]


def mlp_score(read: Residuals, tensors: dict[str, Tensor]) -> Tensor:
    """Log-odds of forget text [row, pos]."""
    return mlp(read.resid, tensors)


# more steps and more hidden units bring feature_gate nothing on held-out text; context_gate, which gains a
# little by more steps, is fitted for as long as feature_gate. Where they fire they write zero: with the mean
# of retain text even an ideal gate does worse, in three worlds, and in one it fails (studies/gates.json)
READERS = {
    "context_gate": {"hidden": 400, "steps": 3000},
    "feature_gate": {"hidden": 40, "steps": 1000},
}


def fit_context_gate(evaluator: Evaluator, generator: torch.Generator) -> Fitted:
    """A probe with one hidden layer on the stream of a token and of those before it."""
    return read_in_context(evaluator, "context_gate", generator, None)


def fit_feature_gate(evaluator: Evaluator, generator: torch.Generator, sae: Any) -> Fitted:
    """The same on an SAE's features, with a tenth of the units."""
    return read_in_context(evaluator, "feature_gate", generator, reader.of_features(sae))


def read_in_context(
    evaluator: Evaluator, kind: str, generator: torch.Generator, features: dict[str, Tensor] | None
) -> Fitted:
    marked, how = evaluator.once(reader.marked_text), READERS[kind]
    tensors = reader.fitted(marked, **how, generator=generator, features=features)
    cells = [cell | {"write": "zero"} for cell in reader.thresholds(marked, tensors)]
    settings = (
        how | reader.FITTING | {"members": reader.MEMBERS, "decays": list(reader.DECAYS), "cells": cells}
    )
    settings["tokens_trained"] = int(marked.trained.sum())
    device = evaluator.retain_mean.device
    tensors = {name: t.to(device) for name, t in tensors.items()}
    return tensors | {"retain_mean": evaluator.retain_mean}, settings


def token_counts(evaluator: Evaluator) -> tuple[Tensor, Tensor]:
    """How often every token [vocabulary] stands in forget text, and in retain text."""
    n = evaluator.lm.lm.get_input_embeddings().num_embeddings
    forget, retain = (read.tokens[read.trained].bincount(minlength=n) for read in both(evaluator))
    return forget, retain


LEAST = 5  # times that a token of the list stands in forget text
FORGET_SHARES = (0.9, 0.99, 1.0)  # of its occurrences, at equal amounts of text, that are there


def fit_token_list(evaluator: Evaluator, generator: torch.Generator) -> Fitted:
    """The tokens that forget text has, and retain text has not or hardly."""
    counts = token_counts(evaluator)
    forget, retain = (n / n.sum() for n in counts)
    share = torch.where(counts[0] >= LEAST, forget / (forget + retain), 0.0)
    cells = [{"threshold": s, "n_tokens": int((share >= s).sum())} for s in FORGET_SHARES]
    tensors = {"forget_share": share, "retain_mean": evaluator.retain_mean}
    return tensors, {"least": LEAST, "cells": written(cells)}


def token_score(read: Residuals, tensors: dict[str, Tensor]) -> Tensor:
    """Of the occurrences of each token, the share that is in forget text [row, pos]."""
    return tensors["forget_share"][read.tokens]


def fit_mean_guard(evaluator: Evaluator, generator: torch.Generator) -> Fitted:
    """A linear probe on a row's mean activation."""
    means = [mean_activation(read) for read in both(evaluator)]
    is_forget = torch.arange(sum(map(len, means))) < len(means[0])
    return guard(evaluator, logistic(torch.cat(means), is_forget))


def guard(evaluator: Evaluator, tensors: dict[str, Tensor]) -> Fitted:
    """A guard that asks for LOG_ODDS."""
    cells = [{"threshold": log_odds} for log_odds in LOG_ODDS]
    return tensors | {"retain_mean": evaluator.retain_mean}, {"cells": written(cells)}


def mean_activation(read: Residuals) -> Tensor:
    """Of the tokens by which each row is judged [row, D]."""
    judged = read.judged[..., None]
    return (read.resid * judged).sum(1) / judged.sum(1).clamp(min=1)


def mean_score(read: Residuals, tensors: dict[str, Tensor]) -> Tensor:
    """Log-odds of forget text, of whole rows [row, 1]."""
    return (mean_activation(read) @ tensors["weight"] + tensors["bias"])[:, None]


def fit_bayes_guard(evaluator: Evaluator, generator: torch.Generator) -> Fitted:
    """Naive Bayes on a row's tokens, the domains equally likely."""
    from sklearn.naive_bayes import MultinomialNB

    forget, retain = (n.cpu().numpy() for n in token_counts(evaluator))
    fitted = MultinomialNB().fit([retain, forget], [False, True])
    log_odds = torch.from_numpy(fitted.feature_log_prob_[1] - fitted.feature_log_prob_[0])
    return guard(evaluator, {"log_odds": log_odds.float().to(evaluator.retain_mean.device)})


def bayes_score(read: Residuals, tensors: dict[str, Tensor]) -> Tensor:
    """Log-odds of forget text, of whole rows [row, 1]."""
    return (tensors["log_odds"][read.tokens] * read.judged).sum(1, keepdim=True)


SCORES = {
    "linear_gate": linear_score,
    "mlp_gate": mlp_score,
    "context_gate": reader.score,
    "feature_gate": reader.score,
    "token_list": token_score,
    "mean_guard": mean_score,
    "bayes_guard": bayes_score,
}
OF_ROWS = ("context_gate", "feature_gate", "mean_guard", "bayes_guard")  # need whole rows


# Training of the LM's own weights

CHECKPOINTS = (25, 50, 75, 100, 150, 200)  # steps
TRAINING = {"batch": 8, "lr": 1e-3}  # contexts of each domain in a step
RMU = {"norm": 5.0, "alpha": 100.0}
NPO = {"beta": 0.1}


def recomputed(resid: Tensor, hook: Residuals, lm: InterventionLM, weights: dict[str, Tensor]) -> Tensor:
    """resid [row, pos, D] of all tokens, as the lower layers give it with other weights."""
    named = dict(lm.lm.named_parameters())
    pairs = [(named[name], weight.to(named[name].dtype)) for name, weight in weights.items()]
    with parameters_as(pairs):
        return lm.resid(hook.tokens, **hook.seen)


def weights_of(hook: Hook | None) -> dict[str, Tensor]:
    """The weights that a hook puts in the place of the LM's own, by its names; most hooks have none."""
    return hook.keywords["weights"] if isinstance(hook, partial) and hook.func is recomputed else {}


def under_step(tensors: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """The weights of a checkpoint, by the LM's names."""
    prefix = f"{step}."
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


class Reached(Exception):
    """The hook layer has put out its hidden state."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


def stream(lm: InterventionLM, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """resid_post [row, pos, D] of the hook layer under other weights, with their gradients, which
    InterventionLM.resid has not."""

    def stop(module, args, put_out):
        raise Reached(hidden_of(put_out).float().to(tokens.device))

    handle = lm.layers[lm.layer].register_forward_hook(stop)
    try:
        forward(lm, weights, tokens)
    except Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise AssertionError("every forward pass runs the hook layer")


def forward(lm: InterventionLM, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits [row, pos, vocabulary] under other weights; the LM's own are not touched."""
    cast = {name: weight.to(lm.lm.dtype) for name, weight in weights.items()}
    return torch.func.functional_call(lm.lm, cast, (tokens,), {"use_cache": False}).logits


@torch.enable_grad()
def train(evaluator: Evaluator, kind: str, generator: torch.Generator, loss_on: Callable) -> Fitted:
    """The weights of the hook layer and the one before it at CHECKPOINTS of training with Adam on
    loss_on(weights, forget, retain), contexts' places [batch]."""
    lm, (stack, _, _) = evaluator.lm, evaluator.lm.hook_name.rpartition(".")
    layers = tuple(f"{stack}.{layer}." for layer in (lm.layer - 1, lm.layer))
    weights = {
        name: p.detach().float().clone().requires_grad_()
        for name, p in lm.lm.named_parameters()
        if name.startswith(layers)
    }
    adam, kept = torch.optim.Adam(weights.values(), TRAINING["lr"]), {}
    sizes = [len(evaluator.fitting[domain].tokens) for domain in ("forget", "retain")]
    for step in range(1, CHECKPOINTS[-1] + 1):
        some = (torch.randint(n, (TRAINING["batch"],), generator=generator) for n in sizes)
        adam.zero_grad()
        finite(kind, loss_on(weights, *some)).backward()
        adam.step()
        if step in CHECKPOINTS:
            kept |= {f"{step}.{name}": w.detach().clone() for name, w in weights.items()}
    return kept, TRAINING | {"cells": [{"step": step} for step in CHECKPOINTS]}


def finite(kind: str, loss: Tensor) -> Tensor:
    """The loss. Raises RunFailed when it is not finite."""
    if not torch.isfinite(loss):
        why = f"the loss of {kind} is {loss.item()}: the LM's activations are out of range"
        raise RunFailed(f"{why}; leave it out, or choose another --layer")
    return loss


def fit_rmu(evaluator: Evaluator, generator: torch.Generator) -> Fitted:
    """RMU (arXiv 2403.03218): the stream of forget text goes to one random vector, that of retain text stays.
    The vector's norm is 5 times the stream's mean norm on forget text: Adaptive RMU (arXiv 2408.06223; 5
    is its authors' default, --scale in their code)."""
    forget, retain = both(evaluator)
    direction = torch.rand(forget.resid.shape[-1], generator=generator).to(forget.resid)
    norm = forget.resid[forget.trained].norm(dim=-1).mean()
    target = RMU["norm"] * norm * normalize(direction, dim=0)

    def loss_on(weights: dict[str, Tensor], of_forget: Tensor, of_retain: Tensor) -> Tensor:
        steered = stream(evaluator.lm, weights, forget.tokens[of_forget])[forget.trained[of_forget]]
        kept = stream(evaluator.lm, weights, retain.tokens[of_retain])
        return mse_loss(steered, target.expand_as(steered)) + RMU["alpha"] * mse_loss(
            kept, retain.resid[of_retain]
        )

    tensors, settings = train(evaluator, "rmu", generator, loss_on)
    return tensors, RMU | settings


def fit_npo(evaluator: Evaluator, generator: torch.Generator) -> Fitted:
    """Negative preference optimisation (arXiv 2404.05868), with the cross-entropy of retain text."""
    lm = evaluator.lm
    forget, retain = (evaluator.fitting[domain].tokens for domain in ("forget", "retain"))
    with torch.no_grad():
        before = torch.cat([log_likelihood(forward(lm, {}, t), t) for t in forget.split(TRAINING["batch"])])

    def loss_on(weights: dict[str, Tensor], of_forget: Tensor, of_retain: Tensor) -> Tensor:
        now = log_likelihood(forward(lm, weights, forget[of_forget]), forget[of_forget])
        preference = logsigmoid(-NPO["beta"] * (now - before[of_forget])).mean()
        kept = log_likelihood(forward(lm, weights, retain[of_retain]), retain[of_retain]).mean()
        return -2 / NPO["beta"] * preference - kept / (retain.shape[1] - 1)

    tensors, settings = train(evaluator, "npo", generator, loss_on)
    return tensors, NPO | settings


def log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of whole contexts [row]."""
    losses = cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return -losses.view(len(tokens), -1).sum(1)


# What perfect unlearning looks like


def check(kind: str, testbed: Testbed):
    """Raises WrongRequest for the oracle of a testbed without one."""
    if kind == "oracle" and testbed.oracle is None:
        why = f"{testbed.name} has no LM that never read the forget text (a folder oracle in its LM's)"
        raise WrongRequest(
            f"--arm oracle: {why}: leave the arm out, or take --testbed micro or smollm2-taught"
        )


def oracle_of(evaluator: Evaluator) -> InterventionLM:
    """The testbed's oracle. Raises WrongRequest when it has none."""
    check("oracle", evaluator.testbed)
    assert evaluator.oracle is not None
    return evaluator.oracle


def fit_oracle(evaluator: Evaluator, generator: torch.Generator) -> Fitted:
    """Nothing is fitted."""
    oracle_of(evaluator)
    return {}, {"cells": [{}]}


FITTED: dict[str, Callable[..., Fitted]] = {
    "difference_of_means": fit_difference_of_means,
    "leace": fit_leace,
    "linear_gate": fit_linear_gate,
    "mlp_gate": fit_mlp_gate,
    "context_gate": fit_context_gate,
    "feature_gate": fit_feature_gate,
    "token_list": fit_token_list,
    "mean_guard": fit_mean_guard,
    "bayes_guard": fit_bayes_guard,
    "rmu": fit_rmu,
    "npo": fit_npo,
    "oracle": fit_oracle,
}
SEEDED = ("mlp_gate", "context_gate", "feature_gate", "rmu", "npo")
