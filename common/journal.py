"""The journal: an append-only list of records, durable in groups, one folder of segment files.

A learner writes segments of its own incarnation only (segments.py has the bytes). Its first record,
Open, seals its predecessors at (segment, length): whatever they write later does not exist.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

from common.errors import JournalError
from common.records import AnyRecord, Open
from common.runfolder import incarnation_of, sync_folder
from common.segments import (
    HEAD,
    MAGIC,
    Bytes,
    decode,
    encode,
    extents,
    payloads,
    record_codec,
    segments,
)

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_IOV_MAX = 1024  # pieces that one call takes on Linux
_sync = getattr(os, "fdatasync", os.fsync)  # either makes the size of a grown file durable


class Position(NamedTuple):
    """Where a record starts. Positions of one journal compare in journal order."""

    segment: str
    offset: int


class DiskFull(JournalError):
    """Nothing is lost: what was appended is still pending, and a later commit may succeed."""


@dataclass(slots=True)
class _Batch:
    """Bytes to be written at one place: what one commit makes durable in one segment."""

    number: int  # of the segment
    start: int  # offset of its first byte
    size: int = 0
    pieces: list[Bytes] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + self.size

    def add(self, pieces: Sequence[Bytes]) -> None:
        self.pieces += pieces
        self.size += sum(map(len, pieces))


class Journal:
    """The one writer. Opens no file before the first commit.

    One thread appends. Another one may `commit` meanwhile: what is appended after a commit began
    belongs to the next.
    """

    def __init__(self, folder: Path, incarnation: int, segment_bytes: int = 64 << 20) -> None:
        newest = max((incarnation_of(path.stem) for path in segments(folder)), default=0)
        if newest >= incarnation:
            raise JournalError(
                f"{folder} was written by incarnation {newest}; {incarnation} may write no more"
            )
        self.folder = folder
        self.incarnation = incarnation
        self.segment_bytes = segment_bytes
        self._codec = record_codec()
        self._broken = ""  # why no later call may succeed
        self._fd: int | None = None
        self._number = -1  # of the segment that is open
        self._lock = threading.Lock()  # for the list of batches and the last of them
        self._pending = [_beginning(0)]  # all but the last have been tried, and met a full disk
        self._last = self._pending[0]  # it grows, or is being written

    def append(self, record: AnyRecord) -> Position:
        """Queue a record for the next commit. An Admit's frame is kept by reference until then."""
        self._check()
        pieces = encode(record, self._codec)
        with self._lock:
            batch = self._growing()
            start = Position(self._name(batch.number), batch.end)
            batch.add(pieces)
        if start == Position(self._name(0), len(MAGIC)):
            assert isinstance(record, Open), "the first record of an incarnation is its Open"
        return start

    def commit(self) -> None:
        """Make everything appended durable: one write, one fsync.

        Raises DiskFull, after which it may be called again, or a JournalError that is final.
        """
        self._check()
        with self._lock:
            batches, self._pending = self._pending, []
        try:
            while batches:
                self._write(batches[0])
                del batches[0]
        finally:
            with self._lock:
                self._pending[:0] = batches

    def end(self) -> Position:
        """Where the next record starts."""
        with self._lock:
            return Position(self._name(self._last.number), self._last.end)

    def prune(self, oldest: Position) -> None:
        """Delete the segments that end before `oldest`, the oldest first."""
        for path in segments(self.folder):
            if path.stem < oldest.segment:
                path.unlink()

    def close(self) -> None:
        """Commit what is pending (unless the journal is broken) and close the file."""
        if not self._broken:
            self.commit()
        self._broken = self._broken or "it is closed"
        self._close_segment()

    def _name(self, number: int) -> str:
        return f"{self.incarnation:06d}-{number:06d}"

    def _growing(self) -> _Batch:
        """The batch for the next record; a new one once the last is on its way to the disk."""
        last = self._last
        if not self._pending or self._pending[-1] is not last:
            full = last.end >= self.segment_bytes
            self._last = _beginning(last.number + 1) if full else _Batch(last.number, last.end)
            self._pending.append(self._last)
        return self._last

    def _close_segment(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _segment(self, number: int) -> int:
        """The open file of segment `number`, which is the last one or a new one."""
        if self._fd is None or number != self._number:
            self._close_segment()
            self._fd, self._number = self._create(self._name(number)), number
        return self._fd

    def _create(self, name: str) -> int:
        path = self.folder / f"{name}.journal"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            sync_folder(self.folder)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise DiskFull(f"no space for {path}; free some, nothing is lost") from None
            self._fail(f"cannot create {path} ({error.strerror})")
        return fd

    def _write(self, batch: _Batch) -> None:
        """A batch behind what is durable; a full disk leaves the segment as it was."""
        fd, at = self._segment(batch.number), batch.start
        try:
            for first in range(0, len(batch.pieces), _IOV_MAX):
                at = _write_all(fd, batch.pieces[first : first + _IOV_MAX], at)
        except OSError as error:
            if error.errno not in NO_SPACE:
                self._fail(
                    f"write failed ({error.strerror}); restart the learner once the disk is sound"
                )
            self._cut_back(fd, batch.start)
            raise DiskFull(
                f"no space for {batch.size} bytes of journal in {self.folder}; "
                "free some, nothing is lost"
            ) from None
        self._sync(fd)

    def _sync(self, fd: int) -> None:
        try:
            _sync(fd)
        except OSError as error:
            # the kernel may have dropped the pages: a second fsync could bless bytes that are gone
            self._fail(
                f"fsync failed ({error.strerror}); restart the learner once the disk is sound"
            )

    def _cut_back(self, fd: int, length: int) -> None:
        try:
            os.ftruncate(fd, length)
        except OSError as error:
            self._fail(f"half-written records could not be cut off ({error.strerror})")

    def _check(self) -> None:
        if self._broken:
            self._fail(self._broken)

    def _fail(self, why: str) -> NoReturn:
        self._broken = why
        raise JournalError(f"the journal {self.folder} can not be written any more: {why}")


def _beginning(number: int) -> _Batch:
    """Of a new segment."""
    return _Batch(number, 0, len(MAGIC), [MAGIC])


def read(folder: Path, start: Position | None = None) -> Iterator[tuple[Position, AnyRecord]]:
    """Every record from `start` (default: the oldest) with its position, in journal order.

    Raises JournalError naming segment and offset of a damaged record, or when `start` is gone.
    """
    codec = record_codec()
    found = extents(folder)
    if start is not None and start.segment not in {extent.name for extent in found}:
        raise JournalError(
            f"{folder} has no segment {start.segment}; it was pruned, or is another run's"
        )
    for extent in found:
        if start is None or extent.name >= start.segment:
            first = start.offset if start and extent.name == start.segment else len(MAGIC)
            for offset, payload in payloads(extent, first):
                yield Position(extent.name, offset), decode(payload, codec, extent, offset)


def seal_of(folder: Path) -> tuple[str, int] | None:
    """(name, good length) of the last segment with a record, for the successor's Open.

    Its torn tail is cut off. None when the journal has no segment. Raises JournalError on damage.
    """
    found = extents(folder)
    for extent in reversed(found):
        good = 0
        for offset, payload in payloads(extent):
            good = offset + HEAD.size + len(payload)
        if good:
            _cut(extent.path, good)
            return extent.name, good
    return (found[0].name, 0) if found else None


def _cut(path: Path, length: int) -> None:
    with path.open("r+b") as file:
        file.truncate(length)
        os.fsync(file.fileno())


def _write_all(fd: int, pieces: list[Bytes], at: int) -> int:
    """Write at offset `at`, also where the kernel takes only parts; returns the end's offset."""
    left = [memoryview(piece) for piece in pieces]
    while left:
        taken = os.pwritev(fd, left, at)
        at += taken
        while left and taken >= len(left[0]):
            taken -= len(left.pop(0))
        if taken:
            left[0] = left[0][taken:]
    return at
