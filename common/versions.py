"""Weight versions: what they are. (Registry in Redis below; blobs in stores.py.)"""
from __future__ import annotations

from typing import NamedTuple


class Tensor(NamedTuple):
    """One tensor as bytes: common never imports torch."""

    name: str
    dtype: str  # safetensors' names: "F32", "BF16", "F16", …
    shape: tuple[int, ...]
    data: memoryview  # contiguous little-endian bytes


class Weights(NamedTuple):
    """A verified version, ready to be loaded. `tensors` are those that are trained, over base version 0."""

    version: int
    digest: str
    tensors: tuple[Tensor, ...]
