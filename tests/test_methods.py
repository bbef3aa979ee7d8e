"""Methods that are told the labels: what each touches and leaves, and that its folder holds all of it."""

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tiny import numpy_state, there

from sae_separation import export, methods, reader
from sae_separation.errors import RunFailed, WrongRequest
from sae_separation.evals.cells import answers, intervening
from sae_separation.evals.evaluator import Evaluator
from sae_separation.exam import Exam, Residuals, trained_on
from sae_separation.four_bits import rounded_to_4_bits
from sae_separation.lm import InterventionLM
from sae_separation.questions import Question
from sae_separation.saebench import FORGET

KINDS = [kind for kind in methods.FITTED if kind != "oracle"]
WEIGHTS = ["rmu", "npo"]


@pytest.fixture(scope="module")
def evaluator(micro):
    return Evaluator(micro, context_size=128, n_contexts=32)


@pytest.fixture(scope="module")
def shorter():
    """Training of a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "CHECKPOINTS", (1, 10))
        patch.setitem(methods.TRAINING, "batch", 4)
        patch.setitem(methods.MLP, "steps", 200)
        patch.setattr(reader, "N_CONTEXTS", 96)
        patch.setattr(methods, "READERS", {k: v | {"steps": 60} for k, v in methods.READERS.items()})
        yield


@pytest.fixture(scope="module")
def sae(micro):
    draw, d_in = torch.Generator().manual_seed(0), micro.d_in
    W_dec = torch.nn.functional.normalize(torch.randn(64, d_in, generator=draw), dim=1)
    biases = {"b_enc": torch.zeros(64), "b_dec": torch.zeros(d_in)}
    return export.build("standard", {"W_dec": W_dec, "W_enc": W_dec.T} | biases)


@pytest.fixture(scope="module")
def fit(evaluator, sae):
    """A method by its kind, with its SAE if it takes one."""
    return lambda kind, seed: methods.fit(kind, evaluator, seed, sae if kind == "feature_gate" else None)


@pytest.fixture(scope="module")
def fitted(fit, shorter) -> dict[str, methods.Method]:
    return {kind: fit(kind, 0) for kind in KINDS}


@pytest.fixture(scope="module")
def texts(evaluator) -> dict[str, Residuals]:
    """Text on which nothing was fitted."""
    special = evaluator.special
    return {
        domain: Residuals(resid[:8], trained_on(tokens[:8], special), tokens[:8])
        for domain, (tokens, resid) in evaluator.held_out.items()
    }


def under(method: methods.Method, evaluator: Evaluator, cell: dict, read: Residuals) -> torch.Tensor:
    """The stream [row, pos, D] that a cell makes of it."""
    return there(there(method.switch(evaluator).hook(cell))(read.resid, hook=read))


def changed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Which tokens [row, pos] (bool)."""
    return (before != after).any(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_does_the_same_bit_for_bit(kind, fitted, evaluator, texts, tmp_path):
    method = fitted[kind]
    method.save(tmp_path / "it")
    again = methods.load(tmp_path / "it")
    assert sorted(p.name for p in (tmp_path / "it").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert (again.kind, again.settings) == (kind, method.settings) and methods.is_method(tmp_path / "it")
    grid = again.switch(evaluator).cells()
    assert grid == method.switch(evaluator).cells() and 0 < len(grid) <= 12
    if kind in methods.READERS:
        assert len(grid) == 6 and {cell["write"] for cell in grid} == {"zero"}
    assert len({json.dumps(cell) for cell in grid}) == len(grid)
    for cell in grid:
        for read in texts.values():
            assert torch.equal(*(under(m, evaluator, cell, read) for m in (method, again)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_all_and_nothing_else_is_changed(kind, fit, fitted, evaluator):
    lm, weights = evaluator.lm.lm, {n: p.detach().clone() for n, p in evaluator.lm.lm.named_parameters()}
    torch.manual_seed(1)
    before = torch.get_rng_state(), numpy_state(), torch.is_grad_enabled()
    with torch.no_grad():
        same, other = fit(kind, 0), fit(kind, 1)
    assert torch.equal(torch.get_rng_state(), before[0]) and numpy_state() == before[1]
    assert torch.is_grad_enabled() == before[2] and not lm.training
    for name, p in lm.named_parameters():
        assert torch.equal(p, weights[name]) and not p.requires_grad and p.grad is None
    assert same.settings == fitted[kind].settings
    for name, tensor in fitted[kind].tensors.items():
        assert torch.equal(tensor, same.tensors[name]) and not tensor.requires_grad
    equal = all(torch.equal(t, other.tensors[name]) for name, t in same.tensors.items())
    assert equal == (kind not in methods.SEEDED) and ("seed" in same.settings) == (not equal)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WEIGHTS])
def test_tokens_that_no_sae_is_trained_on_stay_as_they_are(kind, fitted, evaluator, texts):
    touched = 0
    for cell in fitted[kind].settings["cells"]:
        for read in texts.values():
            at = changed(read.resid, under(fitted[kind], evaluator, cell, read))
            assert not (at & ~read.trained).any()
            touched += int(at.sum())
    assert touched > 0 and all((~read.trained).sum() > 8 for read in texts.values())


@pytest.mark.parametrize("kind", ["linear_gate", "mlp_gate"])
def test_a_gate_fires_on_the_stated_share_of_retain_tokens_and_writes_there_alone(kind, fitted, evaluator):
    read, shares = evaluator.retain_residuals, []
    for cell in fitted[kind].settings["cells"]:
        after = under(fitted[kind], evaluator, cell, read)
        at = changed(read.resid, after)
        assert int(at.sum()) == max(1, round(cell["retain_share"] * int(read.trained.sum())))
        new = torch.zeros(()) if cell["write"] == "zero" else read.resid[read.trained].mean(0)
        assert torch.equal(after[at], new.expand_as(after[at]))
        shares.append((cell["retain_share"], cell["write"]))
    assert shares == [(share, write) for share in methods.RETAIN_SHARES for write in ("zero", "retain_mean")]


def test_methods_are_fitted_on_more_text_where_few_contexts_select_features(micro):
    few = Evaluator(dataclasses.replace(micro, n_held_out=16, n_fitted=80), 128)
    assert methods.tokens_to_fit_on("oracle", few) == 0 and "fitting" not in vars(few), "and reads none"
    assert methods.tokens_to_fit_on("linear_gate", few) == 2 * 80 * 128
    for domain, read in zip(("forget", "retain"), methods.both(few)):
        assert len(few.select[domain].tokens) == 64 and len(read.tokens) == 80
        assert torch.equal(read.tokens[:64], few.select[domain].tokens)
        torch.testing.assert_close(read.resid[:64], few.select[domain].resid, atol=1e-4, rtol=1e-4)
    cells = methods.fit("linear_gate", few, seed=0).settings["cells"]
    score = methods.linear_score(read, methods.fit("linear_gate", few, seed=0).tensors)[read.trained]
    for cell in cells:  # a threshold is a score of the text that it was fitted on
        fires = (score >= cell["threshold"]).float().mean().item()
        assert fires == pytest.approx(cell["retain_share"], abs=1 / len(score))


@pytest.mark.parametrize("kind", ["linear_gate", "mlp_gate"])
def test_a_gate_fires_on_forget_text_it_never_read(kind, fitted, evaluator, texts):
    cell = fitted[kind].settings["cells"][-1]
    rate = {
        domain: (changed(read.resid, under(fitted[kind], evaluator, cell, read)).sum() / read.trained.sum())
        for domain, read in texts.items()
    }
    assert rate["forget"] > 0.15 and rate["forget"] > 5 * rate["retain"]


def test_the_linear_gate_is_sklearns_probe(fitted, evaluator):
    x, is_forget = methods.labelled(evaluator)
    scaled = ((x - x.mean(0)) / x.std(0)).numpy()
    probe = LogisticRegression(max_iter=1000).fit(scaled, is_forget.numpy())
    tensors = fitted["linear_gate"].tensors
    ours = x @ tensors["weight"] + tensors["bias"]
    torch.testing.assert_close(
        ours, torch.from_numpy(probe.decision_function(scaled)).float(), atol=1e-3, rtol=0
    )


def test_the_mlp_gate_is_one_hidden_layer_that_tells_the_domains_apart(fitted, evaluator):
    tensors = fitted["mlp_gate"].tensors
    layers = torch.nn.Sequential(torch.nn.Linear(128, 40), torch.nn.ReLU(), torch.nn.Linear(40, 1))
    names = {"0.weight": tensors["W_in"].T, "0.bias": tensors["b_in"], "2.bias": tensors["b_out"]}
    layers.load_state_dict(names | {"2.weight": tensors["W_out"][None]})
    x, is_forget = methods.labelled(evaluator)
    with torch.no_grad():
        torch.testing.assert_close(methods.mlp(x, tensors), layers(x)[:, 0], atol=1e-4, rtol=1e-4)
    assert ((methods.mlp(x, tensors) > 0) == is_forget).float().mean() > 0.85


def test_difference_of_means_ablates_one_direction_and_clamps_along_it(fitted, evaluator, texts):
    tensors, read = fitted["difference_of_means"].tensors, texts["forget"]
    x, is_forget = methods.labelled(evaluator)
    gap = x[is_forget].mean(0) - x[~is_forget].mean(0)
    direction = gap / gap.norm()
    before = read.resid[read.trained]
    for strength in (0, 3):
        after = under(fitted["difference_of_means"], evaluator, {"strength": strength}, read)[read.trained]
        along = (after - tensors["retain_mean"]) @ direction
        torch.testing.assert_close(
            along, torch.full_like(along, -strength * gap.norm().item()), atol=1e-3, rtol=0
        )
        across = (after - before) - ((after - before) @ direction)[:, None] * direction
        assert across.abs().max() < 1e-3, "the rest of the stream stays"


def test_leace_leaves_no_linear_direction(fitted, evaluator):
    x, is_forget = methods.labelled(evaluator)
    erased = methods.erased(x, fitted["leace"].tensors, 1.0)
    gap = x[is_forget].mean(0) - x[~is_forget].mean(0)
    assert (erased[is_forget].mean(0) - erased[~is_forget].mean(0)).norm() < 1e-3 * gap.norm()

    def told_apart(x: torch.Tensor) -> float:
        probe = methods.logistic(x, is_forget)
        return ((x @ probe["weight"] + probe["bias"] > 0) == is_forget).float().mean().item()

    majority = max(is_forget.float().mean().item(), 1 - is_forget.float().mean().item())
    assert told_apart(x) > majority + 0.2 and told_apart(erased) < majority + 0.01
    twice = methods.erased(x, fitted["leace"].tensors, 2.0)
    torch.testing.assert_close(twice - x, 2 * (erased - x), atol=1e-4, rtol=1e-4)


def test_the_token_list_fires_on_its_tokens_only(fitted, evaluator, texts):
    counts = {}
    for domain, (tokens, _) in evaluator.select.items():
        counts[domain] = Counter(tokens[trained_on(tokens, evaluator.special)].tolist())
    total = {domain: sum(counted.values()) for domain, counted in counts.items()}
    for cell in fitted["token_list"].settings["cells"]:
        listed = set()
        for token, n in counts["forget"].items():
            ours, theirs = n / total["forget"], counts["retain"][token] / total["retain"]
            if n >= 5 and ours >= cell["threshold"] * (ours + theirs):
                listed.add(token)
        assert len(listed) == cell["n_tokens"] > 10
        for read in texts.values():
            at = changed(read.resid, under(fitted["token_list"], evaluator, cell, read))
            assert at.tolist() == [
                [token in listed and may for token, may in zip(*row)]
                for row in zip(read.tokens.tolist(), read.trained.tolist())
            ]


@pytest.mark.parametrize("kind", ["mean_guard", "bayes_guard"])
def test_a_guard_overwrites_whole_rows_of_forget_text(kind, fitted, evaluator, texts):
    for cell in fitted[kind].settings["cells"]:
        for domain, read in texts.items():
            after = under(fitted[kind], evaluator, cell, read)
            rows = changed(read.resid, after)
            fired = rows.any(1)
            assert torch.equal(rows, read.trained & fired[:, None]), "all trained tokens of a row, or none"
            if cell["threshold"] == 0:
                assert fired.float().mean() > 0.7 if domain == "forget" else fired.float().mean() < 0.3


def test_the_bayes_guard_adds_up_log_odds_with_one_count_of_every_token(fitted, evaluator, texts):
    n = evaluator.lm.lm.get_input_embeddings().num_embeddings
    log = {}
    for domain, (tokens, _) in evaluator.select.items():
        counted = torch.zeros(n, dtype=torch.float64) + 1
        for token in tokens[trained_on(tokens, evaluator.special)].tolist():
            counted[token] += 1
        log[domain] = (counted / counted.sum()).log()
    read = texts["forget"]
    odds = (log["forget"] - log["retain"])[read.tokens] * read.trained
    score = methods.bayes_score(read, fitted["bayes_guard"].tensors)[:, 0]
    torch.testing.assert_close(score, odds.sum(1).float(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_stream_is_that_of_an_lm_with_the_trained_weights(kind, micro, evaluator, fitted, texts):
    trained = methods.under_step(fitted[kind].tensors, 10)
    assert {name.split(".")[2] for name in trained} == {"0", "1"}, "the hook layer, and the one before it"
    lm = copy.deepcopy(micro.lm)
    assert not lm.load_state_dict(trained, strict=False).unexpected_keys
    read = texts["forget"]
    with torch.no_grad():
        slow = lm.gpt_neox(read.tokens, output_hidden_states=True).hidden_states[micro.layer + 1]
    fast = under(fitted[kind], evaluator, {"step": 10}, read)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    assert changed(read.resid, fast).all(), "special tokens too"
    assert torch.equal(evaluator.lm.resid(read.tokens), read.resid), "the LM has its own weights again"


@pytest.mark.parametrize("kind", WEIGHTS)
def test_trained_weights_are_rounded_where_those_of_the_lm_are(kind, micro, evaluator, fitted, texts):
    """As an LM that was trained and saved, and then loaded in 4 bits."""
    four_bits = copy.copy(evaluator)
    four_bits.is_in_4_bits = True
    four_bits.lm = InterventionLM(dataclasses.replace(micro, lm=rounded_to_4_bits(micro.lm)))
    lm = copy.deepcopy(micro.lm)
    lm.load_state_dict(methods.under_step(fitted[kind].tensors, 10), strict=False)
    slow = InterventionLM(dataclasses.replace(micro, lm=rounded_to_4_bits(lm))).resid(texts["forget"].tokens)
    switch, read = fitted[kind].switch(evaluator).on(four_bits), texts["forget"]
    fast = there(there(switch.hook({"step": 10}))(read.resid, hook=read))
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    assert (fast - under(fitted[kind], evaluator, {"step": 10}, read)).abs().max() > 0.1


@pytest.mark.parametrize("scoring", ["letter", "cloze"])
def test_the_lower_layers_see_what_the_lm_saw(scoring, micro, evaluator):
    """Rows that hold several ends of one beginning, none of which sees another."""
    question = Question("x", "Who is it?", ("Kraelan syndrome", "otters", "two words", "liver"), 1)
    exam = Exam(micro.tokenizer, [question], scoring)
    read = evaluator.lm.residuals(exam.batches[0])
    assert (read.seen != {}) == (scoring == "cloze")
    weights = {name: p.detach().clone() for name, p in micro.lm.named_parameters()}
    again = methods.recomputed(read.resid, read, lm=evaluator.lm, weights=weights)
    assert torch.equal(again, read.resid)


def test_losses_have_gradients_through_the_stream_and_the_logits_of_the_lm(micro, evaluator, texts):
    lm, tokens = evaluator.lm, texts["forget"].tokens
    weights = {n: p.detach().clone().requires_grad_() for n, p in micro.lm.named_parameters() if ".1." in n}
    streamed = methods.stream(lm, weights, tokens)
    torch.testing.assert_close(streamed.detach(), lm.resid(tokens))
    logits = methods.forward(lm, weights, tokens)
    torch.testing.assert_close(logits.detach(), micro.lm(tokens).logits)
    for out in (streamed, logits):
        grads = torch.autograd.grad(out.square().mean(), list(weights.values()), allow_unused=True)
        assert all(grad is not None and grad.abs().max() > 0 for grad in grads)


def test_log_likelihood_is_that_of_the_whole_context(micro, texts):
    tokens = texts["forget"].tokens[:2]
    with torch.no_grad():
        said = micro.lm(tokens).logits.log_softmax(-1)
    next_ones = range(tokens.shape[1] - 1)
    slow = [torch.stack([said[r, i, tokens[r, i + 1]] for i in next_ones]).sum() for r in range(2)]
    torch.testing.assert_close(methods.log_likelihood(micro.lm(tokens).logits, tokens), torch.stack(slow))


def test_rmu_steers_forget_text_to_one_vector_and_holds_retain_text(fitted, evaluator, texts):
    moved, spread = {}, []
    for domain, read in texts.items():
        after = under(fitted["rmu"], evaluator, {"step": 10}, read)
        moved[domain] = (after - read.resid)[read.trained]
    assert moved["forget"].norm(dim=-1).mean() > 1.5 * moved["retain"].norm(dim=-1).mean()
    mean = moved["forget"].mean(0)
    spread = torch.nn.functional.cosine_similarity(moved["forget"], mean[None]).mean()
    direction = torch.rand(128, generator=torch.Generator().manual_seed(0))
    assert spread > 0.5 and torch.nn.functional.cosine_similarity(mean, direction, dim=0) > 0.5


def test_npo_unlearns_forget_text_more_than_retain_text(fitted, evaluator, texts):
    weights, lost = methods.under_step(fitted["npo"].tensors, 10), {}
    for domain, read in texts.items():
        with torch.no_grad():
            before, after = (
                methods.log_likelihood(methods.forward(evaluator.lm, some, read.tokens), read.tokens)
                for some in ({}, weights)
            )
        lost[domain] = (before - after).mean() / (read.tokens.shape[1] - 1)
    assert lost["forget"] > 0.2 and lost["forget"] > 1.3 * lost["retain"]


def test_a_loss_that_is_not_finite_ends_the_fit(evaluator, shorter, monkeypatch):
    monkeypatch.setitem(methods.RMU, "norm", float("nan"))
    with pytest.raises(RunFailed, match="the loss of rmu is nan"):
        methods.fit("rmu", evaluator, seed=0)


def test_a_guard_takes_answers_away_that_the_lm_gives(fitted, evaluator):
    places = {FORGET: tuple(range(20)), "subject1": tuple(range(20))}
    switch = fitted["mean_guard"].switch(evaluator)
    right = answers(evaluator, switch, switch.cells()[0], places)
    assert right[FORGET].float().mean() < 0.6 and right["subject1"].float().mean() > 0.9
    assert evaluator.lm.hook is None


def test_the_oracle_is_asked_as_it_is(micro, evaluator, tmp_path):
    with_oracle: Any = copy.copy(evaluator)
    with_oracle.__dict__.pop("oracle", None)
    micro.lm.save_pretrained(tmp_path / "oracle")
    with_oracle.testbed = copy.copy(micro)
    with_oracle.testbed.oracle = tmp_path / "oracle"
    method = methods.fit("oracle", with_oracle, seed=0)
    method.save(tmp_path / "it")
    switch = methods.load(tmp_path / "it").switch(with_oracle)
    (cell,) = switch.cells()
    assert cell == {} and switch.lm is with_oracle.oracle is not evaluator.lm
    with intervening(switch.lm, switch.hook(cell)):
        assert switch.lm.hook is None
    assert "oracle" not in methods.SEEDED and list(methods.FITTED)[-1] == "oracle"


def test_a_testbed_without_an_oracle_is_told_so(micro, evaluator):
    without = copy.copy(evaluator)
    without.__dict__.pop("oracle", None)
    without.testbed = copy.copy(micro)
    without.testbed.oracle = None
    with pytest.raises(WrongRequest, match="^--arm oracle: micro has no LM .* leave the arm out"):
        methods.fit("oracle", without, seed=0)
    with pytest.raises(WrongRequest, match="^--arm oracle"):
        methods.Method("oracle", {}, {"cells": [{}]}).switch(without)


def test_a_folder_without_a_method_is_none_and_an_unknown_one_is_refused(tmp_path: Path):
    assert not methods.is_method(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_sae": 8}))
    assert not methods.is_method(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({"method": "magic", "settings": {}}))
    assert methods.is_method(tmp_path)
    with pytest.raises(
        WrongRequest, match="its method is 'magic', none of difference_of_means, .*: fit it anew"
    ):
        methods.load(tmp_path)
