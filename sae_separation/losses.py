"""Losses on decoder directions and on firing, and feature groups, as functions of tensors.

A loss on W_dec is given the unit rows W_dec [F, D], `blocks` [n, size] of the features to look at together
(-1: none) and `whole`, a tensor about all rows; it returns a DecoderGrad for the features of these blocks.
Before it comes its `prepare(W_dec, groups)`: all blocks of the dictionary, each feature in one of them, and
`whole`. Groups and blocks are indices that the host decides: they lie on the CPU, whatever W_dec lies on.

Where the features are split over ranks (`shard`), W_dec holds those of this rank, as do the rows of a
DecoderGrad; blocks and `whole` are about all of them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_separation.devices import upload
from sae_separation.shards import WHOLE, Shard


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 matmuls are fast here: a GPU that supports them, or a CPU with the instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def welch_floor(n: int, d_in: int) -> float:
    """The least Ω over all pairs of n unit rows in d_in dimensions: (n - d_in) / (n - 1) (Welch, 1974)."""
    return max(0.0, (n - d_in) / (n - 1)) if n > 1 else 0.0


def fast_dtype(W: Tensor) -> torch.dtype:
    """What products of W run in: bfloat16 for fp32 where that is fast."""
    return torch.bfloat16 if W.dtype == torch.float32 and has_bf16(W.device) else W.dtype


def gram(W_dec: Tensor) -> Tensor:
    """W_decᵀ W_dec [D, D]; the quarter under the diagonal is copied, as it is symmetric."""
    low, half = W_dec.to(fast_dtype(W_dec)), W_dec.shape[1] // 2
    out = W_dec.new_empty(W_dec.shape[1], W_dec.shape[1])
    out[:half] = low[:, :half].T @ low
    out[half:, half:] = low[:, half:].T @ low[:, half:]
    out[half:, :half] = out[:half, half:].T
    return out


def omega_all_pairs(W_dec: Tensor, gram_DD: Tensor | None = None) -> Tensor:
    """d_in · mean of (w_i · w_j)² over all pairs i ≠ j of n unit rows, linear in d_sae: Σ_ij (w_i · w_j)² =
    ||W_decᵀ W_dec||²."""
    return omega_of_gram(gram(W_dec) if gram_DD is None else gram_DD, len(W_dec))


def omega_of_gram(gram_DD: Tensor, n: int) -> Tensor:
    """omega_all_pairs of n unit rows, from their Gram matrix."""
    return len(gram_DD) * (gram_DD.pow(2).sum() - n) / max(n * (n - 1), 1)


@dataclass
class DecoderGrad:
    """Of a loss on W_dec: its `value` as far as some features tell, the places `rows` [R] in W_dec of those
    of them that are here, and the gradient of the whole loss by these rows [R, D]."""

    value: Tensor
    rows: Tensor
    grad: Tensor


def tangential(grad: Tensor, rows: Tensor) -> Tensor:
    """The gradient [..., D], in place, less its component along each of the unit rows [..., D]."""
    return grad.addcmul_(rows, (grad * rows).sum(-1, keepdim=True), value=-1)


def each_row(W_dec: Tensor, groups: Tensor, shard: Shard = WHOLE) -> tuple[Tensor, Tensor]:
    """Every feature in a block of its own [F, 1], and nothing about the whole."""
    return torch.arange(shard.total(len(W_dec)))[:, None], W_dec.new_zeros(0)


def rows_and_gram(W_dec: Tensor, groups: Tensor, shard: Shard = WHOLE) -> tuple[Tensor, Tensor]:
    """Every feature in a block of its own [F, 1], and the Gram matrix [D, D]."""
    return each_row(W_dec, groups, shard)[0], shard.sum(gram(W_dec))


def all_pairs_grad(W_dec: Tensor, blocks: Tensor, gram_DD: Tensor, shard: Shard = WHOLE) -> DecoderGrad:
    """Of omega_all_pairs: 4 d_in w_i (W_decᵀ W_dec) / (n (n - 1)). Nearly all of the Gram matrix is its mean
    diagonal m, and m w_i lies along the row: it is left out, so that the rounding of bfloat16 is that of what
    remains."""
    n, d_in, rest = shard.total(len(W_dec)), W_dec.shape[1], gram_DD.clone()
    rest.diagonal().sub_(gram_DD.diagonal().mean())
    rows = upload(shard.here(blocks.flatten(), len(W_dec))[1], W_dec.device)
    low = W_dec.index_select(0, rows).to(fast_dtype(W_dec))
    grad = low @ (4 * d_in / max(n * (n - 1), 1) * rest).to(low)
    return DecoderGrad(omega_of_gram(gram_DD, n), rows, grad.to(W_dec))


def group_cosines(
    W_dec: Tensor, groups: Tensor, dtype: torch.dtype, no_pair: float, shard: Shard
) -> tuple[Tensor, Tensor, Tensor]:
    """Of groups [G, size] of feature indices (-1: none): their rows [G, size, D] in `dtype`, the cosines of
    these [G, size, size], `no_pair` where they are not of two features, and which places hold a feature [G,
    size] (bool, on the CPU)."""
    present = groups >= 0
    places = upload(groups.clamp(min=0).flatten(), W_dec.device)
    rows = shard.rows(W_dec, places).view(*groups.shape, -1).to(dtype)
    cosines = rows @ rows.transpose(1, 2)
    cosines.diagonal(dim1=1, dim2=2).fill_(no_pair)
    if not present.all():
        pairs = present[:, :, None] & present[:, None, :]
        cosines.masked_fill_(upload(~pairs, cosines.device), no_pair)
    return rows, cosines, present


def of_features(
    value: Tensor, groups: Tensor, present: Tensor, grad: Tensor, n: int, shard: Shard
) -> DecoderGrad:
    """The gradients of the places in groups [G, size] that hold one of the n features that are here."""
    grad = grad.view(-1, grad.shape[-1])
    if present.all() and shard.size == 1:
        return DecoderGrad(value, upload(groups.flatten(), grad.device), grad)
    mine, rows = shard.here(groups[present], n)
    places = upload(present.flatten().nonzero()[:, 0][mine], grad.device)
    return DecoderGrad(value, upload(rows, grad.device), grad.index_select(0, places))


def groups_and_pairs(W_dec: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The groups [G, size], and how many pairs are inside one, over all of them."""
    sizes = (groups >= 0).sum(1)
    return groups.clone(), (sizes * (sizes - 1)).sum().clamp(min=1)


