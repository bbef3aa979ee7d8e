"""Relearning: the LM fine-tuned with an intervention in place."""

import copy
from dataclasses import replace

import pytest
import tiny
import tiny_facts
import torch
from tiny_facts import ENTITIES, OneHook

from sae_separation import evals
from sae_separation.evals import relearning as module
from sae_separation.evals.cells import changed
from sae_separation.evals.relearning import (
    CHANCE,
    SETTINGS,
    STEPS,
    FineTuned,
    knowledge,
    material,
    relearning,
    steps_to_half,
)
from sae_separation.four_bits import rounded_to_nearest
from sae_separation.lm import InterventionLM
from sae_separation.methods import Method, weights_of


def weights(lm) -> list[torch.Tensor]:
    return [p.clone() for p in lm.parameters()]


def test_no_text_tells_what_is_asked(facts_evaluator):
    of = facts_evaluator.once(material)
    taught, asked = of.about["taught"], of.about["asked"]
    assert len(taught) == len(asked) == 12 and not set(taught) & set(asked) and len(of.exam.answers) == 24
    decode = facts_evaluator.testbed.tokenizer.decode
    both, retain = (decode(batch.tokens.flatten()) for batch in (of.both, of.retain))
    assert any(e + " is" in both for e in taught) and not any(e + " is" in both for e in asked)
    assert not any(e + " is" in retain for e in ENTITIES)
    assert len(of.both.tokens) == 2 * len(of.retain.tokens)
    again = tiny.there(tiny_facts.evaluator(facts_evaluator.testbed).once(material))
    assert torch.equal(again.both.tokens, of.both.tokens) and again.about == of.about


@pytest.mark.parametrize("whole_lm", [False, True])
def test_a_step_is_one_of_adamw_under_the_hook_on_the_layers_that_are_trained(facts_evaluator, whole_lm):
    """Against a training step that runs the LM as it is, with the hook among its layers."""
    lm, hook, of = facts_evaluator.lm, tiny_facts.halved(facts_evaluator), facts_evaluator.once(material)
    before, rows = weights(lm.lm), [0, 3, 5]
    tuned = FineTuned(facts_evaluator.testbed, lm, hook, whole_lm)
    tuned.step(of.both, rows)
    plain = copy.deepcopy(lm.lm).requires_grad_(True)

    def half(m, args, out):
        trained = of.both.trained[rows][..., None]
        return torch.where(trained, out / 2, out)

    plain.model.layers[1].register_forward_hook(half)
    tokens = of.both.tokens[rows]
    plain(tokens, labels=tokens).loss.backward()
    above = ("model.layers.2.", "model.norm.", "lm_head.")
    trained = [p for n, p in plain.named_parameters() if whole_lm or n.startswith(above)]
    torch.optim.AdamW(trained, 0.128 / 32).step()
    for (name, expected), found in zip(plain.named_parameters(), tuned.lm.parameters()):
        near = ((found - expected).abs() < 1e-4).float().mean()
        assert near > 0.99, name  # a gradient near zero has any sign, and the first step is of one size
    moved = [not torch.equal(p, q) for p, q in zip(tuned.lm.parameters(), before)]
    assert all(moved) if whole_lm else 0 < sum(moved) < len(moved)
    assert all(torch.equal(p, q) for p, q in zip(lm.lm.parameters(), before)) and lm.hook is None
    assert all(p.grad is None and not p.requires_grad for p in lm.lm.parameters())


def test_before_the_first_step_the_lm_answers_as_under_the_hook(facts_evaluator):
    lm, hook, of = facts_evaluator.lm, tiny_facts.halved(facts_evaluator), facts_evaluator.once(material)
    lm.hook = hook
    probs = of.exam.probs_from(lambda batch: lm.ask(batch, of.exam.read))
    lm.reset_hooks()
    expected = (probs.argmax(-1) == of.exam.answers).float().mean().item()
    for whole_lm in (False, True):
        tuned = FineTuned(facts_evaluator.testbed, lm, hook, whole_lm)
        assert tuned.accuracy(of.exam) == expected
        (batch, *_) = of.exam.batches
        with torch.no_grad(), lm.resumed_from(changed(lm, batch, hook)):
            logits = lm.lm(batch.tokens).logits[torch.arange(len(batch.tokens)), batch.positions[:, 0]]
        found = tuned.logits(batch, list(range(len(batch.tokens))))[:, 0]
        assert torch.allclose(found, logits, atol=1e-3)


