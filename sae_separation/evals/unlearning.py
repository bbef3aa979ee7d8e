"""SAEBench's unlearning score on any LM, the same under guarded interventions, and what one needs to read
them."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sae_separation import saebench
from sae_separation.evals.cells import best_allowed, measured_cells, switch_of
from sae_separation.evals.evaluator import Evaluator, Firing, finite, suffix
from sae_separation.exam import Residuals
from sae_separation.interventions import INTERVENTIONS, ChosenFeatures, calibration, intervene
from sae_separation.methods import Method

MIN_KNOWN = 10  # known questions a domain without which an accuracy means nothing
RANDOM_THRESHOLD = 0.001  # a retain threshold that every random feature passes
ACCURACIES = (
    "lm_forget_accuracy",
    "lm_retain_accuracy",
    "reconstruction_forget_accuracy",
    "reconstruction_retain_accuracy",
)
OF_A_SWEEP = ("unlearning_score", "forget_accuracy", "retain_accuracy", "random_feature_score")


def unlearning(evaluator: Evaluator, sae, seed: int, name: str) -> tuple[dict, dict, list[str]]:
    """SAEBench's unlearning score, the same under the guarded interventions (suffixes _conditional,
    _guardrail), and what one needs to read them: metrics, details (sweep table, bootstrap interval),
    warnings. Metrics are None when the LM knows too few questions.

    The guarded interventions also try features with a retain rate of up to 0.1: a guard exists to make such
    features safe, and SAEBench's limits leave it little to guard. Without a limit, what fires on any text
    would come first.
    """
    evaluator = evaluator.examiner
    known = evaluator.questions.n_known
    n_forget = known[saebench.FORGET]
    n_retain = sum(known.values()) - n_forget
    metrics: dict = {"n_known_forget": n_forget, "n_known_retain": n_retain}
    if min(n_forget, n_retain) < MIN_KNOWN:
        return metrics | undefined(), {}, [too_few(n_forget, n_retain, evaluator.testbed.scoring)]
    if isinstance(sae, Method):
        return of_method(evaluator, sae, metrics)
    subjects = [saebench.FORGET, *(s for s, n in known.items() if n and s != saebench.FORGET)]
    firing = evaluator.firing(sae)
    thresholds = evaluator.settings["retain_thresholds"]
    swept = sweeps(
        evaluator, sae, firing.rates, firing.unit, name, subjects, thresholds, evaluator.guarded_thresholds
    )
    floor = sweep_random(evaluator, sae, firing, seed, f"{name}_random", subjects)
    plain = accuracy(evaluator, subjects)

    def reconstruct(resid: Tensor, hook: Residuals) -> Tensor:
        return torch.where(hook.trained[..., None], sae.decode(sae.encode(resid)), resid)

    through = accuracy(evaluator, subjects, reconstruct)
    metrics |= dict(zip(ACCURACIES, plain + through))
    metrics["n_features_selectable"] = n_selectable(firing, max(thresholds))
    best = {how: best_allowed(cells) for how, (cells, _) in swept.items()}
    for how, (_, score) in swept.items():
        values = score, best[how]["forget_accuracy"], best[how]["retain_accuracy"], floor[how][1]
        metrics |= dict(zip((metric + suffix(how) for metric in OF_A_SWEEP), values))
    details = {
        "unlearning_score_bootstrap_95": bootstrap_interval(swept["clamp"][0], seed),
        "units": units(evaluator, firing, swept),
        "known": {evaluator.questions.names[alias]: n for alias, n in known.items()},
        "best": {how: repeatable(evaluator, sae, firing, cell) for how, cell in best.items()},
        "sweep": [without_answers(cell) for cells, _ in swept.values() for cell in cells],
    }
    return *finite("unlearning", metrics, details), doubts(evaluator, metrics)


def of_method(evaluator: Evaluator, method: Method, metrics: dict) -> tuple[dict, dict, list[str]]:
    """The same rule over the grid of a method that needs no SAE."""
    everything = {s: tuple(range(len(some))) for s, some in evaluator.questions.by_subject.items()}
    cells = measured_cells(evaluator, switch_of(evaluator, method), everything)
    best = best_allowed(cells)
    metrics |= {"unlearning_score": 1 - best["forget_accuracy"]}
    metrics |= {k: best[k] for k in ("forget_accuracy", "retain_accuracy")}
    return *finite("unlearning", metrics, {"best": {"clamp": best}, "sweep": cells}), []


def undefined() -> dict[str, None]:
    """The metrics that an LM which knows too few questions does not have."""
    names = [metric + suffix(how) for how in INTERVENTIONS for metric in OF_A_SWEEP]
    return dict.fromkeys([*names, *ACCURACIES, "n_features_selectable"])


def too_few(n_forget: int, n_retain: int, scoring: str) -> str:
    return (
        f"unlearning: the LM knows {n_forget} forget and {n_retain} retain questions ({scoring} scoring);"
        f" {MIN_KNOWN} of each are needed"
    )


def n_selectable(firing: Firing, threshold: float) -> int:
    """How many features fire on forget text, and on retain text at most as often as the threshold says."""
    forget, retain = firing.rates
    return int(((forget > 0) & (retain < threshold)).sum())


def sweep(
    evaluator: Evaluator,
    features: ChosenFeatures,
    rates: tuple[np.ndarray, np.ndarray],
    name: str,
    subjects: list[str],
    how: str = "clamp",
    **settings,
) -> tuple[list[dict], float]:
    """SAEBench's sweep (saebench.run_sweep) under one intervention, over features of the given firing rates
    [F]."""
    forget, retain = (rate[features.chosen.numpy()] for rate in rates)
    cells, score = saebench.run_sweep(
        evaluator.lm,
        features,
        (forget, retain),
        {subject: evaluator.questions.by_subject[subject] for subject in subjects},
        evaluator.artifacts,
        name,
        partial(intervene, how=how),
        evaluator.questions.ask,
        **settings,
    )
    for cell in cells:
        top = saebench.top_features(rates, cell["retain_threshold"], cell["n_features"])
        cell |= {"intervention": how, "features": top.tolist()}
    return cells, score


def sweeps(
    evaluator: Evaluator,
    sae,
    rates: tuple[np.ndarray, np.ndarray],
    unit: Tensor,
    name: str,
    subjects: list[str],
    thresholds: list[float],
    guarded: list[float],
) -> dict[str, tuple[list[dict], float]]:
    """`sweep` under each of the INTERVENTIONS; those with a guard take `guarded` as their retain
    thresholds."""
    features = evaluator.choose(sae, rates, unit, sorted({*thresholds, *guarded}))
    evaluator.lm.forget_answers()
    of = {how: thresholds if how == "clamp" else guarded for how in INTERVENTIONS}
    return {
        how: sweep(
            evaluator,
            features,
            rates,
            f"{name}_{how}",
            subjects,
            how,
            **evaluator.settings | {"retain_thresholds": of[how]},
        )
        for how in INTERVENTIONS
    }


def sweep_random(
    evaluator: Evaluator, sae, firing: Firing, seed: int, name: str, subjects: list[str]
) -> dict[str, tuple[list[dict], float]]:
    """The floor: as many features, drawn at random from the living, under the same interventions; one draw a
    seed."""
    forget, retain = firing.rates
    drawn = np.random.default_rng(seed).uniform(0.1, 1.0, len(forget))
    rates = np.where(forget + retain > 0, drawn, 0.0)
    thresholds = [RANDOM_THRESHOLD]
    return sweeps(evaluator, sae, (rates, 0 * rates), firing.unit, name, subjects, thresholds, thresholds)


def accuracy(evaluator: Evaluator, subjects: list[str], hook: Callable | None = None) -> tuple[float, float]:
    """Accuracy on the known forget and on the known retain questions, under a hook if given."""
    evaluator.lm.hook = hook
    right = {}
    for subject in subjects:
        metrics = saebench.mcq_metrics(
            evaluator.questions.ask, None, None, evaluator.artifacts, subject, target_metric="correct"
        )
        right[subject] = metrics["is_correct"]
    evaluator.lm.reset_hooks()
    retain = np.concatenate([v for s, v in right.items() if s != saebench.FORGET])
    return float(right[saebench.FORGET].mean()), float(retain.mean())


def units(evaluator: Evaluator, firing: Firing, swept: dict) -> dict[int, float]:
    """In what the multipliers of every feature that a sweep clamps count."""
    clamped = {i for cells, _ in swept.values() for cell in cells for i in cell["features"]}
    absolute = evaluator.testbed.clamp_scale == "absolute"
    return {i: 1.0 if absolute else firing.unit[i].item() for i in sorted(clamped)}


def repeatable(evaluator: Evaluator, sae, firing: Firing, cell: dict) -> dict:
    """A cell with what its guard takes from retain text (interventions.calibration), by which it can be
    repeated without that."""
    if not cell.get("features"):  # nothing was switched off
        return without_answers(cell)
    features = evaluator.features(sae, np.unique(cell["features"]), firing.unit)
    return without_answers(cell) | calibration(features, cell["intervention"])


def without_answers(cell: dict) -> dict:
    """A cell without right or wrong by question."""
    return {k: v for k, v in cell.items() if k not in ("forget", "retain")}


def doubts(evaluator: Evaluator, metrics: dict) -> list[str]:
    """What keeps the scores from meaning what they seem to: nothing to clamp, or an LM that mostly
    guesses."""
    found = []
    if not metrics["n_features_selectable"]:
        most = max(evaluator.settings["retain_thresholds"])
        found.append(
            f"unlearning: no feature fires on forget text and on under {most:g} of retain text: nothing of"
            " the forget domain was clamped"
        )
    if evaluator.testbed.scoring != "cloze":
        return found  # a letter must be right 24 times, a guess among four choices once
    asked = {subject: len(some) for subject, some in evaluator.questions.by_subject.items()}
    n_forget = asked[saebench.FORGET]
    forget = metrics["n_known_forget"] / n_forget
    retain = metrics["n_known_retain"] / (sum(asked.values()) - n_forget)
    if min(forget, retain) < 0.5:
        found.append(
            f"unlearning: the LM chooses right in {forget:.0%} of the forget and {retain:.0%} of the retain"
            " questions, and a guess in 25%: many of the questions that count as known are lucky guesses,"
            " which any change can undo"
        )
    return found


def bootstrap_interval(cells: list[dict], seed: int, draws: int = 2000) -> list[float]:
    """95 % percentile interval of SAEBench's score over resampled questions (forget and retain apart); the
    choice of the best cell is made anew in every resample."""
    rng = np.random.default_rng(seed)
    accuracies = []
    for domain in ("forget", "retain"):
        right = np.stack([c[domain] for c in cells])  # [cell, question]
        n = right.shape[1]
        accuracies.append(rng.multinomial(n, np.full(n, 1 / n), size=draws) @ right.T / n)
    scores = 1 - np.where(accuracies[1] >= 0.99, accuracies[0], 1.0).min(1)
    return np.quantile(scores, [0.025, 0.975]).tolist()
