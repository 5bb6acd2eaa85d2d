"""The blobs of a manifest, received into one buffer: two at a time, from where an earlier attempt
broke off.

What came of a pull that breaks stays where it is, and is told by blob: bytes [0, there) have
arrived. The next attempt at the same blobs, which are named by content, asks for the rest only.
Nobody trusts these bytes before the digest of the whole has been compared (pull.py); when that is
wrong, all of them are forgotten.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from common.errors import DeadlineError, WeightsError
from common.stores import Source
from common.versions import Blob, Manifest

log = logging.getLogger(__name__)

_READERS = 2  # blobs on their way at once: one is received while the one before is hashed


@dataclass
class Room:
    """Where blobs arrive, one behind the other."""

    data: memoryview
    there: dict[str, int] = field(default_factory=dict)  # of each blob, bytes from its front

    def apart(self) -> Room:
        """The same bytes where nobody else writes."""
        there = dict(self.there)
        data = np.empty(len(self.data), np.uint8).data
        data[:] = self.data
        return Room(data, there)


class Unfinished:
    """What came of pulls that broke. Of one actor, which pulls one version at a time."""

    def __init__(self) -> None:
        self._rooms: dict[tuple[Blob, ...], Room] = {}

    def only(self, manifests: Sequence[Manifest]) -> None:
        """Forget what none of these is made of."""
        wanted = {manifest.blobs for manifest in manifests}
        self._rooms = {blobs: room for blobs, room in self._rooms.items() if blobs in wanted}

    def forget(self) -> None:
        self._rooms = {}

    def receive(
        self,
        source: Source,
        manifest: Manifest,
        silence_s: float,
        arrived: Callable[[memoryview, int], None] = lambda _room, _nbytes: None,
    ) -> memoryview:
        """All blobs of a manifest; `arrived` is told of each, in order: the room, its bytes.

        Raises WeightsError (a blob is missing or of another size, no memory) and DeadlineError:
        no byte came for `silence_s`. What is there then is kept.
        """
        room = self._rooms.get(manifest.blobs)
        if room is None:
            room = Room(room_for(manifest, sum(blob.nbytes for blob in manifest.blobs)))
        elif there := sum(room.there.values()):
            said = "version %d: going on at byte %d of %d"
            log.info(said, manifest.version, there, len(room.data))
        self._rooms[manifest.blobs] = room
        progress = _Progress(room)
        readers = ThreadPoolExecutor(_READERS, "fetch")
        coming = _start(readers, source, manifest.blobs, room, progress)
        try:
            for blob, future in zip(manifest.blobs, coming, strict=True):
                if not progress.until(future, silence_s):
                    raise DeadlineError(
                        f"version {manifest.version}: no byte came for {silence_s:g} s; "
                        f"{sum(room.there.values())} of {len(room.data)} are there"
                    )
                _result(future, blob, room)
                arrived(room.data, blob.nbytes)
        finally:
            progress.is_over = True
            readers.shutdown(wait=False, cancel_futures=True)
            if not all(future.done() for future in coming):
                self._rooms[manifest.blobs] = room.apart()  # a reader left behind may yet write
        return room.data


def room_for(manifest: Manifest, nbytes: int) -> memoryview:
    """Raises WeightsError: what a manifest asks for is more than there is."""
    try:
        return np.empty(nbytes, np.uint8).data
    except (MemoryError, ValueError):  # ValueError: no machine could address it
        raise WeightsError(f"version {manifest.version}: no memory for {nbytes} bytes") from None


def _result(future: Future[None], blob: Blob, room: Room) -> None:
    try:
        future.result()
    except WeightsError:
        room.there.pop(blob.key, None)  # what it was before may not be what it is said to be
        raise


class _Progress:
    """When the last bytes came, whichever reader's; readers left behind end at their next bytes."""

    def __init__(self, room: Room) -> None:
        self.is_over = False
        self._room = room
        self._at = time.monotonic()

    def note(self, key: str, there: int) -> None:
        if self.is_over:
            raise WeightsError("nobody waits for this blob any more")
        self._room.there[key] = there
        self._at = time.monotonic()

    def until(self, future: Future[None], silence_s: float) -> bool:
        """False: there was none for so long."""
        while not wait([future], max(0.0, self._at + silence_s - time.monotonic())).done:
            if time.monotonic() >= self._at + silence_s:
                return False
        return True


def _start(
    readers: ThreadPoolExecutor,
    source: Source,
    blobs: Sequence[Blob],
    room: Room,
    progress: _Progress,
) -> list[Future[None]]:
    coming, start = [], 0
    for blob in blobs:
        into = room.data[start : start + blob.nbytes]
        start += blob.nbytes
        at = room.there.get(blob.key, 0)
        if at == blob.nbytes:
            future: Future[None] = Future()
            future.set_result(None)
        else:
            future = readers.submit(source.get, blob.key, into, progress.note, at)
        coming.append(future)
    return coming
