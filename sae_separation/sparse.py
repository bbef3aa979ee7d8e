"""The features of a batch in training, dense or sparse: products with the decoder, gradients by hand."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from sae_separation.devices import upload
from sae_separation.losses import tangential
from sae_separation.shards import Shard


class Encoder(Protocol):
    """What activation functions read of an SAE: b_enc [F], the name of its activation, k active features a
    row, the 0-d buffers threshold (batchtopk, matryoshka) and temperature (softk), of jumprelu its
    thresholds [F] and its bandwidth, and which share of the features it holds."""

    @property
    def activation(self) -> str: ...
    @property
    def k(self) -> int: ...
    @property
    def b_enc(self) -> Tensor: ...
    @property
    def threshold(self) -> Tensor: ...
    @property
    def thresholds(self) -> Tensor: ...
    @property
    def bandwidth(self) -> float: ...
    @property
    def temperature(self) -> Tensor: ...
    @property
    def shard(self) -> Shard: ...
    def pre_activations(self, u: Tensor, some: slice = ..., out_FB: Tensor | None = None) -> Tensor: ...


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """The tensors one behind the other; of one no copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class DenseFeatures:
    """The features f [B, F] of a batch, and the products that training needs of them: in f's dtype, sums in
    fp32.

    slope [B, F] (None: 1) is the activation function's, gain [F] (None: 1) multiplies each feature, forget
    [B] labels rows.
    """

    def __init__(self, f_BF: Tensor, slope_BF: Tensor | None, gain_F: Tensor | None, forget: Tensor):
        self.f = f_BF if gain_F is None else f_BF.mul_(gain_F.to(f_BF))
        self.factors = [factor for factor in (slope_BF, gain_F) if factor is not None]
        self.domain_2B = torch.stack([forget, ~forget]).to(f_BF)

    def decode(self, W_dec: Tensor, edges: Sequence[int]) -> list[Tensor]:
        """f W_dec [B, D] of the features of each part: those between two edges."""
        self.W_dec, self.parts = W_dec.to(self.f), [slice(*ends) for ends in pairwise(edges)]
        return [(self.f[:, part] @ self.W_dec[part]).float() for part in self.parts]

    def gradients(
        self, d_outs: list[Tensor], u_BD: Tensor, W_dec: Tensor, d_l1: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of W_dec [F, D], W_encᵀ [F, D] and b_enc [F], from those of the parts' f W_dec and d_l1
        for each active feature."""
        d_outs, u = [d_out.to(self.f) for d_out in d_outs], u_BD.to(self.f)
        d_pre = joined(
            [
                torch.addmm(d_l1.to(self.f).expand(part.stop - part.start), d_out, self.W_dec[part].T)
                for part, d_out in zip(self.parts, d_outs)
            ],
            1,
        )
        d_pre = torch.ops.aten.threshold_backward(d_pre, self.f, 0)
        for factor in self.factors:
            d_pre *= factor
        d_b_enc = (
            (self.domain_2B @ d_pre).float().sum(0)
        )  # a product, not .sum(0): that would first copy all of it to fp32
        d_W_dec = joined([self.f[:, part].T @ d_out for part, d_out in zip(self.parts, d_outs)], 0)
        return d_W_dec.float(), (d_pre.T @ u).float(), d_b_enc

    def counts(self) -> tuple[Tensor, Tensor]:
        """How often each feature fired on forget and retain rows [2, F], and Σ f."""
        return (self.domain_2B @ self.f.sign()).float(), (self.domain_2B @ self.f).float().sum()

    def sketch(self, signs_BK: Tensor) -> Tensor:
        """Σ of signs over the rows that each feature fires on [F, K]."""
        return (self.f.sign().T @ signs_BK.to(self.f)).float()


class JumpFeatures(DenseFeatures):
    """The features of JumpReLU, and the gradient of their thresholds through the straight-through estimator
    of arXiv 2407.14435: a rectangle of width `bandwidth` around a threshold. The price is of L0, and teaches
    thresholds alone."""

    def __init__(self, pre_BF: Tensor, sae: Encoder, gain_F: Tensor | None, forget: Tensor):
        self.threshold, self.width = sae.thresholds.detach().to(pre_BF), sae.bandwidth
        self.near = ((pre_BF - self.threshold).abs() < self.width / 2).to(pre_BF)
        super().__init__(jump_relu(pre_BF, sae)[0], None, gain_F, forget)

    def gradients(
        self, d_outs: list[Tensor], u_BD: Tensor, W_dec: Tensor, d_l0: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = super().gradients(d_outs, u_BD, W_dec, torch.zeros_like(d_l0))
        d_f = joined([d.to(self.f) @ self.W_dec[part].T for part, d in zip(self.parts, d_outs)], 1)
        by_error, by_price = (self.near * d_f).sum(0), d_l0 * self.near.sum(0)
        for gain in self.factors:  # what takes no part is not priced
            by_error, by_price = by_error * gain, by_price * gain.sign()
        taught = self.threshold * by_error + by_price
        self.d_log_threshold = (-self.threshold / self.width * taught).float()
        return found

    def counts(self) -> tuple[Tensor, Tensor]:
        fired_2F, _ = super().counts()
        return fired_2F, fired_2F.sum()


class SparseFeatures:
    """As DenseFeatures, from the active entries alone and in fp32: each product reads one row of D numbers an
    entry, as an embedding bag. A NaN counts as active.

    col (the feature), row, value and slope (None: 1) of the entries, in the order of features; n_features is
    F.
    """

    def __init__(
        self,
        col: Tensor,
        row: Tensor,
        value: Tensor,
        slope: Tensor | None,
        n_features: int,
        gain_F: Tensor | None,
        forget: Tensor,
    ):
        self.col, self.row, self.value, self.factor, self.F, self.forget = (
            col,
            row,
            value,
            slope,
            n_features,
            forget,
        )
        if gain_F is not None:
            gain = gain_F[col]
            self.value, self.factor = value * gain, gain if slope is None else slope * gain
        self.feature_starts = starts(col, n_features)

    def decode(self, W_dec: Tensor, edges: Sequence[int]) -> list[Tensor]:
        n, B = len(edges) - 1, len(self.forget)
        self.place = self.row  # of an entry among the rows of all parts, one part after the other
        if n > 1:
            inner = upload(torch.tensor(edges[1:-1]), self.col.device)
            self.place = self.row + B * torch.bucketize(self.col, inner, right=True)
        place, order = self.place.sort(stable=True)
        out = bags(self.col[order], starts(place, n * B), self.value[order], W_dec.detach())
        return list(out.split(B))

    def gradients(
        self, d_outs: list[Tensor], u_BD: Tensor, W_dec: Tensor, d_l1: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_out = joined(d_outs, 0)
        d_pre = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            d_out, W_dec.detach(), self.col, self.feature_starts, self.place, 0
        )
        d_pre += d_l1
        if self.factor is not None:
            d_pre *= self.factor
        d_W_dec = bags(self.place, self.feature_starts, self.value, d_out)
        d_W_enc_FD = bags(self.row, self.feature_starts, d_pre, u_BD)
        d_b_enc = bags(torch.zeros_like(self.row), self.feature_starts, d_pre, d_pre.new_ones(1, 1))[:, 0]
        return d_W_dec, d_W_enc_FD, d_b_enc

    def counts(self) -> tuple[Tensor, Tensor]:
        place = self.col + self.F * ~self.forget[self.row]
        fired = self.value.new_zeros(2 * self.F).index_add_(0, place, (self.value > 0).float())
        return fired.view(2, self.F), self.value.sum()

    def sketch(self, signs_BK: Tensor) -> Tensor:
        return bags(self.row, self.feature_starts, (self.value > 0).float(), signs_BK)


def cache_blocks(W: Tensor) -> tuple[Tensor, ...]:
    """W [F, D] in blocks of rows, of 1 MB on a CPU: what is done to one in several passes then goes through
    memory once."""
    return W.split(max(1, 2**18 // W.shape[1]) if W.device.type == "cpu" else len(W))


@torch.no_grad()
def remove_radial(grad_FD: Tensor, W_FD: Tensor):
    """Remove from a gradient the component along each row of W, which the unit norm would undo."""
    for grad, W in zip(*map(cache_blocks, (grad_FD, W_FD))):
        tangential(grad, W)


@torch.no_grad()
def unit_rows(W_FD: Tensor):
    """Scale each row of W to unit norm."""
    for W in cache_blocks(W_FD):
        W /= W.norm(dim=1, keepdim=True)


@torch.no_grad()
def hold_near(W_FD: Tensor, start_FD: Tensor, least_cosine: float):
    """Turn each unit row of W towards its unit row of `start` until their cosine is at least this (the
    soft-frozen decoder of arXiv 2602.14111)."""
    for W, start in zip(*map(cache_blocks, (W_FD, start_FD))):
        cosine = (W * start).sum(1, keepdim=True)
        away = torch.nn.functional.normalize(W - cosine * start, dim=1)
        nearest = least_cosine * start + math.sqrt(1 - least_cosine**2) * away
        W.copy_(torch.where(cosine < least_cosine, nearest, W))


# Share of active features under which SparseFeatures is faster than DenseFeatures on a CPU, whose products
# run in this precision: measured at d_in 512; in bfloat16 they are equal at 5 % of 1,024 features, 4.5 % of
# 4,096 and 2.5 % of 16,384 (2.5 % of 1,024 at d_in 128).
SPARSE_SHARE = {torch.float32: 0.06, torch.bfloat16: 0.03}
# The same for batchtopk on a GPU, as the host knows how many entries it has; measured on an H100 with k 32 at
# d_in 512 and 2,304: faster among 65,536 features (by 1.37 and 1.17), slower among 16,384.
SPARSE_SHARE_ON_GPU = 0.001


def starts(index: Tensor, n: int) -> Tensor:
    """Where each of the n bags begins among entries that are sorted by the bag they are in."""
    if index.is_cuda:  # which bincount would wait for
        return torch.searchsorted(index, torch.arange(n, device=index.device))
    counts = torch.bincount(index, minlength=n)
    return counts.cumsum(0) - counts


def bags(index: Tensor, starts: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Σ of weight · rows[index] over the entries of each bag."""
    return torch.nn.functional.embedding_bag(index, rows, starts, mode="sum", per_sample_weights=weight)


def true_places(t: Tensor) -> Tensor:
    """Flat places of the entries that are not 0 (NaN is not), where most are; on a CPU 8 bytes are looked at
    at once."""
    flat = t.flatten()
    if flat.device.type != "cpu" or len(flat) % 8:
        return flat.nonzero()[:, 0]
    words = flat.view(torch.int64).nonzero()[:, 0]
    word, place = flat.view(-1, size := 8 // flat.element_size())[words].nonzero(as_tuple=True)
    return words[word] * size + place


@torch.no_grad()
def sparse_features(
    sae: Encoder, u_BD: Tensor, dtype: torch.dtype, gain_F: Tensor | None, forget: Tensor
) -> SparseFeatures:
    """The features of u [B, D], less b_dec, on a CPU; on a GPU of batchtopk. The matrix product runs in
    `dtype`."""
    F, u_low = len(sae.b_enc), u_BD.to(dtype)
    if u_low.is_cuda:
        col, row, value, slope = largest_entries(sae, u_low)
        return SparseFeatures(col, row, value, slope, F, gain_F, forget)
    if sae.activation == "softk":  # ranks all features of a row
        f_BF, slope_BF = soft_k_winners(sae.pre_activations(u_low), sae)
        place = true_places(f_BF)
        row = place // F
        col, by_feature = (place - row * F).sort(stable=True)
        slope = None if slope_BF is None else slope_BF.flatten()[place][by_feature].float()
        return SparseFeatures(
            col, row[by_feature], f_BF.flatten()[place][by_feature].float(), slope, F, gain_F, forget
        )
    floor = 0.8 * sae.threshold.item() if sae.activation in OF_BATCH else 0.0
    col, row, value = entries_above(floor, sae, u_low)
    if sae.activation in OF_BATCH:
        if sae.shard.count(len(value), value.device) < sae.k * len(u_BD) and floor:
            col, row, value = entries_above(0.0, sae, u_low)
        keep = ~(value < batch_border(value, sae.k * len(u_BD), sae))
        col, row, value = col[keep], row[keep], value[keep]
    return SparseFeatures(col, row, value, None, F, gain_F, forget)


def largest_entries(sae: Encoder, u_low: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """col, row, value and slope (fp32) of the k B largest features of a batch, in the order of features: so
    many that the host knows how many. Where fewer are active, the others have value and slope 0; of equals at
    the border some are kept."""
    pre_BF, n = sae.pre_activations(u_low), sae.k * len(u_low)
    value, place = pre_BF.flatten().topk(min(n, pre_BF.numel()), sorted=False)
    row = place // pre_BF.shape[1]
    at, order = ((place - row * pre_BF.shape[1]) * len(u_low) + row).sort()
    col, value = at // len(u_low), value[order].float().relu_()
    border = value.min() if sae.shard.size == 1 else nth_largest(sae.shard.largest(value, n), n)
    value = value.masked_fill_(value < border, 0)  # of all ranks' features
    learn_border(border, sae)
    return col, at - col * len(u_low), value, (~(value <= 0)).float()


ENTRIES_AT_ONCE = 2**21  # pre-activations that entries_above holds, 8 MB in fp32


def entries_above(floor: float, sae: Encoder, u_low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """col, row and value (fp32) of the pre-activations above a floor of at least 0, in the order of features.
    A NaN is above. A few features at a time, whose pre-activations (8 MB) stay in cache: all of them, [B, F],
    are never in memory. They share one place, as freed ones with what is found between them would leave holes
    of their size."""
    found, F = [], len(sae.b_enc)
    room_FB = u_low.new_empty(min(F, max(1, ENTRIES_AT_ONCE // len(u_low))), len(u_low))
    for first in range(0, F, len(room_FB)):
        pre_FB = sae.pre_activations(u_low, slice(first, first + len(room_FB)), room_FB[: F - first])
        place = true_places(torch.threshold_(pre_FB, floor, 0.0))
        col = place // len(u_low)
        found.append((col + first, place - col * len(u_low), pre_FB.flatten()[place].float()))
    cols, rows, values = zip(*found)
    return torch.cat(cols), torch.cat(rows), torch.cat(values)


def relu(pre: Tensor, sae: Encoder) -> tuple[Tensor, None]:
    return pre.relu_(), None


def jump_relu(pre: Tensor, sae: Encoder) -> tuple[Tensor, None]:
    """The pre-activations above the threshold of their feature (arXiv 2407.14435)."""
    return torch.where(pre > sae.thresholds.to(pre), pre, 0), None


def prefix_widths(n_features: int) -> list[int]:
    """How many of the first features reconstruct by themselves in a matryoshka SAE: the shares of arXiv
    2503.17547."""
    return sorted({max(1, n_features * share // 32) for share in (1, 3, 7, 15, 32)})


def batch_border(few: Tensor, n: int, sae: Encoder) -> Tensor:
    """The n-th largest feature of a batch, 0 if fewer are active, from all candidates that are here."""
    few = sae.shard.largest(few, n)
    border = few.new_zeros(()) if len(few) < n else nth_largest(few, n)
    learn_border(border, sae)
    return border


def nth_largest(values: Tensor, n: int) -> Tensor:
    """Of a vector of at least n entries."""
    if values.is_cuda:  # kthvalue keeps one block of threads busy there
        return values.topk(n, sorted=False).values.min().float()
    return values.kthvalue(len(values) - n + 1).values


def learn_border(border: Tensor, sae: Encoder):
    """A moving average of the border of BatchTopK is the threshold at inference."""
    sae.threshold.copy_(torch.where(sae.threshold > 0, sae.threshold.lerp(border, 0.01), border))


def batch_top_k(pre: Tensor, sae: Encoder) -> tuple[Tensor, None]:
    """The k·B largest of a batch (Bussmann et al., BatchTopK, arXiv 2412.06410); equals at the border are
    kept."""
    f = torch.relu(pre)
    n, few = sae.k * (f.numel() // f.shape[-1]), f.flatten()
    if not f.is_cuda:  # where to find how many there are, a GPU would be waited for
        # the border is near where it was: seldom more than a few per cent must be ranked
        near = few[true_places(f > 0.8 * sae.threshold)].float()
        few = near if sae.shard.count(len(near), near.device) >= n else few.float()
    return f.masked_fill_(f < batch_border(few, n, sae), 0), None


def soft_k_winners(pre: Tensor, sae: Encoder) -> tuple[Tensor, Tensor | None]:
    """relu(pre) · σ((pre - θ) / T), θ midway between the k-th and the next largest of the row and held
    constant in the gradient; gates under 1 % are shut. At temperature T = 0 this is top-k."""
    top = pre.topk(min(sae.k + 1, pre.shape[-1]), dim=-1).values
    if sae.shard.size > 1:
        top = sae.shard.gather(top.float(), -1).topk(sae.k + 1, dim=-1).values.to(pre)
    border = (top[..., -2:].sum(-1, keepdim=True) / 2).detach()
    if not sae.temperature > 0:
        return torch.relu(pre) * (pre >= top[..., -2:-1]), None
    temperature = sae.temperature.to(pre.dtype)
    gate = torch.sigmoid((pre - border) / temperature)
    gate = gate * (gate >= 0.01)
    f = torch.relu(pre) * gate
    return f, gate + f * (1 - gate) / temperature


ACTIVATIONS = {
    "relu": relu,
    "jumprelu": jump_relu,
    "batchtopk": batch_top_k,
    "matryoshka": batch_top_k,
    "softk": soft_k_winners,
}
OF_BATCH = ("batchtopk", "matryoshka")
JUMPS = ("jumprelu", *OF_BATCH)  # at inference a feature fires above a threshold, whatever the others do
