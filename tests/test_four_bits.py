"""Weights in 4 bits: rounded to nearest, in groups, in a copy."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

from sae_separation import testbeds
from sae_separation.evals.evaluator import Evaluator
from sae_separation.four_bits import GROUP, LEVELS, rounded_to_4_bits, rounded_to_nearest
from sae_separation.lm import load_lm
from sae_separation.specs import DataConfig


def test_every_weight_is_at_the_nearest_of_16_levels_of_its_own_group():
    weight = torch.randn(5, 3 * GROUP + 7, generator=torch.Generator().manual_seed(0))
    weight[0, :GROUP] *= 100  # a large group does not make another coarse
    rounded = rounded_to_nearest(weight)
    assert rounded.shape == weight.shape and rounded.dtype == weight.dtype
    for start in range(0, weight.shape[1], GROUP):
        for row, near in zip(weight[:, start : start + GROUP], rounded[:, start : start + GROUP]):
            levels = torch.linspace(row.min(), row.max(), LEVELS, dtype=torch.float64)
            nearest = levels[(row[:, None].double() - levels).abs().argmin(1)]
            assert torch.allclose(near.double(), nearest, rtol=1e-6, atol=1e-7)
            half = (row.max() - row.min()) / (LEVELS - 1) / 2
            assert ((near - row).abs() <= half * (1 + 1e-5)).all() and len(near.unique()) <= LEVELS
    assert torch.equal(rounded_to_nearest(rounded), rounded)


def test_a_group_of_one_value_stays():
    weight = torch.tensor([[0.3] * GROUP + [0.0] * GROUP, [-2.5] * 2 * GROUP])
    assert torch.equal(rounded_to_nearest(weight), weight)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_linear_layers_of_a_copy_are_rounded_and_nothing_else(tmp_path, kind):
    lm = load_lm(tiny.save_lm(tmp_path / kind, kind), "cpu")
    before = {name: p.clone() for name, p in lm.named_parameters()}
    rounded = rounded_to_4_bits(lm)
    assert all(torch.equal(p, before[name]) for name, p in lm.named_parameters())
    changed = {name for name, p in rounded.named_parameters() if not torch.equal(p, before[name])}
    ends = ("wte.weight", "wpe.weight", "lm_head.weight", "embed_in.weight", "embed_out.weight")
    matrices = {
        name
        for name, p in lm.named_parameters()
        if p.dim() == 2 and not name.endswith((*ends, "tokens.weight"))
    }
    assert changed == matrices != set()
    for name in changed:  # along the input, which Conv1D has first
        new, old = rounded.get_parameter(name), before[name]
        along = (new.T, old.T) if kind == "gpt2" else (new, old)
        assert torch.equal(along[0], rounded_to_nearest(along[1]))


@pytest.fixture
def evaluator(tmp_path):
    files: dict[str, Any] = {k: (str(path),) for k, path in tiny.own_files(tmp_path / "own").items()}
    lm = str(tiny.save_lm(tmp_path / "lm"))
    wanted = DataConfig(lm=lm, layer=1, forget_subject="biology", **files)
    testbed = replace(testbeds.load(wanted), n_held_out=16)
    return Evaluator(replace(testbed, oracle=tiny.save_lm(tmp_path / "oracle", seed=1)), 32, n_contexts=32)


def test_the_evaluator_in_4_bits_is_around_the_rounded_lm_and_the_rounded_oracle(evaluator):
    rounded = evaluator.in_4_bits
    assert rounded is evaluator.in_4_bits
    tokens = torch.arange(20, 40)[None]
    for lm, of in ((rounded.lm, evaluator.lm), (rounded.oracle, evaluator.oracle)):
        with torch.no_grad():
            logits, expected = lm.lm(tokens).logits, rounded_to_4_bits(of.lm)(tokens).logits
            assert torch.equal(logits, expected)
            assert not torch.allclose(logits, of.lm(tokens).logits, rtol=0.01)
        assert torch.allclose(
            lm.resid(tokens), rounded_to_4_bits(of.lm)(tokens, output_hidden_states=True).hidden_states[2]
        )
    assert "contexts" not in vars(rounded), "they are read for whoever asks"
    assert torch.equal(rounded.select["forget"].tokens, evaluator.select["forget"].tokens)
    assert not torch.equal(rounded.retain_mean, evaluator.retain_mean)
