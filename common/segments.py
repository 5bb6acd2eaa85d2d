"""One segment of the journal as bytes: records in, records out, and which bad bytes are forgiven.

    <incarnation>-<number>.journal   magic (8 bytes), then records
    record                           u32 payload bytes · u64 xxh3-64 of (length + payload) · payload
    payload of an admitted group     b"A" · i64 ticket · f64 at · the group's frame as received
    payload of anything else         b"R" · the record by codec.Codec

Integers are little-endian. Behind the last good record bad bytes are a torn tail, which a crash in
mid-write leaves, but only where a writer may have died: at an end that no successor has sealed.
Anywhere else they are damage.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from common.codec import Codec
from common.errors import JournalError, WireError
from common.records import Admit, AnyRecord, Open
from common.runfolder import incarnation_of

MAGIC = b"ISENJ\x00\x00\x01"  # the last byte is the version of the format
HEAD = struct.Struct("<IQ")
MAX_RECORD_BYTES = 1 << 30

_LENGTH = struct.Struct("<I")
_ADMIT = struct.Struct("<cqd")
_KINDS = (ord("A"), ord("R"))

Bytes = bytes | bytearray | memoryview


class Extent(NamedTuple):
    """The part of a segment that exists. `sealed`: its length, None where no successor said it."""

    path: Path
    sealed: int | None
    last: bool  # nothing of its incarnation follows

    @property
    def name(self) -> str:
        return self.path.stem


def record_codec() -> Codec:
    return Codec(AnyRecord, MAX_RECORD_BYTES)


def encode(record: AnyRecord, codec: Codec) -> list[Bytes]:
    """Head and payload in pieces; the frame of an Admit is one of them, not a copy."""
    payload: list[Bytes]
    if isinstance(record, Admit):
        payload = [_ADMIT.pack(b"A", record.ticket, record.at), record.frame]
    else:
        payload = [b"R", codec.encode(record)]
    length = sum(map(len, payload))
    if length > MAX_RECORD_BYTES:
        raise JournalError(f"a record of {length} bytes; at most {MAX_RECORD_BYTES} are allowed")
    return [HEAD.pack(length, _checksum(length, payload)), *payload]


def decode(payload: memoryview, codec: Codec, extent: Extent, offset: int) -> AnyRecord:
    """Copies what it keeps: a view would hold the whole segment while one ticket lives."""
    if payload[0] == ord("A") and len(payload) >= _ADMIT.size:
        _, ticket, at = _ADMIT.unpack_from(payload)
        return Admit(ticket=ticket, at=at, frame=bytes(payload[_ADMIT.size :]))
    try:
        record: AnyRecord = codec.decode(bytes(payload[1:]))
    except WireError as error:
        raise _damage(extent, offset, f"not a record of this version ({error})") from None
    return record


def segments(folder: Path) -> list[Path]:
    """The segment files, oldest first."""
    return sorted(path for path in folder.glob("*.journal") if incarnation_of(path.stem) > 0)


def extents(folder: Path) -> list[Extent]:
    """The segments that exist by the seals of their successors, oldest first.

    Read from the newest back, so that a zombie whose own segments lie behind a seal seals nothing.
    """
    found: list[Extent] = []
    limit: tuple[str, int] | None = None
    newer = 0
    for path in reversed(segments(folder)):
        if limit is not None and path.stem > limit[0]:
            continue
        sealed = limit[1] if limit is not None and path.stem == limit[0] else None
        incarnation = incarnation_of(path.stem)
        found.append(Extent(path, sealed, incarnation != newer))
        newer = incarnation
        limit = min(filter(None, (limit, _seal_in(path))), default=None)
    return found[::-1]


def payloads(extent: Extent, at: int = len(MAGIC)) -> Iterator[tuple[int, memoryview]]:
    """Offset and payload of every record from offset `at` on, up to the seal or the torn tail.

    Raises JournalError on damage.
    """
    data = memoryview(extent.path.read_bytes())
    if extent.sealed is not None:
        if len(data) < extent.sealed:
            raise _damage(extent, len(data), f"cut off; it had {extent.sealed} bytes")
        data = data[: extent.sealed]
    if data[: len(MAGIC)] != MAGIC:
        _check_beginning(extent, data)
        return
    if at > len(data):
        raise _damage(extent, len(data), f"cut off; it had {at} bytes or more")
    while at < len(data):
        payload = _payload_at(data, at)
        if payload is None:
            _check_tail(extent, data, at)
            return
        yield at, payload
        at += HEAD.size + len(payload)


def _seal_in(path: Path) -> tuple[str, int] | None:
    """What the first record of a segment seals, when it is an intact Open."""
    with path.open("rb") as file:
        data = file.read(len(MAGIC) + HEAD.size)
        if len(data) == len(MAGIC) + HEAD.size:
            data += file.read(min(HEAD.unpack_from(data, len(MAGIC))[0], MAX_RECORD_BYTES))
    payload = _payload_at(memoryview(data), len(MAGIC))
    if payload is None or payload[0] != ord("R"):
        return None
    try:
        record = record_codec().decode(bytes(payload[1:]))
    except WireError:
        return None  # whoever reads the segment says so
    return record.sealed if isinstance(record, Open) else None


def _payload_at(data: memoryview, at: int) -> memoryview | None:
    """The payload of the record at `at`, or None when no intact record is there."""
    if at + HEAD.size > len(data):
        return None
    length, checksum = HEAD.unpack_from(data, at)
    payload = data[at + HEAD.size : at + HEAD.size + length]
    if length == 0 or len(payload) != length or checksum != _checksum(length, (payload,)):
        return None
    return payload


def _check_beginning(extent: Extent, data: memoryview) -> None:
    """A segment without its magic: fine when nothing was ever finished in it."""
    if len(data) == 0 and extent.sealed is not None:
        return
    if len(data) >= len(MAGIC) and data[: len(MAGIC) - 1] == MAGIC[:-1]:
        version = data[len(MAGIC) - 1]
        raise _damage(extent, 0, f"written in format {version}; this version reads {MAGIC[-1]}")
    _check_tail(extent, data, 0)


def _check_tail(extent: Extent, data: memoryview, at: int) -> None:
    """Bad bytes at `at`: fine where a writer may have died, unless good records follow."""
    if extent.sealed is not None or not extent.last:
        raise _damage(extent, at, "a damaged record, and more was written after it")
    follower = _next_good(data, at + 1)
    if follower is not None:
        raise _damage(extent, at, f"a damaged record, with a good one behind it at {follower}")


def _next_good(data: memoryview, at: int) -> int | None:
    """Offset of the first intact record from `at` on, wherever it begins."""
    tail = np.frombuffer(data, np.uint8)[at:]
    starts = tail.size - HEAD.size  # a record has a payload of at least one byte
    if starts <= 0:
        return None
    lengths = np.zeros(starts, np.uint32)
    for i in range(4):
        lengths |= tail[i : i + starts].astype(np.uint32) << np.uint32(8 * i)
    kinds = tail[HEAD.size : HEAD.size + starts]
    fits = (lengths > 0) & (lengths <= starts - np.arange(starts)) & np.isin(kinds, _KINDS)
    candidates = (at + int(i) for i in np.flatnonzero(fits))
    return next((i for i in candidates if _payload_at(data, i) is not None), None)


def _checksum(length: int, pieces: Sequence[Bytes]) -> int:
    digest = xxhash.xxh3_64(_LENGTH.pack(length))
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()


def _damage(extent: Extent, offset: int, what: str) -> JournalError:
    return JournalError(f"{extent.path}, offset {offset}: {what}; restore the run from a copy")
