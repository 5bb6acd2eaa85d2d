"""The ranks of a learner: who I am, and what ranks say to each other.

Rank 0 leads. The others wait for an order, do with it what rank 0 does at the same time, and wait
again. What travels is plain: an order and a length as int64, bytes (MessagePack) as uint8, and
tensors end to end as uint8 behind an int64 header. torch's own ways to send objects pickle them.

Messages go over gloo between CPUs, whatever sums gradients. A `Comm` of one rank says nothing and
adds nothing, so the learner has one code path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor, distributed

_DTYPES = (torch.float32, torch.int64, torch.int32, torch.bool, torch.uint8)
_ALIGN = 8  # bytes: where every tensor of a message begins


class Order(IntEnum):
    """What rank 0 tells the others to do with it."""

    STOP = 0
    BEAT = 1  # answer that you are there
    MAKE = 2  # version 0 of the run's model
    LOAD = 3  # a checkpoint
    STEP = 4
    SNAPSHOT = 5  # keep your slices as they are to be published
    SAVE = 6  # write your shard of a checkpoint
    SHOW = 7  # your slice of one tensor that is to be published
    EXPORT = 8  # show your slices of all parameters, one after the other


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

    @property
    def leads(self) -> bool:
        """Whether others wait for this rank's orders."""
        return self.world_size > 1 and self.rank == 0

    # ---- orders --------------------------------------------------------------------------------

    def say(self, order: Order, facts: bytes = b"") -> None:
        """Rank 0; heard by every other rank. Alone: nothing."""
        if self.leads:
            distributed.broadcast(torch.tensor([int(order), len(facts)]), 0)
            self._bytes(facts, len(facts))

    def beat(self) -> None:
        """Rank 0, while it waits for something else: is everybody there?"""
        if self.leads:
            self.say(Order.BEAT)
            self.meet()

    def hear(self) -> tuple[Order, bytes]:
        """Wait for rank 0's next order (until its beat fails to come)."""
        head = torch.zeros(2, dtype=torch.int64)
        distributed.broadcast(head, 0)
        order, size = head.tolist()
        return Order(order), self._bytes(b"", size)

    def _bytes(self, mine: bytes, size: int) -> bytes:
        if not size:
            return b""
        flat = torch.empty(size, dtype=torch.uint8)
        if mine:
            flat.copy_(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
        distributed.broadcast(flat, 0)
        return flat.numpy().tobytes()

    # ---- tensors -------------------------------------------------------------------------------

    def broadcast(self, tensors: Sequence[Tensor] = ()) -> list[Tensor]:
        """Rank 0's `tensors`, on the CPU, everywhere."""
        header, body = _flat(tensors)
        size = torch.tensor([header.numel(), body.numel()])
        distributed.broadcast(size, 0)
        if self.rank:
            header, body = _room(size)
        distributed.broadcast(header, 0)
        distributed.broadcast(body, 0)
        return _apart(header, body)

    def scatter(self, shares: Sequence[Sequence[Tensor]] = ()) -> list[Tensor]:
        """This rank's of rank 0's `shares`, which are one a rank and may differ in size."""
        if self.rank:
            size = torch.zeros(2, dtype=torch.int64)
            distributed.recv(size, 0)
            header, body = _room(size)
            distributed.recv(header, 0)
            distributed.recv(body, 0)
            return _apart(header, body)
        for rank, share in enumerate(shares):
            if rank:
                header, body = _flat(share)
                distributed.send(torch.tensor([header.numel(), body.numel()]), rank)
                distributed.send(header, rank)
                distributed.send(body, rank)
        return list(shares[0])

    def gather(self, columns: Tensor) -> Tensor:
        """[k, T] columns of which every rank has filled its own tokens and left the others 0.

        Adding zeros changes no value, so the sum is the gathered table in canonical order.
        """
        if self.world_size > 1:
            distributed.all_reduce(columns)
        return columns

    def collect(self, words: Sequence[bytes]) -> list[list[bytes]]:
        """Every rank's `words`, of equal lengths on all ranks: `result[rank][word]`."""
        sizes = [len(word) for word in words]
        mine = torch.frombuffer(bytearray(b"".join(words)), dtype=torch.uint8)
        if self.world_size == 1:
            return [list(words)]
        found = [torch.empty_like(mine) for _ in range(self.world_size)]
        distributed.all_gather(found, mine)
        return [[part.numpy().tobytes() for part in torch.split(f, sizes)] for f in found]

    def meet(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            distributed.all_reduce(torch.zeros(1))


def _flat(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Header: of each its dtype's number, dimensions and shape; body: their bytes, aligned."""
    header: list[int] = [len(tensors)]
    parts: list[Tensor] = []
    for tensor in tensors:
        header += [_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape]
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        parts += [data, data.new_zeros(-data.numel() % _ALIGN)]
    body = torch.cat([*parts, torch.zeros(_ALIGN, dtype=torch.uint8)])  # never empty
    return torch.tensor(header), body


def _room(size: Tensor) -> tuple[Tensor, Tensor]:
    words, nbytes = size.tolist()
    return torch.empty(words, dtype=torch.int64), torch.empty(nbytes, dtype=torch.uint8)


def _apart(header: Tensor, body: Tensor) -> list[Tensor]:
    count, *rest = header.tolist()
    tensors, at = [], 0
    for _ in range(count):
        dtype, dims, *rest = rest
        shape, rest = rest[:dims], rest[dims:]
        nbytes = math.prod(shape) * _DTYPES[dtype].itemsize
        tensors.append(body[at : at + nbytes].view(_DTYPES[dtype]).reshape(shape))
        at += nbytes + -nbytes % _ALIGN
    return tensors
