"""A version of many ranks: each keeps its slices as they are to be published, and rank 0 has
tensors whose bytes are gathered when somebody asks for them, one tensor at a time. No rank ever
holds a whole version.

    rank 0      take() ──▶ Gathered, Gathered, …      .data ──▶ SHOW n, name ──▶ the bytes
    others      keep() their slices                             show() theirs

Slices stay until rank 0 has forgotten every tensor of their version, so that the one before can
still be compared with and one that Redis lost can be published again.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from learner import shard
from learner.comm import Comm, Order

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CODES = {"fp32": "F32", "bf16": "BF16"}  # safetensors' names


class Take(msgspec.Struct, frozen=True):
    """Keep your slices under this number, and of the earlier ones those of these numbers."""

    number: int
    dtype: str
    earlier: list[int]


class Show(msgspec.Struct, frozen=True):
    number: int
    name: str


@dataclass(eq=False)  # compared and hashed by identity: it is referred to weakly
class Kept:
    """One rank's slices of a version, on the CPU, by the names of the parameters they are of."""

    number: int
    slices: dict[str, Tensor]
    parameters: Mapping[str, Tensor]

    def whole(self, name: str) -> Tensor:
        """[a whole tensor], on the CPU; every rank calls it for the same name."""
        parameter = self.parameters[name]
        mine = self.slices[name].to(parameter.device)
        return shard.whole(shard.beside(mine, parameter)).to("cpu").contiguous()


@dataclass
class Shelf:
    """What one rank keeps. Rank 0 keeps what its tensors refer to; the others what they are told
    to.
    """

    kept: dict[int, Kept] = field(default_factory=dict)
    alive: weakref.WeakValueDictionary[int, Kept] = field(
        default_factory=weakref.WeakValueDictionary
    )
    numbers: itertools.count[int] = field(default_factory=itertools.count)


@dataclass(frozen=True)
class Gathered:
    """A tensor of a version, on rank 0: as common.versions.Tensor, but for where its bytes are."""

    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    kept: Kept

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.kept.slices[self.name].itemsize

    @property
    def data(self) -> memoryview:
        """Gathered anew each time; the other ranks wait for orders meanwhile."""
        order = Show(self.kept.number, self.name)
        Comm.current().say(Order.SHOW, msgspec.msgpack.encode(order))
        flat = self.kept.whole(self.name).reshape(-1)
        return flat.view(torch.uint8).numpy().data.toreadonly()


def take(parameters: Mapping[str, Tensor], dtype: str, shelf: Shelf) -> tuple[Gathered, ...]:
    """Rank 0's part: a version as the parameters are now, which later steps do not touch."""
    order = Take(next(shelf.numbers), dtype, sorted(shelf.alive))
    Comm.current().say(Order.SNAPSHOT, msgspec.msgpack.encode(order))
    kept = _kept(parameters, order)
    shelf.alive[order.number] = kept
    return tuple(Gathered(k, CODES[dtype], tuple(p.shape), kept) for k, p in parameters.items())


def keep(parameters: Mapping[str, Tensor], facts: bytes, shelf: Shelf) -> None:
    """Any other rank's part of it."""
    order = msgspec.msgpack.decode(facts, type=Take)
    shelf.kept = {n: kept for n, kept in shelf.kept.items() if n in order.earlier}
    shelf.kept[order.number] = _kept(parameters, order)


def show(facts: bytes, shelf: Shelf) -> None:
    """Any other rank's part when rank 0 looks at the bytes of a tensor."""
    order = msgspec.msgpack.decode(facts, type=Show)
    shelf.kept[order.number].whole(order.name)


def _kept(parameters: Mapping[str, Tensor], order: Take) -> Kept:
    dtype = DTYPES[order.dtype]
    slices = {k: shard.local(p.detach()).to("cpu", dtype, copy=True) for k, p in parameters.items()}
    return Kept(order.number, slices, parameters)


def is_cut(parameters: Mapping[str, Tensor]) -> bool:
    """Whether these are slices, so that there are other ranks to ask."""
    return any(isinstance(parameter, DTensor) for parameter in parameters.values())
