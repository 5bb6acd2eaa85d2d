"""The `learner` store, as the learner sees it: it keeps the blobs of the versions that the registry
keeps, and a thread of its own gives them to whoever is admitted (common/blobs.py asks).

Nothing is copied: the blobs are the very tensors that were published, and go to the socket from
where they lie. Actors ask for one chunk at a time, so what is under way to one of them is bounded
by its own credit, and by a high-water mark for one that asks and does not read.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq

from common import blobs, keys
from common.blobs import CHUNK, ENCODER, MAX_ASK, Ask, Part, nothing
from common.channel import Keys, bind_router
from common.config import RunConfig
from common.stores import Store, open_store
from common.versions import Registry, wrong_size

log = logging.getLogger("isentrope.blobs")

HIGH_WATER = 64  # answers queued for one connection; more than any honest one asks for at once
IO_THREADS = 2  # encryption is theirs


def open_blobs(run: RunConfig, registry: Registry, incarnation: int) -> Store:
    """The learner's store, by `[run] store`. Raises ConfigError: the endpoint cannot be bound, or
    leaves loopback without keys.
    """
    if run.store.partition(":")[0] != "learner":
        return open_store(run.store, registry)
    endpoint = blobs.bind_address(run.learner, run.store)
    return ServedStore(registry, incarnation, endpoint, keys.read(run.keys))


class ServedStore:
    blob_bytes = 32 << 20

    def __init__(
        self, registry: Registry, incarnation: int, endpoint: str, keys: Keys | None = None
    ) -> None:
        """Serves from here on. Raises ConfigError."""
        self.refused: Counter[str] = Counter()  # frames, by reason
        self._registry, self._incarnation = registry, incarnation
        self._blobs: dict[str, _Blob] = {}
        # a context of its own: it has its own list of admitted keys, and ends with the store
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(IO_THREADS)
        try:
            socket, self.endpoint = bind_router(
                self._context, endpoint, keys, MAX_ASK, answers=HIGH_WATER
            )
        except BaseException:  # Ctrl-C too: a context left open would hold the process at its end
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._serve, args=(socket,), name="blobs")
        self._thread.daemon = True
        self._thread.start()
        log.info("serving blobs on %s", self.endpoint)

    def put(self, key: str, data: Sequence[memoryview]) -> None:
        """Keeps the pieces themselves: they must not change any more."""
        self._blobs[key] = _Blob([piece for piece in data if len(piece)])
        self._registry.serve(self._incarnation, self.endpoint)

    def get(
        self, key: str, into: memoryview, note: Callable[[str, int], None] = nothing, at: int = 0
    ) -> None:
        held = self._blobs.get(key)
        if held is None or held.total != len(into):
            raise wrong_size(key, held.total if held else 0, len(into))
        into[at:] = held.part(at, held.total - at)
        note(key, held.total)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """All of them, when the registry has forgotten where they are."""
        known = self._registry.served() == self.endpoint
        return [key for key in keys if not known or key not in self._blobs]

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._blobs.pop(key, None)

    def list(self) -> list[str]:
        return sorted(self._blobs)

    def close(self) -> None:
        self._context.term()  # the thread sees it and closes its socket
        self._thread.join()
        if self.refused:
            log.warning("refused on the blob socket: %s", dict(self.refused))

    def _serve(self, socket: zmq.Socket[bytes]) -> None:
        """Answers until the context ends. Waits for asks only; sending never blocks."""
        decoder = msgspec.msgpack.Decoder(Ask)
        try:
            while True:
                peer, *frames = socket.recv_multipart()
                try:
                    (frame,) = frames
                    head, body = self._answer(decoder.decode(frame))
                    socket.send_multipart([peer, head, body], zmq.NOBLOCK, copy=False)
                except (ValueError, RecursionError, msgspec.MsgspecError) as error:
                    self._refuse("malformed", error)
                except zmq.ContextTerminated:
                    raise
                except zmq.ZMQError as error:  # it left, or asks and does not read
                    self._refuse("undelivered", error)
        except zmq.ContextTerminated:
            pass
        finally:
            socket.close(0)

    def _answer(self, ask: Ask) -> tuple[bytes, Any]:
        """Raises ValueError: no chunk of any blob."""
        held = self._blobs.get(ask.key)
        if held is None:
            return ENCODER.encode(Part(key=ask.key, at=ask.at, total=-1)), b""
        if not (0 <= ask.at <= held.total and 0 <= ask.size <= CHUNK):
            raise ValueError(f"{ask.size} bytes at {ask.at} of {held.total}")
        head = ENCODER.encode(Part(key=ask.key, at=ask.at, total=held.total))
        return head, held.part(ask.at, ask.size)

    def _refuse(self, reason: str, error: Exception) -> None:
        self.refused[reason] += 1
        if self.refused[reason] == 1:
            log.warning("a frame on the blob socket is refused (%s): %s", reason, error)


class _Blob:
    """Bytes in pieces, one behind the other."""

    def __init__(self, pieces: list[memoryview]) -> None:
        ends = list(itertools.accumulate(map(len, pieces)))
        self.total = ends[-1] if ends else 0
        self._pieces, self._starts = pieces, [0, *ends[:-1]]

    def part(self, at: int, size: int) -> memoryview:
        """As it lies there if it lies in one piece, else joined."""
        found: list[memoryview] = []
        index = max(0, bisect.bisect_right(self._starts, at) - 1)
        end = min(at + size, self.total)
        while at < end:
            piece, start = self._pieces[index], self._starts[index]
            found.append(piece[at - start : end - start])
            at, index = start + len(piece), index + 1
        return found[0] if len(found) == 1 else memoryview(b"".join(found))
