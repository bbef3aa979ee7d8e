"""What training and evaluation are built of, function by function: LMs, tokens, sparse products, profiles."""

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from sae_separation import exam, lm, losses, sparse
from sae_separation.errors import WrongRequest
from sae_separation.rounds import Rounds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama, as transformers saves it."""
    return tiny.save_lm(tmp_path_factory.mktemp("lm"), "llama")


def make_testbed(model, layer=1) -> lm.Testbed:
    text: Any = None  # no test here reads any
    return lm.Testbed("tiny", model, None, layer, text, text, {}, "", defaults={"context_size": 32})


# ---- LMs


def test_an_lm_is_loaded_frozen_in_float32_and_a_large_one_in_bfloat16(folder, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    model = lm.load_lm(folder, "cpu")
    saved = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(name), saved[name]) and model.dtype == torch.float32
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    monkeypatch.setattr(lm, "LARGE", 1)
    large = lm.load_lm(folder, "cpu")
    assert large.dtype == torch.bfloat16
    assert large(torch.tensor([[5, 6]])).logits.dtype == torch.float32
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = {k: v for k, v in saved.items() if k != name}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WrongRequest, match=f"lacks 1 weights, first {name}: save it anew, whole"):
        lm.load_lm(tmp_path, "cpu")


def test_a_testbed_names_its_hook_layer_and_widths(folder):
    testbed = make_testbed(lm.load_lm(folder, "cpu"), layer=2)
    assert (testbed.hook_name, testbed.d_in, testbed.context_size) == ("model.layers.2", tiny.D_IN, 32)
    assert len(testbed.layers) == tiny.N_LAYERS


def test_twins_are_of_what_runs_up_to_the_hook_and_stand_in_for_it_inside_alone(folder):
    model = lm.load_lm(folder, "cpu")
    twins = lm.bfloat16_twins(make_testbed(model, layer=1))
    named = {id(p): name for name, p in model.named_parameters()}
    parts = {named[id(p)].split(".")[2] if "layers" in named[id(p)] else named[id(p)] for p, _ in twins}
    assert parts == {"0", "1", "model.embed_tokens.weight", "model.norm.weight"}
    p, twin = next(pair for pair in twins if named[id(pair[0])] == "model.layers.0.mlp.up_proj.weight")
    before, tokens = p.clone(), torch.tensor([[5, 6, 7]])
    plain = model.model.layers[0].mlp(torch.ones(1, tiny.D_IN))
    with pytest.raises(KeyError), lm.parameters_as(twins):
        assert p.dtype == torch.bfloat16 and torch.equal(p, before.to(torch.bfloat16))
        low = model.model.layers[0].mlp(torch.ones(1, tiny.D_IN, dtype=torch.bfloat16)).float()
        torch.testing.assert_close(low, plain, atol=0.05, rtol=0.05)
        raise KeyError
    assert p.dtype == torch.float32 and torch.equal(p, before)
    assert model(tokens).logits.dtype == torch.float32


def test_the_hidden_state_is_what_a_layer_puts_out_or_the_first_of_it():
    x = torch.ones(2)
    assert all(lm.hidden_of(put_out) is x for put_out in (x, (x, None), [x]))


def test_transformers_says_nothing_inside_and_as_much_as_before_afterwards():
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    with pytest.raises(KeyError), lm.without_bars():
        assert not logging.is_progress_bar_enabled() and logging.get_verbosity() == 40, "ERROR"
        raise KeyError
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before


# ---- tokens and answers


@pytest.mark.parametrize(("pad", "alone"), [(9, {9}), (None, set()), (1, set()), (2, set()), (3, set())])
def test_a_pad_token_counts_as_one_where_it_has_no_other_role(pad, alone):
    roles = SimpleNamespace(bos_token_id=1, eos_token_id=2, unk_token_id=3, pad_token_id=pad)
    assert exam.pad_alone(roles) == alone


def test_answers_are_right_or_wrong_by_question_and_permutation():
    """An LM that finds every second question's right letter, wherever it stands."""
    told: Any = exam.Exam.__new__(exam.Exam)
    told.scoring, told.permutations = "letter", [(0, 1, 2, 3), (3, 2, 1, 0)]
    told.answers, told.n_rows, told.width = torch.tensor([1, 2, 0, 3]), 4, 4
    probs = torch.eye(4)[[1, 2, 1, 0]]
    told.batches = [SimpleNamespace(rows=[2, 0]), SimpleNamespace(rows=[1, 3])]
    told.read = lambda batch, logits: logits
    right = told.correct(lambda batch: probs[batch.rows])
    assert right.tolist() == [[True, True], [False, False]] and right.dtype == torch.bool


