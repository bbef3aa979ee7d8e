"""One batch of training by hand: FVU, L1 and a loss on firing, and their gradients.

terms = accumulate_grads(sae, x, forget, l1, dtype)      # adds to .grad of W_dec, W_enc_FD, b_enc, b_dec
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sae_separation.sparse import (
    ACTIVATIONS,
    OF_BATCH,
    SPARSE_SHARE,
    SPARSE_SHARE_ON_GPU,
    DenseFeatures,
    Encoder,
    JumpFeatures,
    SparseFeatures,
    prefix_widths,
    sparse_features,
)


class TrainedSAE(Encoder, Protocol):
    """What is read of an SAE in training: its parameters, the share of the input that goes past the features,
    and how many features a row were active in the last batch."""

    W_dec: torch.nn.Parameter
    W_enc_FD: torch.nn.Parameter
    b_dec: torch.nn.Parameter
    skip: float
    active: Tensor

    @property
    def W_enc(self) -> Tensor: ...
    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
    def get_parameter(self, target: str) -> torch.nn.Parameter: ...


@dataclass
class Terms:
    """What one pass measured, on the device: 0-d tensors, how often each feature `fired` on forget and retain
    rows [2, F], and a `sketch` of which rows [F, K] (losses.firing_profile). F are the features here."""

    fvu: Tensor
    nested: Tensor | None  # matryoshka: mean FVU over the prefixes, which is what is trained
    l1: Tensor  # what lambda prices
    l0: Tensor
    fired: Tensor
    firing: Tensor | None
    sketch: Tensor | None


@torch.no_grad()
def accumulate_grads(
    sae: TrainedSAE,
    x: Tensor,
    forget: Tensor,
    l1: Tensor,
    dtype: torch.dtype,
    firing_loss: tuple[int, Callable] | None = None,
    gain_F: Tensor | None = None,
    weight: float = 1.0,
    signs_BK: Tensor | None = None,
    routed: int = 0,
) -> Terms:
    """Add `weight` times the gradients of FVU + (l1 · mean Σ f + firing_loss) / √d_in to .grad, by hand,
    and measure the terms.

    x [B, D] in the LM's units, forget [B] (bool), l1 a 0-d tensor; firing_loss, if given, is how many of the
    first features it is about, and what maps their pre-activations [B, G] and forget [B] to its value and its
    gradient by these; gain [F], if given, multiplies each feature (0: it takes no part); signs [B, K], if
    given, are summed for each feature over the rows that it fires on. With `routed` gradients are routed
    (arXiv 2410.04332, 2512.05648): the reconstruction of forget rows teaches the first so many features
    alone, and that of retain rows the others alone; what fires, what it reconstructs and its price are as
    ever.

    Matrix products run in `dtype` and accumulate in fp32, weights stay fp32; in bfloat16 a product's entries,
    counts of firing among them, are right to 0.4 %. Five products instead of autograd's six: x needs no
    gradient, and that of b_dec through the encoder is one matrix-vector product.
    """
    B, D = x.shape
    shard, n_here = sae.shard, len(sae.b_enc)
    u_BD, _, size = sae.normalise(x)
    variance = (x - x.mean(0)).pow(2).sum()
    u_BD = u_BD - sae.b_dec
    features = features_of(sae, u_BD, dtype, gain_F, forget)
    n_features = shard.total(n_here)
    widths = prefix_widths(n_features) if sae.activation == "matryoshka" else [n_features]
    edges = sorted({0, routed, *widths})
    parts = shard.sums(features.decode(sae.W_dec, shard.within(edges, n_here)))
    errors = prefix_errors(parts, edges, widths, u_BD, sae.skip)
    error_BD, per_row = errors[-1], 1 / (B * math.sqrt(D))
    d_errors = [error * (size**2 * (2 * weight / len(widths) / variance)) for error in errors]
    d_out_BD = sum(d_errors[1:], start=d_errors[0])
    d_outs = part_gradients(d_errors, edges, widths, forget, routed)
    d_W_dec, d_W_enc_FD, d_b_enc = features.gradients(d_outs, u_BD, sae.W_dec, l1 * per_row * weight)
    firing = None
    if firing_loss:
        n_group, loss = firing_loss
        mine = shard.columns(n_group, n_here)
        group = slice(0, mine.stop - mine.start)
        pre_BG = shard.first_columns(sae.pre_activations(u_BD, group), n_group, n_here)
        firing, d_firing = loss(pre_BG, forget)
        d_firing = d_firing[:, mine].mul_(weight / math.sqrt(D))
        d_W_enc_FD[group] += d_firing.T @ u_BD
        d_b_enc[group] += d_firing.sum(0)
    fired_2F, total = features.counts()
    through_encoder, total, n_fired = shard.sums([sae.W_enc @ d_b_enc, total, fired_2F.sum()])
    d_b_dec = (1 - sae.skip) * d_out_BD.sum(0) - through_encoder
    grads = {"W_dec": d_W_dec, "W_enc_FD": d_W_enc_FD, "b_enc": d_b_enc, "b_dec": d_b_dec}
    if isinstance(features, JumpFeatures):
        grads["log_threshold"] = features.d_log_threshold
    for name, grad in grads.items():
        parameter = sae.get_parameter(name)
        if parameter.requires_grad:
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
    sae.active.copy_(n_fired / B)
    return Terms(
        fvu=(error_BD * size).pow(2).sum() / variance,
        nested=None if len(widths) == 1 else mean_square(errors, size) / variance,
        l1=total * per_row,
        l0=sae.active.clone(),
        fired=fired_2F,
        firing=None if firing is None else firing / math.sqrt(D),
        sketch=None if signs_BK is None else features.sketch(signs_BK),
    )


def prefix_errors(
    parts: list[Tensor], edges: list[int], widths: list[int], u_BD: Tensor, skip: float
) -> list[Tensor]:
    """x_hat - x in units of u, of the first features alone, for each of `widths`; parts: what the features
    between two edges decode to [B, D]."""
    errors, so_far = [], parts[0]
    for part, end in zip([None, *parts[1:]], edges[1:]):
        so_far = so_far if part is None else so_far + part
        if end in widths:
            last = end == widths[-1]
            errors.append((so_far if last else so_far.clone()).sub_(u_BD, alpha=1 - skip))
    return errors


def part_gradients(
    d_errors: list[Tensor], edges: list[int], widths: list[int], forget: Tensor, routed: int
) -> list[Tensor]:
    """What the features between two edges learn from [B, D]: the gradients of the errors of all prefixes that
    hold them; with `routed` on the rows of their domain."""
    d_outs = []
    for end in edges[1:]:
        held_in = [d_error for d_error, width in zip(d_errors, widths) if width >= end]
        d_out = sum(held_in[1:], start=held_in[0])
        if routed:
            d_out = d_out * (forget if end <= routed else ~forget)[:, None]
        d_outs.append(d_out)
    return d_outs


def mean_square(errors: list[Tensor], size: Tensor) -> Tensor:
    """Mean over prefixes of ||error||² in the LM's units, summed over rows."""
    return torch.stack([(error * size).pow(2).sum() for error in errors]).mean()


