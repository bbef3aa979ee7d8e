"""Interventions on the residual stream: which features are changed, where, and to what."""

import math
from collections.abc import Callable
from functools import cached_property, partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from sae_separation.exam import Batch, Residuals, trained_on

INTERVENTIONS = ("clamp", "conditional", "guardrail")  # as `intervene` says

WRITES = ("zero", "retain_mean")  # what a token's whole stream can be set to

# conditional: of retain tokens that may be clamped, SAEBench's stricter limit on a feature's retain rate
RETAIN_SHARE = 0.001
GUARD_QUANTILE = 0.95  # guardrail: of retain contexts that stay under the threshold, as published


class ChosenFeatures:
    """The few features of an SAE that an intervention may touch, each in units of `unit_F`, as SAEBench's
    code takes an SAE.

    Clamping changes the residual by (f' - f) W_dec of the clamped features alone, since SAEBench adds the
    SAE's error back: the others need not be computed. With the features' own mean active values as units,
    SAEBench's multipliers count in those. The guards are calibrated on `retain`, the residuals of retain
    text, and never on questions or held-out text.
    """

    def __init__(self, sae, chosen: Tensor, unit_F: Tensor, retain: Residuals | None = None):
        self.sae, self.chosen, self.unit, self.cfg, self.retain = sae, chosen, unit_F[chosen], sae.cfg, retain
        self.W_dec = sae.W_dec[chosen] * self.unit[:, None]
        self.alone = sae.cfg.architecture() == "standard"  # features do not compete: encode the chosen alone
        if self.alone:
            self.W_enc, self.b_enc = sae.W_enc[:, chosen] / self.unit, sae.b_enc[chosen] / self.unit
        self.encoded: WeakKeyDictionary[Residuals, Tensor] = WeakKeyDictionary()
        self.guards: dict[tuple, float] = {}

    def encode(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., chosen]."""
        if self.alone:
            return torch.relu(self.sae.process_sae_in(x) @ self.W_enc + self.b_enc)
        return self.sae.encode(x)[..., self.chosen] / self.unit

    def decode(self, f: Tensor, x: Tensor | None = None) -> Tensor:
        """f [..., chosen] -> what the chosen features write into x [..., D]; x matters where the SAE
        layer-normalises its input."""
        written = f @ self.W_dec
        if self.cfg.normalize_activations != "layer_norm":
            return written
        if x is None:
            raise ValueError("an SAE that layer-normalises its input decodes in units of that: give x")
        return written * x.std(-1, keepdim=True)

    def on(self, residuals: Residuals) -> Tensor:
        """[row, pos, chosen] on the tokens that may be touched, 0 on the others; encoded once."""
        if residuals not in self.encoded:
            self.encoded[residuals] = self.encode(residuals.resid) * residuals.trained[..., None]
        return self.encoded[residuals]

    def _calibration(self) -> Residuals:
        if self.retain is None:
            raise ValueError("these features were made without retain text, which guards are calibrated on")
        return self.retain

    @cached_property
    def limit(self) -> Tensor:
        """The activation that at most RETAIN_SHARE of the tokens of retain text exceed, [chosen]; 0 for a
        feature that fires no more."""
        retain = self._calibration()
        f = self.on(retain)[retain.trained]
        return f.kthvalue(math.ceil((1 - RETAIN_SHARE) * len(f)), 0).values

    def guard(self, features: list[int]) -> float:
        """The GUARD_QUANTILE over retain contexts of the share of tokens that fire one of the features."""
        key = tuple(features)
        if key not in self.guards:
            retain = self._calibration()
            share = firing_share(self.on(retain)[..., key] > 0, retain.trained)
            self.guards[key] = share.quantile(GUARD_QUANTILE).item()
        return self.guards[key]


def firing_share(fires: Tensor, trained: Tensor) -> Tensor:
    """Share [row] of the tokens `trained` [row, pos] that fire at least one feature, fires [row, pos,
    feature] (bool)."""
    return (fires.any(-1) & trained).sum(1) / trained.sum(1).clamp(min=1)


def intervene(
    resid: Tensor,
    hook: Residuals,
    sae: ChosenFeatures,
    features_to_ablate,
    multiplier: float,
    how: str = "clamp",
) -> Tensor | None:
    """resid [row, pos, D], with features (places among the chosen) set to -multiplier on the tokens that may
    be touched (Residuals.trained), as a hook.

    clamp: where they fire. SAEBench's `anthropic_clamp_resid_SAE_features`, without its work on features left
    alone.
    conditional: where they exceed their `limit`. After Khoriaty et al. (arXiv 2503.11127); in public
    implementations their Clamp Prime takes one small number for all features, which is nearly SAEBench's
    clamp. Ours is each feature's own and comes from retain text; a quantile and not the maximum, which would
    grow with the amount of text and follow a single token.
    guardrail: where they fire, in rows whose share of firing tokens exceeds the 95th percentile of that share
    over retain contexts. Muhamed et al. (arXiv 2504.08192); they select features by squared activations and,
    in their code, clamp all chosen features on a firing token; we keep SAEBench's selection and clamp those
    that fire, so that only the guard differs.
    """
    chosen = [int(i) for i in features_to_ablate]
    if not chosen:
        return None
    f = sae.on(hook)
    value = f[..., chosen]
    fires = value > (sae.limit[chosen] if how == "conditional" else 0)
    if how == "guardrail":
        fires &= (firing_share(fires, hook.judged) > sae.guard(chosen))[:, None, None]
    at = fires.any(-1)
    change = torch.zeros(
        int(at.sum()), f.shape[-1], device=f.device
    )  # as wide for any choice: one change, one rounding
    change[:, chosen] = torch.where(fires, -multiplier - value, 0.0)[at]
    resid = resid.clone()
    resid[at] += sae.decode(change, resid[at])
    return resid


def written_where(fires: Tensor, resid: Tensor, write: str, retain_mean: Tensor) -> Tensor:
    """resid [row, pos, D] with one of WRITES in place of the stream of the tokens that fire [row, pos]
    (bool)."""
    new = {"zero": torch.zeros_like(retain_mean), "retain_mean": retain_mean}[write]
    return torch.where(fires[..., None], new, resid)


def written_on_features(
    resid: Tensor, hook: Residuals, sae: ChosenFeatures, places: list[int], write: str, retain_mean: Tensor
) -> Tensor:
    """resid [row, pos, D] with one of WRITES in place of the stream of the tokens that fire one of the
    features (places among the chosen), as a hook."""
    fires = (sae.on(hook)[..., places] > 0).any(-1)
    return written_where(fires, resid, write, retain_mean)


def feature_hook(features: ChosenFeatures, cell: dict, retain_mean: Tensor) -> Callable:
    """The intervention of a cell on some of the chosen features, by their numbers in the SAE: what is
    written where they fire (`write`), or the `intervention` that clamps them."""
    places = np.searchsorted(features.chosen.numpy(), cell["features"]).tolist()
    write = cell.get("write", "clamp")
    if write != "clamp":
        how = {"places": places, "write": write, "retain_mean": retain_mean}
        return partial(written_on_features, sae=features, **how)
    how = {"features_to_ablate": places, "multiplier": cell["multiplier"]}
    return partial(intervene, sae=features, how=cell.get("intervention", "clamp"), **how)


def calibration(features: ChosenFeatures, how: str) -> dict:
    """What a guard takes from retain text, for a cell that touches all of the chosen features: by feature its
    `limit`, or the share of a row's tokens above which the guardrail acts. Empty for the clamp."""
    if how == "conditional":
        return {"limits": dict(zip(features.chosen.tolist(), features.limit.tolist()))}
    return {"guard": features.guard(list(range(len(features.chosen))))} if how == "guardrail" else {}


def calibrated(features: ChosenFeatures, cell: dict) -> ChosenFeatures:
    """Features without retain text, with the `calibration` that their cell has recorded."""
    if "limits" in cell:
        limits = [cell["limits"][str(i)] for i in features.chosen.tolist()]
        features.limit = torch.tensor(limits, device=features.unit.device)
    if "guard" in cell:
        places = np.searchsorted(features.chosen.numpy(), cell["features"]).tolist()
        features.guards[tuple(places)] = cell["guard"]
    return features


def whole_contexts(tokens: Tensor, resid: Tensor, special: Tensor) -> Batch:
    """Contexts [n, pos] and their resid [n, pos, D], as a batch that is read everywhere; `special` ids as in
    `special_ids`."""
    trained = trained_on(tokens, special)
    return Batch(tokens, trained, residuals=Residuals(resid, trained, tokens))
