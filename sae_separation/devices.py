"""Tensors on their way to a device, and what is looked at of those on it.

What the host decides (indices, masks, random numbers) is made on the CPU and sent with `upload`: a GPU is
then not waited for. What the host asks of a tensor (`item`, `bool`, `nonzero`, `cpu`) waits until the device
has done all that came before.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def upload(t: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`; from the CPU to a GPU without a wait, through pinned memory."""
    if device.type != "cuda" or t.is_cuda:
        return t.to(device)
    return t.pin_memory().to(device, non_blocking=True)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all entries of all tensors are finite: one look a device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        by_device.setdefault(t.device, []).append(t.isfinite().all())
    return all(bool(torch.stack(finite).all()) for finite in by_device.values())
