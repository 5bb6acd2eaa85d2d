"""The tensors of a checkpoint, line by line, from whatever files they are in (common/shards.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common import shards
from common.errors import JournalError
from learner.comm import Comm


class Pieces:
    """For this rank: it reads the lines that are its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.index = shards.Index.load(folder)
        self._comm = Comm.current()

    def names(self, stem: str) -> list[str]:
        with self._file(stem, 0) as file:
            return list(file.keys())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all weights, whole."""
        if self.index.ranks > 1:
            return self.index.shapes
        with self._file(shards.WEIGHTS, 0) as file:
            names = list(file.keys())
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}

    def lines(self, stem: str, name: str, master: Tensor) -> Tensor:
        """This rank's lines of a tensor that is cut like `master`; a number is every rank's."""
        with self._file(stem, 0) as file:
            part = file.get_slice(name)
            if not part.get_shape():
                return torch.clone(file.get_tensor(name))
            found = [part[0:0]]
        comm, ranks, length = self._comm, self.index.ranks, master.shape[0]
        first, last = shards.lines(length, comm.rank, comm.world_size)
        for rank in range(ranks):
            lo, hi = shards.lines(length, rank, ranks)
            begin, end = max(first, lo), min(last, hi)
            if begin < end:
                with self._file(stem, rank) as file:
                    found.append(file.get_slice(name)[begin - lo : end - lo])
        return torch.cat(found)

    def rng(self) -> Tensor:
        """torch's random state: this rank's own where as many ranks wrote, else rank 0's."""
        same = self.index.ranks == self._comm.world_size
        with self._file(shards.MOMENTS, self._comm.rank if same else 0) as file:
            state: Tensor = file.get_tensor("rng")
            return state.clone()

    def _file(self, stem: str, rank: int) -> Any:
        path = self._folder / shards.name(stem, rank, self.index.ranks)
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise JournalError(f"{path}: {error}") from None
