"""How soon removed knowledge is back: the LM fine-tuned with the intervention in place, on half of the forget
facts and on none of them, and asked for the other half."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple
from weakref import WeakKeyDictionary

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sae_separation import saebench
from sae_separation.evals.cells import Chosen, Hook, changed, chosen_for, hook_of, never_named
from sae_separation.evals.evaluator import Evaluator, finite
from sae_separation.exam import Batch, Exam, Residuals, trained_on
from sae_separation.lm import InterventionLM, SplitLM, Testbed, hidden_of, low_precision, massive
from sae_separation.methods import weights_of
from sae_separation.progress import section
from sae_separation.testbeds import packed_contexts

STEPS = (0, 5, 10, 20, 30, 50, 75, 100)  # of fine-tuning, after which the LM is asked
CHANCE = 0.25
LEAST = 10  # questions that are asked

MOST_CONTEXTS = 128  # of each text that is trained on
MOST_NUMBERS = 2**25  # of each text's stream that is kept
SMALL_LM = 10_000_000  # parameters; larger ones are given a quarter of the contexts on a CPU


class Setting(NamedTuple):
    """What is trained on what, and how its metrics end."""

    whole_lm: bool
    facts: bool
    ending: str


SETTINGS = [
    Setting(whole_lm=False, facts=True, ending=""),
    Setting(whole_lm=True, facts=True, ending="_whole_lm"),
    Setting(whole_lm=False, facts=False, ending="_without_facts"),
    Setting(whole_lm=True, facts=False, ending="_whole_lm_without_facts"),
]
ROUNDED = Setting(whole_lm=False, facts=True, ending="_4bit")

Curve = list[float]  # accuracy after each of STEPS


@dataclass
class Material:
    """Contexts that are trained on, half of them forget text, or all of them retain text; and the exam of the
    facts that neither tells."""

    both: Batch
    retain: Batch
    exam: Exam
    about: dict


def material(evaluator: Evaluator) -> Material | None:
    """The entities of the forget questions, split in two at random, always in the same way: documents that
    name some of the first half, and none of the second, and the questions about the second that the LM
    knows. None where questions name no entity, no such document is there, or too few questions are left."""
    asked, unseen = evaluator.questions.by_subject[saebench.FORGET], set(evaluator.once(never_named))
    entities = sorted({q.entity for i, q in enumerate(asked) if q.entity and i not in unseen})
    mixed = np.random.default_rng(0).permutation(entities).tolist()
    taught, others = sorted(mixed[: len(mixed) // 2]), sorted(mixed[len(mixed) // 2 :])
    known = evaluator.questions.known[saebench.FORGET]
    places = tuple(i for i, q in enumerate(asked) if q.entity in others and known[i])
    testbed, size = evaluator.testbed, evaluator.context_size
    n = max(16, min(MOST_CONTEXTS, MOST_NUMBERS // (size * testbed.d_in)))
    documents = telling(testbed, taught, others, 8 * n * size)
    if not documents or len(places) < LEAST:
        return None
    of_forget = contexts(evaluator, datasets.Dataset.from_dict({"text": documents}), n)
    of_retain = contexts(evaluator, testbed.retain.train, n)
    return Material(
        as_batch(evaluator, of_forget + of_retain),
        as_batch(evaluator, of_retain),
        evaluator.questions.exam(saebench.FORGET, places),
        {"taught": taught, "asked": others, "n_questions": len(places), "n_documents": len(documents)},
    )


def telling(testbed: Testbed, taught: list[str], others: list[str], n_characters: int) -> list[str]:
    """Forget documents that name one of `taught` and none of `others`, about so many characters."""
    found, length = [], 0
    for part in testbed.forget.train.shuffle(seed=0).iter(batch_size=256):
        for text in dict(part)["text"]:
            if any(e in text for e in taught) and not any(e in text for e in others):
                found.append(text)
                length += len(text)
        if length >= n_characters:
            break
    return found


def contexts(evaluator: Evaluator, text: datasets.Dataset, n: int) -> list[list[int]]:
    """n contexts."""
    tokenizer = evaluator.testbed.tokenizer
    return list(islice(packed_contexts(text, tokenizer, evaluator.context_size, seed=0), n))


def as_batch(evaluator: Evaluator, contexts: list[list[int]]) -> Batch:
    tokens = torch.tensor(contexts, device=evaluator.special.device)
    return Batch(tokens, trained_on(tokens, evaluator.special))


class FineTuned:
    """A copy of an LM, in fp32, whose hook layer puts out what the hook makes of it.

    Of the whole LM, every weight is trained; gradients flow through the hook where they can. Otherwise those
    above the hook layer are (an unembedding that is tied to the embedding as if it were its own), and what
    the hook layer puts out is made once a batch. A hook that gives the lower layers other weights is these
    weights where the whole LM is trained.
    """

    def __init__(self, testbed: Testbed, lm: InterventionLM, hook: Hook | None, whole_lm: bool):
        weights = weights_of(hook) if whole_lm else {}
        self.before, self.hook, self.whole_lm = lm, None if weights else hook, whole_lm
        self.lm = copy.deepcopy(lm.lm).float().requires_grad_(True)
        self.lm.load_state_dict(weights, strict=False)
        self.split = SplitLM(replace(testbed, lm=self.lm))
        self.as_put_out = self.split.as_put_out  # found out by a pass of its own
        self.made: WeakKeyDictionary[Batch, Tensor] = WeakKeyDictionary()
        # as muP scales Adam's: 1e-3 for a width of 128. Fused, a core takes 0.12 s for 53 M
        # weights, else 0.58
        self.adam = torch.optim.AdamW(self.lm.parameters(), 0.128 / testbed.d_in, fused=True)

    def stream(self, batch: Batch) -> Tensor:
        """The stream [row, pos, D] that the untrained hook layer puts out, under the hook."""
        if batch not in self.made:
            some = [batch.take(rows.tolist()) for rows in torch.arange(len(batch.tokens)).split(32)]
            with torch.no_grad():
                self.made[batch] = torch.cat([changed(self.before, part, self.hook) for part in some])
        return self.made[batch]

    @contextlib.contextmanager
    def intervened(self, batch: Batch) -> Iterator[None]:
        """Inside, the hook layer's output passes through the hook."""
        hook = self.hook

        def put_in(module, args, put_out):
            resid = hidden_of(put_out).to(batch.tokens.device)
            may_be_touched = batch.trained & ~massive(resid.detach(), batch.trained)
            seen = batch.seen(self.lm)
            with torch.autocast(resid.device.type, enabled=False):
                new = hook and hook(resid, hook=Residuals(resid, may_be_touched, batch.tokens, seen))
            return put_out if new is None else self.as_put_out(new)

        handle = self.split.layers[self.split.layer].register_forward_hook(put_in)
        try:
            yield
        finally:
            handle.remove()

    def logits(self, batch: Batch, rows: list[int]) -> Tensor:
        """Of rows of a batch [row, n, vocab]."""
        some = batch.take(rows)
        inside = self.intervened(some) if self.whole_lm else self.split.resumed_from(self.stream(batch)[rows])
        with low_precision(self.lm):
            return self.split.logits_of(some, inside)

    @torch.enable_grad()
    def step(self, contexts: Batch, rows: list[int]):
        """One step of AdamW on some contexts' next-token cross-entropy."""
        logits = self.logits(contexts, rows)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), contexts.tokens[rows, 1:].flatten())
        weights = list(self.lm.parameters())
        for weight, grad in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True)):
            weight.grad = grad  # None: it plays no part, and stays
        self.adam.step()

    @torch.no_grad()
    def accuracy(self, exam: Exam) -> float:
        """Of the exam's questions."""

        def answers(batch: Batch) -> Tensor:
            return exam.read(batch, self.logits(batch, list(range(len(batch.tokens)))))

        probs = exam.probs_from(answers)
        return (probs.argmax(-1) == exam.answers).float().mean().item()