# ---- sparse products

F, D = 6, 3


@pytest.fixture
def both():
    """The same features as dense and sparse ones; labels of rows, and f [row, F] itself."""
    generator = torch.Generator().manual_seed(0)
    f = torch.rand(5, F, generator=generator) * (torch.rand(5, F, generator=generator) > 0.5)
    f[:, 2] = 0.0  # a feature that never fires
    forget = torch.tensor([True, False, True, True, False])
    col, row = f.T.nonzero(as_tuple=True)
    few = sparse.SparseFeatures(col, row, f[row, col], None, F, None, forget)
    return (sparse.DenseFeatures(f.clone(), None, None, forget), few), forget, f


def test_counts_are_of_forget_then_retain_rows(both):
    for features in both[0]:
        fired, total = features.counts()
        fires = both[2] > 0
        assert torch.equal(fired, torch.stack([fires[both[1]].sum(0), fires[~both[1]].sum(0)]).float())
        assert total.item() == pytest.approx(both[2].sum().item(), rel=1e-6)


def test_a_sketch_adds_the_signs_of_the_rows_that_a_feature_fires_on(both):
    signs = losses.random_signs(5, 4, torch.Generator().manual_seed(1))
    wanted = torch.stack([signs[both[2][:, i] > 0].sum(0) for i in range(F)])
    for features in both[0]:
        torch.testing.assert_close(features.sketch(signs), wanted)


def test_gradients_are_those_of_autograd(both):
    """Of Σ f_active·d_l1 + Σ d_out·(f W_dec), with f = relu(u W_encᵀ + b), the features in two parts, each
    with a d_out of its own."""
    generator, d_l1 = torch.Generator().manual_seed(2), torch.tensor(0.3)
    u, *d_outs = (torch.randn(5, D, generator=generator) for _ in range(3))
    parts = slice(0, 2), slice(2, F)
    W_dec = torch.randn(F, D, generator=generator)
    f, W_enc, b_enc = both[2], torch.zeros(F, D, requires_grad=True), torch.zeros(F, requires_grad=True)
    decoder = W_dec.clone().requires_grad_()
    moved = f + (f > 0) * (u @ W_enc.T + b_enc)  # equal to f, with the slope of each active feature
    said = sum(((moved[:, part] @ decoder[part]) * d_out).sum() for part, d_out in zip(parts, d_outs))
    (said + d_l1 * moved.sum()).backward()
    for features in both[0]:
        for decoded, part in zip(features.decode(W_dec, [0, 2, F]), parts, strict=True):
            torch.testing.assert_close(decoded, f[:, part] @ W_dec[part])
        for by_hand, p in zip(features.gradients(d_outs, u, W_dec, d_l1), (decoder, W_enc, b_enc)):
            torch.testing.assert_close(by_hand, p.grad, atol=1e-5, rtol=1e-5)


def test_blocks_of_rows_are_a_megabyte_and_views_of_the_whole():
    W = torch.zeros(1000, 2**10)
    blocks = sparse.cache_blocks(W)
    assert [len(block) for block in blocks] == [256, 256, 256, 232]
    assert blocks[1].data_ptr() == W[256:].data_ptr()
    assert len(sparse.cache_blocks(torch.zeros(2, 2**20))[0]) == 1, "a row is never parted"


def test_profiles_are_unit_rows_and_the_affinity():
    profile = losses.firing_profile(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(profile, torch.tensor([[0.6, 0.8, 0.5], [0.0, 0.0, -1.0]]))


def test_a_visit_counts_in_adams_second_moment_as_if_it_had_come_at_every_step():
    """(n p)² once in n = 4 steps, where p² four times was meant: three quarters of it go again."""

    def unused(*_):
        raise AssertionError

    moment, visited = torch.full((3, 2), 0.01), torch.tensor([[2.0, 0.0]])
    Rounds(unused, unused, steps=4).correct_moment(moment, torch.tensor([1]), visited, beta2=0.999)
    assert moment.flatten().tolist() == pytest.approx([0.01, 0.01, 0.01 - 0.75 * 0.001 * 4, 0.01, 0.01, 0.01])
    Rounds(unused, unused, steps=4, every=4).correct_moment(moment, torch.tensor([0]), visited, beta2=0.999)
    assert moment[0].tolist() == pytest.approx([0.01, 0.01]), "as the loss was published"