def grouped_grad(W_dec: Tensor, groups: Tensor, n_pairs: Tensor, shard: Shard = WHOLE) -> DecoderGrad:
    """Of d_in · mean of cos² over the pairs inside a group: 4 d_in Σ_j cos_ij w_j / pairs; groups [G, size],
    -1 where one is short."""
    rows, cosines, present = group_cosines(W_dec, groups, fast_dtype(W_dec), 0.0, shard)
    cosines, d_in, sizes = cosines.to(W_dec), W_dec.shape[1], present.sum(1)
    grad = ((4 * d_in / n_pairs * cosines).to(rows) @ rows).to(W_dec)
    n_here = (sizes * (sizes - 1)).sum().clamp(min=1)
    return of_features(d_in * cosines.pow(2).sum() / n_here, groups, present, grad, len(W_dec), shard)


def random_chunks(n: int, size: int, generator: torch.Generator) -> Tensor:
    """n features in random chunks [chunks, size]; the last ends in -1 where n is no multiple of the size."""
    order = torch.randperm(n, generator=generator)
    return torch.nn.functional.pad(order, (0, -n % size), value=-1).view(-1, size)


def chunks_of_rows(
    W_dec: Tensor, groups: Tensor, chunk_size: int, generator: torch.Generator, shard: Shard = WHOLE
) -> tuple[Tensor, Tensor]:
    """`random_chunks` of all features, and nothing about the whole."""
    return random_chunks(shard.total(len(W_dec)), chunk_size, generator), W_dec.new_zeros(0)


