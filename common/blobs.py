"""The `learner` store, as actors see it: blobs come straight out of the learner's memory, over a
socket of their own (learner/blobs.py serves them).

    DEALER ── Ask(key, at, size) ──▶ ROUTER        at most CREDIT asks are open
    DEALER ◀── Part(key, at, total) · the bytes ── ROUTER

Nothing is remembered on the other side. An answer that does not come is asked for again over a
fresh connection, at the address that the registry then names: a pull outlives a cut connection and
a learner that was started again with the same version. Off loopback the socket is authenticated
like the main channel, by the same keys.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec
import zmq

from common.channel import Keys, connect_dealer
from common.errors import DeadlineError, WeightsError
from common.versions import Registry, wrong_size

CHUNK = 1 << 20  # bytes of one answer at most
CREDIT = 8  # answers under way to one reader of one actor
MAX_ASK = 4_096  # bytes


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    at: int
    size: int


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Of a blob of `total` bytes, those from `at` on; -1: there is no such blob."""

    key: str
    at: int
    total: int


ENCODER = msgspec.msgpack.Encoder()
_PARTS = msgspec.msgpack.Decoder(Part)


def bind_address(learner: str, spec: str) -> str:
    """Where the learner serves blobs: the host of its main channel, the port of `[run] store`."""
    if learner.startswith("ipc://"):
        return f"{learner}.blobs"
    return f"{learner.rpartition(':')[0]}:{spec.partition(':')[2] or 0}"


def address(learner: str, served: str) -> str:
    """Where an actor finds what the learner serves: at the host by which it knows the learner."""
    if not (learner.startswith("tcp://") and served.startswith("tcp://")):
        return served
    return f"{learner.rpartition(':')[0]}:{served.rpartition(':')[2]}"


def nothing(_key: str, _there: int) -> None:
    """For those who do not ask how far it is."""


class PulledStore:
    """A source of blobs (stores.py) for several threads at once."""

    def __init__(
        self,
        registry: Registry,
        learner: str,
        keys: Keys | None = None,
        silence_s: float = 5.0,
        patience_s: float = 60.0,
    ) -> None:
        """`silence_s`: without an answer, then over a fresh connection; longer each time.
        `patience_s`: without a single answer, then it is given up.
        """
        self.reconnects = 0
        self._registry, self._learner, self._keys = registry, learner, keys
        self._silence_s, self._patience_s = silence_s, patience_s
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._lock, self._is_closed = threading.Lock(), False  # no socket of a context that ends

    def get(
        self, key: str, into: memoryview, note: Callable[[str, int], None] = nothing, at: int = 0
    ) -> None:
        """`note` is called for every answer. Raises WeightsError: the learner has no such blob, or
        one of another size; DeadlineError. ConfigError: it cannot be reached without keys."""
        pull = _Pull(key, into, note, at)
        silence_s = self._silence_s
        while not pull.done:
            if time.monotonic() > pull.heard_at + self._patience_s:
                raise DeadlineError(
                    f"the learner sent nothing of blob {key} for {self._patience_s:g} s; "
                    f"{pull.there} of {len(into)} bytes are there"
                )
            try:
                self._converse(pull, silence_s)
            except zmq.ZMQError as error:
                raise WeightsError(f"blob {key}: {error.strerror}") from None
            self.reconnects += not pull.done
            silence_s = min(2 * silence_s, self._patience_s)

    def close(self) -> None:
        """Ends what is under way, in whatever thread, with WeightsError."""
        with self._lock:
            self._is_closed = True
        self._context.term()

    def _converse(self, pull: _Pull, silence_s: float) -> None:
        """Ask over one connection, until all is there or nobody answers."""
        served = self._registry.served()
        if served is None:
            raise WeightsError("no learner serves blobs; it has not published yet")
        where = address(self._learner, served)
        with self._lock:
            if self._is_closed:
                raise WeightsError(f"blob {pull.key}: the store is closed")
            socket = connect_dealer(self._context, where, self._keys, CHUNK)
        try:
            pull.begin()
            while not pull.done:
                for ask in pull.asks():
                    socket.send(ENCODER.encode(ask))
                if not socket.poll(int(1000 * silence_s)):
                    return
                pull.take(socket.recv_multipart(copy=False))
        finally:
            socket.close(0)


class _Pull:
    """One blob on its way: what is there, what was asked for, what is still to be asked."""

    def __init__(
        self, key: str, into: memoryview, note: Callable[[str, int], None], at: int
    ) -> None:
        self.key, self.into, self._note = key, into, note
        self.there = at
        self.heard_at = time.monotonic()
        self._missing = set(range(at, max(1, len(into)), CHUNK))  # an empty blob is asked for too
        self._to_ask: deque[int] = deque()
        self._open = 0

    @property
    def done(self) -> bool:
        return not self._missing

    def begin(self) -> None:
        """A fresh connection: whatever is missing is asked for again."""
        self._to_ask, self._open = deque(sorted(self._missing)), 0

    def asks(self) -> list[Ask]:
        """As many as there is credit for."""
        number = min(CREDIT - self._open, len(self._to_ask))
        self._open += number
        starts = [self._to_ask.popleft() for _ in range(number)]
        size = len(self.into)
        return [Ask(key=self.key, at=at, size=min(CHUNK, size - at)) for at in starts]

    def take(self, frames: list[zmq.Frame]) -> None:
        """An answer. Raises WeightsError for one that says that it will never fit."""
        try:
            head, body = frames
            part = _PARTS.decode(head.buffer)
        except (ValueError, msgspec.MsgspecError):
            raise WeightsError(f"blob {self.key}: the learner's answer is malformed") from None
        if part.total != len(self.into):
            raise wrong_size(self.key, max(0, part.total), len(self.into))
        data = body.buffer
        if (part.key, len(data)) != (self.key, min(CHUNK, len(self.into) - part.at)):
            raise WeightsError(f"blob {self.key}: the learner answered something else")
        if part.at in self._missing:
            self.into[part.at : part.at + len(data)] = data
            self._missing.remove(part.at)
            self.there += len(data)
            self._open -= 1
            self.heard_at = time.monotonic()
            self._note(self.key, min(self._missing, default=len(self.into)))
