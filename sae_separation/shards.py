"""The features of one SAE over several processes (ranks): an equal share each, in order.

    shard = Shard(rank=1, size=4)               # the second quarter of the features
    error = shard.sum(f @ W_dec) - u            # W_dec [F / 4, D]: the reconstruction of all features
    WHOLE                                       # all features are here: nothing is sent

What belongs to features (rows of W_dec and W_enc, biases, firing rates, Adam's moments of them) is split;
everything else is the same on every rank, as it is computed from the same sums. `n` is how many features are
here. Every rank calls the same methods in the same order.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sae_separation import ranks
from sae_separation.errors import RunFailed

# the dimension of an SAE's tensors that is the features'
OF_FEATURES = {"W_dec": 0, "W_enc_FD": 0, "b_enc": 0, "log_threshold": 0, "rate": 1, "idle": 0}


def feature_dim(name: str, t: Tensor) -> int | None:
    """The dimension of a trainer's tensor (`sae.rate`, `adam.W_dec.exp_avg`) that is the features'; None
    where it has none."""
    found = [OF_FEATURES[part] for part in name.split(".") if part in OF_FEATURES]
    return found[0] if found and t.dim() else None


@dataclass(frozen=True)
class Shard:
    """Which share of the features this process holds: the `rank`-th of `size`."""

    rank: int = 0
    size: int = 1

    # which features are here
    def total(self, n: int) -> int:
        """Features of the SAE."""
        return self.size * n

    def first(self, n: int) -> int:
        """The place, among all features, of the first that is here."""
        return self.rank * n

    def own(self, t: Tensor, dim: int = 0) -> Tensor:
        """The part of a tensor about all features that is about those here."""
        return t.chunk(self.size, dim)[self.rank]

    def within(self, places: Sequence[int], n: int) -> list[int]:
        """Borders between all features, as borders between those here."""
        return [min(max(place - self.first(n), 0), n) for place in places]

    def here(self, places: Tensor, n: int) -> tuple[Tensor | slice, Tensor]:
        """Which of some places among all features are here, and their places here."""
        if self.size == 1:
            return slice(None), places
        mine = ((places >= self.first(n)) & (places < self.first(n) + n)).nonzero()[:, 0]
        return mine, places[mine] - self.first(n)

    # what is about all features
    def sum(self, t: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            with ranks.together():
                dist.all_reduce(t)
        return t

    def sums(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the ranks, in one message; of floating-point tensors of one type."""
        if self.size == 1 or len(parts) == 1:
            return [self.sum(part) for part in parts]
        packed = self.sum(torch.cat([part.flatten() for part in parts]))
        return [some.view_as(part) for some, part in zip(packed.split([p.numel() for p in parts]), parts)]

    def mean(self, t: Tensor) -> Tensor:
        """Of the entries of all ranks, of which some may have none."""
        if self.size == 1:
            return t.mean()
        total, n = self.sums([t.sum(), t.new_tensor(float(t.numel()))])
        return total / n

    def gather(self, t: Tensor, dim: int = 0) -> Tensor:
        """The ranks' tensors of one shape, one behind the other."""
        if self.size == 1:
            return t
        mine = t.detach().to(torch.uint8 if t.dtype == torch.bool else t.dtype).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        with ranks.together():
            dist.all_gather(parts, mine)
        return torch.cat(parts, dim).to(t.dtype)

    def rows(self, W: Tensor, places: Tensor) -> Tensor:
        """The rows of W at some places among all features [R, D]; W [n, D] holds those here."""
        if self.size == 1:
            return W.index_select(0, places)
        out = W.new_zeros(len(places), W.shape[1])
        mine, at = self.here(places, len(W))
        out[mine] = W.index_select(0, at)
        return self.sum(out)

    def columns(self, width: int, n: int) -> slice:
        """Those of the first `width` features that are here, as places among these `width`."""
        return slice(*(min(place, width) for place in (self.first(n), self.first(n) + n)))

    def first_columns(self, t: Tensor, width: int, n: int) -> Tensor:
        """t [B, width] of the first `width` features, from what each rank has of it."""
        if self.size == 1:
            return t
        out = t.new_zeros(len(t), width)
        out[:, self.columns(width, n)] = t
        return self.sum(out)

    def largest(self, values: Tensor, n: int) -> Tensor:
        """Values among which are the n largest of all ranks' [m]: fewer than n are filled up with 0."""
        if self.size == 1:
            return values
        top = values.topk(min(n, len(values)), sorted=False).values
        return self.gather(torch.nn.functional.pad(top, (0, n - len(top))))

    def count(self, n: int, device: torch.device) -> int:
        """The sum of the ranks' numbers; waits for it."""
        return n if self.size == 1 else int(self.sum(torch.tensor(n, device=device)))

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Where one rank raises RunFailed inside, all of them do: the first one's."""
        try:
            yield
            said = ""
        except RunFailed as error:
            if self.size == 1:
                raise
            said = str(error)
        if texts := list(filter(None, ranks.all_gather(said))) if self.size > 1 else []:
            raise RunFailed(texts[0])

    def to_rank(self, to: int, t: Tensor, dim: int) -> Tensor | None:
        """What all ranks have of a tensor, on one rank's CPU, which receives one part at a time; None on the
        others."""
        part = t.detach().contiguous()
        with ranks.together():
            if self.rank != to:
                dist.send(part, to)
                return None
            parts = []
            for rank in range(self.size):
                if rank != to:
                    dist.recv(part := torch.empty_like(part), rank)
                parts.append((t.detach() if rank == to else part).cpu())
        return torch.cat(parts, dim)

    def whole(self, tensors: Mapping[str, Tensor], to: int = 0) -> dict[str, Tensor]:
        """Tensors of a trainer, with those of features from all ranks: on one rank, and on its CPU; none on
        the others."""
        if self.size == 1:
            return dict(tensors)
        out: dict[str, Tensor] = {}
        for name, t in tensors.items():
            dim = feature_dim(name, t)
            gathered = t.cpu() if dim is None else self.to_rank(to, t, dim)
            if gathered is not None and self.rank == to:
                out[name] = gathered
        return out

    def gather_module(self, sae, to: int):
        """Give an SAE all of its features, on one rank, and on its CPU; elsewhere it stays a part."""
        state = self.whole(sae.state_dict(), to)
        sae.cpu().shard = WHOLE
        for name, t in state.items():
            getattr(sae, name).data = t

    def parts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of such tensors what belongs to this rank."""
        dims = {name: feature_dim(name, t) for name, t in tensors.items()}
        return {name: t if (dim := dims[name]) is None else self.own(t, dim) for name, t in tensors.items()}


WHOLE = Shard()
