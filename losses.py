"""Losses that make directions or firing apart, and the groups they act on. DIMENSIONS in names: B batch rows, D d_in, F d_sae, G groups.

Orthogonal rows give 0. Plain squared cosines are scaled by d_in, so that independent random unit rows give 1.
"""

import math

import torch
from torch import Tensor


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 matmuls are fast here: a GPU that supports them, or a CPU with the instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def welch_floor(n: int, d_in: int) -> float:
    """The least Ω over all pairs of n unit rows in d_in dimensions: (n - d_in) / (n - 1) (Welch, 1974)."""
    return max(0.0, (n - d_in) / (n - 1)) if n > 1 else 0.0


def omega_all_pairs(W_dec: Tensor) -> Tensor:
    """d_in · mean of (w_i · w_j)² over all pairs i ≠ j, linear in d_sae: Σ_ij (w_i · w_j)² = ||W_decᵀ W_dec||²."""
    n, d_in = W_dec.shape
    own = W_dec.pow(2).sum(1).pow(2).sum()
    return d_in * (SquaredGram.apply(W_dec) - own) / max(n * (n - 1), 1)


def fast_dtype(W: Tensor) -> torch.dtype:
    """What products of W run in: bfloat16 for fp32 where that is fast."""
    return torch.bfloat16 if W.dtype == torch.float32 and has_bf16(W.device) else W.dtype


class SquaredGram(torch.autograd.Function):
    """||Wᵀ W||² of W [F, D] and its gradient 4 W (Wᵀ W), in two products instead of autograd's three.

    Nearly all of Wᵀ W is its mean diagonal m, whose part 4 m W of the gradient lies along the rows, where unit norm undoes it;
    it is added in full precision, so that the rounding of bfloat16 is that of what remains.
    """

    @staticmethod
    def forward(ctx, W: Tensor) -> Tensor:
        low = W.to(fast_dtype(W))
        gram = (low.T @ low).to(W)
        mean = gram.diagonal().mean()
        rest = gram.clone()
        rest.diagonal().sub_(mean)
        ctx.save_for_backward(W, low, rest, mean)
        return gram.pow(2).sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        W, low, rest, mean = ctx.saved_tensors
        return (low @ (4 * grad * rest).to(low)).to(W).addcmul_(W, 4 * grad * mean)


def rows_of(W_dec: Tensor, groups: Tensor) -> Tensor:
    """Rows [G, size, D] of each group; some row or other where a group is short."""
    return W_dec.index_select(0, groups.clamp(min=0).flatten()).view(*groups.shape, -1)