def test_a_method_that_trains_weights_is_these_weights(facts_evaluator):
    """The whole LM is trained from them, and in 4 bits they are rounded, too."""
    lm, of = facts_evaluator.lm, facts_evaluator.once(material)
    name = "model.layers.1.mlp.down_proj.weight"
    trained = 2 * lm.lm.get_parameter(name)
    switch = Method("rmu", {f"5.{name}": trained}, {"cells": [{"step": 5}]}).switch(facts_evaluator)
    hook = switch.hook({"step": 5})
    above, whole = (FineTuned(facts_evaluator.testbed, lm, hook, whole) for whole in (False, True))
    assert torch.equal(whole.lm.get_parameter(name), trained) and whole.hook is None
    assert torch.equal(above.lm.get_parameter(name), lm.lm.get_parameter(name))
    rows = [0, 1]
    assert torch.allclose(above.logits(of.both, rows), whole.logits(of.both, rows), atol=1e-3)
    in_4_bits = weights_of(switch.on(facts_evaluator.in_4_bits).hook({"step": 5}))
    assert torch.equal(in_4_bits[name], rounded_to_nearest(trained))


def test_curves_are_the_same_again_and_knowledge_that_was_never_gone_is_there_at_step_0(
    facts_evaluator, monkeypatch
):
    """An LM is said to know what it answers."""
    monkeypatch.setattr(module, "STEPS", (0, 2, 4))
    monkeypatch.setattr(module, "LEAST", 2)
    before = weights(facts_evaluator.lm.lm)
    knowing = tiny_facts.evaluator(facts_evaluator.testbed, known_are_right=True)
    first, details, notes = relearning(knowing, OneHook(tiny_facts.nothing).chosen_on(knowing), 0, "it")
    again, _, _ = relearning(knowing, OneHook(tiny_facts.nothing).chosen_on(knowing), 1, "that")
    assert first == again and details["steps"] == [0, 2, 4]
    assert set(details["accuracy"]) == {*(how.ending for how in SETTINGS), "_4bit"}
    assert first["left_before"] == 1 and all(first[f"steps_to_half{how.ending}"] == 0 for how in SETTINGS)
    assert first["oracle_left_before"] is None and any("no oracle" in note for note in notes)
    assert all(len(curve) == 3 for curve in details["accuracy"].values())
    gone, _, notes = relearning(knowing, OneHook(tiny_facts.retain_mean).chosen_on(knowing), 0, "gone")
    assert set(gone) == set(first) == set(module.undefined())
    assert all(torch.equal(p, q) for p, q in zip(facts_evaluator.lm.lm.parameters(), before))


def test_the_oracle_is_fine_tuned_once(facts_evaluator, monkeypatch):
    monkeypatch.setattr(module, "STEPS", (0, 1))
    other = tiny_facts.evaluator(facts_evaluator.testbed)
    other.oracle = InterventionLM(facts_evaluator.testbed)
    method = OneHook(on_oracle=True).chosen_on(other)
    metrics, details, _ = relearning(other, method, 0, "it")
    for how in SETTINGS:
        assert details["oracle"][how.ending] == details["accuracy"][how.ending]
    made = other.once(module.of_oracle)
    relearning(other, OneHook(tiny_facts.nothing).chosen_on(other), 0, "it")
    assert other.once(module.of_oracle) is made and metrics["oracle_left_before"] == metrics["left_before"]


def test_knowledge_and_the_steps_until_half_of_it_is_back():
    assert [knowledge(a) for a in (1.0, 0.625, CHANCE, 0.1)] == [1.0, 0.5, 0.0, 0.0]
    curve = [0.25, 0.5, 0.625, 0.5] + [1.0] * (len(STEPS) - 4)
    assert steps_to_half(curve) == STEPS[2]
    assert steps_to_half([0.6] * len(STEPS)) is None and steps_to_half([1.0] * len(STEPS)) == 0


@pytest.mark.parametrize("why", ["no entities", "no text", "few questions"])
def test_where_nothing_can_be_taught_relearning_is_undefined(facts_testbed, why):
    other = {
        "no entities": dict(questions=tiny_facts.questions(about=False)),
        "no text": dict(forget=facts_testbed.retain),
        "few questions": dict(questions={s: some[:4] for s, some in tiny_facts.questions().items()}),
    }[why]
    facts_evaluator = tiny_facts.evaluator(replace(facts_testbed, **other))
    metrics, details, notes = relearning(facts_evaluator, OneHook(tiny_facts.nothing), 0, "it")
    assert set(metrics.values()) == {None} and details == {} and "it is not measured" in notes[0]


def test_relearning_is_made_where_it_is_named():
    (row,) = evals.rows_of(("relearning",))
    assert row.asks and row not in evals.rows_of(())
    assert {*row.shown, *row.columns} <= set(module.undefined())
