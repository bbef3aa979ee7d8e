"""A reader: whether a token belongs to what is to be forgotten, told by units of it and of the tokens before.

    marked = evaluator.once(marked_text)               # what is learnt from: the same for all
    tensors = fitted(marked, hidden=40, steps=1000, generator=generator, features=features)
    fires = score(residuals, tensors) >= threshold

    score_t = b_out + w_out · relu(b_in + W_0 f_t + Σ_d W_d m_dt),   m_dt = (1 - d) Σ_{k > 0} d^(k - 1) f_t-k

f are units of single tokens: the features of an SAE as it is, or the stream itself. m_d are means of them
over the tokens before, the nearest counting most, for each d of DECAYS. What is linear in f is linear in its
means: a few numbers a token are averaged, and not all units. Of tokens that no SAE is trained on f is 0.

It learns the label of the document that a token is of, from pieces of both domains (pieces.py); in a third of
the contexts a fifth of the words is replaced by others. A token counts as many nats as the LM foresees its
successor better than a bigram does: most where the LM says what it learnt by heart. Form and settings were
chosen on world 1 (studies/gates.py), the number of steps by held-out text (context_gate's by time). Of
MEMBERS readers that start apart the scores are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from sae_separation.errors import RunFailed, WrongRequest
from sae_separation.exam import Residuals
from sae_separation.lm import massive
from sae_separation.pieces import log_bigram, mixed_contexts, with_others
from sae_separation.progress import section

if TYPE_CHECKING:
    from sae_separation.evals.evaluator import Evaluator

DECAYS = (0.75, 0.9)
N_CONTEXTS, MOST_BYTES = 18_000, 2**30  # to learn from: so many, or what fits into so much memory
REPLACED = 0.2  # of the words of a third of them
LEAST, OTHERS = 0.5, 0.02  # nats from which on a token counts, and of the others such a share
FITTING = {"contexts": 32, "lr": 3e-3, "weight_decay": 0.1}  # of AdamW
LEFT_OUT = 0.5  # of the tokens are read without what came before
MEMBERS = 3  # readers whose scores are averaged
# of what counts in retain text, on which a reader fires; beyond, gates spoil too much (studies/gates.json)
RETAIN_SHARES = (1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3)

Tensors = dict[str, Tensor]


class Marked(NamedTuple):
    """The stream x [context, pos, D] (half precision; 0 where not `trained`), which tokens SAEs are trained
    on and which are of forget text [context, pos] (bool), and how much each counts [context, pos]."""

    x: Tensor
    trained: Tensor
    forget: Tensor
    weight: Tensor


# ---- what it learns from


@torch.no_grad()
def marked_text(evaluator: Evaluator, held_out: bool = False) -> Marked:
    """Of the training text of an evaluator's testbed; of what is `held_out` of it a tenth as much, as it is.
    No question is seen. Raises RunFailed where an LM knows nothing of a domain."""
    testbed, size = evaluator.testbed, evaluator.context_size
    n = 2 * min(N_CONTEXTS, MOST_BYTES // (2 * size * testbed.d_in)) // 3
    n = n // 10 if held_out else n
    generator = torch.Generator().manual_seed(0)
    tokens, labels = mixed_contexts(testbed, n, size, seed=0, held_out=held_out)
    read, told, bigram = tokens, tokens, log_bigram(tokens)
    if not held_out:
        some = torch.randperm(n, generator=generator)[: n // 2]
        others = with_others(tokens[some], testbed.tokenizer, REPLACED, generator)
        read = torch.cat([tokens, others])
        told, labels, bigram = (torch.cat([part, part[some]]) for part in (tokens, labels, bigram))
    x = torch.zeros(*read.shape, testbed.d_in, dtype=torch.half)
    trained, weight = labels >= 0, torch.zeros(read.shape)
    for at in section.steps(torch.arange(len(read)).split(64), 0.6):
        resid, log_p = foreseen(evaluator, read[at], told[at])
        trained[at] &= ~massive(resid, trained[at])
        x[at] = resid.masked_fill(~trained[at][..., None], 0).half()
        weight[at, :-1] = (log_p - bigram[at]).clamp(min=0)
    counts = trained & ((weight > LEAST) | (torch.rand(weight.shape, generator=generator) < OTHERS))
    counts[:, :-1] &= labels[:, 1:] == labels[:, :-1]  # the next token says nothing where a piece ends
    weight *= counts
    for label, domain in enumerate(("retain", "forget")):
        if not weight[labels == label].any():
            why = f"the LM foresees no token of the {domain} text better than a bigram does"
            raise RunFailed(f"{why}, and gates in context learn from those: leave this arm out")
    return Marked(x, trained, labels == 1, weight)


def foreseen(evaluator: Evaluator, read: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
    """The stream [n, pos, D] of contexts as they are read, and the LM's log p [n, pos - 1] of the tokens told
    next."""
    lm, device = evaluator.lm, evaluator.special.device
    resid = lm.resid(read.to(device))
    with lm.resumed_from(resid):
        logits = lm.lm(read.to(device), use_cache=False).logits[:, :-1].float()
    log_p = logits.log_softmax(-1).gather(2, told[:, 1:, None].to(device))[..., 0]
    return resid.cpu(), log_p.cpu()


# ---- what it reads


def of_features(sae: Any) -> Tensors:
    """What an SAE's features are computed by: of its format `standard` or `jumprelu`, as SAELens has them.
    Raises WrongRequest for another."""
    kind, normalised = sae.cfg.architecture(), sae.cfg.normalize_activations
    if kind not in ("standard", "jumprelu") or normalised not in ("none", None):
        how = "" if normalised in ("none", None) else f" of input normalised by {normalised}"
        raise WrongRequest(f"feature_gate takes ReLU and JumpReLU features, and these are {kind}{how}")
    threshold = sae.threshold if kind == "jumprelu" else torch.zeros_like(sae.b_enc)
    b_enc = sae.b_enc - sae.b_dec @ sae.W_enc if sae.cfg.apply_b_dec_to_input else sae.b_enc
    named = {"W_enc": sae.W_enc, "b_enc": b_enc, "threshold": threshold}
    return {name: t.detach().cpu() for name, t in named.items()}


def units(x: Tensor, trained: Tensor, tensors: Tensors) -> Tensor:
    """f [row, pos, units] of x [row, pos, D], each by its own size; 0 where not `trained` [row, pos]."""
    f = features_of(x, tensors) if "W_enc" in tensors else x
    return torch.where(trained[..., None], (f - tensors["shift"]) / tensors["size"], 0.0)


def features_of(x: Tensor, tensors: Tensors) -> Tensor:
    """An SAE's features [..., F] of x [..., D]."""
    pre = torch.relu(x @ tensors["W_enc"] + tensors["b_enc"])
    return pre * (pre > tensors["threshold"])


