"""Every optimised loss against a naive reference, value and gradient, and against values derived by hand."""

import math
from functools import partial

import pytest
import torch
from torch.nn.functional import normalize

from sae_separation.losses import (
    all_and_retain_rate,
    all_pairs_grad,
    chunks_of_rows,
    each_row,
    forget_overlap,
    forget_overlap_grad,
    form_groups,
    group_cross_entropy,
    grouped_grad,
    groups_and_pairs,
    omega_all_pairs,
    omega_between_domains,
    ortsae_grad,
    random_chunks,
    rows_and_gram,
    welch_floor,
)
from sae_separation.rounds import Rounds

torch.manual_seed(0)
N, D = 40, 12


@pytest.fixture
def W(device):
    rows = torch.randn(N, D, generator=torch.Generator().manual_seed(1)).double()
    return normalize(rows, dim=1).to(device).requires_grad_()


@pytest.fixture
def affinity(device):
    return (torch.rand(N, generator=torch.Generator().manual_seed(2)) * 2 - 1).double().to(device)


@pytest.fixture
def groups(W):
    return form_groups(W.detach(), 8)


def naive_all_pairs(W):
    pairs = [(W[i] @ W[j]) ** 2 for i in range(len(W)) for j in range(len(W)) if i != j]
    return W.shape[1] * sum(pairs) / len(pairs)


def naive_grouped(W, groups):
    pairs = [
        (W[i] @ W[j]) ** 2 for g in groups.tolist() for i in g for j in g if i != j and i >= 0 and j >= 0
    ]
    return W.shape[1] * sum(pairs) / len(pairs)


def naive_between_domains(W, a):
    total = weight = 0.0
    for i in range(len(W)):
        for j in range(len(W)):
            w = max(a[i], 0) * max(-a[j], 0)
            total, weight = total + w * (W[i] @ W[j]) ** 2, weight + w
    return W.shape[1] * total / weight


def naive_overlap(W, rate, n, free):
    """Over pairs of one of the first n rows and one of the others, weighted by the other's rate."""
    total = weight = 0.0
    for i in range(n):
        for j in range(n, len(W)):
            beyond = ((W[i] @ W[j]).abs() - math.sqrt(free / W.shape[1])).clamp(min=0)
            total, weight = total + rate[j] * beyond**2, weight + rate[j]
    return W.shape[1] * total / weight


def whole(loss, prepare, W, groups, steps=1):
    """Values of the steps of a round, how many rows each has, and the gradient put together from them."""
    rounds = Rounds(loss, prepare, steps)
    grad, values, sizes, rows_seen = torch.zeros_like(W), [], [], []
    for step in range(steps):
        if (visited := rounds.visit(W, groups, step)) is not None:
            grad[visited.rows] += visited.grad
            values.append(visited.value.item())
            rows_seen += visited.rows.tolist()
            sizes.append(len(visited.rows))
    assert sorted(rows_seen) == list(range(len(W))), "every row is visited once"
    return values, sizes, grad


def tangential(grad, W):
    return grad - (grad * W).sum(1, keepdim=True) * W


def chunks(size):
    """How ortsae prepares a round, with the same draw at each call."""

    def prepare(W, groups):
        return chunks_of_rows(W, groups, size, torch.Generator().manual_seed(9))

    return prepare


def grouped_value(W, groups):
    return grouped_grad(W, *groups_and_pairs(W, groups)).value.item()


def test_blocks_of_one_row_hold_every_feature_and_nothing_of_the_whole(W):
    blocks, nothing = each_row(W, torch.full((1, 1), -1))
    assert blocks.tolist() == [[i] for i in range(N)] and nothing.numel() == 0


@pytest.mark.parametrize("parts", [1, 3, 5, 16])
@pytest.mark.parametrize("name", ["all_pairs", "grouped"])
def test_a_loss_and_its_gradient_in_parts_equal_the_naive_double_loop(name, parts, W, groups):
    loss, prepare, naive = {
        "all_pairs": (all_pairs_grad, rows_and_gram, lambda: naive_all_pairs(W)),
        "grouped": (grouped_grad, groups_and_pairs, lambda: naive_grouped(W, groups)),
    }[name]
    values, sizes, grad = whole(loss, prepare, W.detach(), groups, parts)
    assert naive().item() > 0.05, "the comparison would be empty"
    torch.testing.assert_close(grad, tangential(torch.autograd.grad(naive(), W)[0], W.detach()))
    if parts == 1 or name == "all_pairs":
        assert values == [pytest.approx(naive().item(), rel=1e-9)] * parts
    else:  # each value is of its groups alone, here of eight features each
        assert (
            sum(v * n for v, n in zip(values, sizes)) / N == pytest.approx(naive().item(), rel=1e-9)
            and len(set(values)) > 1
        )


