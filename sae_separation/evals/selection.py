"""Features of an SAE chosen with the labels of the text: what any SAE can do once one is told which text
is to be forgotten."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_separation.evals.evaluator import Evaluator
from sae_separation.exam import trained_on

N_TOKENS = 16_384  # of each domain, that features are chosen on


@torch.no_grad()
def labelled_features(evaluator: Evaluator, sae) -> tuple[Tensor, Tensor]:
    """Activations [n, F] of tokens of the text that features are selected on, and whether each is of the
    forget domain [n] (bool)."""
    parts = []
    for contexts in evaluator.select.values():
        x = contexts.resid[trained_on(contexts.tokens, evaluator.special)]
        few = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:N_TOKENS]
        parts.append(sae.encode(x[few.to(x.device)]).cpu())
    return torch.cat(parts), torch.arange(sum(map(len, parts))) < len(parts[0])


def by_mutual_information(evaluator: Evaluator, sae, n: int) -> list[int]:
    """The features that fire more often on forget text, by the mutual information (nats) of firing and
    domain, domains equally likely."""
    forget, retain = evaluator.firing(sae).rates

    def entropy(p: np.ndarray) -> np.ndarray:
        p = np.clip(p, 1e-12, 1 - 1e-12)
        return -p * np.log(p) - (1 - p) * np.log(1 - p)

    information = entropy((forget + retain) / 2) - (entropy(forget) + entropy(retain)) / 2
    ranked = np.argsort(-np.where(forget > retain, information, -1.0), kind="stable")
    return ranked[:n].tolist()


def by_logistic_regression(evaluator: Evaluator, sae, n: int) -> list[int]:
    """By their weight in a logistic regression of the domain on all activations, each in units of its own
    deviation."""
    from sklearn.linear_model import LogisticRegression

    f, forget = labelled_features(evaluator, sae)
    scaled = (f / f.std(0).clamp(min=1e-6)).numpy()
    weights = LogisticRegression(max_iter=200).fit(scaled, forget.numpy()).coef_[0]
    weights = np.where((f > 0).any(0).numpy(), weights, -np.inf)
    return np.argsort(-weights, kind="stable")[:n].tolist()


def greedily(evaluator: Evaluator, sae, n: int) -> list[int]:
    """One after the other, the feature that adds most to the share of forget tokens on which one of them
    fires, less that share of retain tokens."""
    f, forget = labelled_features(evaluator, sae)
    fires, covered = (f > 0).float(), torch.zeros(len(f))
    worth = torch.where(forget, 1 / forget.sum(), -1 / (~forget).sum())
    ranked: list[int] = []
    for _ in range(n):
        gain = (worth * (1 - covered)) @ fires
        gain[ranked] = -torch.inf
        ranked.append(int(gain.argmax()))
        covered = torch.maximum(covered, fires[:, ranked[-1]])
    return ranked


SELECTIONS: dict[str, Any] = {
    "mutual_information": by_mutual_information,
    "logistic": by_logistic_regression,
    "greedy": greedily,
}
