"""A loss on W_dec that looks at a share of the rows at each optimiser step, as if it had looked at all of
them.

    rounds = Rounds(grouped_grad, groups_of_sae, steps=8)
    visited = rounds.add_gradient(W_dec, groups, update, alpha)    # before the optimiser's step
    rounds.correct_moment(exp_avg_sq, visited.rows, visited.grad, beta2)       # after it

A round is as many steps as it takes to visit every row once. A visit's gradient weighs as much as the round
has steps, so that over a round each row gets what it would get from the whole loss at every step. A loss need
not know: it is given blocks of features, and may look at any of W_dec.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sae_separation.losses import DecoderGrad, tangential

ROWS_A_STEP = 1024  # that a loss on W_dec looks at, where an arm's bounds allow it


def steps_of_round(d_sae: int, step_size: float, every: int, longest: int, gentle: float) -> int:
    """Optimiser steps of a round: as many as leave ROWS_A_STEP rows to each, at least `every`; at most
    `longest` with a `step_size` (alpha times learning rate) up to `gentle`, and fewer beyond."""
    most = round(longest * min(1.0, gentle / max(step_size, 1e-30)))
    return max(every, min(most, math.ceil(d_sae / ROWS_A_STEP)))


def share_of(n: int, part: int, parts: int) -> slice:
    """The part-th of `parts` nearly equal shares of n things; the larger and, of fewer things than parts, the
    first, come early."""
    return slice(-(-n * part // parts), -(-n * (part + 1) // parts))


class Rounds:
    """A loss on W_dec in rounds of `steps`. `loss` and `prepare` are as losses.py describes them; `every`:
    the steps of a round that the loss is meant to have (a published loss that comes at every 5th step has
    5)."""

    def __init__(self, loss: Callable, prepare: Callable, steps: int = 1, every: int = 1):
        self.loss, self.prepare, self.steps, self.every = loss, prepare, steps, every
        self.blocks, self.whole = torch.zeros(0, 1, dtype=torch.long), torch.zeros(0)

    def state(self) -> dict[str, Tensor]:
        """What the rest of a round depends on."""
        return {"round.blocks": self.blocks, "round.whole": self.whole}

    def restore(self, tensors: dict[str, Tensor]):
        self.blocks, self.whole = tensors["round.blocks"].cpu(), tensors["round.whole"]

    @torch.no_grad()
    def visit(self, W_dec: Tensor, groups: Tensor, update: int) -> DecoderGrad | None:
        """The loss of this step's share of the blocks, and its gradient, less the component along each row,
        which unit norm would undo. None where there are fewer blocks than steps and none is left."""
        part = update % self.steps
        if part == 0:
            self.blocks, self.whole = self.prepare(W_dec, groups)
        mine = self.blocks[share_of(len(self.blocks), part, self.steps)]
        if not len(mine):
            return None
        found = self.loss(W_dec, mine, self.whole)
        return replace(found, grad=tangential(found.grad, W_dec.index_select(0, found.rows)))

    @torch.no_grad()
    def add_gradient(self, W_dec: Tensor, groups: Tensor, update: int, alpha: Tensor) -> DecoderGrad | None:
        """Add `alpha` times the gradient of a visit, times the steps of a round, to W_dec.grad; returns it
        so."""
        visited = self.visit(W_dec, groups, update)
        if visited is not None and W_dec.grad is not None:
            visited.grad.mul_(self.steps * alpha)
            W_dec.grad.index_add_(0, visited.rows, visited.grad)
        return visited

    @torch.no_grad()
    def correct_moment(self, exp_avg_sq: Tensor, rows: Tensor, grad: Tensor, beta2: float):
        """Take from Adam's second moment [F, D] what a visit adds to it by coming at once: (n αp)² in n
        steps, where n / every times (every αp)² were meant. grad [R, D] is n αp. Without it the loss is
        weakened (notes.txt)."""
        if self.steps > self.every:
            too_much = (1 - self.every / self.steps) * (1 - beta2)
            squares = exp_avg_sq.index_select(0, rows).addcmul_(grad, grad, value=-too_much).clamp_(min=0)
            exp_avg_sq.index_copy_(0, rows, squares)