def mean_before(z: Tensor, decay: float, seen: dict) -> Tensor:
    """(1 - d) Σ_{k ≥ 1} d^(k-1) z[t - k] over what came before [row, pos, n]; where a row holds several ends
    of one stem, over what a token sees (Batch.seen)."""
    at = torch.arange(z.shape[1], device=z.device)[None]
    at = seen["position_ids"] if seen else at
    back = (at[:, :, None] - at[:, None, :] - 1).float()
    sees = back >= 0
    if seen:
        sees &= seen["attention_mask"][:, 0] == 0
    weight = torch.where(sees, (1 - decay) * decay ** back.clamp(min=0), 0.0)
    return weight.to(z) @ z


def hidden_of(
    f: Tensor, tensors: Tensors, seen: dict, heeded: Tensor | float = 1.0, at: Tensor | None = None
) -> Tensor:
    """The hidden units [row, pos, hidden] on units f [row, pos, units]; of the tokens `at` [row, pos] (bool)
    alone: [n, hidden]. `heeded` [n, 1]: 0 where one is read without what came before."""
    own, *before = tensors["W_in"]
    n_units, hidden = own.shape
    total = of(f, at) @ own
    for decay, W in zip(DECAYS, before):
        if hidden < n_units:  # a mean of what is projected is the mean, projected: the fewer numbers
            part = of(mean_before(f @ W, decay, seen), at)
        else:
            part = of(mean_before(f, decay, seen), at) @ W
        total = total + heeded * part
    return torch.relu(total + tensors["b_in"])


def of(z: Tensor, at: Tensor | None) -> Tensor:
    """All of z [row, pos, n], or what it is of the tokens `at`."""
    return z if at is None else z[at]


def score_of(f: Tensor, tensors: Tensors, seen: dict) -> Tensor:
    """The score [row, pos] of units f [row, pos, units]."""
    return hidden_of(f, tensors, seen) @ tensors["w_out"] + tensors["b_out"]


