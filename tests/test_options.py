"""The options that any arm may switch on: what each claims, by hand or against a naive twin, and that it
costs nothing when off."""

import math
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_trainer import SMALL, train

import experiment
from experiment import OrthogonalSAE, Request, Trainer
from sae_separation import gradients, losses
from sae_separation.errors import WrongRequest
from sae_separation.export import export, load_exported
from sae_separation.gradients import accumulate_grads
from sae_separation.sparse import batch_top_k, relu, soft_k_winners

META = {"model_name": "m", "hook_name": "h", "hook_layer": 0, "context_size": 16, "prepend_bos": True}
D, F = 24, 96


def make(**options) -> OrthogonalSAE:
    """A small SAE with all weights away from their start."""
    sae = OrthogonalSAE(D, F, seed=3, scale=0.7, k=8, **options)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in (sae.b_enc, sae.b_dec):
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        sae.W_enc.add_(0.1 * torch.randn(sae.W_enc.shape, generator=generator))
    return sae


def grads(sae: OrthogonalSAE) -> dict[str, torch.Tensor]:
    """The gradient of each parameter, by name. Raises AssertionError where one has none."""
    found = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    assert found.keys() == dict(sae.named_parameters()).keys()
    return found


@pytest.fixture
def x():
    return torch.randn(256, D, generator=torch.Generator().manual_seed(5)) + 0.5


FORGET = torch.arange(256) % 2 == 0
KINDS = {
    "plain": {},
    "layer_norm": {"layer_norm": True},
    "skip": {"skip": 0.3},
    "softk": {"activation": "softk"},
    "batchtopk": {"activation": "batchtopk"},
    "matryoshka": {"activation": "matryoshka"},
    "matryoshka with skip": {"activation": "matryoshka", "skip": 0.3},
    "all": {"activation": "softk", "layer_norm": True, "skip": 0.2},
}
WITH_JUMPRELU = KINDS | {"jumprelu": {"activation": "jumprelu"}}


