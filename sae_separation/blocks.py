"""A block of activations: what the stream gives and trainers take batches of."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from sae_separation.devices import upload


@dataclass
class ActivationBlock:
    """Shuffled activations x [rows, D] (fp32, unscaled), which rows' text was forget text [rows] (bool), and
    a number in [0, 1) that the row's document was given (testbeds.draw_of) [rows]."""

    x: Tensor
    forget: Tensor
    document: Tensor | None = None

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Whole batches only: up to size - 1 rows of a block are left over."""
        for start in range(0, len(self.x) - size + 1, size):
            yield self.x[start : start + size], self.forget[start : start + size]

    def documents(self, size: int) -> Iterator[Tensor | None]:
        """The documents' numbers of each batch."""
        return repeat(None) if self.document is None else iter(self.document.split(size))

    def without(self, places: Tensor) -> "ActivationBlock":
        """All rows but those at `places` (on the CPU), which the last rows take; nothing else is moved."""
        n = len(self.x) - len(places)
        kept_at_end = torch.ones(len(places), dtype=torch.bool)
        kept_at_end[places[places >= n] - n] = False
        taken = upload(places[places < n], self.x.device)
        last = upload(n + kept_at_end.nonzero()[:, 0], self.x.device)
        kept = []
        for t in (self.x, self.forget, self.document):
            if t is not None:
                t.index_copy_(0, taken, t.index_select(0, last))
                kept.append(t[:n])
        return ActivationBlock(*kept)

    @classmethod
    def blank(cls, d_in: int, device: torch.device) -> "ActivationBlock":
        """What a trainer is made from whose state then comes from a checkpoint."""
        return cls(torch.ones(2, d_in, device=device), torch.zeros(2, dtype=torch.bool, device=device))


def shuffled_places(n: int, seed: int) -> Tensor:
    """A place for each of n rows [n]: a random permutation."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(order).scatter_(0, order, torch.arange(n))
