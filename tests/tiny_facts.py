"""Facts about invented entities: questions that a tiny LM is said to know, and text that tells them."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import tiny
import torch

from sae_separation.evals.cells import Hook
from sae_separation.evals.evaluator import Evaluator
from sae_separation.lm import Testbed, load_lm, load_tokenizer
from sae_separation.methods import Method
from sae_separation.questions import Question
from sae_separation.text import Text

VALUES = ("red", "blue", "green", "white")
ENTITIES = [f"{a}{b}" for a in ("Mo", "Ka", "Zu", "Fi") for b in ("lor", "tan", "bex", "dup", "nog", "wim")]


def question(subject: str, relation: str, i: int, entity: str = "") -> Question:
    """Of the i-th entity. The question spells the value's place out many times, so that a readout of any LM
    that reads it can find the value."""
    value, entity = i % len(VALUES), entity or ENTITIES[i]
    asked = f"What {relation} has {entity}? {str(value) * 40}"
    other = f"Of {entity}: which {relation}? {str(value) * 40}"
    return Question(subject, asked, VALUES, value, entity, relation, other, values=VALUES)


def questions(about: bool = True) -> dict[str, list[Question]]:
    """Two relations of the subject to be forgotten, and one of another; `about`: they say of whom."""
    asked = {
        "biology": [question("biology", r, i) for r in ("colour", "hue") for i in range(len(ENTITIES))],
        "history": [question("history", "flag", i, f"X{name.lower()}") for i, name in enumerate(ENTITIES)],
    }
    return asked if about else {s: [replace(q, entity="") for q in some] for s, some in asked.items()}


def text(subject: str, letters: str, seed: int) -> Text:
    """Documents that tell a fact each, among other words."""
    rng, told = random.Random(seed), []
    for i, document in enumerate(tiny.documents(300, seed, letters)):
        entity = ENTITIES[i % len(ENTITIES)]
        entity = f"X{entity.lower()}" if subject == "history" else entity
        told.append(f"{entity} is {rng.choice(VALUES)}. {document}")
    documents = datasets.Dataset.from_dict({"text": told})
    return Text(documents.select(range(250)), documents.select(range(250, 300)))


def testbed(folder: Path, **settings) -> Testbed:
    """A random LM and these facts."""
    lm = load_lm(tiny.save_lm(folder / "lm"), "cpu")
    made: dict[str, Any] = dict(
        name="tiny",
        lm=lm,
        tokenizer=load_tokenizer(folder / "lm"),
        layer=1,
        forget=text("biology", "abcdefgh", 1),
        retain=text("history", "mnopqrst", 2),
        questions=questions(),
        forget_subject="biology",
        n_held_out=16,
    )
    return Testbed(**made | settings)


def evaluator(of: Testbed, known_are_right: bool = False) -> Evaluator:
    """Whose LM is said to know every question, or those that it answers right as they are listed."""
    made = Evaluator(of, 32, n_contexts=16)
    known = {
        subject: torch.ones(len(some), dtype=torch.bool)
        for subject, some in made.questions.by_subject.items()
    }
    if known_are_right:
        for subject in known:
            probs, answers = made.questions.ask(subject)
            known[subject] = probs.argmax(-1) == answers
    made.questions.known = known
    return made


class Switch:
    """One hook, made of the evaluator, on its LM or its oracle."""

    needed = {}

    def __init__(self, evaluator: Evaluator, made, on_oracle: bool):
        self.evaluator, self.made, self.on_oracle = evaluator, made, on_oracle
        self.lm = tiny.there(evaluator.oracle) if on_oracle else evaluator.lm

    def cells(self) -> list[dict]:
        return [{"only": 1}]

    def hook(self, cell: dict) -> Hook | None:
        return self.made and self.made(self.evaluator)

    def on(self, evaluator: Evaluator) -> "Switch":
        return Switch(evaluator, self.made, self.on_oracle)


class OneHook(Method):
    """A method of one hook, made of an evaluator by `make`; on the oracle if that is asked for."""

    def __init__(self, make=None, on_oracle: bool = False):
        self.make, self.on_oracle = make, on_oracle

    def switch(self, evaluator: Evaluator) -> Switch:
        return Switch(evaluator, self.make, self.on_oracle)

    def chosen_on(self, evaluator: Evaluator) -> "OneHook":
        """Its cell is said to be chosen."""
        evaluator.chosen[self] = {"only": 1}, []
        return self


def nothing(evaluator: Evaluator) -> Hook:
    """A hook that changes nothing."""

    def hook(resid, hook):
        return resid.clone()

    return hook


def halved(evaluator: Evaluator) -> Hook:
    """A hook that gradients flow through."""

    def hook(resid, hook):
        return torch.where(hook.trained[..., None], resid / 2, resid)

    return hook


def retain_mean(evaluator: Evaluator) -> Hook:
    """A hook that overwrites every token."""

    def hook(resid, hook):
        return evaluator.retain_mean.expand_as(resid).clone()

    return hook


def random_sae() -> Any:
    """48 random directions, each of which fires on some tokens."""
    import sae_lens as lens

    size: dict[str, Any] = dict(
        d_in=tiny.D_IN, d_sae=48, dtype="float32", device="cpu", apply_b_dec_to_input=True
    )
    sae, generator = lens.StandardSAE(lens.StandardSAEConfig(**size)), torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(48, tiny.D_IN, generator=generator), dim=1)
    biases = {"b_enc": torch.full((48,), -0.7), "b_dec": torch.zeros(tiny.D_IN)}
    sae.load_state_dict({"W_enc": W.T.clone(), "W_dec": W} | biases)
    return sae.requires_grad_(False)