def curve(evaluator: Evaluator, of: Material, lm: InterventionLM, hook: Hook | None, how: Setting) -> Curve:
    """Accuracy on the facts that are not trained on, after each of STEPS."""
    tuned, out = FineTuned(evaluator.testbed, lm, hook, how.whole_lm), []
    small = lm.lm.device.type != "cpu" or sum(p.numel() for p in lm.lm.parameters()) < SMALL_LM
    texts, n = of.both if how.facts else of.retain, 4 if small else 1
    drawn = np.random.default_rng(0).integers(len(texts.tokens), size=(STEPS[-1], n))
    read, rows = np.unique(drawn, return_inverse=True)  # the others need not pass through the LM
    texts = texts.take(read.tolist())
    for step, some in enumerate(section.steps(rows.reshape(drawn.shape).tolist(), 0.2)):
        if step in STEPS:
            out.append(tuned.accuracy(of.exam))
        tuned.step(texts, some)
    return [*out, tuned.accuracy(of.exam)]


def of_oracle(evaluator: Evaluator) -> dict[str, Curve] | None:
    """The oracle's curves, by their settings' endings; None without an oracle."""
    questions, oracle = evaluator.once(material), evaluator.oracle
    if not oracle or not questions:
        return None
    return {how.ending: curve(evaluator, questions, oracle, None, how) for how in SETTINGS}


