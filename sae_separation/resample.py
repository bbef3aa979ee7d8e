"""Dead features, pointed at what the SAE reconstructs badly."""

from typing import Any

import torch
from torch import Tensor

from sae_separation.sparse import hold_near


@torch.no_grad()
def resample(
    sae: Any,
    dead_F: Tensor,
    x: Tensor,
    adam: torch.optim.Optimizer,
    generator: torch.Generator,
    start_FD: Tensor | None = None,
    least_cosine: float = -1.0,
    kept: int = 0,
) -> int:
    """Point the dead features [F] (bool) of an OrthogonalSAE at rows of x [B, D] drawn by squared error, with
    the living's mean encoder norm and fresh Adam moments (after Bricken et al., Towards Monosemanticity,
    2023, appendix on resampling). At most one a row; returns how many. A feature's pre-activation is above 0
    where the stream lies more than half as far along it as at its row, and no more freely than the living's
    on average: with their mean bias alone it would fire far from its row, on what is reconstructed already.

    A decoder that is not trained keeps its directions, an encoder its weights; with `start` [F, D] the
    directions keep a `least_cosine` with it. The first `kept` features stay as they are. Of features that are
    split over ranks, each rank revives its own."""
    shard, all_dead = sae.shard, sae.shard.gather(dead_F)
    dead = all_dead.nonzero()[:, 0]
    dead = dead[dead >= kept]
    if not len(dead):
        return 0
    # in parts: [B, F] of a large dictionary is larger than its weights
    error = torch.cat([part - sae(part) for part in x.split(256)])
    weight, n = error.pow(2).sum(1).cpu(), min(len(dead), len(x))
    chosen = torch.multinomial(weight, n, generator=generator).to(x.device)
    mine, dead = shard.here(dead[:n], len(dead_F))
    chosen = chosen[mine]
    direction = torch.nn.functional.normalize(error[chosen], dim=1)
    size, bias = sae.b_enc.new_ones(()), sae.b_enc.new_zeros(())
    if not all_dead.all():
        size, bias = shard.mean(sae.W_enc_FD[~dead_F].norm(dim=1)), shard.mean(sae.b_enc[~dead_F])
    if start_FD is not None:
        hold_near(direction, start_FD[dead], least_cosine)
    if not sae.W_dec.requires_grad:
        direction = sae.W_dec[dead]
    elif not sae.W_enc_FD.requires_grad:
        direction = torch.nn.functional.normalize(sae.W_enc_FD[dead], dim=1)
    sae.W_dec[dead] = direction
    if sae.W_enc_FD.requires_grad:
        sae.W_enc_FD[dead] = size * direction
    u = sae.normalise(x[chosen])[0] - sae.b_dec
    sae.b_enc[dead] = torch.minimum(bias, -0.5 * (u * sae.W_enc_FD[dead]).sum(1))
    sae.idle[dead] = 0
    of_features = [sae.W_dec, sae.W_enc_FD, sae.b_enc]
    if sae.activation == "jumprelu":
        if not all_dead.all():
            sae.log_threshold[dead] = shard.mean(sae.log_threshold[~dead_F])
        of_features.append(sae.log_threshold)
    forget_moments(adam, of_features, dead)
    return n


def forget_moments(adam: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], rows: Tensor):
    """Adam begins anew with these rows of the parameters that it trains."""
    for parameter in parameters:
        for moment in ("exp_avg", "exp_avg_sq") if parameter.requires_grad else ():
            adam.state[parameter][moment][rows] = 0.0
