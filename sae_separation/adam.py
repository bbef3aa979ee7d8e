"""What Adam does to an SAE, shaped by how its features fire."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sae_separation.shards import Shard


def clip(sae: Any, most: float) -> Tensor:
    """Scale the gradients so that their norm over all parameters is at most this; the norm as it was."""
    if sae.shard.size == 1:
        return torch.nn.utils.clip_grad_norm_(sae.parameters(), most)
    grads = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
    alike = grads.pop("b_dec")  # on every rank
    here = torch.nn.utils.get_total_norm(list(grads.values()))
    norm = (sae.shard.sum(here.square()) + alike.norm().square()).sqrt()
    torch.nn.utils.clip_grads_with_norm_(sae.parameters(), most, norm)
    return norm


def factors(rate_2F: Tensor, power: float, shard: Shard) -> Tensor:
    """(mean rate / its own)^power of each feature, within 0.1 to 10 [F]."""
    rate = rate_2F.mean(0).clamp(min=1e-12)
    mean = shard.mean(rate_2F.mean(0)).clamp(min=1e-12)
    return (mean / rate).pow(power).clamp(0.1, 10.0)


@contextlib.contextmanager
def own_learning_rates(sae: Any, power: float) -> Iterator[None]:
    """Inside, the optimiser's change of each feature's weights is multiplied by (mean rate / its
    rate)^power."""
    factor = factors(sae.rate, power, sae.shard)
    shaped = ((sae.W_enc_FD, factor[:, None]), (sae.b_enc, factor), (sae.W_dec, factor[:, None]))
    before = [p.detach().clone() for p, _ in shaped]
    yield
    for (p, f), old in zip(shaped, before):
        p.data.copy_(old.lerp(p.data, f.expand_as(old)))
