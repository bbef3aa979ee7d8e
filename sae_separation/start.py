"""Where an SAE starts: decoder directions, biases, thresholds."""

import torch
from torch import Tensor

from sae_separation.config import BY_LAMBDA, Config
from sae_separation.shards import Shard


def directions(d_sae: int, d_in: int, seed: int, orthogonal: bool, shard: Shard) -> Tensor:
    """Random unit rows of W_dec, of a shard its own [F, D]: the same whatever number of ranks there are."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    if orthogonal:  # blocks of d_in orthonormal rows, as near to orthogonal as d_sae rows can be
        W_dec = torch.cat([torch.nn.init.orthogonal_(b, generator=generator) for b in W_dec.split(d_in)])
    return shard.own(W_dec).clone()


@torch.no_grad()
def set_biases(sae, config: Config, x: Tensor):
    """b_dec is the mean of u of the activations x [rows, D]. relu and jumprelu start sparse, near the target
    L0, by bias and threshold: many features to bring down run lambda up, or are killed together."""
    parts = (sae.normalise(part)[0].sum(0) for part in x.split(4096))
    sae.b_dec.copy_(sum(parts, start=x.new_zeros(x.shape[1])) / len(x))
    if config.activation in BY_LAMBDA:
        l0 = 2 * (config.target_l0 or x.shape[1] / 8)
        rows = x[: min(4096, max(1, 2**22 // config.d_sae))]
        pre = sae.shard.gather((sae.normalise(rows)[0] - sae.b_dec) @ sae.W_enc, 1)
        height = torch.quantile(pre.flatten()[: 2**22], 1 - min(0.5, l0 / config.d_sae))
        if config.activation == "relu":
            sae.b_enc.sub_(height)
        else:
            sae.log_threshold.fill_(height.clamp(min=1e-3).log())
        sae.active.fill_(l0)