def test_the_loss_between_domains_and_its_gradient_equal_the_naive_double_loop(W, affinity):
    fast, naive = omega_between_domains(W, affinity), naive_between_domains(W, affinity)
    assert fast.item() == pytest.approx(naive.item(), rel=1e-9) and fast.item() > 0.05
    torch.testing.assert_close(torch.autograd.grad(fast, W)[0], torch.autograd.grad(naive, W)[0])


@pytest.mark.parametrize("free", [0.05, 0.5])
def test_the_loss_of_forget_rows_on_retain_text_equals_the_naive_double_loop(free, W, affinity):
    rate = torch.stack([affinity, affinity.square()])
    prepare, loss = (
        partial(all_and_retain_rate, rate=rate),
        partial(forget_overlap_grad, forget_features=7, target_overlap=free),
    )
    naive = naive_overlap(W, rate[1], 7, free)
    values, _, grad = whole(loss, prepare, W.detach(), torch.zeros(0))
    assert values == [pytest.approx(naive.item(), rel=1e-9)] and naive.item() > 0.05
    torch.testing.assert_close(grad, tangential(torch.autograd.grad(naive, W)[0], W.detach()))
    overlap = forget_overlap(W.detach(), rate[1], 7)
    assert overlap.item() == pytest.approx(naive_overlap(W, rate[1], 7, 0.0).item(), rel=1e-9)


def test_pairs_may_overlap_as_far_as_the_target_and_text_of_one_domain_costs_nothing():
    W = normalize(torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.0, 1.0]]), dim=1)
    for free, some in ((0.41, False), (0.39, True)):  # d_in cos² of the pair is 0.4
        blocks, rate = all_and_retain_rate(W, torch.zeros(0), torch.ones(2, 3))
        found = forget_overlap_grad(W, blocks, rate, 1, free)
        assert (found.value > 0) == some == bool(found.grad.any())
    none = forget_overlap_grad(W, blocks, torch.zeros(3), 1, 0.1)
    assert none.value == forget_overlap(W, torch.zeros(3), 1) == 0 and not none.grad.any()
    assert forget_overlap(W, torch.ones(3), 3) == 0, "no other features"


@pytest.mark.parametrize("n", [1, 6])
def test_the_cross_entropy_of_the_group_equals_autograd_of_the_naive_one(n):
    pre = torch.randn(50, n, generator=torch.Generator().manual_seed(3)).double().mul(3).requires_grad_()
    forget, total = torch.arange(50) % 3 == 0, torch.zeros(())
    for row, label in zip(pre, forget):
        p = 1 - (1 - row.sigmoid()).prod()
        total = total - (p.log() if label else (1 - p).log())
    value, grad = group_cross_entropy(pre.detach(), forget, torch.tensor(0.7))
    assert value.item() == pytest.approx(0.7 * total.item() / 50)
    torch.testing.assert_close(grad, torch.autograd.grad(0.7 * total / 50, pre)[0])
    if n == 1:
        bce = torch.nn.functional.binary_cross_entropy_with_logits(pre[:, 0], forget.double())
        assert value.item() == pytest.approx(0.7 * bce.item())
    far = torch.tensor([[-200.0] * n, [200.0] * n])
    for labels in (torch.tensor([True, False]), torch.tensor([False, True])):
        assert all(t.isfinite().all() for t in group_cross_entropy(far, labels, torch.tensor(1.0)))


@pytest.mark.parametrize("name", ["all_pairs", "grouped", "ortsae"])
def test_the_fast_dtype_gives_the_exact_loss_and_a_gradient_within_a_few_per_cent(name, monkeypatch):
    """In bfloat16, wherever the test runs: value and tangential gradient against float64, on rows that
    lean on each other and so have a gradient to speak of."""
    monkeypatch.setattr("sae_separation.losses.has_bf16", lambda device: True)
    lean = torch.randn(512, 64, generator=torch.Generator().manual_seed(3)) + torch.randn(
        64, generator=torch.Generator().manual_seed(4)
    )
    W = normalize(lean, dim=1)
    loss, prepare = {
        "all_pairs": (all_pairs_grad, rows_and_gram),
        "grouped": (grouped_grad, groups_and_pairs),
        "ortsae": (ortsae_grad, chunks(128)),
    }[name]
    groups = torch.arange(512).view(16, 32)
    (fast, _, fast_grad), (exact, _, exact_grad) = (
        whole(loss, prepare, rows, groups) for rows in (W, normalize(W.double(), dim=1))
    )
    assert fast == pytest.approx(exact, rel=5e-3)
    assert (fast_grad - exact_grad).norm() < 0.05 * exact_grad.norm()


