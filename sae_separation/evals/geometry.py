"""Geometry of the decoder: overlaps of all living features, and spectra of those of each domain."""

import numpy as np
import torch
from torch import Tensor

from sae_separation.evals.evaluator import Evaluator, finite
from sae_separation.losses import omega_all_pairs, omega_between_domains, sharing, welch_floor


@torch.no_grad()
def geometry(evaluator: Evaluator, sae, seed: int, name: str) -> tuple[dict, dict]:
    """Directions of the living features: overlaps of all, and spectra of the forget (affinity > 0.5), retain
    (< -0.5) and shared groups. Undefined values are None."""
    forget_rate, retain_rate, _ = evaluator.firing(sae)
    total = forget_rate + retain_rate
    alive = total > 0
    W = torch.nn.functional.normalize(sae.W_dec[alive].double(), dim=1)
    affinity = ((forget_rate - retain_rate) / total.clamp(min=1e-12))[alive]
    groups = {"forget": affinity > 0.5, "retain": affinity < -0.5, "shared": affinity.abs() <= 0.5}
    mean_max, above = overlaps(W)
    both = groups["forget"].any() and groups["retain"].any()
    metrics = {
        "omega": omega_all_pairs(W).item(),
        "omega_floor": welch_floor(*W.shape),
        "mean_max_cosine": mean_max,
        "frac_pairs_above_0.2": above,
        "sharing": sharing(torch.stack([forget_rate, retain_rate])).item(),
        "omega_between_domains": omega_between_domains(W, affinity.double()).item() if both else None,
    }
    spectra, bases = {}, {}
    for group, members in groups.items():
        values, bases[group] = spectrum(W[members])
        spectra[group] = values.tolist()
        metrics[f"n_{group}"] = int(members.sum())
        metrics |= {f"{metric}_{group}": value for metric, value in of_spectrum(values).items()}
    angles = torch.linalg.svdvals(bases["forget"] @ bases["retain"].T).clamp(max=1.0).tolist()
    metrics["max_principal_cosine_forget_retain"] = angles[0] if angles else None
    metrics["mean_principal_cosine_forget_retain"] = float(np.mean(angles)) if angles else None
    return finite(
        "geometry", metrics, {"singular_values": spectra, "principal_cosines_forget_retain": angles}
    )


def spectrum(W: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of rows W [n, D], largest first, and the right singular vectors [k, D] that hold nine
    tenths of their squares; both empty where there is no row."""
    if not len(W):
        return torch.zeros(0), W
    _, values, basis = torch.linalg.svd(W, full_matrices=False)
    energy = values.pow(2).cumsum(0) / values.pow(2).sum()
    return values, basis[: int((energy < 0.9).sum()) + 1]


def of_spectrum(values: Tensor) -> dict[str, float | int | None]:
    """Largest over smallest singular value (None where that is 0), and the exponential of the entropy of
    their shares."""
    if not len(values):
        return {"condition_number": None, "effective_rank": None}
    share = values / values.sum()
    return {
        "condition_number": (values[0] / values[-1]).item() if values[-1] > 1e-12 else None,
        "effective_rank": torch.exp(-(share * share.clamp(min=1e-300).log()).sum()).item(),
    }


def overlaps(W: Tensor, chunk: int = 1024) -> tuple[float | None, float | None]:
    """Mean over rows of the largest |cosine| with another row, and the share of pairs whose |cosine| exceeds
    0.2."""
    if len(W) < 2:
        return None, None
    largest, above = [], 0
    for start in range(0, len(W), chunk):
        cosines = (W[start : start + chunk] @ W.T).abs()
        cosines[torch.arange(len(cosines)), torch.arange(start, start + len(cosines))] = 0
        largest.append(cosines.max(1).values)
        above += int((cosines > 0.2).sum())
    return torch.cat(largest).mean().item(), above / (len(W) * (len(W) - 1))
