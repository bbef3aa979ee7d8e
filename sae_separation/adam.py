"""What Adam does to an SAE, shaped by how its features fire."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor


def factors(rate_2F: Tensor, power: float) -> Tensor:
    """(mean rate / its own)^power of each feature, within 0.1 to 10 [F]."""
    rate = rate_2F.mean(0).clamp(min=1e-12)
    mean = rate_2F.mean(0).mean().clamp(min=1e-12)
    return (mean / rate).pow(power).clamp(0.1, 10.0)


@contextlib.contextmanager
def own_learning_rates(sae: Any, power: float) -> Iterator[None]:
    """Inside, the optimiser's change of each feature's weights is multiplied by (mean rate / its
    rate)^power."""
    factor = factors(sae.rate, power)
    shaped = ((sae.W_enc_FD, factor[:, None]), (sae.b_enc, factor), (sae.W_dec, factor[:, None]))
    before = [p.detach().clone() for p, _ in shaped]
    yield
    for (p, f), old in zip(shaped, before):
        p.data.copy_(old.lerp(p.data, f.expand_as(old)))
