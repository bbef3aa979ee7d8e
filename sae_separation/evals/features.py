"""The features of an SAE that matter for the domain to forget, as one reads them: where they fire, on what,
next to which others, what clamps them, and what clamping one alone changes."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sae_separation.evals.answers import Paper, paper
from sae_separation.evals.cells import FeatureSwitch, chosen_for, said, under_cell
from sae_separation.evals.evaluator import Evaluator, Firing, finite
from sae_separation.evals.selection import by_mutual_information
from sae_separation.exam import Residuals, trained_on
from sae_separation.interventions import ChosenFeatures

SHOWN = 40  # features with contexts: those of the chosen cell, then those that tell the domains apart best
CONTEXTS, BEFORE, BEHIND = 10, 8, 3  # contexts a feature; tokens before and behind the one that fires most
NEIGHBOURS = 5
EXAMPLES = 5  # changed answers a feature that are told
MOST_LISTED = 2048  # living features whose numbers are listed, the most forget-leaning first


@torch.no_grad()
def features(evaluator: Evaluator, sae, seed: int, name: str) -> tuple[dict, dict]:
    """How many features live, lean to forget text (affinity > 0.5), are clamped by the chosen cell, and
    change an answer when they alone are written as that cell writes (without a cell: clamped as strongly as
    any). The SHOWN ones in full, the numbers of all others.

    Firing rates and mean active values are of the text that features are selected on, contexts of held-out
    text."""
    evaluator = evaluator.examiner
    firing: Firing = evaluator.firing(sae)
    of = chosen_for(evaluator, sae)
    switch, cell, cells = of
    assert isinstance(switch, FeatureSwitch)
    clamped = [] if cell is None else cell["features"]
    ranked = by_mutual_information(evaluator, sae, SHOWN)
    leaning = [i for i in ranked if firing.forget[i] > firing.retain[i]]
    shown = list(dict.fromkeys([*clamped, *leaning]))[:SHOWN]
    write = {"write": "clamp", "multiplier": max(evaluator.settings["multipliers"])}
    if cell is not None:
        write = {k: cell[k] for k in write if k in cell}
    table = numbers(firing)
    told: list[dict] = [table[i] | {"in_cell": i in clamped} for i in shown]
    if shown:
        alone = switch.over(shown)
        for feature, more in zip(
            told, zip(neighbours(sae, firing, shown), contexts(evaluator, alone, shown))
        ):
            feature |= {"cells": cells_with(cells, feature["feature"]), "neighbours": more[0]}
            feature |= {"contexts": more[1]}
        for feature, changed in zip(told, changes(evaluator, alone, write, shown)):
            feature |= {"changes": changed}
        switch.lm.forget_answers()
    forget_first = sorted(table.values(), key=forget_leaning_first)
    metrics = {
        "n_alive": len(table),
        "n_leaning_to_forget": sum(row["affinity"] > 0.5 for row in table.values()),
        "n_clamped": len(clamped),
        "n_that_change_answers": sum(bool(feature["changes"]["n"]) for feature in told),
    }
    columns = ("feature", "forget", "retain", "mean")
    details = of.recorded | {
        "written_alone": write,
        "context": ["domain", "at", "tokens", "activations"],
        "features": told,
        "alive": {k: [row[k] for row in forget_first[:MOST_LISTED]] for k in columns},
    }
    return finite("features", metrics, details)


def numbers(firing: Firing) -> dict[int, dict]:
    """Of every living feature, by its place: firing rate on forget and on retain text, affinity (their
    difference over their sum), mean active value."""
    out = {}
    rows = torch.stack([firing.forget, firing.retain, firing.unit], 1).cpu().tolist()
    for i, (forget, retain, mean) in enumerate(rows):
        if forget + retain > 0:
            affinity = (forget - retain) / (forget + retain)
            rates = {"forget": digits(forget), "retain": digits(retain)}
            out[i] = {"feature": i} | rates | {"affinity": digits(affinity), "mean": digits(mean)}
    return out


def digits(value: float, n: int = 3) -> float | int:
    """So many of a number: what one reads."""
    short = float(f"{value:.{n}g}")
    return int(short) if short.is_integer() else short


def forget_leaning_first(row: dict) -> tuple[float, float]:
    return -row["affinity"], -row["forget"]


def cells_with(cells: list[dict], feature: int) -> dict[str, int]:
    """By the ranking that a cell takes its features from (a retain threshold or a selection), the least
    number of features with which a cell clamps this one."""
    out: dict[str, int] = {}
    for cell in cells:
        if feature in cell["features"]:
            by = next(f"{k} {cell[k]}" for k in ("retain_threshold", "selection") if k in cell)
            n = cell["n_features"]
            out[by] = min(n, out[by]) if by in out else n
    return out


def neighbours(sae, firing: Firing, shown: list[int]) -> list[list[list]]:
    """Of each feature, the NEIGHBOURS living ones whose decoder rows have the largest cosine with its own,
    and that cosine."""
    W = torch.nn.functional.normalize(sae.W_dec.float(), dim=1)
    cosines = W[shown] @ W.T
    cosines[:, firing.forget + firing.retain == 0] = -torch.inf
    cosines[torch.arange(len(shown)), shown] = -torch.inf
    top = cosines.topk(min(NEIGHBOURS, len(W)), 1)
    return [
        [[i, digits(c)] for i, c in zip(places, values) if np.isfinite(c)]
        for places, values in zip(top.indices.tolist(), top.values.tolist())
    ]


# ------------------------------------------------------------------------------------------------ contexts


def activations(evaluator: Evaluator, features: ChosenFeatures) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Domain, tokens [n, pos] and activations [n, pos, chosen] of held-out contexts, 0 on tokens that SAEs
    are not trained on."""
    for domain, (tokens, resid) in evaluator.held_out.items():
        for t, x in zip(tokens.split(16), resid.split(16)):
            read = Residuals(x, trained_on(t, evaluator.special), t)
            yield domain, t.cpu(), (features.on(read) * features.unit).cpu()