def group_cosines(W_dec: Tensor, groups: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines [G, size, size] of the rows of each group, as products in `dtype`, and which entries are pairs i ≠ j of features (bool)."""
    rows, present = rows_of(W_dec, groups).to(dtype), groups >= 0
    pairs = present[:, :, None] & present[:, None, :] & ~torch.eye(groups.shape[1], dtype=torch.bool, device=groups.device)
    return rows @ rows.transpose(1, 2), pairs


def omega_grouped(W_dec: Tensor, groups: Tensor) -> Tensor:
    """d_in · mean of cos² over the pairs inside a group; groups [G, size] of feature indices, -1 where a group is short."""
    sizes = (groups >= 0).sum(1)
    return W_dec.shape[1] * SquaredCosines.apply(W_dec, groups) / (sizes * (sizes - 1)).sum().clamp(min=1)


class SquaredCosines(torch.autograd.Function):
    """Σ cos²_ij over the pairs i ≠ j inside each of disjoint groups [G, size] (-1: none), and its gradient 4 Σ_j cos_ij w_j.

    A few groups at a time (1 MB of rows), so that W goes through memory once each way.
    """

    @staticmethod
    def forward(ctx, W: Tensor, groups: Tensor) -> Tensor:
        ctx.per_pass = max(1, 2**18 // (groups.shape[1] * W.shape[1])) if W.device.type == "cpu" else len(groups)
        cosines = [cos * pairs for cos, pairs in (group_cosines(W, part, fast_dtype(W)) for part in groups.split(ctx.per_pass))]
        ctx.save_for_backward(W, groups, *cosines)
        return torch.stack([cos.to(W).pow(2).sum() for cos in cosines]).sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        W, groups, *cosines = ctx.saved_tensors
        out = torch.zeros_like(W)
        for part, cos in zip(groups.split(ctx.per_pass), cosines):
            d_rows = (4 * grad * cos).to(cos) @ rows_of(W, part).to(cos)
            present = part >= 0
            out[part[present]] = d_rows[present].to(W)
        return out, None


def omega_between_domains(W_dec: Tensor, affinity: Tensor) -> Tensor:
    """d_in · mean of cos² between forget-leaning and retain-leaning features, weighted by |affinity|; linear in d_sae.

    Σ_ij u_i v_j cos²_ij = <Σ_i u_i w_i w_iᵀ, Σ_j v_j w_j w_jᵀ> with u = a₊ and v = (-a)₊.
    """
    forget, retain = affinity.clamp(min=0), (-affinity).clamp(min=0)
    M_forget, M_retain = W_dec.T @ (W_dec * forget[:, None]), W_dec.T @ (W_dec * retain[:, None])
    return W_dec.shape[1] * (M_forget * M_retain).sum() / (forget.sum() * retain.sum()).clamp(min=1e-12)


def form_groups(profile: Tensor, group_size: int) -> Tensor:
    """Balanced groups of features whose profiles are alike: groups [G, size] of indices, short groups end in -1.

    profile [F, r] says how each feature fires. Recursive bisection at the median of the principal direction: G =
    ceil(F / group_size) groups whose sizes differ by at most 1, in O(F r² log G), no F x F matrix; ties (dead features)
    keep their order, so the result is a function of the profile alone.
    """
    n = len(profile)
    n_groups = math.ceil(n / group_size)
    sizes = [n // n_groups + (g < n % n_groups) for g in range(n_groups)]
    out = torch.full((n_groups, sizes[0]), -1)

    def split(members: Tensor, first: int, last: int):
        if last - first == 1:
            out[first, : len(members)] = members
            return
        centred = profile[members] - profile[members].mean(0)
        direction = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
        direction = direction * torch.sign(direction[direction.abs().argmax()])
        order = members[torch.argsort(centred @ direction, stable=True)]
        middle = (first + last) // 2
        at = sum(sizes[first:middle])
        split(order[:at], first, middle)
        split(order[at:], middle, last)

    profile = profile.double().cpu()
    split(torch.arange(n), 0, n_groups)
    return out


def firing_profile(f_BF: Tensor, affinity: Tensor, generator: torch.Generator, width: int = 16) -> Tensor:
    """How each feature fires, [F, width + 1]: random projections of its firing pattern over the batch, unit rows, and its
    domain affinity. Features that fire on the same rows have like projections (Johnson & Lindenstrauss, 1984)."""
    signs = torch.randint(0, 2, (len(f_BF), width), generator=generator).to(f_BF) * 2 - 1
    sketch = torch.nn.functional.normalize((f_BF > 0).to(f_BF).T @ signs, dim=1)
    return torch.cat([sketch, affinity[:, None].to(sketch)], dim=1)


def omega_ortsae(W_dec: Tensor, chunk_size: int, generator: torch.Generator) -> Tensor:
    """OrtSAE (arXiv 2509.22033): rows in random chunks, mean over rows of (max_{j ≠ i in the chunk} cos_ij)².

    The maximum is signed, as published: antipodal pairs are free. A row alone in its chunk counts 0. Not scaled by d_in.
    """
    order = torch.randperm(len(W_dec), generator=generator).to(W_dec.device)
    chunks = torch.nn.functional.pad(order, (0, -len(order) % chunk_size), value=-1).view(-1, chunk_size)
    with torch.no_grad():  # the gradient passes through the nearest alone; bfloat16 would often take another for it
        cosines, pairs = group_cosines(W_dec, chunks, W_dec.dtype)
        nearest = chunks.gather(1, cosines.masked_fill_(~pairs, -torch.inf).argmax(2))
        paired = pairs.any(2)
        nearest = torch.arange(len(W_dec), device=W_dec.device).index_copy_(0, chunks[paired], nearest[paired])
    largest = (W_dec * torch.nn.functional.embedding(nearest, W_dec)).sum(1)
    return largest[chunks[paired]].pow(2).sum() / len(W_dec)


def domain_hinges(pre_BF: Tensor, forget: Tensor, n: int, margin: float, alpha: Tensor, gap_weight: float) -> tuple[Tensor, slice, Tensor]:
    """Keeps the firing of the forget group, the first n features, off retain text and on forget text: alpha · leak + gap_weight · gap,

    leak = mean over rows of Σ_i (pre_i + margin)₊ on retain rows, where none of the group may fire,
    gap  = mean over rows of (margin - max_i pre_i)₊ on forget rows, where one of them is to fire.

    pre [B, F], forget [B] (bool). Returns the value, the group as a slice of features, and the gradient by their pre [B, n].
    """
    group = slice(0, n)
    pre = pre_BF[:, group].float()
    near = (pre > -margin) & ~forget[:, None]
    largest, at = pre.max(1)
    missed = forget & (largest < margin)
    value = alpha * ((pre + margin) * near).sum() + gap_weight * ((margin - largest) * missed).sum()
    grad = (alpha * near).scatter_add_(1, at[:, None], -gap_weight * missed[:, None].to(pre))
    return value / len(pre), group, (grad / len(pre)).to(pre_BF)


def sharing(rate: Tensor) -> Tensor:
    """Share of firing that the domains have in common, 2 Σ min(p_forget, p_retain) / Σ (p_forget + p_retain), from rate [2, F]."""
    return 2 * rate.amin(0).sum() / rate.sum().clamp(min=1e-12)
