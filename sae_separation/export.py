"""SAEs in SAELens' format, written and read back."""

import shutil
from pathlib import Path
from typing import Any

from sae_separation import methods, saebench
from sae_separation.sparse import JUMPS


def build(architecture: str, weights: dict, **settings) -> Any:
    """A sae_lens SAE of these weights (W_dec [F, D], the others by its names), float32, on the CPU."""
    from sae_lens.registry import get_sae_class

    kind, config = get_sae_class(architecture)
    F, D = weights["W_dec"].shape
    how = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True}
    sae = kind(config(**how | settings))
    sae.load_state_dict({name: t.detach().float().cpu().contiguous() for name, t in weights.items()})
    return sae


def save(sae, folder: Path, metadata: dict):
    """Save a sae_lens SAE as cfg.json, with this `metadata`, and sae_weights.safetensors."""
    from sae_lens.saes.sae import SAEMetadata

    sae.cfg.metadata = SAEMetadata(**metadata)
    sae.save_model(folder)
    shutil.copymode(
        folder / "cfg.json", folder / "sae_weights.safetensors"
    )  # safetensors lets the owner alone read


def export(module, folder: Path, metadata: dict):
    """Save an OrthogonalSAE in SAELens' format (cfg.json, sae_weights.safetensors) with its `scale` s folded
    into the weights: StandardSAE; JumpReLUSAE for jumprelu, batchtopk and matryoshka, as SAELens saves its
    own; TopKSAE for softk. Locked features never fire.

    All of them are homogeneous: dividing biases and threshold by s gives features f / s and the same
    reconstruction, rows still unit. Raises ValueError for what the format cannot hold: a skip connection, a
    temperature above 0.
    """
    if module.skip or module.temperature > 0:
        what = (
            f"a skip connection of {module.skip:g}"
            if module.skip
            else f"soft k-winners at temperature {module.temperature.item():.3g} (it must reach 0)"
        )
        raise ValueError(f"the SAELens format cannot hold {what}")
    F = len(module.W_dec)
    architecture = ({"relu": "standard", "softk": "topk"} | dict.fromkeys(JUMPS, "jumprelu"))[
        module.activation
    ]
    settings = {"k": module.k} if module.activation == "softk" else {}
    settings["normalize_activations"] = "layer_norm" if module.layer_norm else "none"
    weights = {
        "W_enc": module.W_enc.clone(),
        "W_dec": module.W_dec,
        "b_enc": module.b_enc / module.scale,
        "b_dec": module.b_dec / module.scale,
    }
    weights["W_enc"][:, module.unlocked :], weights["b_enc"][module.unlocked :] = 0.0, -1.0
    if module.activation in JUMPS:
        weights["threshold"] = (module.thresholds / module.scale).expand(F)
    save(build(architecture, weights, **settings), folder, metadata)


def load_exported(folder: Path, device="cpu") -> Any:
    """An exported SAE as SAEBench takes it: read by sae_lens, its config in the form SAEBench expects. Or
    what a method without an SAE has fitted, a methods.Method."""
    from sae_lens import SAE

    if methods.is_method(folder):
        return methods.load(folder, device)
    sae = SAE.load_from_disk(folder, device=str(device)).requires_grad_(False)
    return saebench.as_expected(sae, str(device))
