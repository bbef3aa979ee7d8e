"""Where the machine has bfloat16, an LM that is not small is asked and fine-tuned in it, and what
interventions read and write is fp32. Machines without the instructions can do it, too, slowly."""

import copy

import pytest
import tiny
import tiny_facts
import torch

from sae_separation import lm as of_lm
from sae_separation import saebench
from sae_separation.evals import depth, relearning
from sae_separation.evals.cells import intervening
from sae_separation.lm import InterventionLM, load_lm, low_precision

GIVEN = []  # to hooks: the stream's precision


@pytest.fixture
def in_bf16(monkeypatch):
    monkeypatch.setattr(of_lm, "has_bf16", lambda device: True)
    monkeypatch.setattr(of_lm, "LEAST_IN_BF16", 0)


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
    for name, value in (("has_bf16", lambda device: True), ("LEAST_IN_BF16", 0)):
        monkeypatch.setattr(of_lm, name, value)
    rounded, rounded_under = asked(facts_testbed)
    effect = (plain - under).abs().max()
    for one, other in ((plain, rounded), (under, rounded_under)):
        assert 0 < (one - other).abs().max() < 0.3 * effect
    assert GIVEN and set(GIVEN) == {torch.float32}


@pytest.mark.parametrize("kind", [*tiny.KINDS, *tiny.FURTHER_KINDS])
def test_an_lm_of_any_family_does(tmp_path, in_bf16, kind):
    lm, tokens = load_lm(tiny.save_lm(tmp_path / "lm", kind), "cpu"), torch.tensor([[5, 6, 7, 8]])
    exact = lm(tokens).logits
    with low_precision(lm):
        rounded = lm(tokens).logits
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).norm() < 0.05 * exact.norm()
    assert len(rounded.to(torch.bfloat16).unique()) < 0.9 * len(rounded.unique()), "the unembedding is exact"
    assert torch.equal(lm(tokens).logits, exact)


def test_a_small_lm_and_one_that_is_in_bf16_already_are_left_as_they_are(facts_testbed, in_bf16, monkeypatch):
    lm = InterventionLM(facts_testbed).lm
    with low_precision(lm):
        assert torch.is_autocast_enabled("cpu")
    with low_precision(copy.deepcopy(lm).to(torch.bfloat16)):
        assert not torch.is_autocast_enabled("cpu")
    monkeypatch.setattr(of_lm, "LEAST_IN_BF16", 10_000_000)
    with low_precision(lm):
        assert not torch.is_autocast_enabled("cpu")


def test_what_core_takes_and_what_methods_are_fitted_on_is_exact(facts_testbed, in_bf16, monkeypatch):
    rounded = tiny_facts.evaluator(facts_testbed)
    batch = rounded.questions.exam(saebench.FORGET, None).batches[0]
    in_answers, tokens = rounded.lm.residuals(batch).resid, rounded.select["retain"].tokens
    proxy = saebench.shared_proxy(rounded.lm, facts_testbed.tokenizer)
    clean = proxy(tokens[:2], return_type="logits")
    same = proxy.run_with_hooks(
        tokens[:2], [(facts_testbed.hook_name, lambda x, hook: x)], return_type="logits"
    )
    assert rounded.runs_in == "bfloat16" and torch.allclose(clean, same, atol=1e-4)
    monkeypatch.setattr(of_lm, "has_bf16", lambda device: False)
    exact = tiny_facts.evaluator(facts_testbed)
    assert exact.runs_in == "float32" and torch.equal(
        exact.select["retain"].resid, rounded.select["retain"].resid
    )
    assert 0 < (exact.lm.residuals(batch).resid - in_answers).norm() < 0.05 * in_answers.norm()


@pytest.mark.parametrize("whole_lm", [False, True])
def test_fine_tuning_has_fp32_weights_and_ends_near_those_of_fp32(facts_testbed, monkeypatch, whole_lm):
    curves = []
    for big in (False, True):
        monkeypatch.setattr(of_lm, "has_bf16", lambda device, big=big: big)
        monkeypatch.setattr(of_lm, "LEAST_IN_BF16", 0)
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


def test_a_readout_takes_the_stream_in_fp32(facts_testbed, in_bf16, monkeypatch):
    evaluator = tiny_facts.evaluator(facts_testbed)
    batches = evaluator.once(depth.material).batches
    rounded = depth.streams(evaluator.lm, batches, None)
    monkeypatch.setattr(of_lm, "has_bf16", lambda device: False)
    exact = depth.streams(evaluator.lm, batches, None)
    off = (rounded - exact).norm(dim=(0, 2))
    assert rounded.dtype == torch.float32 and len(off) == len(facts_testbed.layers) - facts_testbed.layer
    assert (off > 0).all() and (off < 0.05 * exact.norm(dim=(0, 2))).all()
