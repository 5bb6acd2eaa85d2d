"""A weight version on its way into vLLM's workers: one file in memory.

The actor writes the pulled and verified tensors once; each worker maps the file, compares the
digest again and loads views of it. Nothing is pickled, and tensor-parallel workers share the pages.

    8 bytes: length of the header · the header (JSON) · zeros · tensors, each at a multiple of 64
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import msgspec

from common.errors import DataError, WeightsError
from common.pull import ALIGNMENT
from common.versions import Entry, Tensor, Weights, begin_digest

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of an element; the dtypes we take
_HEAD = 8


class Header(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    digest: str
    tensors: tuple[Entry, ...]  # in name order; offsets from the start of the file
    frozen: tuple[str, ...]  # tensors to take from the checkpoint beside them


class Checkpoint:
    """The model's tensors as its safetensors files declare them: names and shapes."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError when the folder has no usable safetensors."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise DataError(f"model {folder} has no *.safetensors, which weight updates need")
        for path in files:
            self.shapes |= _declared(path)

    def check(self, weights: Weights, trained: frozenset[str]) -> None:
        """Raises WeightsError when `weights` does not fit the model, or lacks a tensor of
        `trained`: without those the model would be a mixture of two versions."""
        names = {tensor.name for tensor in weights.tensors}
        if lost := sorted(trained - names):
            raise WeightsError(
                f"version {weights.version} lacks {lost[0]!r}, which the version served now has"
            )
        for tensor in weights.tensors:
            self._check(tensor, f"version {weights.version}: tensor {tensor.name!r}")

    def beside(self, names: Sequence[str]) -> tuple[str, ...]:
        """The other tensors of the layers that `names` touch: vLLM keeps several of them in one
        parameter, which is loaded as a whole."""
        touched = {_layer(name) for name in names}
        given = set(names)
        return tuple(n for n in self.shapes if n not in given and _layer(n) in touched)

    def _check(self, tensor: Tensor, where: str) -> None:
        shape = self.shapes.get(tensor.name)
        if shape is None:
            raise WeightsError(f"{where} is no parameter of the model")
        if tuple(tensor.shape) != shape:
            raise WeightsError(f"{where} has shape {tuple(tensor.shape)}, the model's is {shape}")
        if tensor.dtype not in _SIZES:
            raise WeightsError(f"{where} has dtype {tensor.dtype}; known are {', '.join(_SIZES)}")
        needed = math.prod(shape) * _SIZES[tensor.dtype]
        if tensor.data.nbytes != needed:
            raise WeightsError(
                f"{where} has {tensor.data.nbytes} bytes, its shape and dtype say {needed}"
            )


class Spool:
    """A version in memory that other processes open by `path`, until it is closed."""

    def __init__(self, weights: Weights, frozen: tuple[str, ...]) -> None:
        """Raises WeightsError when there is no memory for it.

        On Linux it is memory without a name: it needs no room in /dev/shm, and nothing of it is
        left when the actor is killed.
        """
        self._file, self.path = _open()
        try:
            _fill(self._file, weights, frozen)
        except OSError as error:
            self.close()
            raise WeightsError(
                f"version {weights.version} could not be handed over: {error.strerror}"
            ) from None

    def close(self) -> None:
        """Whoever has mapped it keeps it."""
        self._file.close()
        if not self.path.is_relative_to("/proc"):
            self.path.unlink(missing_ok=True)


def read(path: Path) -> tuple[Header, mmap.mmap]:
    """The header and the mapped file, its digest compared. Raises WeightsError."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        length = int.from_bytes(mapped[:_HEAD], "little")
        header = msgspec.json.decode(mapped[_HEAD : _HEAD + length], type=Header)
    except (OSError, ValueError) as error:
        raise WeightsError(f"spool {path} is unreadable: {error}") from None
    content = begin_digest([(e.name, e.dtype, e.shape) for e in header.tensors])
    with memoryview(mapped) as whole:
        for entry in header.tensors:
            with whole[entry.offset : entry.offset + entry.nbytes] as part:
                content.update(part)
    if content.hexdigest() != header.digest:
        raise WeightsError(
            f"version {header.version}: the spool's digest is {content.hexdigest()}, "
            f"not {header.digest}"
        )
    return header, mapped


def _open() -> tuple[BinaryIO, Path]:
    if sys.platform == "linux":
        fd = os.memfd_create("isentrope-weights")
        return os.fdopen(fd, "wb"), Path(f"/proc/{os.getpid()}/fd/{fd}")
    file = tempfile.NamedTemporaryFile(prefix="isentrope-weights-", delete=False)  # noqa: SIM115
    return cast("BinaryIO", file), Path(file.name)


def _fill(file: BinaryIO, weights: Weights, frozen: tuple[str, ...]) -> None:
    ordered = sorted(weights.tensors, key=lambda tensor: tensor.name)
    entries, start = _lay_out(ordered, 0), 0
    while True:  # the header's length depends on the offsets that it names
        inner = _encode(weights, entries, frozen)
        if start >= _HEAD + len(inner):
            break
        start = _aligned(_HEAD + len(inner) + ALIGNMENT)
        entries = _lay_out(ordered, start)
    file.write(len(inner).to_bytes(_HEAD, "little") + inner)
    for entry, tensor in zip(entries, ordered, strict=True):
        file.seek(entry.offset)
        file.write(tensor.data)
    file.flush()


def _encode(weights: Weights, entries: Sequence[Entry], frozen: tuple[str, ...]) -> bytes:
    return msgspec.json.encode(
        Header(
            version=weights.version,
            digest=weights.digest,
            tensors=tuple(entries),
            frozen=frozen,
        )
    )


def _lay_out(ordered: Sequence[Tensor], start: int) -> list[Entry]:
    entries, at = [], start
    for t in ordered:
        at = _aligned(at)
        size = t.data.nbytes
        entries.append(Entry(name=t.name, dtype=t.dtype, shape=t.shape, offset=at, nbytes=size))
        at += size
    return entries


def _aligned(at: int) -> int:
    return at + -at % ALIGNMENT


def _declared(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the tensors of a safetensors file: its header is JSON behind its length."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = msgspec.json.decode(file.read(length), type=dict[str, Mapping[str, object]])
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is unreadable: {error}") from None
    header.pop("__metadata__", None)
    return ((name, tuple(entry["shape"])) for name, entry in header.items())  # type: ignore[arg-type]


def _layer(name: str) -> tuple[str, ...]:
    """Tensors with the same answer belong to one decoder layer, or to one module outside of them.

    As in vLLM's layerwise transfer the outermost number in a name is the layer's.
    """
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return tuple(parts[: index + 1])
    return tuple(parts[:-1])
