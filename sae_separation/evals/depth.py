"""How deep knowledge is removed: whether a linear readout of the stream still finds what the LM no longer
says."""

import warnings
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae_separation import saebench
from sae_separation.evals.cells import Hook, Switch, changed, chosen_for, hook_of, never_named
from sae_separation.evals.evaluator import Evaluator, finite
from sae_separation.exam import Batch, logits_at, prompt_batches
from sae_separation.lm import InterventionLM, hidden_of, low_precision

FOLDS = 3
LEAST_GAP = 0.1  # between the readouts of the LM and of the reference, of a layer that counts
NO_RELATIONS = (
    "depth: no relation of the forget questions that the LM knows has two values with two entities each"
    " (questions say of whom they ask, and which values there are): depth is not measured"
)

ByLayer = dict[str, list[float]]  # subject -> accuracy of the readout by layer


@dataclass
class Readout:
    """One relation of a subject: a classifier of its values is fitted on some entities, and asked of the
    others.

    `prompts` [entity][wording] end where the value would be said; labels [entity] are places among the
    values; folds [entity]: every value of a fold is in the others, too.
    """

    subject: str
    prompts: list[list[str]]
    labels: np.ndarray
    folds: np.ndarray
    n_values: int

    def accuracy(self, x: np.ndarray) -> float:
        """Of the stream x [entity, wording, D], cross-validated over entities."""
        right = []
        for fold in np.unique(self.folds):
            asked = self.folds == fold
            right.append(right_of(x[~asked], self.labels[~asked], x[asked], self.labels[asked]).ravel())
        return float(np.concatenate(right).mean())