def curves(evaluator: Evaluator, of: Chosen, questions: Material) -> dict[str, Curve]:
    """Those of an intervention, by their settings' endings."""
    hook, rounded = hook_of(of.switch, of.cell), of.switch.on(evaluator.in_4_bits)
    found = {how.ending: curve(evaluator, questions, of.switch.lm, hook, how) for how in SETTINGS}
    in_4_bits = curve(evaluator, questions, rounded.lm, hook_of(rounded, of.cell), ROUNDED)
    return found | {ROUNDED.ending: in_4_bits}


def knowledge(accuracy: float) -> float:
    """Accuracy above chance: 1 is all that the LM knew."""
    return max(accuracy - CHANCE, 0.0) / (1 - CHANCE)


def steps_to_half(of: Curve) -> int | None:
    """The first of STEPS after which half of the knowledge is there; None where it never is."""
    return next((step for step, accuracy in zip(STEPS, of) if knowledge(accuracy) >= 0.5), None)


def metrics_of(found: dict[str, Curve], whose: str = "") -> dict[str, float | None]:
    """What is left before and after fine-tuning, and how soon half of it is."""
    out: dict[str, float | None] = {f"{whose}left_before": knowledge(found[""][0])}
    for ending, of in found.items():
        out[f"{whose}left_after_{STEPS[-1]}_steps{ending}"] = knowledge(of[-1])
        out[f"{whose}steps_to_half{ending}"] = steps_to_half(of)
    return out


def undefined() -> dict[str, None]:
    """The metrics, where there is nothing to measure."""
    curve = [0.0] * len(STEPS)
    found = {how.ending: curve for how in (*SETTINGS, ROUNDED)}
    of_oracle = {how.ending: curve for how in SETTINGS}
    return dict.fromkeys([*metrics_of(found), *metrics_of(of_oracle, "oracle_")])


def relearning(evaluator: Evaluator, sae, seed: int, name: str) -> tuple[dict, dict, list[str]]:
    """The layers above the hook, and apart from that the whole LM, are fine-tuned with the intervention in
    place (the cell that is chosen on half of the questions), on documents about half of the forget entities
    and as much retain text, and apart from that on retain text alone: the knowledge left of the other
    entities, before and after, and the steps until half of it is back; and the oracle's, to which all of it
    is new."""
    evaluator = evaluator.examiner
    questions = evaluator.once(material)
    if questions is None:
        why = f"fewer than {LEAST} known forget questions are about entities that some documents leave out"
        return undefined(), {}, [f"relearning: {why}: it is not measured"]
    of = chosen_for(evaluator, sae)
    found, oracle = curves(evaluator, of, questions), evaluator.once(of_oracle)
    metrics = undefined() | metrics_of(found) | (metrics_of(oracle, "oracle_") if oracle else {})
    notes = []
    if of.cell is None:
        notes.append("relearning: no cell keeps 0.99 of the retain questions: nothing was switched off")
    if oracle is None:
        notes.append("relearning: there is no oracle to compare with")
    slow = [
        m for m in metrics if "steps_to_half" in m and metrics[m] is None and (oracle or "oracle" not in m)
    ]
    if slow:
        notes.append(f"relearning: more than {STEPS[-1]} steps: {', '.join(slow)}")
    details = {"steps": STEPS, "accuracy": found, "oracle": oracle} | of.recorded | questions.about
    return *finite("relearning", metrics, details), notes