def test_independent_random_rows_give_one_and_orthogonal_rows_give_zero():
    random = normalize(torch.randn(3000, 256), dim=1)
    assert omega_all_pairs(random).item() == pytest.approx(1.0, abs=0.01)
    in_a_row = grouped_value(random, torch.arange(3000).view(15, 200))
    assert grouped_value(random, form_groups(random, 256)) > in_a_row
    assert in_a_row == pytest.approx(1.0, abs=0.05)
    assert omega_between_domains(
        random, torch.where(torch.arange(3000) < 1000, 1.0, -1.0)
    ).item() == pytest.approx(1.0, abs=0.02)
    assert omega_all_pairs(torch.eye(64)).item() == pytest.approx(0.0, abs=1e-6)


def test_all_pairs_cannot_fall_under_the_welch_floor_and_a_tight_frame_reaches_it():
    # two orthonormal bases side by side: n = 2 d, each row has d - 1 zeros and d overlaps whose squares sum
    # to 1
    basis = torch.linalg.qr(torch.randn(32, 32, dtype=torch.double))[0]
    frame = torch.cat([torch.eye(32, dtype=torch.double), basis])
    assert omega_all_pairs(frame).item() == pytest.approx(32 / 63, rel=1e-9)
    assert welch_floor(64, 32) == pytest.approx(32 / 63)
    assert welch_floor(1024, 128) == pytest.approx(896 / 1023)
    assert welch_floor(16, 32) == 0.0 and welch_floor(1, 32) == 0.0


def test_a_single_domain_or_dead_features_give_zero_not_nan():
    W = normalize(torch.randn(10, 4), dim=1)
    for affinity in (torch.ones(10), torch.zeros(10)):
        assert omega_between_domains(W, affinity).item() == 0.0
    none = grouped_grad(W, *groups_and_pairs(W, torch.arange(10)[:, None]))
    assert none.value.item() == none.grad.abs().max().item() == 0.0, "groups of one have no pairs"


def naive_ortsae(W, chunk_size, generator):
    """The published formula in few lines: random chunks, largest signed cosine of each row, squared, mean
    over rows."""
    order, total = torch.randperm(len(W), generator=generator).tolist(), W.new_zeros(())
    for start in range(0, len(W), chunk_size):
        chunk = order[start : start + chunk_size]
        for i in chunk:
            if len(chunk) > 1:
                total = total + max(W[i] @ W[j] for j in chunk if j != i) ** 2
    return total / len(W)


@pytest.mark.parametrize("parts", [1, 5, 16])
@pytest.mark.parametrize("chunk_size", [8, 13, 39, 40, 64])
def test_ortsae_equals_the_published_formula(W, chunk_size, parts):
    naive = naive_ortsae(W, chunk_size, torch.Generator().manual_seed(9))
    values, sizes, grad = whole(ortsae_grad, chunks(chunk_size), W.detach(), torch.zeros(0), parts)
    assert naive.item() > 0.01
    torch.testing.assert_close(grad, tangential(torch.autograd.grad(naive, W)[0], W.detach()))
    assert sum(v * n for v, n in zip(values, sizes)) / N == pytest.approx(naive.item(), rel=1e-9)


def test_ortsae_leaves_antipodal_pairs_free():
    pair = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    chunk = random_chunks(4, 4, torch.Generator())
    assert ortsae_grad(pair, chunk, torch.zeros(0)).value.item() == 0.0
    assert ortsae_grad(pair.abs(), chunk, torch.zeros(0)).value.item() == 1.0


class TestGroups:
    def test_every_feature_is_in_exactly_one_group_and_sizes_differ_by_at_most_one(self):
        for n, size in ((1024, 64), (1000, 64), (7, 64), (65, 64), (1, 1), (129, 2)):
            groups = form_groups(torch.randn(n, 5), size)
            sizes = (groups >= 0).sum(1)
            assert sorted(groups[groups >= 0].tolist()) == list(range(n))
            assert sizes.max() - sizes.min() <= 1 and sizes.max() <= size
            assert len(groups) == math.ceil(n / size)

    def test_features_that_fire_alike_share_a_group(self):
        """Four kinds as far from each other as these have no principal direction but by noise: in 12 of 300
        draws it cuts through one."""
        kind = torch.arange(64) % 4
        profile = torch.eye(4)[kind] + 0.01 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        groups = form_groups(profile, 16)
        assert all(len(set(kind[g].tolist())) == 1 for g in groups)

    def test_the_result_is_a_function_of_the_profile(self):
        profile = torch.randn(300, 6)
        assert torch.equal(form_groups(profile, 32), form_groups(profile.clone(), 32))

    def test_dead_features_and_a_single_domain_are_grouped_too(self):
        groups = form_groups(torch.zeros(100, 4), 16)
        assert sorted(groups[groups >= 0].tolist()) == list(range(100))
