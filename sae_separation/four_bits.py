"""Weights in 4 bits: rounded to the nearest of 16 levels, in groups. What an LM seems to have forgotten can
come back when its weights are rounded (Zhang et al., arXiv 2410.16454)."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

GROUP = 64  # weights along a layer's input that share their levels
LEVELS = 16


def rounded_to_nearest(weight: Tensor) -> Tensor:
    """weight [out, in], each group of GROUP inputs of a row (the last may be smaller) on LEVELS equally
    spaced levels from its minimum to its maximum (asymmetric, as GPTQ and AWQ have it); in the precision it
    came in."""
    parts = []
    for group in weight.double().split(GROUP, 1):
        low, high = group.aminmax(dim=1, keepdim=True)
        width = high - low
        level = ((LEVELS - 1) * (group - low) / width).nan_to_num(0.0).round()
        parts.append(low + level * width / (LEVELS - 1))
    return torch.cat(parts, 1).to(weight.dtype)


def rounded(lm: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an LM by its names for them, those of its linear layers rounded (`rounded_to_nearest`).
    Embeddings, the unembedding, norms and biases stay as they are, and so does what is no linear layer by
    itself (the experts of some mixtures)."""
    head, out = lm.get_output_embeddings(), dict(weights)
    for name, weight in weights.items():
        module = lm.get_submodule(name.rpartition(".")[0])
        if weight.dim() != 2 or module is head:
            continue
        if isinstance(module, torch.nn.Linear):
            out[name] = rounded_to_nearest(weight)
        elif isinstance(module, Conv1D):  # GPT-2's, whose weight is [in, out]
            out[name] = rounded_to_nearest(weight.T).T
    return out


@torch.no_grad()
def rounded_to_4_bits(lm: Any) -> Any:
    """A copy of an LM, its weights `rounded`."""
    lm = copy.deepcopy(lm)
    for name, weight in rounded(lm, dict(lm.named_parameters())).items():
        lm.get_parameter(name).copy_(weight)
    return lm