def few_active(sae: TrainedSAE, u_BD: Tensor, dtype: torch.dtype) -> bool | Tensor:
    """Whether so few features are active that SparseFeatures are faster; a GPU is not asked."""
    n_features = sae.shard.total(len(sae.b_enc))
    if u_BD.device.type == "cpu":
        return sae.active < SPARSE_SHARE[dtype] * n_features
    return sae.activation in OF_BATCH and sae.k < SPARSE_SHARE_ON_GPU * n_features


def features_of(
    sae: TrainedSAE, u_BD: Tensor, dtype: torch.dtype, gain_F: Tensor | None, forget: Tensor
) -> SparseFeatures | DenseFeatures:
    """SparseFeatures where few are active and it is not compiled: on a CPU as in the last batch, on a GPU of
    batchtopk and by k. Else DenseFeatures, as those of jumprelu always are."""
    if sae.activation == "jumprelu":
        return JumpFeatures(sae.pre_activations(u_BD.to(dtype)), sae, gain_F, forget)
    if not torch.compiler.is_compiling() and few_active(sae, u_BD, dtype):
        return sparse_features(sae, u_BD, dtype, gain_F, forget)
    f_BF, slope_BF = ACTIVATIONS[sae.activation](sae.pre_activations(u_BD.to(dtype)), sae)
    return DenseFeatures(f_BF, slope_BF, gain_F, forget)
