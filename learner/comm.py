"""The ranks of a training step: who I am, and the two sums that ranks make together.

Every rank holds the whole batch and trains on its own micro-batches. A `Comm` of one rank does
nothing, so the step has one code path.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Comm:
    rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls) -> Comm:
        """The default process group where there is one (torchrun), else a single rank."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def gather(self, columns: Tensor) -> Tensor:
        """[k, T] columns of which every rank has filled its own tokens and left the others 0.

        Adding zeros changes no value, so the sum is the gathered table in canonical order.
        """
        if self.world_size > 1:
            distributed.all_reduce(columns)
        return columns

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Each rank's share of the loss is scaled by global counts: gradients add."""
        if self.world_size == 1:
            return
        held = [p for p in parameters if p.requires_grad]
        for p in held:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.reshape(-1) for p in held if p.grad is not None])
        distributed.all_reduce(flat)
        parts = torch.split(flat, [p.numel() for p in held])
        for p, part in zip(held, parts, strict=True):
            p.grad = part.view_as(p)