def ortsae_grad(W_dec: Tensor, chunks: Tensor, whole: Tensor, shard: Shard = WHOLE) -> DecoderGrad:
    """Of OrtSAE's loss (arXiv 2509.22033), mean over rows of (max_{j ≠ i in the chunk} cos_ij)²: 2 max / n
    times the nearest row for each row, and times each row for its nearest.

    The maximum is signed, as published: antipodal pairs are free. A row alone in its chunk counts 0. Not
    scaled by d_in. In full precision: bfloat16 would often take another row for the nearest.
    """
    rows, cosines, present = group_cosines(W_dec, chunks, W_dec.dtype, -torch.inf, shard)
    largest, nearest = cosines.max(2)
    largest = largest.masked_fill(largest.isneginf(), 0.0)
    first = torch.arange(0, nearest.numel(), nearest.shape[1], device=nearest.device)
    nearest = (nearest + first[:, None]).flatten()
    rows, weight = rows.flatten(0, 1), 2 / shard.total(len(W_dec)) * largest.flatten()[:, None]
    grad = (rows.index_select(0, nearest) * weight).index_add_(0, nearest, rows * weight)
    value = largest.pow(2).sum() / present.sum()
    return of_features(value, chunks, present, grad, len(W_dec), shard)


def omega_between_domains(W_dec: Tensor, affinity: Tensor, shard: Shard = WHOLE) -> Tensor:
    """d_in · mean of cos² between forget-leaning and retain-leaning features, weighted by |affinity|; linear
    in d_sae.

    Σ_ij u_i v_j cos²_ij = <Σ_i u_i w_i w_iᵀ, Σ_j v_j w_j w_jᵀ> with u = a₊ and v = (-a)₊.
    """
    forget, retain = affinity.clamp(min=0), (-affinity).clamp(min=0)
    M_forget, M_retain = W_dec.T @ (W_dec * forget[:, None]), W_dec.T @ (W_dec * retain[:, None])
    summed = shard.sums([M_forget, M_retain, forget.sum(), retain.sum()])
    M_forget, M_retain, n_forget, n_retain = summed
    return W_dec.shape[1] * (M_forget * M_retain).sum() / (n_forget * n_retain).clamp(min=1e-12)


def group_and_others(W_dec: Tensor, n: int, shard: Shard) -> tuple[Tensor, Tensor, slice]:
    """Rows of W_dec: those of the first n features, wherever they are [n, D]; those of the other features
    that are here; and which of the first n are here."""
    group = shard.rows(W_dec, torch.arange(n, device=W_dec.device))
    mine = shard.columns(n, len(W_dec))
    return group, W_dec[mine.stop - mine.start :], mine


def forget_overlap(W_dec: Tensor, rate_F: Tensor, n: int, shard: Shard = WHOLE) -> Tensor:
    """How far the first n rows lie along what carries retain text: d_in · mean of cos² over the pairs of one
    of them and one of the others, weighted by the other's firing rate on retain text. 1 for independent
    rows. W_dec and rate_F are of the features that are here."""
    group, others, _ = group_and_others(W_dec, n, shard)
    weight = rate_F[len(rate_F) - len(others) :]
    overlap, weight = shard.sums([((group @ others.T).pow(2) @ weight).sum(), weight.sum()])
    return W_dec.shape[1] * overlap / (n * weight).clamp(min=1e-12)


def all_and_retain_rate(
    W_dec: Tensor, groups: Tensor, rate: Tensor, shard: Shard = WHOLE
) -> tuple[Tensor, Tensor]:
    """All features in one block [1, F], and how often each fires on retain text [F], from rate [2, F] of
    those here."""
    return torch.arange(shard.total(len(W_dec)))[None], shard.gather(rate[1]).clone()


