"""Where the machine has bfloat16, an LM that is not small is asked and fine-tuned in it, and what
interventions read and write is fp32. Machines without the instructions can do it, too, slowly."""

import pytest
import tiny
import tiny_facts
import torch
from tiny_facts import OneHook

from sae_separation import lm as of_lm
from sae_separation import saebench
from sae_separation.evals import depth, relearning
from sae_separation.evals.cells import intervening
from sae_separation.lm import InterventionLM, low_precision

GIVEN = []  # to hooks: the stream's precision


@pytest.fixture
def in_bf16(monkeypatch):
    monkeypatch.setattr(of_lm, "has_bf16", lambda device: True)
    monkeypatch.setattr(of_lm, "SMALL_LM", 0)


def halved(evaluator):
    """A hook that changes every token, and notes in which precision it is given the stream."""

    def hook(resid, hook):
        assert not torch.is_autocast_enabled("cpu"), "what a hook computes is in fp32"
        GIVEN.append(resid.dtype)
        return torch.where(hook.trained[..., None], resid / 2, resid)

    return hook


def asked(testbed) -> tuple[torch.Tensor, torch.Tensor]:
    """What the LM says, and what it says under the hook."""
    evaluator = tiny_facts.evaluator(testbed)
    plain, _ = evaluator.questions.ask(saebench.FORGET)
    with intervening(evaluator.lm, halved(evaluator)):
        return plain, evaluator.questions.ask(saebench.FORGET)[0]


def test_answers_are_those_of_fp32_but_for_rounding(facts_testbed, monkeypatch):
    plain, under = asked(facts_testbed)
    for name, value in (("has_bf16", lambda device: True), ("SMALL_LM", 0)):
        monkeypatch.setattr(of_lm, name, value)
    rounded, rounded_under = asked(facts_testbed)
    effect = (plain - under).abs().max()
    for one, other in ((plain, rounded), (under, rounded_under)):
        assert 0 < (one - other).abs().max() < 0.3 * effect
    assert GIVEN and set(GIVEN) == {torch.float32}


def test_a_small_lm_and_one_that_is_in_bf16_already_are_left_as_they_are(facts_testbed, in_bf16, monkeypatch):
    lm = InterventionLM(facts_testbed).lm
    tokens = torch.tensor([[5, 6, 7]])
    with low_precision(lm):
        assert torch.is_autocast_enabled("cpu") and lm(tokens).logits.dtype == torch.bfloat16
    monkeypatch.setattr(of_lm, "SMALL_LM", 10_000_000)
    with low_precision(lm):
        assert not torch.is_autocast_enabled("cpu") and lm(tokens).logits.dtype == torch.float32


@pytest.mark.parametrize("whole_lm", [False, True])
def test_fine_tuning_has_fp32_weights_and_ends_near_those_of_fp32(facts_testbed, monkeypatch, whole_lm):
    curves = []
    for big in (False, True):
        monkeypatch.setattr(of_lm, "has_bf16", lambda device, big=big: big)
        monkeypatch.setattr(of_lm, "SMALL_LM", 0)
        evaluator = tiny_facts.evaluator(facts_testbed)
        tuned = relearning.FineTuned(facts_testbed, evaluator.lm, halved(evaluator), whole_lm)
        contexts = tiny.there(evaluator.once(relearning.material)).both
        for step in range(3):
            tuned.step(contexts, [step, step + 1])
        curves.append(torch.cat([p.detach().flatten() for p in tuned.lm.parameters()]))
        assert {p.dtype for p in tuned.lm.parameters()} == {torch.float32}
    before = torch.cat([p.flatten() for p in facts_testbed.lm.parameters()])
    apart, moved = (curves[0] - curves[1]).norm(), (curves[0] - before).norm()
    assert 0 < apart < 0.3 * moved


def test_a_readout_takes_the_stream_in_fp32(facts_testbed, in_bf16):
    evaluator = tiny_facts.evaluator(facts_testbed)
    method = OneHook(tiny_facts.nothing).chosen_on(evaluator)
    metrics, *_ = depth.depth(evaluator, method, 0, "it")
    assert metrics["depth_score"] == 0 and metrics["lm_readout_forget"] > 0.5
