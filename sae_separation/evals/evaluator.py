"""What evaluations share: a testbed's LM, the contexts and questions it is measured on, and where an SAE
fires on them.

    evaluator = Evaluator(testbed, context_size=128)
    metrics, details = geometry(evaluator, load_exported(folder), seed, name)

Every SAE is read back from its exported files: what is evaluated is what was saved.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import datasets
import numpy as np
import torch
from torch import Tensor

from sae_separation import process, saebench
from sae_separation.errors import RunFailed, WrongRequest
from sae_separation.exam import Exam, Residuals, special_ids, trained_on
from sae_separation.four_bits import rounded_to_4_bits
from sae_separation.interventions import ChosenFeatures
from sae_separation.lm import (
    InterventionLM,
    Testbed,
    device_of,
    fast_lm_tokens,
    load_lm,
    massive,
    runs_in_bf16,
)
from sae_separation.progress import section
from sae_separation.testbeds import packed_contexts

GUARDED_RETAIN_THRESHOLD = 0.1  # a guard can afford features that fire more on retain text

T = TypeVar("T")


class Contexts(NamedTuple):
    """Contexts of one domain [n, pos], and their residual stream at the hook layer [n, pos, D] (fp32)."""

    tokens: Tensor
    resid: Tensor


class Firing(NamedTuple):
    """Firing rate of each feature on forget and on retain text, and its mean active value, each [F]."""

    forget: Tensor
    retain: Tensor
    unit: Tensor

    @property
    def rates(self) -> tuple[np.ndarray, np.ndarray]:
        """On forget and on retain text, as SAEBench takes them."""
        return self.forget.cpu().numpy(), self.retain.cpu().numpy()


def evaluation_contexts(
    testbed: Testbed, context_size: int, n_contexts: int | None = None
) -> dict[tuple[str, str], Tensor]:
    """Contexts [n, pos] of the parts ("train", "held_out") of both domains that evaluations use, at most
    `n_contexts`: of each domain, `n_held_out` that are held out and four times as many to select features on.
    No LM is needed.

    Raises WrongRequest when a text is too short.
    """
    out = {}
    for domain, text in (("forget", testbed.forget), ("retain", testbed.retain)):
        for part, n in (("train", 4 * testbed.n_held_out), ("held_out", testbed.n_held_out)):
            n = n if n_contexts is None else min(n, n_contexts)
            contexts = first_contexts(testbed, getattr(text, part), context_size, n)
            if len(contexts) < 16:
                there = f"its {part.replace('_', '-')} part holds {len(contexts)} contexts"
                raise WrongRequest(
                    f"--{domain}_text: {there} of {context_size} tokens, and evaluation takes at least 16:"
                    " give more text, a smaller --context_size, or --evals none"
                )
            out[part, domain] = torch.tensor(contexts, device=testbed.lm.device)
    return out


def first_contexts(testbed: Testbed, text: datasets.Dataset, context_size: int, n: int) -> list[list[int]]:
    """The first n contexts of a text in a fixed random order of its documents, or all that there are."""
    every = packed_contexts(text, testbed.tokenizer, context_size, seed=0, repeat=False)
    return list(islice(every, n))


class Questions:
    """A testbed's questions, by the names that SAEBench is given for their subjects (`names` has the user's).

    SAEBench asks the same again with every SAE: an exam is made once, and what the LM itself answers is asked
    once.
    """

    def __init__(self, testbed: Testbed, lm: InterventionLM):
        self.testbed, self.lm = testbed, lm
        self.names = saebench.aliases(testbed.questions, testbed.forget_subject)
        self.by_subject = {alias: testbed.questions[subject] for alias, subject in self.names.items()}
        self._exams: dict[tuple, Exam] = {}  # by what is asked
        self._plain: dict[tuple, tuple[Tensor, Tensor]] = {}  # by the same: what the plain LM answers

    def ask(
        self,
        subject: str,
        chosen: tuple[int, ...] | None = None,
        permutations: Sequence[Sequence[int]] = saebench.AS_LISTED,
        without_question: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Probabilities [n, 4] of the choices as listed, and the right choices [n], of the questions at the
        `chosen` places (None: all), permutations innermost; under the LM's hook if there is one. Without a
        hook, NaN under the rest of all 24 permutations where a question was wrong under one."""
        key = (subject, chosen, tuple(map(tuple, permutations)), without_question)
        if self.lm.hook is not None:
            return self._probs(self.exam(*key)), self.exam(*key).answers
        if key not in self._plain:
            self._plain[key] = self._until_wrong(*key) if len(key[2]) == 24 else self._asked(*key)
        return self._plain[key]

    def _asked(self, *what) -> tuple[Tensor, Tensor]:
        exam = self.exam(*what)
        return self._probs(exam), exam.answers

    def _until_wrong(
        self, subject: str, chosen: tuple[int, ...] | None, permutations: tuple, without_question: bool
    ) -> tuple[Tensor, Tensor]:
        """The same of all permutations. What counts is whether a question is right under every one: by letter
        the LM is asked under a few at a time, and not again what it got wrong (NaN)."""
        if self.testbed.scoring != "letter":  # one pass serves all permutations
            return self._asked(subject, chosen, permutations, without_question)
        questions = self.by_subject[subject]
        still = list(range(len(questions))) if chosen is None else list(chosen)
        place = {question: i for i, question in enumerate(still)}
        probs = torch.full((len(still), 24, 4), torch.nan)
        answers = torch.tensor([[p.index(questions[i].answer) for p in permutations] for i in still])
        for first, last in itertools.pairwise((0, 1, 3, 8, 24)):
            if not still:
                break
            exam = self._made(subject, tuple(still), permutations[first:last], without_question)
            rows = torch.tensor([place[i] for i in still])
            probs[rows, first:last] = self._probs(exam).view(len(still), -1, 4)
            correct = saebench.right(probs[rows, first:last], answers[rows, first:last]).all(1)
            still = [i for i, wanted in zip(still, correct.tolist()) if wanted]
        return probs.flatten(0, 1), answers.flatten()

    def exam(
        self,
        subject: str,
        chosen: tuple[int, ...] | None,
        permutations=saebench.AS_LISTED,
        without_question=False,
    ) -> Exam:
        """Of the questions at the `chosen` places (None: all), as the testbed scores them; made once."""
        key = (subject, chosen, permutations, without_question)
        if key not in self._exams:
            self._exams[key] = self._made(*key)
        return self._exams[key]

    def _made(self, subject: str, chosen: tuple[int, ...] | None, permutations, without_question) -> Exam:
        questions = self.by_subject[subject]
        return Exam(
            self.testbed.tokenizer,
            questions if chosen is None else [questions[i] for i in chosen],
            self.testbed.scoring,
            permutations,
            self.testbed.prompt_format,
            without_question,
            self.testbed.lm.device,
            self.testbed.shared_stems,
            self.testbed.mixed_lengths,
            fast_lm_tokens(self.testbed),
        )

    def _probs(self, exam: Exam) -> Tensor:
        return exam.probs_from(partial(self.lm.ask, read=exam.read))

    @cached_property
    def known(self) -> dict[str, Tensor]:
        """Which questions [n] (bool) of each subject the LM gets right under all 24 permutations."""
        out = {}
        for subject in section.steps(self.by_subject, 0.15):
            probs, answers = self.ask(subject, permutations=saebench.ALL_PERMUTATIONS)
            out[subject] = saebench.right(probs, answers).view(-1, 24).all(1)
        return out

    @property
    def n_known(self) -> dict[str, int]:
        """How many, by subject."""
        return {subject: int(known.sum()) for subject, known in self.known.items()}


