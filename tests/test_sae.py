"""The SAE: hand-written gradients against autograd, shapes, norms, statistics, and the exported file."""

from functools import partial

import pytest
import torch
from tiny import there

import sae_separation.gradients
import sae_separation.sparse
from experiment import OrthogonalSAE
from sae_separation import losses
from sae_separation.export import export, load_exported
from sae_separation.gradients import accumulate_grads
from sae_separation.sparse import remove_radial, sparse_features, true_places, unit_rows


@pytest.fixture
def sae():
    sae = OrthogonalSAE(d_in=24, d_sae=96, seed=3, scale=0.7)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in (sae.b_enc, sae.b_dec):
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        sae.W_enc.add_(0.1 * torch.randn(sae.W_enc.shape, generator=generator))
    return sae


@pytest.fixture
def x():
    return torch.randn(256, 24, generator=torch.Generator().manual_seed(5)) + 0.5


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_hand_written_gradients_equal_autograd_of_the_plain_forward(sae, x, dtype, rtol, device):
    sae, x, l1 = sae.to(device), x.to(device), torch.tensor(0.05, device=device)
    terms = accumulate_grads(sae, x, torch.arange(256, device=device) % 2 == 0, l1, dtype)
    by_hand = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    fvu, sparsity = sae.loss_terms(x)
    (fvu + l1 * sparsity).backward()
    assert terms.fvu.item() == pytest.approx(fvu.item(), rel=rtol)
    assert terms.l1.item() == pytest.approx(sparsity.item(), rel=rtol)
    for name, p in sae.named_parameters():
        assert (by_hand[name] - p.grad).norm() <= rtol * p.grad.norm(), name
        assert p.grad.norm() > 1e-4, f"{name}: the comparison would be empty"


@pytest.mark.parametrize("activation", ["relu", "batchtopk", "softk"])
@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_the_sparse_path_measures_what_the_dense_one_does_and_both_keep_a_nan(activation, temperature):
    x = torch.randn(256, 24, generator=torch.Generator().manual_seed(5)) + 0.5
    forget, l1, seen = torch.arange(256) < 100, torch.tensor(0.05), []
    for active in (0.0, 96.0):
        sae = OrthogonalSAE(24, 96, seed=3, activation=activation, k=5)
        sae.temperature.fill_(temperature)
        sae.active.fill_(active)
        terms = accumulate_grads(sae, x, forget, l1, torch.float32)
        seen.append(
            [
                terms.fvu,
                terms.l1,
                terms.l0,
                terms.fired,
                sae.active.clone(),
                *(p.grad for p in sae.parameters()),
            ]
        )
        assert all(p.is_contiguous() and there(p.grad).is_contiguous() for p in sae.parameters()), (
            "fused Adam copies what is not"
        )
        sae.active.fill_(active)
        sae.W_enc.data[3, 7] = torch.nan
        assert not accumulate_grads(sae, x, forget, l1, torch.float32).fvu.isfinite()
    for sparse, dense in zip(*seen):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-6)
    assert seen[0][3].sum() > 256


def test_the_path_follows_the_share_of_active_features_by_itself(x, monkeypatch):
    taken = []
    for module, name in (
        (sae_separation.gradients, "DenseFeatures"),
        (sae_separation.sparse, "SparseFeatures"),
    ):
        kind = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, kind=kind: taken.append(kind) or kind(*args))
    sae = OrthogonalSAE(24, 400, seed=3)
    for bias in (0.0, -2.0, -2.0, 0.0, 0.0):
        sae.b_enc.data.fill_(bias)
        accumulate_grads(sae, x, torch.zeros(256, dtype=torch.bool), torch.tensor(0.0), torch.float32)
        assert sae.active.item() == pytest.approx((sae.encode(x) > 0).sum().item() / 256)
    assert [kind.__name__ for kind in taken] == [
        "DenseFeatures",
        "DenseFeatures",
        "SparseFeatures",
        "SparseFeatures",
        "DenseFeatures",
    ]


