"""What changed from one version to the next, as bytes: lossless, and the same however often it is
applied.

At reinforcement learning's rates a step moves few weights past the next bfloat16, so a version is
mostly the one before it. A patch names the changed elements and their *new* values (overwrite, not
add): frames one behind the other, each

    u64 first element · u32 count · u32, u32 bytes of the two parts · gaps · values

with the gap from each changed element to the one before it (u32, the first is 0) and the new values
(u16). Both parts are transposed into planes of bytes, of which the high ones hardly vary, and
compressed with zstd. Elements count from the front of the version's bytes (pull.py).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import zstandard

from common.errors import WeightsError
from common.versions import TensorLike

ITEM_BYTES = 2  # of the dtypes that can be patched
_HEAD = struct.Struct("<QIII")
_GAP, _VALUE = np.dtype("<u4"), np.dtype("<u2")
_LEVEL = 1  # of zstd: higher ones take longer for hardly less

Changes = tuple[np.ndarray, np.ndarray]  # elements (int64, rising), new values (uint16)


class Sizes(NamedTuple):
    slice: int = 1 << 20  # elements compared at once: they stay in the processor's cache
    frame: int = 1 << 20  # changes of a frame, about
    span: int = 1 << 31  # elements that a frame may reach over: a gap fits into its type


USUAL = Sizes()


def fits(tensors: Sequence[TensorLike]) -> bool:
    """Whether versions of these can be patched: 16 bits an element."""
    return bool(tensors) and all(tensor.dtype in ("BF16", "F16") for tensor in tensors)


def make(
    base: Sequence[TensorLike],
    result: Sequence[TensorLike],
    firsts: Sequence[int],
    most: int,
    sizes: Sizes = USUAL,
) -> list[bytes] | None:
    """The frames that turn `base` into `result`, tensors of the same names, dtypes and shapes.

    `firsts`: where each tensor begins in the version, in elements. None when there would be more
    than `most` bytes.
    """
    frames: list[bytes] = []
    for changes in _gather(_changes(base, result, firsts, sizes.slice), sizes):
        frames.append(_encode(*changes))
        if (most := most - len(frames[-1])) < 0:
            return None
    return frames


def apply(patch: memoryview, onto: np.ndarray) -> int:
    """Overwrite the changed elements of `onto` (uint16); how many they are.

    Raises WeightsError for a damaged patch. `onto` may have been changed then.
    """
    changed = 0
    while len(patch):
        try:
            (elements, values), patch = _decode(patch, onto.size)
        except (struct.error, zstandard.ZstdError, ValueError) as error:
            raise WeightsError(f"the patch is damaged: {error}") from None
        onto[elements] = values
        changed += elements.size
    return changed


def _changes(
    base: Sequence[TensorLike], result: Sequence[TensorLike], firsts: Sequence[int], size: int
) -> Iterator[Changes]:
    for old, new, first in zip(base, result, firsts, strict=True):
        before, after = np.frombuffer(old.data, _VALUE), np.frombuffer(new.data, _VALUE)
        for at in range(0, after.size, size):
            part = after[at : at + size]
            where = np.flatnonzero(before[at : at + size] != part)
            if where.size:
                yield where + (first + at), part[where]


def _gather(changes: Iterator[Changes], sizes: Sizes) -> Iterator[Changes]:
    """The same changes in larger pieces."""
    held: list[Changes] = []
    for elements, values in changes:
        if held and elements[-1] - held[0][0][0] >= sizes.span:
            yield _joined(held)
            held = []
        held.append((elements, values))
        if sum(e.size for e, _ in held) >= sizes.frame:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def _joined(held: list[Changes]) -> Changes:
    return np.concatenate([e for e, _ in held]), np.concatenate([v for _, v in held])


def _encode(elements: np.ndarray, values: np.ndarray) -> bytes:
    gaps = np.diff(elements, prepend=elements[:1])
    zstd = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    parts = [zstd.compress(_planes(gaps.astype(_GAP))), zstd.compress(_planes(values))]
    head = _HEAD.pack(int(elements[0]), elements.size, *map(len, parts))
    return b"".join((head, *parts))


def _decode(patch: memoryview, size: int) -> tuple[Changes, memoryview]:
    """The first frame, and what comes behind it. Raises ValueError and the libraries' errors."""
    first, count, of_gaps, of_values = _HEAD.unpack_from(patch)
    body = patch[_HEAD.size :]
    if not 0 < count <= size or of_gaps + of_values > len(body):
        raise ValueError(f"{count} changes in {len(body)} bytes")
    gaps = _from_planes(body[:of_gaps], _GAP, count)
    values = _from_planes(body[of_gaps : of_gaps + of_values], _VALUE, count)
    elements = np.cumsum(gaps, dtype=np.int64)
    if elements[-1] >= size - first:
        raise ValueError(f"element {int(elements[-1]) + first} of {size}")
    return (elements + first, values), body[of_gaps + of_values :]


def _planes(array: np.ndarray) -> Any:
    """[n] of k bytes each as k planes of n bytes."""
    return np.ascontiguousarray(array.view(np.uint8).reshape(-1, array.itemsize).T).data


def _from_planes(packed: memoryview, dtype: np.dtype[Any], count: int) -> np.ndarray:
    """Raises ValueError unless `packed` says that it is exactly as long as it should be: nothing
    is unpacked to a length of its own choice.
    """
    wanted = count * dtype.itemsize
    if (said := zstandard.frame_content_size(packed)) != wanted:
        raise ValueError(f"a part of {said} bytes in place of {wanted}")
    raw = zstandard.ZstdDecompressor().decompress(packed)
    planes = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, count)
    return np.ascontiguousarray(planes.T).view(dtype).reshape(count)
