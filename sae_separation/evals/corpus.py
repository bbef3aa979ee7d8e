"""Corpus unlearning: what clamping features costs the LM on forget and on retain text, in cross-entropy."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from sae_separation import saebench
from sae_separation.evals.cells import Hook, intervening, switch_of
from sae_separation.evals.evaluator import Evaluator, finite, suffix
from sae_separation.exam import Batch
from sae_separation.interventions import INTERVENTIONS, intervene, whole_contexts
from sae_separation.lm import InterventionLM
from sae_separation.methods import Method

COSTS = (0.01, 0.05, 0.1)  # nats a token of retain text


def batches(evaluator: Evaluator) -> dict[str, list[Batch]]:
    """Held-out contexts of each domain, and of general text where there is some: three eighths as many as
    core's."""
    n = max(1, evaluator.testbed.n_held_out * 3 // 8)
    texts = evaluator.held_out | ({"general": evaluator.general} if evaluator.general else {})
    return {
        domain: [
            whole_contexts(tokens, resid, evaluator.special)
            for tokens, resid in zip(contexts.tokens[:n].split(16), contexts.resid[:n].split(16))
        ]
        for domain, contexts in texts.items()
    }


def cross_entropy(evaluator: Evaluator, lm: InterventionLM | None = None) -> dict[str, float]:
    """Mean of the LM (None: the evaluator's) on `batches` of each domain, in nats a token, under its hook if
    there is one."""
    lm = lm or evaluator.lm
    return {
        domain: torch.cat([lm.ce(batch) for batch in some]).mean().item()
        for domain, some in evaluator.once(batches).items()
    }


def plain_cross_entropy(evaluator: Evaluator) -> dict[str, float]:
    """The LM's own."""
    evaluator.lm.reset_hooks()
    return cross_entropy(evaluator)


def cells(evaluator: Evaluator, sae) -> Iterator[tuple[dict, Hook | None]]:
    """The settings and the hook of every clamp in the sweeps of `unlearning`, or of every cell of a method
    that needs no SAE."""
    if isinstance(sae, Method):
        switch = switch_of(evaluator, sae)
        for cell in switch.cells():
            yield {"intervention": "clamp"} | cell, switch.hook(cell)
        return
    firing, settings = evaluator.firing(sae), evaluator.settings
    features = evaluator.choose(sae, firing.rates, firing.unit, evaluator.guarded_thresholds)
    for how in INTERVENTIONS:
        thresholds = settings["retain_thresholds"] if how == "clamp" else evaluator.guarded_thresholds
        for threshold in thresholds:
            top = saebench.top_features(firing.rates, threshold, max(settings["n_features_list"]))
            ranked = np.searchsorted(features.chosen.numpy(), top)
            for n in sorted({min(n, len(ranked)) for n in settings["n_features_list"]} - {0}):
                for multiplier in settings["multipliers"]:
                    cell = {"intervention": how, "retain_threshold": threshold, "n_features": n}
                    cell |= {"multiplier": multiplier, "features": top[:n].tolist()}
                    clamp = {"features_to_ablate": ranked[:n], "multiplier": multiplier, "how": how}
                    yield cell, partial(intervene, sae=features, **clamp)


def changes(plain: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    """What an intervention gains on forget text, and costs on any other."""
    names = {domain: f"{domain}_ce_{'gain' if domain == 'forget' else 'cost'}" for domain in plain}
    return {name: now[domain] - plain[domain] for domain, name in names.items()}


def corpus(evaluator: Evaluator, sae, seed: int, name: str) -> tuple[dict, dict]:
    """Cross-entropy gained on held-out forget text against cross-entropy paid on held-out retain text, in
    nats a token, under the sweeps of `unlearning`: the most gained at each of COSTS, for each
    intervention."""
    lm = switch_of(evaluator, sae).lm if isinstance(sae, Method) else evaluator.lm
    plain, table = evaluator.once(plain_cross_entropy), []
    lm.forget_answers()
    for cell, hook in cells(evaluator, sae):
        with intervening(lm, hook):
            ce = cross_entropy(evaluator, lm)
        table.append(cell | changes(plain, ce))
    metrics = {f"lm_{domain}_ce": ce for domain, ce in plain.items()}
    for how in ("clamp",) if isinstance(sae, Method) else INTERVENTIONS:
        rows = [row for row in table if row["intervention"] == how]
        for cost in COSTS:
            gains = [row["forget_ce_gain"] for row in rows if row["retain_ce_cost"] <= cost]
            metrics[f"forget_ce_gain_at_retain_ce_cost_{cost}{suffix(how)}"] = max([0.0, *gains])
    return finite("corpus_unlearning", metrics, {"sweep": table})