def test_a_batch_without_any_active_feature_has_gradient_zero_and_not_nan(x):
    sae = OrthogonalSAE(24, 96, seed=3)
    sae.b_enc.data.fill_(-100.0)
    sae.active.fill_(0.0)
    terms = accumulate_grads(sae, x, torch.zeros(256, dtype=torch.bool), torch.tensor(0.1), torch.float32)
    assert terms.l0 == 0 and terms.fvu.isfinite()
    assert all(there(p.grad).isfinite().all() for p in sae.parameters())
    assert there(sae.W_dec.grad).abs().max() == there(sae.W_enc_FD.grad).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "share"), [((64, 96), 0.02), ((7, 13), 0.3), ((8, 16), 0.0), ((8, 16), 1.0)]
)
def test_true_places_are_those_of_nonzero(shape, share, dtype):
    generator = torch.Generator().manual_seed(1)
    t = ((torch.rand(shape, generator=generator) < share) * torch.randn(shape, generator=generator)).to(
        dtype
    )  # 0.0 and -0.0 among the others
    if dtype.is_floating_point and share == 0.02:
        t[5, 7] = torch.nan
        assert 5 * 96 + 7 in true_places(t)
    assert torch.equal(true_places(t), t.flatten().nonzero()[:, 0])


@pytest.mark.parametrize("activation", ["relu", "batchtopk", "softk"])
@pytest.mark.parametrize("active", [0.0, 1e9])
def test_a_sketch_sums_the_signs_of_the_rows_that_a_feature_fires_on(activation, active, x):
    sae, signs = (
        OrthogonalSAE(24, 96, seed=3, activation=activation, k=5),
        losses.random_signs(256, 16, torch.Generator().manual_seed(1)),
    )
    sae.active.fill_(active)
    terms = accumulate_grads(
        sae, x, torch.arange(256) < 100, torch.tensor(0.0), torch.float32, signs_BK=signs
    )
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    few = {
        "relu": pre > 0,
        "batchtopk": pre >= pre.flatten().topk(5 * 256).values[-1],
        "softk": pre >= pre.topk(5, dim=1).values[:, -1:],
    }[activation]
    torch.testing.assert_close(terms.sketch, (few & (pre > 0)).float().T @ signs)
    assert signs.abs().eq(1).all() and abs(signs.mean()) < 0.1 and there(terms.sketch).abs().max() > 3


def test_features_are_found_a_part_at_a_time_as_all_at_once(x, monkeypatch):
    """Parts of 7 features; for batchtopk also where the moving border was far too high, so that more must
    be looked at."""
    for activation, threshold in (("relu", 0.0), ("batchtopk", 0.5), ("batchtopk", 100.0)):
        seen = []
        for rows in (2**21, 256 * 7):
            monkeypatch.setattr("sae_separation.sparse.ENTRIES_AT_ONCE", rows)
            sae = OrthogonalSAE(24, 96, seed=3, activation=activation, k=5)
            sae.threshold.fill_(threshold)
            f = sparse_features(sae, x, torch.float32, None, torch.arange(256) < 100)
            seen.append((f.col, f.row, f.value, sae.threshold.clone()))
        assert (
            torch.equal(seen[0][0], seen[1][0])
            and torch.equal(seen[0][1], seen[1][1])
            and len(seen[0][0]) >= 5 * 256
        )
        torch.testing.assert_close(seen[0][2:], seen[1][2:])
        assert torch.equal(seen[0][0], seen[0][0].sort().values), "in the order of features"


def test_gradients_accumulate_and_a_frozen_decoder_gets_none(sae, x):
    forget, l1 = torch.zeros(256, dtype=torch.bool), torch.tensor(0.0)
    accumulate_grads(sae, x, forget, l1, torch.float32)
    once = sae.W_enc_FD.grad.clone()
    accumulate_grads(sae, x, forget, l1, torch.float32)
    torch.testing.assert_close(sae.W_enc_FD.grad, 2 * once)
    sae.zero_grad()
    sae.W_dec.requires_grad_(False)
    accumulate_grads(sae, x, forget, l1, torch.float32)
    assert sae.W_dec.grad is None and sae.W_enc_FD.grad is not None


def test_counts_and_l0_are_those_of_the_features(sae, x):
    forget = torch.arange(256) < 100
    terms = accumulate_grads(sae, x, forget, torch.tensor(0.0), torch.float32)
    active = sae.encode(x) > 0
    assert torch.equal(terms.fired[0], active[:100].sum(0).float()), "forget"
    assert torch.equal(terms.fired[1], active[100:].sum(0).float()), "retain"
    assert terms.l0.item() == pytest.approx(active.sum(1).float().mean().item())


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (2, 3, 4, 24)])
def test_any_leading_shape_gives_the_same_rows(sae, shape):
    x = torch.randn(shape)
    flat = sae(x.reshape(-1, 24))
    torch.testing.assert_close(sae(x), flat.reshape(shape))
    assert sae.encode(x).shape == (*shape[:-1], 96)


