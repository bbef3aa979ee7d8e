"""Corpus unlearning: what clamping features costs the LM on forget and on retain text, in cross-entropy."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from sae_separation import saebench
from sae_separation.evals.evaluator import Evaluator, finite, suffix
from sae_separation.exam import Batch
from sae_separation.interventions import INTERVENTIONS, ChosenFeatures, intervene, whole_contexts

COSTS = (0.01, 0.05, 0.1)  # nats a token of retain text


def batches(evaluator: Evaluator) -> dict[str, list[Batch]]:
    """Held-out contexts of each domain: three eighths as many as core's."""
    n = max(1, evaluator.testbed.n_held_out * 3 // 8)
    return {
        domain: [
            whole_contexts(tokens, resid, evaluator.special)
            for tokens, resid in zip(contexts.tokens[:n].split(16), contexts.resid[:n].split(16))
        ]
        for domain, contexts in evaluator.held_out.items()
    }


def cross_entropy(evaluator: Evaluator) -> dict[str, float]:
    """Mean on `batches` of each domain, in nats a token, under the LM's hook if there is one."""
    return {
        domain: torch.cat([evaluator.lm.ce(batch) for batch in some]).mean().item()
        for domain, some in evaluator.once(batches).items()
    }


def plain_cross_entropy(evaluator: Evaluator) -> dict[str, float]:
    """The LM's own."""
    evaluator.lm.reset_hooks()
    return cross_entropy(evaluator)


def cells(
    evaluator: Evaluator, features: ChosenFeatures, rates: tuple[np.ndarray, np.ndarray]
) -> Iterator[tuple[dict, np.ndarray]]:
    """The settings of every clamp in the sweeps of `unlearning`, and the places among the chosen features
    that it clamps."""
    settings = evaluator.settings
    for how in INTERVENTIONS:
        thresholds = settings["retain_thresholds"] if how == "clamp" else evaluator.guarded_thresholds
        for threshold in thresholds:
            top = saebench.top_features(rates, threshold, max(settings["n_features_list"]))
            ranked = np.searchsorted(features.chosen.numpy(), top)
            for n in sorted({min(n, len(ranked)) for n in settings["n_features_list"]} - {0}):
                for multiplier in settings["multipliers"]:
                    cell = {"intervention": how, "retain_threshold": threshold}
                    yield cell | {"n_features": n, "multiplier": multiplier}, ranked[:n]


def corpus(evaluator: Evaluator, sae, seed: int, name: str) -> tuple[dict, dict]:
    """Cross-entropy gained on held-out forget text against cross-entropy paid on held-out retain text, in
    nats a token, under the sweeps of `unlearning`: the most gained at each of COSTS, for each
    intervention."""
    firing, lm = evaluator.firing(sae), evaluator.lm
    features = evaluator.choose(sae, firing.rates, firing.unit, evaluator.guarded_thresholds)
    plain, table = evaluator.once(plain_cross_entropy), []
    lm.forget_answers()
    for cell, places in cells(evaluator, features, firing.rates):
        how, multiplier = cell["intervention"], cell["multiplier"]
        lm.add_hook(
            "",
            partial(intervene, sae=features, features_to_ablate=places, multiplier=multiplier, how=how),
        )
        ce = cross_entropy(evaluator)
        change = {"forget_ce_gain": ce["forget"] - plain["forget"]}
        table.append(cell | change | {"retain_ce_cost": ce["retain"] - plain["retain"]})
    lm.reset_hooks()
    metrics = {f"lm_{domain}_ce": ce for domain, ce in plain.items()}
    for how in INTERVENTIONS:
        rows = [row for row in table if row["intervention"] == how]
        for cost in COSTS:
            gains = [row["forget_ce_gain"] for row in rows if row["retain_ce_cost"] <= cost]
            metrics[f"forget_ce_gain_at_retain_ce_cost_{cost}{suffix(how)}"] = max([0.0, *gains])
    return finite("corpus_unlearning", metrics, {"sweep": table})