def naive_loss(sae, x, l1, gain):
    """The documented loss written out anew, for autograd."""
    if sae.layer_norm:
        size, mean = x.std(1, keepdim=True), x.mean(1, keepdim=True)
        u = (x - mean) / (size + 1e-5)
    else:
        size, mean, u = 1 / sae.scale, 0.0, x * sae.scale
    pre = (u - sae.b_dec) @ sae.W_enc + sae.b_enc
    if sae.activation == "relu":
        f = pre.relu()
    elif sae.activation in ("batchtopk", "matryoshka"):
        border = pre.detach().flatten().sort(descending=True).values[sae.k * len(x) - 1]
        f = torch.where(pre >= border, pre, 0.0).relu()
    else:
        ranked = pre.detach().sort(dim=1, descending=True).values
        gate = torch.sigmoid((pre - (ranked[:, [sae.k - 1]] + ranked[:, [sae.k]]) / 2) / sae.temperature)
        f = torch.where(gate.detach() >= 0.01, pre.relu() * gate, 0.0)
    f, fvus = f * gain, []
    for width in [3, 9, 21, 45, 96] if sae.activation == "matryoshka" else [96]:
        decoded = f[:, :width] @ sae.W_dec[:width] + sae.b_dec + sae.skip * (u - sae.b_dec)
        fvus.append((decoded * size + mean - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
    paid = l1 * f.sum(1).mean() / math.sqrt(D)
    _, d_pre = losses.domain_hinges(pre[:, :20].detach(), FORGET, 0.4, torch.tensor(0.7), 0.3)
    paid = paid + (pre[:, :20] * d_pre).sum() / math.sqrt(
        D
    )  # the hinges' own gradient is tested in test_sae.py
    return torch.stack(fvus), paid


@pytest.mark.parametrize("path", ["DenseFeatures", "SparseFeatures"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_hand_equal_autograd_of_the_naive_loss(kind, path, x, monkeypatch):
    sae, generator = make(**KINDS[kind]), torch.Generator().manual_seed(6)
    monkeypatch.delattr(
        gradients, {"DenseFeatures": "sparse_features", "SparseFeatures": "DenseFeatures"}[path]
    )
    sae.active.fill_(0.0 if path == "SparseFeatures" else F)
    sae.temperature.fill_(0.2)
    l1, gain = torch.tensor(0.05), (torch.rand(F, generator=generator) > 0.3) * 1.25
    firing_loss = (
        20,
        partial(losses.domain_hinges, margin=0.4, alpha=torch.tensor(0.7), gap_weight=0.3),
    )
    terms = accumulate_grads(sae, x, FORGET, l1, torch.float32, firing_loss, gain, weight=0.5)
    by_hand = grads(sae)
    sae.zero_grad()
    fvus, paid = naive_loss(sae, x, l1, gain)
    (0.5 * (fvus.mean() + paid)).backward()
    assert terms.fvu.item() == pytest.approx(fvus[-1].item(), rel=1e-4)
    assert (terms.nested is None) == (len(fvus) == 1)
    assert terms.nested is None or terms.nested.item() == pytest.approx(fvus.mean().item(), rel=1e-4)
    for name, grad in grads(sae).items():
        assert grad.norm() > 1e-4 and (by_hand[name] - grad).norm() <= 1e-3 * grad.norm(), name


class Step(torch.autograd.Function):
    """1 where pre is above the threshold; to the threshold alone the straight-through gradient."""

    @staticmethod
    def forward(ctx, pre, threshold, width):
        ctx.save_for_backward(((pre - threshold).abs() < width / 2) / width)
        return (pre > threshold).to(pre)

    @staticmethod
    def backward(ctx, grad):
        return None, -(grad * ctx.saved_tensors[0]).sum(0), None


@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_gradients_of_jumprelu_equal_autograd_with_its_straight_through_estimator(layer_norm, x):
    """arXiv 2407.14435: f = pre H(pre - θ), the price λ Σ H(pre - θ); H teaches θ alone."""
    sae = make(activation="jumprelu", bandwidth=0.4, layer_norm=layer_norm)
    sae.log_threshold.data.copy_(torch.linspace(-1.0, 0.5, F))
    gain = (torch.rand(F, generator=torch.Generator().manual_seed(6)) > 0.3) * 1.25
    l1 = torch.tensor(0.05)
    terms = accumulate_grads(sae, x, FORGET, l1, torch.float32, None, gain, weight=0.5)
    by_hand = grads(sae)
    sae.zero_grad()
    u, mean, size = sae.normalise(x)
    pre = (u - sae.b_dec) @ sae.W_enc + sae.b_enc
    on = Step.apply(pre, sae.log_threshold.exp(), 0.4)
    # where pre meets the step, the paper's jump has the height θ
    at_jump = (
        torch.where(on.detach() > 0, pre, 0).detach() + (on - on.detach()) * sae.log_threshold.exp().detach()
    )
    f = gain * (at_jump + on.detach() * (pre - pre.detach()))
    x_hat = (f @ sae.W_dec + sae.b_dec) * size + mean
    fvu = (x_hat - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    price = (on * (gain > 0)).sum() / len(x) / math.sqrt(D)
    (0.5 * (fvu + l1 * price)).backward()
    assert terms.fvu.item() == pytest.approx(fvu.item(), rel=1e-4)
    assert terms.l1.item() == pytest.approx(price.item(), rel=1e-4)
    for name, grad in grads(sae).items():
        assert grad.norm() > 1e-4 and (by_hand[name] - grad).norm() <= 1e-3 * grad.norm(), name


def test_revived_features_of_jumprelu_take_the_threshold_of_the_living(activations):
    config = replace(SMALL, activation="jumprelu", resample_steps=40)
    trainer, history = train(config, activations, killed=40)
    thresholds = trainer.sae.thresholds.detach()
    assert trainer.resampled >= 40 and thresholds.std() > 0 and history[-1]["fvu"] < 0.8 * history[0]["fvu"]


@pytest.mark.parametrize("path", ["DenseFeatures", "SparseFeatures"])
def test_routed_gradients_are_those_of_each_domains_rows(path, x, monkeypatch):
    """The first 20 features learn from the error on forget rows alone, the others from that on retain rows
    alone; the price is paid on every row."""
    sae = make()
    monkeypatch.delattr(
        gradients, {"DenseFeatures": "sparse_features", "SparseFeatures": "DenseFeatures"}[path]
    )
    sae.active.fill_(0.0 if path == "SparseFeatures" else F)
    l1 = torch.tensor(0.05)
    terms = accumulate_grads(sae, x, FORGET, l1, torch.float32, routed=20)
    by_hand, expected = grads(sae), {}
    for rows, learns in ((FORGET, slice(0, 20)), (~FORGET, slice(20, None))):
        sae.zero_grad()
        f = ((x * sae.scale - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
        error = (f @ sae.W_dec + sae.b_dec) / sae.scale - x
        variance = (x - x.mean(0)).pow(2).sum()
        (error[rows].pow(2).sum() / variance + l1 * f.sum() / len(x) / math.sqrt(D)).backward()
        for name in ("W_dec", "W_enc_FD", "b_enc"):
            expected.setdefault(name, torch.zeros_like(by_hand[name]))[learns] = grads(sae)[name][learns]
    assert terms.fvu.item() == pytest.approx((error.pow(2).sum() / variance).item(), rel=1e-4)
    for name, grad in expected.items():
        assert grad.norm() > 1e-4 and (by_hand[name] - grad).norm() <= 1e-3 * grad.norm(), name


@pytest.mark.parametrize("kind", WITH_JUMPRELU)
@pytest.mark.parametrize("shape", [(D,), (5, D), (2, 3, 4, D)])
def test_any_leading_shape_gives_the_same_rows(kind, shape):
    sae, x = make(**WITH_JUMPRELU[kind]), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    sae.threshold.fill_(0.5)
    torch.testing.assert_close(sae(x), sae(x.reshape(-1, D)).reshape(shape))
    assert sae.encode(x).shape == (*shape[:-1], F) and (sae.encode(x) > 0).any()


@pytest.mark.parametrize("kind", ["plain", "layer_norm", "softk", "batchtopk", "jumprelu", "matryoshka"])
def test_the_exported_file_is_the_same_function_and_locked_features_never_fire(kind, x, tmp_path):
    sae = make(**WITH_JUMPRELU[kind])
    sae.unlocked.fill_(60)
    sae.threshold.fill_(0.8)
    if kind == "jumprelu":
        sae.log_threshold.data.copy_(torch.linspace(-1.0, 0.5, F))
    export(sae, tmp_path, META)
    loaded = load_exported(tmp_path)
    f = loaded.encode(x)
    assert f[:, 60:].max() == 0 < f[:, :60].max()
    # softk: in training, locked features that win leave their place empty; in the file they never win
    if kind != "softk":
        torch.testing.assert_close(f * sae.scale, sae.encode(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(loaded(x), sae(x), atol=1e-5, rtol=1e-5)
    else:
        sae.unlocked.fill_(F)
        export(sae, tmp_path / "all", META)
        loaded = load_exported(tmp_path / "all")
        torch.testing.assert_close(loaded(x), sae(x), atol=1e-5, rtol=1e-5)


def test_what_the_format_cannot_hold_is_refused_at_export_and_before_training(tmp_path):
    with pytest.raises(ValueError, match="cannot hold a skip connection of 0.3"):
        export(make(skip=0.3), tmp_path, META)
    soft = make(activation="softk")
    soft.temperature.fill_(0.1)
    with pytest.raises(ValueError, match="temperature 0.1"):
        export(soft, tmp_path, META)
    assert not any(tmp_path.iterdir())
    with pytest.raises(WrongRequest, match="--evals none"):
        experiment.parse_command(["--out_dir=run_0", "--skip=0.1"])
    (request,) = experiment.parse_command(["--out_dir=run_0", "--skip=0.1", "--evals=none"])[1]
    assert request.skip == 0.1


def test_options_and_their_state_are_in_the_state_dict():
    sae, other = make(activation="batchtopk"), make(activation="batchtopk")
    sae.unlocked.fill_(7)
    sae.threshold.fill_(0.3)
    sae.temperature.fill_(0.2)
    other.load_state_dict(sae.state_dict())
    assert (other.unlocked.item(), other.threshold.item(), other.temperature.item()) == (
        7,
        pytest.approx(0.3),
        pytest.approx(0.2),
    )


# ---- activation functions


def test_batch_top_k_keeps_the_largest_of_the_batch_and_learns_their_border(device):
    sae = make(activation="batchtopk").to(device)
    pre = torch.randn(64, F, generator=torch.Generator().manual_seed(2)).to(device)
    f, slope = batch_top_k(pre, sae)
    kept = f[f > 0]
    assert len(kept) == 8 * 64 and slope is None
    assert kept.min() > pre[f == 0].max()
    assert (f > 0).sum(1).float().std() > 0, "rows share the batch's budget"
    border = sae.threshold.item()
    assert border == pytest.approx(kept.min().item())
    for _ in range(600):  # the moving average, also when the border has moved far away
        batch_top_k(3 * pre, sae)
    assert sae.threshold.item() == pytest.approx(3 * border, rel=0.01)


def test_batch_top_k_with_fewer_positive_values_than_places_keeps_them_all(device):
    sae, pre = make(activation="batchtopk").to(device), torch.full((4, F), -1.0, device=device)
    pre[:, :3] = 1.0
    assert torch.equal(batch_top_k(pre, sae)[0], pre.relu())


def test_soft_k_winners_by_hand_and_its_limit_is_top_k():
    sae = make(activation="softk")
    sae.k = 2
    pre = torch.tensor([[4.0, 3.0, 2.0, -1.0]])
    sae.temperature.fill_(0.5)
    f, slope = soft_k_winners(pre, sae)
    gate = [1 / (1 + math.exp(-(v - 2.5) / 0.5)) for v in (4.0, 3.0, 2.0)]
    assert f[0].tolist() == pytest.approx([4 * gate[0], 3 * gate[1], 2 * gate[2], 0.0])
    assert slope is not None and slope[0, 1].item() == pytest.approx(
        gate[1] + 3 * gate[1] * (1 - gate[1]) / 0.5
    )
    sae.temperature.fill_(0.0)
    assert soft_k_winners(pre, sae)[0].tolist() == [[4.0, 3.0, 0.0, 0.0]]
    assert soft_k_winners(torch.full((1, 4), -1.0), sae)[0].tolist() == [[0.0] * 4]


@pytest.mark.parametrize("activation", ["batchtopk", "matryoshka", "softk"])
def test_top_k_arms_have_lambda_0_and_learn_at_their_k(activation, activations):
    config = replace(SMALL, activation=activation, k=8, tokens=200 * 512)
    trainer, history = train(config, activations, steps=200)
    assert all(r["l1_coefficient"] == 0 for r in history)
    assert history[-1]["fvu"] < 0.5
    assert trainer.sae.temperature == 0
    l0 = (trainer.sae.encode(activations.x) > 0).sum(1).float().mean().item()
    assert l0 == pytest.approx(8, abs=0.8), "by the inference function, on other rows than the last batch"


def test_temperature_falls_in_a_line_to_0_where_the_learning_rate_decays(activations):
    config = replace(SMALL, activation="softk", temperature=0.4, decay_fraction=0.5)
    trainer = Trainer(config, 0, activations.x.shape[1], 201, activations)
    for step, expected in ((0, 0.4), (50, 0.4 * (1 - 50 / 99.5)), (100, 0.0), (200, 0.0)):
        trainer.steps = step
        trainer._unlock_and_cool()
        assert trainer.sae.temperature.item() == pytest.approx(expected)


# ---- schedules


def test_the_alpha_curriculum_rises_geometrically_until_half_way(activations):
    trainer = Trainer(
        replace(SMALL, arm="fixed", alpha=0.1, alpha_start=0.001),
        0,
        activations.x.shape[1],
        200,
        activations,
    )
    seen = []
    for step in (0, 50, 100, 150):
        trainer.steps = step
        seen.append(trainer._weights()[1].item())
    assert seen == pytest.approx([0.001, 0.01, 0.1, 0.1])


def test_loss_warmup_raises_lambda_and_alpha_in_a_line(activations):
    _, history = train(
        replace(SMALL, arm="fixed", loss_warmup_steps=10, target_l0=0.0), activations, steps=12
    )
    assert [r["l1_coefficient"] / SMALL.l1 for r in history] == pytest.approx(
        [0.1 * i for i in range(1, 11)] + [1.0, 1.0]
    )
    assert history[4]["alpha"] == pytest.approx(0.5 * SMALL.alpha)


def test_progressive_unlocking_opens_a_quarter_and_a_tenth_at_every_growth(activations):
    config = replace(SMALL, unlock_steps=5, resample_steps=0)
    trainer = Trainer(config, 0, activations.x.shape[1], 200, activations)
    start = trainer.sae.W_enc.detach().clone()
    batches, opened = list(activations.batches(512)), []
    for i in range(45):
        trainer.step(*batches[i % len(batches)])
        opened.append(int(trainer.sae.unlocked))
        if i == 4:
            assert torch.equal(trainer.sae.W_enc[:, 64:], start[:, 64:]) and not torch.equal(
                trainer.sae.W_enc[:, :64], start[:, :64]
            )
            assert (trainer.sae.encode(activations.x)[:, 64:] > 0).sum() == 0
            assert trainer.sae.idle[64:].max() <= 512, "locked is not dead"
    assert opened[::5] == [64, 90, 116, 141, 167, 192, 218, 244, 256]


def test_unlocking_that_would_not_end_is_refused():
    with pytest.raises(WrongRequest, match="--unlock_steps 50.*200 steps"):
        Request(unlock_steps=50, batch_size=512, tokens=200 * 512)


# ---- regularisation and the optimiser


def test_feature_dropout_leaves_out_the_given_share_and_scales_the_rest(activations):
    trainer = Trainer(replace(SMALL, feature_dropout=0.25), 0, activations.x.shape[1], 200, activations)
    gains = torch.stack([gain for _ in range(200) if (gain := trainer._gain()) is not None])
    assert len(gains) == 200
    assert gains.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (gains == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert not torch.equal(gains[0], gains[1]), "drawn anew each batch"
    sae, x = trainer.sae, activations.x[:512]
    terms = accumulate_grads(
        sae, x, activations.forget[:512], torch.tensor(0.0), torch.float32, gain_F=gains[0]
    )
    assert terms.fired[:, gains[0] == 0].sum() == 0 and grads(sae)["W_enc_FD"][gains[0] == 0].abs().max() == 0


def test_gradient_accumulation_steps_on_the_mean_of_its_batches(activations, monkeypatch):
    config = replace(
        SMALL, grad_accumulation=2, grad_clip=0.0, target_l0=0.0, warmup_steps=0, resample_steps=0
    )
    trainer = Trainer(config, 0, activations.x.shape[1], 200, activations)
    trainer.dtype = torch.float32
    (x1, g1), (x2, g2) = list(activations.batches(512))[:2]
    start, by_hand = (
        trainer.sae.W_enc.detach().clone(),
        OrthogonalSAE(activations.x.shape[1], 256, 0, trainer.sae.scale.item()),
    )
    by_hand.load_state_dict(trainer.sae.state_dict())
    trainer.step(x1, g1)
    assert torch.equal(trainer.sae.W_enc, start)
    for x in (x1, x2):
        fvu, l1 = by_hand.loss_terms(x)[:2]
        ((fvu + SMALL.l1 * l1) / 2).backward()
    seen = {}
    monkeypatch.setattr(trainer, "_update", lambda _: seen.update(grads(trainer.sae)))
    trainer.step(x2, g2)
    for name, grad in grads(by_hand).items():
        assert (seen[name] - grad).norm() <= 1e-3 * grad.norm(), name


def test_accumulation_takes_half_the_optimiser_steps_and_the_same_schedule(activations):
    trainer, _ = train(replace(SMALL, arm="ortsae", grad_accumulation=2), activations, steps=40)
    assert trainer.adam.state[trainer.sae.W_enc_FD]["step"] == 20
    assert trainer.adam.param_groups[0]["lr"] == pytest.approx(SMALL.lr)
    _, history = train(replace(SMALL, arm="ortsae", alpha=0.25, grad_accumulation=2), activations, steps=22)
    omegas = [r.get("omega") for r in history]
    assert [i for i in range(len(history)) if omegas[i] != (omegas[i - 1] if i else None)] == [
        1,
        11,
        21,
    ], "every fifth optimiser step"


def test_gradients_are_clipped_to_the_norm_given(activations, monkeypatch):
    trainer, _ = train(replace(SMALL, grad_clip=1e-3), activations, steps=3)
    norms, step = [], trainer.adam.step

    def measured_step():
        norms.append(math.sqrt(sum(grad.pow(2).sum().item() for grad in grads(trainer.sae).values())))
        return step()

    monkeypatch.setattr(trainer.adam, "step", measured_step)
    trainer.step(*next(activations.batches(512)))
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_rare_features_move_further_under_their_own_learning_rates(activations):
    plain, _ = train(replace(SMALL, resample_steps=0), activations, steps=5)
    own, _ = train(replace(SMALL, resample_steps=0, feature_lr_power=0.5), activations, steps=5)
    for trainer in (plain, own):  # from one state on
        trainer.sae.load_state_dict(plain.sae.state_dict())
        trainer.adam.load_state_dict(deepcopy(plain.adam.state_dict()))
        trainer.sae.rate.copy_(torch.linspace(0.01, 0.09, 256).expand(2, 256))
    before = plain.sae.W_enc.detach().clone()
    batch = next(activations.batches(512))
    for trainer in (plain, own):
        trainer.step(*batch)
    ratio = (own.sae.W_enc - before).norm(dim=0) / (plain.sae.W_enc - before).norm(dim=0)
    torch.testing.assert_close(ratio, (0.05 / torch.linspace(0.01, 0.09, 256)).sqrt(), rtol=0.02, atol=0.01)


def test_orthogonal_initialisation_makes_orthonormal_blocks():
    sae = OrthogonalSAE(D, 60, seed=0, orthogonal_init=True)
    for block in sae.W_dec.detach().split(D):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block)), atol=1e-5, rtol=0)
    plain = OrthogonalSAE(D, 60, seed=0)
    assert losses.omega_all_pairs(sae.W_dec) < losses.omega_all_pairs(plain.W_dec)


def test_options_that_are_off_do_no_work(activations, monkeypatch):
    """Nothing of them is called in a plain step: no gain, no slope, no copy of the weights, no clipping."""
    trainer, _ = train(SMALL, activations, steps=2)
    assert trainer._gain() is None and relu(torch.zeros(1), trainer.sae)[1] is None

    def never(*_, **__):
        raise AssertionError("called although it is off")

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", never)
    monkeypatch.setattr(experiment, "own_learning_rates", never)
    monkeypatch.setattr(torch, "rand", never)
    trainer.step(*next(activations.batches(512)))