def score(read: Residuals, tensors: Tensors) -> Tensor:
    """Log-odds of forget text [row, pos]."""
    if read.seen:
        return score_of(units(read.resid, read.trained, tensors), tensors, read.seen)
    parts = zip(read.resid.split(64), read.trained.split(64))
    return torch.cat([score_of(units(*part, tensors), tensors, {}) for part in parts])


# ---- the fit


def begun(
    marked: Marked, hidden: int, generator: torch.Generator, features: Tensors
) -> tuple[Tensors, Tensors]:
    """What is fixed, and what is trained from here on."""
    x = marked.x[:1000][marked.trained[:1000]].float()
    if features:
        f = features_of(x, features)
        shift, size = torch.zeros(1), f.pow(2).mean(0).sqrt()  # a feature that is off stays 0
    else:
        f, shift, size = x, x.mean(0), x.std(0)
    n_means, n_units, n_hidden = 1 + len(DECAYS), f.shape[1], MEMBERS * hidden

    def uniform(fan_in: int, *shape: int) -> Tensor:  # as torch.nn.Linear starts
        return ((2 * torch.rand(*shape, generator=generator) - 1) / fan_in**0.5).requires_grad_()

    trained = {
        "W_in": uniform(n_means * n_units, n_means, n_units, n_hidden),
        "b_in": torch.zeros(n_hidden, requires_grad=True),
        "w_out": uniform(hidden, MEMBERS, hidden),
        "b_out": torch.zeros(MEMBERS, requires_grad=True),
    }
    return features | {"shift": shift, "size": size.clamp(min=1e-3)}, trained


@torch.enable_grad()
def fitted(
    marked: Marked, hidden: int, steps: int, generator: torch.Generator, features: Tensors | None = None
) -> Tensors:
    """The tensors of a reader of the stream, or of an SAE's features (of_features): MEMBERS readers, each
    trained with AdamW on contexts drawn at random, whose scores are averaged. As their hidden units stand
    side by side, it is one reader again."""
    fixed, trained = begun(marked, hidden, generator, features or {})
    adam = torch.optim.AdamW(trained.values(), FITTING["lr"], weight_decay=FITTING["weight_decay"])
    falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda i: min(1.0, 2 * (steps - i) / steps))
    for _ in section.steps(range(steps), 0.9):
        some = torch.randint(len(marked.x), (FITTING["contexts"],), generator=generator)
        weight, forget = marked.weight[some], marked.forget[some]
        counts = weight > 0
        weight, forget = (part[counts][:, None].expand(-1, MEMBERS) for part in (weight, forget.float()))
        heeded = (torch.rand(len(weight), 1, generator=generator) >= LEFT_OUT).float()
        f = units(marked.x[some].float(), marked.trained[some], fixed)
        h = hidden_of(f, trained, {}, heeded, counts).unflatten(1, (MEMBERS, hidden))
        log_odds = (h * trained["w_out"]).sum(-1) + trained["b_out"]  # [n, member]
        loss = binary_cross_entropy_with_logits(log_odds, forget, weight, reduction="sum") / weight.sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        falling.step()
    trained = {name: t.detach() for name, t in trained.items()}
    trained["w_out"] = trained["w_out"].flatten() / MEMBERS
    trained["b_out"] = trained["b_out"].mean(0, keepdim=True)
    return fixed | trained


@torch.no_grad()
def scores_of(marked: Marked, tensors: Tensors) -> Tensor:
    """Of all its tokens [context, pos]."""
    parts = zip(marked.x.split(64), marked.trained.split(64))
    return torch.cat([score_of(units(x.float(), trained, tensors), tensors, {}) for x, trained in parts])


def thresholds(marked: Marked, tensors: Tensors) -> list[dict]:
    """Cells that fire on RETAIN_SHARES of what counts in retain text."""
    scores, counts = scores_of(marked, tensors), ~marked.forget & (marked.weight > 0)
    found = at_shares(scores[counts], marked.weight[counts], RETAIN_SHARES)
    return [{"retain_share": share, "threshold": score} for share, score in zip(RETAIN_SHARES, found)]


def at_shares(scores: Tensor, weight: Tensor, shares: Sequence[float]) -> list[float]:
    """The scores [n] above which at most these shares of the weight [n] lie."""
    found, order = scores.sort(descending=True)
    so_far = weight[order].cumsum(0) / weight.sum()
    return [found[(so_far < share).sum().clamp(max=len(found) - 1)].item() for share in shares]