def forget_overlap_grad(
    W_dec: Tensor,
    blocks: Tensor,
    rate_F: Tensor,
    forget_features: int,
    target_overlap: float,
    shard: Shard = WHOLE,
) -> DecoderGrad:
    """Of forget_overlap with controlled sharing: d_in · weighted mean of (|cos| - τ)₊², τ² = target_overlap /
    d_in. A pair may overlap as far as the target, and only what is beyond costs."""
    n, d_in = forget_features, W_dec.shape[1]
    group, others, mine = group_and_others(W_dec, n, shard)
    whole = (n * rate_F[n:].sum()).clamp(min=1e-12)
    weight = shard.own(rate_F)[len(W_dec) - len(others) :]
    beyond = torch.nn.functional.softshrink(group @ others.T, math.sqrt(target_overlap / d_in))
    slope = 2 * d_in / whole * beyond * weight
    of_group, value = shard.sums([slope @ others, (beyond.pow(2) @ weight).sum()])
    grad = torch.cat([of_group[mine], slope.T @ group])
    rows = upload(shard.here(blocks.flatten(), len(W_dec))[1], W_dec.device)
    return DecoderGrad(d_in * value / whole, rows, grad)


def form_groups(profile: Tensor, group_size: int) -> Tensor:
    """Balanced groups of features whose profiles are alike: groups [G, size] of indices, short groups end in
    -1.

    profile [F, r] says how each feature fires. Recursive bisection at the median of the principal direction:
    G = ceil(F / group_size) groups whose sizes differ by at most 1, in O(F r² log G), no F x F matrix; ties
    (dead features) keep their order, so the result is a function of the profile alone.
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


def random_signs(n_rows: int, width: int, generator: torch.Generator) -> Tensor:
    """n_rows x width of +1 and -1."""
    return torch.randint(0, 2, (n_rows, width), generator=generator).float() * 2 - 1


def firing_profile(sketch: Tensor, affinity: Tensor) -> Tensor:
    """How each feature fires, [F, width + 1], from the sum of random signs over the rows of a batch that it
    fires on [F, width] and its domain affinity [F]: unit rows, then the affinity. Features that fire on the
    same rows have like sums (Johnson & Lindenstrauss, 1984)."""
    return torch.cat([torch.nn.functional.normalize(sketch, dim=1), affinity[:, None].to(sketch)], dim=1)


def domain_hinges(
    pre_BG: Tensor, forget: Tensor, margin: float, alpha: Tensor, gap_weight: float
) -> tuple[Tensor, Tensor]:
    """Keeps the forget group's firing off retain text and on forget text: alpha · leak + gap_weight · gap,

    leak = mean over rows of Σ_i (pre_i + margin)₊ on retain rows, where none of the group may fire,
    gap  = mean over rows of (margin - max_i pre_i)₊ on forget rows, where one of them is to fire.

    pre [B, G] of the group's features, forget [B] (bool). Returns the value and the gradient by pre [B, G].
    """
    near = (pre_BG > -margin) & ~forget[:, None]
    largest, at = pre_BG.max(1)
    missed = forget & (largest < margin)
    value = alpha * ((pre_BG + margin) * near).sum() + gap_weight * ((margin - largest) * missed).sum()
    grad = (alpha * near).scatter_add_(1, at[:, None], -gap_weight * missed[:, None].to(pre_BG))
    return value / len(pre_BG), grad / len(pre_BG)


def group_cross_entropy(pre_BG: Tensor, forget: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Trains the forget group to tell the domain: alpha times the mean over rows of the cross-entropy of the
    labels and p = 1 - Π_i (1 - σ(pre_i)), the chance that any of the group fires where each one does with
    chance σ(pre_i).

    For a group of one this is the loss of G-SAE (arXiv 2506.19382), where a concept has one feature. pre [B,
    G], forget [B] (bool). Returns the value and the gradient by pre [B, G].
    """
    none = torch.nn.functional.softplus(pre_BG).sum(1).clamp(min=1e-12)  # -log Π (1 - σ)
    value = torch.where(forget, -torch.log(-torch.expm1(-none)), none).sum()
    weight = torch.where(forget, -1 / torch.expm1(none), 1.0)
    scale = alpha / len(pre_BG)
    return scale * value, scale * weight[:, None] * torch.sigmoid(pre_BG)


def sharing(rate: Tensor) -> Tensor:
    """Share of firing that the domains have in common, 2 Σ min(p_forget, p_retain) / Σ (p_forget + p_retain),
    from rate [2, F] of forget and retain."""
    return 2 * rate.amin(0).sum() / rate.sum().clamp(min=1e-12)