class Evaluator:
    """What the evaluations of one testbed share. What does not depend on the SAE is made once for all seeds
    and runs of the process: contexts and their residual stream here, the LM's own answers in `questions`, the
    rest by `once`."""

    def __init__(
        self,
        testbed: Testbed,
        context_size: int,
        n_contexts: int | None = None,
        reads_text: bool = True,
    ):
        """Raises WrongRequest for an LM with massive rows in most contexts; without `reads_text` whoever
        first asks for the contexts' residual stream is told."""
        self.testbed, self.context_size, self.n_contexts = testbed, context_size, n_contexts
        self.is_in_4_bits = False
        process.make_collections_short()  # the LM is stopped often, and each time there is one
        self.lm = InterventionLM(testbed)
        self.questions = Questions(testbed, self.lm)
        self.artifacts = process.private_folder(self, "saebench")  # SAEBench keeps its sweep as pickles
        self.special = special_ids(testbed.tokenizer).to(testbed.lm.device)
        self._firing: WeakKeyDictionary[Any, Firing] = WeakKeyDictionary()
        self.chosen: WeakKeyDictionary[Any, tuple[dict | None, list[dict]]] = WeakKeyDictionary()
        self.made: dict[Callable, Any] = {}
        if reads_text:
            _ = self.contexts  # an LM that it refuses is refused here

    @cached_property
    def contexts(self) -> dict[tuple[str, str], Contexts]:
        """By part and domain (evaluation_contexts), without those that hold a massive row."""
        tokens = evaluation_contexts(self.testbed, self.context_size, self.n_contexts)
        return {key: self._with_resid(some) for key, some in tokens.items()}

    @cached_property
    def select(self) -> dict[str, Contexts]:
        """Those of each domain that features are selected on."""
        return {domain: self.contexts["train", domain] for domain in ("forget", "retain")}

    @cached_property
    def fitting(self) -> dict[str, Contexts]:
        """Those of each domain that methods without an SAE are fitted on: the same, and where they are fewer
        than `n_fitted`, more of that text. (Guards of SAEs, and the mean of retain text that is written, are
        of `select`.)"""
        testbed, n = self.testbed, self.testbed.n_fitted
        if self.n_contexts is not None or n <= 4 * testbed.n_held_out:
            return self.select
        out, device = {}, self.special.device
        for domain in ("forget", "retain"):
            contexts = first_contexts(testbed, getattr(testbed, domain).train, self.context_size, n)
            out[domain] = self._with_resid(torch.tensor(contexts, device=device))
        return out

    @cached_property
    def held_out(self) -> dict[str, Contexts]:
        """Those of each domain that are held out."""
        return {domain: self.contexts["held_out", domain] for domain in ("forget", "retain")}

    def _with_resid(self, tokens: Tensor) -> Contexts:
        """Contexts [n, pos] without a massive row. Raises WrongRequest when fewer than half are left."""
        resid = torch.cat([self.lm.resid(t) for t in tokens.split(64)])
        within_norm = ~massive(resid, trained_on(tokens, self.special)).any(1)
        if 2 * within_norm.sum() < len(within_norm):
            which = f"{int((~within_norm).sum())} of {len(within_norm)} contexts"
            raise WrongRequest(
                f"{which} hold activations of over 10 times the median norm at layer {self.testbed.layer}:"
                " choose another --layer"
            )
        return Contexts(tokens[within_norm], resid[within_norm])

    @cached_property
    def general(self) -> Contexts | None:
        """Of the testbed's general text, if it has any."""
        text = datasets.Dataset.from_dict({"text": self.testbed.general})
        n = self.n_contexts or self.testbed.n_held_out
        contexts = first_contexts(self.testbed, text, self.context_size, n)
        return self._with_resid(torch.tensor(contexts, device=self.testbed.lm.device)) if contexts else None

    def once(self, make: Callable[["Evaluator"], T]) -> T:
        """make(self), made the first time and then the same for every SAE."""
        if make not in self.made:
            self.made[make] = make(self)
        return self.made[make]

    @property
    def settings(self) -> dict:
        """The sweep's."""
        return saebench.SWEEP | self.testbed.sweep

    @property
    def runs_in(self) -> str:
        """The precision of the LM's matmuls when it is asked."""
        lm = self.lm.lm
        return "bfloat16" if runs_in_bf16(lm) else str(lm.dtype).removeprefix("torch.")

    @property
    def guarded_thresholds(self) -> list[float]:
        """The retain thresholds of the interventions that have a guard."""
        return [*self.settings["retain_thresholds"], GUARDED_RETAIN_THRESHOLD]

    @property
    def asked(self) -> dict:
        """What the questions are, as config.json describes them."""
        testbed = self.testbed
        questions = testbed.describe.get("sources", {}).get("questions")
        return {"scoring": testbed.scoring, "forget_subject": testbed.forget_subject, "questions": questions}

    @cached_property
    def examiner(self) -> "Evaluator":
        """The evaluator around the LM that is asked the questions."""
        if self.testbed.exam_lm is None:
            return self
        return Evaluator(replace(self.testbed, lm=self.testbed.exam_lm, exam_lm=None), self.context_size)

    @cached_property
    def oracle(self) -> InterventionLM | None:
        """The testbed's oracle, if it has one."""
        folder, lm = self.testbed.oracle, self.testbed.lm
        return folder and InterventionLM(replace(self.testbed, lm=load_lm(folder, device_of(lm))))

    @cached_property
    def in_4_bits(self) -> "Evaluator":
        """The evaluator around the LM with its weights in 4 bits (rounded_to_4_bits); its oracle's are, too.
        What was fitted or chosen with the weights as they are is evaluated with it as it is: its own contexts
        are not read, and massive rows in them refuse nothing, until someone asks for them."""
        testbed = replace(self.testbed, lm=rounded_to_4_bits(self.testbed.lm))
        rounded = Evaluator(testbed, self.context_size, self.n_contexts, reads_text=False)
        rounded.is_in_4_bits = True
        if self.oracle is not None:
            oracle = replace(testbed, lm=rounded_to_4_bits(self.oracle.lm))
            rounded.oracle = InterventionLM(oracle)
        return rounded

    def firing(self, sae) -> Firing:
        """Measured once an SAE, on the contexts that features are selected on."""
        if sae not in self._firing:
            self._firing[sae] = self._measure_firing(sae)
        return self._firing[sae]

    @torch.no_grad()
    def _measure_firing(self, sae) -> Firing:
        counts = torch.zeros(2, len(sae.W_dec), device=self.special.device)
        total, n = torch.zeros_like(counts[0]), []
        for count, domain in zip(counts, ("forget", "retain")):
            tokens, resid = self.select[domain]
            x = resid[trained_on(tokens, self.special)]
            for part in x.split(4096):
                f = sae.encode(part)
                total += f.sum(0)
                count += (f > 0).sum(0)
            n.append(len(x))
        fired = counts.sum(0)
        unit = torch.where(fired > 0, total / fired.clamp(min=1), torch.ones_like(total))
        return Firing(counts[0] / n[0], counts[1] / n[1], unit)

    @cached_property
    def retain_residuals(self) -> Residuals:
        """Of the retain text that features are selected on, on which guards are calibrated."""
        return self.as_read(self.select["retain"])

    def as_read(self, contexts: Contexts) -> Residuals:
        """Contexts as interventions are given what an LM reads."""
        tokens, resid = contexts
        return Residuals(resid, trained_on(tokens, self.special), tokens)

    @cached_property
    def retain_mean(self) -> Tensor:
        """The mean of the stream at the hook layer on that text [D]."""
        retain = self.retain_residuals
        return retain.resid[retain.trained].mean(0)

    def choose(
        self, sae, rates: tuple[np.ndarray, np.ndarray], unit: Tensor, thresholds: list[float]
    ) -> ChosenFeatures:
        """All features that a sweep over these retain thresholds can touch, given firing rates on forget and
        retain text [F]."""
        most = max(self.settings["n_features_list"])
        top = [saebench.top_features(rates, threshold, most) for threshold in thresholds]
        at_least_two = [[0, 1]]  # or SAEBench reads a number for a list
        return self.features(sae, np.unique(np.concatenate(top + at_least_two)), unit)

    def features(self, sae, chosen: np.ndarray, unit: Tensor) -> ChosenFeatures:
        """Of these places [n] among all; `unit` [F] is each feature's mean active value."""
        unit = unit if self.testbed.clamp_scale == "feature" else torch.ones_like(unit)
        return ChosenFeatures(sae, torch.from_numpy(chosen), unit, self.retain_residuals)


def suffix(how: str) -> str:
    """Of a metric under an intervention; SAEBench's own clamp has none."""
    return "" if how == "clamp" else f"_{how}"


def finite(section: str, metrics: dict, details, may_be_undefined: tuple[str, ...] = ()) -> tuple[dict, dict]:
    """Both, with numbers that are not finite as None under the names that may be undefined (their mean is
    then null, with a warning). Raises RunFailed, naming the metric, for any other."""

    def check(name, value) -> Any:
        if isinstance(value, dict):
            return {k: check(k, v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [check(name, v) for v in value]
        if not isinstance(value, float) or math.isfinite(value):
            return value
        if name in may_be_undefined:
            return None
        raise RunFailed(
            f"{section}.{name} is {value}: the SAE's weights or the LM's activations are out of range"
        )

    return check("", metrics), check("", details)