def test_decoder_rows_are_normalised_along_d_in_and_the_radial_gradient_is_removed(sae, x):
    accumulate_grads(sae, x, torch.zeros(256, dtype=torch.bool), torch.tensor(0.0), torch.float32)
    remove_radial(sae.W_dec.grad, sae.W_dec)
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-7
    with torch.no_grad():
        sae.W_dec *= 3.0
    unit_rows(sae.W_dec)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(96))


def test_the_exported_file_gives_the_same_features_and_reconstruction_in_sae_lens(sae, x, tmp_path):
    export(
        sae,
        tmp_path,
        {"model_name": "m", "hook_name": "h", "hook_layer": 0, "context_size": 16, "prepend_bos": True},
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    loaded = load_exported(tmp_path)
    torch.testing.assert_close(loaded.encode(x) * sae.scale, sae.encode(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded(x), sae(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(96))


def test_statistics_follow_the_domains_and_are_saved_with_the_module(sae):
    fired = torch.zeros(2, 96)
    fired[0, 1], fired[1, 0], fired[:, 2] = 20, 50, torch.tensor([20.0, 50.0])
    for _ in range(2000):
        sae.update_statistics(fired, torch.tensor(20), 70)
    assert sae.rate[:, 0].tolist() == pytest.approx([0, 1], abs=1e-4), "forget, retain"
    assert sae.rate[:, 1].tolist() == pytest.approx([1, 0], abs=1e-4)
    assert sae.affinity[:4].tolist() == pytest.approx([-1, 1, 0, 0], abs=1e-4)
    assert sae.idle[0] == 0 and sae.idle[3] == 70 * 2000
    before = sae.rate[0].clone()
    sae.update_statistics(torch.zeros(2, 96), torch.tensor(0), 70)
    assert torch.equal(sae.rate[0], before), "a domain that is not in the batch keeps its rate"
    assert {"rate", "idle", "groups", "scale", "unlocked", "threshold", "temperature"} <= set(
        sae.state_dict()
    )


def test_the_domain_hinges_are_the_gradient_of_their_loss(sae, x):
    """Against autograd of leak and gap written out row by row, and values by hand."""
    forget, l1, alpha = torch.arange(256) < 100, torch.tensor(0.05), torch.tensor(0.7)
    firing_loss = 20, partial(losses.domain_hinges, margin=0.4, alpha=alpha, gap_weight=0.3)
    terms = accumulate_grads(sae, x, forget, l1, torch.float32, firing_loss)
    by_hand = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    fvu, sparsity = sae.loss_terms(x)
    pre = ((x * sae.scale - sae.b_dec) @ sae.W_enc + sae.b_enc)[:, :20]
    nothing = torch.zeros(())
    leak = sum(((pre[b] + 0.4).relu().sum() for b in range(256) if not forget[b]), start=nothing) / 256
    gap = sum(((0.4 - pre[b].max()).relu() for b in range(256) if forget[b]), start=nothing) / 256
    paid = (0.7 * leak + 0.3 * gap) / 24**0.5
    (fvu + l1 * sparsity + paid).backward()
    assert there(terms.firing).item() == pytest.approx(paid.item(), rel=1e-4)
    for name, p in sae.named_parameters():
        assert (by_hand[name] - p.grad).norm() <= 1e-4 * p.grad.norm(), name
    value, grad = losses.domain_hinges(
        torch.tensor([[-2.0, 0.5], [0.1, -1.0]]), torch.tensor([False, True]), 1.0, alpha, 0.3
    )
    assert value.item() == pytest.approx((0.7 * 1.5 + 0.3 * 0.9) / 2)
    assert grad.flatten().tolist() == pytest.approx([0.0, 0.35, -0.15, 0.0])


def test_sharing_by_hand(sae):
    sae.rate = torch.zeros(2, 96)
    sae.rate[:, :3] = torch.tensor([[0.3, 0.4, 0.2], [0.1, 0.0, 0.2]])  # forget, retain
    assert losses.sharing(sae.rate).item() == pytest.approx(2 * (0.1 + 0.0 + 0.2) / 1.2)