def right_of(x: np.ndarray, labels: np.ndarray, asked: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Right or wrong [entity, wording] of logistic regression on x [entity, wording, D], standardised, asked
    of other entities."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    flat = x.reshape(-1, x.shape[-1])
    mean, std = flat.mean(0), flat.std(0) + 1e-6
    probe = LogisticRegression(C=0.1, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit((flat - mean) / std, labels.repeat(x.shape[1]))
    said = np.asarray(probe.predict((asked.reshape(-1, x.shape[-1]) - mean) / std))
    return said.reshape(asked.shape[:2]) == expected[:, None]


@dataclass
class Material:
    """The readouts of all subjects, and their prompts as batches."""

    readouts: list[Readout]
    batches: list[Batch]
    layers: list[int]


def material(evaluator: Evaluator) -> Material:
    """Of the questions that the LM knows, but for those about entities that the forget text never names."""
    readouts, unseen = [], set(evaluator.once(never_named))
    for subject, questions in evaluator.questions.by_subject.items():
        known, relations = evaluator.questions.known[subject], defaultdict(dict)
        for i, q in enumerate(questions):
            told = q.entity and q.relation and q.choices[q.answer] in q.values
            if told and known[i] and not (subject == saebench.FORGET and i in unseen):
                relations[q.relation, q.values].setdefault(q.entity, q)
        readouts += [
            readout for some in relations.values() if (readout := readout_of(subject, list(some.values())))
        ]
    prompts = [prompt for readout in readouts for of_entity in readout.prompts for prompt in of_entity]
    testbed, first = evaluator.testbed, evaluator.testbed.layer
    how = {"device": testbed.lm.device, "mixed_lengths": testbed.mixed_lengths}
    batches = prompt_batches(testbed.tokenizer, prompts, **how) if prompts else []
    return Material(readouts, batches, list(range(first, len(testbed.layers))))


def readout_of(subject: str, questions: list) -> Readout | None:
    """Of one question an entity. Entities whose value no other has are left out; None where fewer than two
    values are left."""
    values = [q.values.index(q.choices[q.answer]) for q in questions]
    kept = [i for i, value in enumerate(values) if values.count(value) > 1]
    labels = np.array([values[i] for i in kept])
    if len(np.unique(labels)) < 2:
        return None
    nth = np.array([int((labels[:i] == label).sum()) for i, label in enumerate(labels)])
    rephrased = all(q.rephrased for q in questions)
    asked = [
        (questions[i].question, questions[i].rephrased) if rephrased else (questions[i].question,)
        for i in kept
    ]
    prompts = [[f"Question: {text}\nAnswer:" for text in texts] for texts in asked]
    return Readout(subject, prompts, labels, nth % FOLDS, len(np.unique(labels)))


@torch.no_grad()
def streams(lm: InterventionLM, batches: list[Batch], hook: Hook | None) -> Tensor:
    """The stream [prompt, layer, D] at the last token of every prompt, after every layer from the hook layer
    up, under a hook."""
    rows = {}
    for batch in batches:
        resid = changed(lm, batch, hook)
        for row, stream in zip(batch.rows or [], layers_above(lm, batch, resid)):
            rows[row] = stream
    return torch.stack([rows[row] for row in sorted(rows)])


def layers_above(lm: InterventionLM, batch: Batch, resid: Tensor) -> Tensor:
    """The stream [row, layer, D] where a batch is read, after every layer from the hook layer up, which puts
    out `resid`."""
    assert batch.positions is not None
    at, kept = (torch.arange(len(resid)), batch.positions[:, 0]), [resid]

    def keep(module, args, put_out):
        kept.append(hidden_of(put_out).float().to(resid.device))

    handles = [layer.register_forward_hook(keep) for layer in lm.layers[lm.layer + 1 :]]
    try:
        with lm.resumed_from(resid), low_precision(lm.lm):
            logits_at(lm.lm, batch.tokens, batch.positions, **batch.seen(lm.lm))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([stream[at] for stream in kept], 1).cpu()


def accuracies(of: Material, lm: InterventionLM, hook: Hook | None) -> ByLayer:
    """Mean over the relations of every subject."""
    x, start = streams(lm, of.batches, hook).numpy(), 0
    found: dict[str, list[list[float]]] = defaultdict(list)
    for readout in of.readouts:
        shape = len(readout.prompts), len(readout.prompts[0])
        end = start + shape[0] * shape[1]
        mine = x[start:end].reshape(*shape, *x.shape[1:])
        found[readout.subject].append([readout.accuracy(mine[:, :, k]) for k in range(x.shape[1])])
        start = end
    return {subject: np.mean(some, 0).tolist() for subject, some in found.items()}


def of_lm(evaluator: Evaluator) -> ByLayer:
    """Without an intervention."""
    return accuracies(evaluator.once(material), evaluator.lm, None)


def of_oracle(evaluator: Evaluator) -> ByLayer | None:
    """None without an oracle."""
    return evaluator.oracle and accuracies(evaluator.once(material), evaluator.oracle, None)


def depth_score(lm: list[float], reference: list[float], under: list[float]) -> float | None:
    """Mean over layers of how far the readout `under` an intervention is on the way from the LM's to the
    reference's, within 0 and 1. Layers count where these two are at least LEAST_GAP apart; None where none
    does."""
    shares = [
        min(max((a - c) / (a - b), 0.0), 1.0) for a, b, c in zip(lm, reference, under) if a - b >= LEAST_GAP
    ]
    return float(np.mean(shares)) if shares else None


def measure(
    evaluator: Evaluator, switch: Switch, cell: dict | None, questions: Material
) -> tuple[dict, dict]:
    """Metrics, and accuracies by layer, on one LM."""
    lm, oracle = evaluator.once(of_lm), evaluator.once(of_oracle)
    under = accuracies(questions, switch.lm, hook_of(switch, cell))
    asked = [r for r in questions.readouts if r.subject == saebench.FORGET]
    chance = [float(np.mean([1 / r.n_values for r in asked]))] * len(questions.layers)
    reference = oracle[saebench.FORGET] if oracle else chance
    metrics: dict[str, float | None] = {
        "depth_score": depth_score(lm[saebench.FORGET], reference, under[saebench.FORGET])
    }
    for whose, found in (("", under), ("lm_", lm), ("oracle_", oracle)):
        of_retain = [a for subject, a in (found or {}).items() if subject != saebench.FORGET]
        metrics[f"{whose}readout_forget"] = float(np.mean(found[saebench.FORGET])) if found else None
        metrics[f"{whose}readout_retain"] = float(np.mean(of_retain)) if of_retain else None
    names = evaluator.questions.names
    by_layer = {
        names[subject]: {"lm": lm[subject], "oracle": oracle and oracle[subject], "intervention": accuracy}
        for subject, accuracy in under.items()
    }
    return metrics, {"layers": questions.layers, "chance": chance[0], "by_layer": by_layer}


def depth(evaluator: Evaluator, sae, seed: int, name: str) -> tuple[dict, dict, list[str]]:
    """Linear readout of the value from the stream after every layer from the hook layer up, at the end of the
    question and of its other wording, for entities that it was not fitted on, under the intervention that is
    chosen on half of the questions: 0 as the LM, 1 as the oracle. The Unlearning Depth Score (arXiv
    2605.24614) is its model."""
    evaluator = evaluator.examiner
    questions = evaluator.once(material)
    if all(readout.subject != saebench.FORGET for readout in questions.readouts):
        return dict.fromkeys(METRICS), {}, [NO_RELATIONS]
    of = chosen_for(evaluator, sae)
    metrics, details = measure(evaluator, of.switch, of.cell, questions)
    rounded = evaluator.in_4_bits
    rounded.made[material] = questions  # the same, whatever it knows
    in_4_bits, details["in_4_bits"] = measure(rounded, of.switch.on(rounded), of.cell, questions)
    metrics |= {f"{metric}_4bit": value for metric, value in in_4_bits.items()}
    notes = []
    if of.cell is None:
        notes.append("depth: no cell keeps 0.99 of the retain questions: nothing was switched off")
    if evaluator.oracle is None:
        notes.append("depth: there is no oracle: chance stands in its place")
    if metrics["depth_score"] is None:
        why = "the readout hardly finds in the LM what it does not find without the knowledge"
        notes.append(f"depth: {why}: depth_score is undefined")
    may = tuple(metrics)
    return *finite("depth", {m: metrics[m] for m in METRICS}, details | of.recorded, may), notes


METRICS = [
    metric + bits
    for bits in ("", "_4bit")
    for metric in (
        "depth_score",
        *(f"{whose}readout_{domain}" for whose in ("", "lm_", "oracle_") for domain in ("forget", "retain")),
    )
]