def contexts(evaluator: Evaluator, switch: FeatureSwitch, shown: list[int]) -> list[list[list]]:
    """Of each feature, the CONTEXTS held-out contexts in which it fires most, around the token where it does:
    domain, the place of that token, tokens as text, activations."""
    parts = list(activations(evaluator, switch.features))
    domains = [domain for domain, tokens, _ in parts for _ in tokens]
    tokens, f = torch.cat([t for _, t, _ in parts]), torch.cat([f for *_, f in parts])
    places = np.searchsorted(switch.features.chosen.numpy(), shown)
    peak, at = f.max(1)  # [n, chosen]
    out = []
    for place in places.tolist():
        top = peak[:, place].topk(min(CONTEXTS, len(peak)))
        rows = [row for row, value in zip(top.indices.tolist(), top.values.tolist()) if value > 0]
        out.append([])
        for row in rows:
            here = int(at[row, place])
            window = slice(max(0, here - BEFORE), here + BEHIND + 1)
            texts = pieces(evaluator.testbed.tokenizer, tokens[row, window].tolist())
            values = [digits(v, 2) for v in f[row, window, place].tolist()]
            out[-1].append([domains[row], here - window.start, texts, values])
    return out


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text of each token, as it stands behind those before it."""
    whole = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    return [text[len(before) :] for before, text in zip(whole, whole[1:])]


# ------------------------------------------------------------------------------------------------ answers


def changes(evaluator: Evaluator, switch: FeatureSwitch, write: dict, shown: list[int]) -> Iterator[dict]:
    """Of each feature written alone: how many answers change (`n`), by format those to forget and to retain
    questions, and some of them: format, question, the answer without and with, the right one."""
    asked: Paper = evaluator.once(paper)
    for feature in shown:
        cell, n, examples = write | {"n_features": 1, "features": [feature]}, {}, []
        for name, one in asked.formats.items():
            with under_cell(switch, cell):
                now = said(switch.lm, one.exam)
            other = (now != one.plain).nonzero()[:, 0].tolist()
            forget = int(asked.is_forget([one.places[i] for i in other]).sum())
            n[name] = [forget, len(other) - forget]
            for i in other:
                texts = [one.words[i][int(s[i])] for s in (one.plain, now, one.exam.answers)]
                examples.append([name, asked.questions[one.places[i]].question, *texts])
        switch.lm.forget_answers()
        some = examples[:: max(1, len(examples) // EXAMPLES)][:EXAMPLES]
        yield {"n": sum(map(sum, n.values())), "by_format": n, "examples": some}
