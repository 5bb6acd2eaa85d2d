"""How a thread that waits for its socket is woken by others."""

from __future__ import annotations

import contextlib
import os

import zmq


class Bell:
    """Ends the desk's wait for its socket. Anybody may ring, from any thread."""

    def __init__(self) -> None:
        self._out, self._in = os.pipe()
        os.set_blocking(self._out, False)
        os.set_blocking(self._in, False)
        self._alone, self._beside = zmq.Poller(), zmq.Poller()
        for poller in (self._alone, self._beside):
            poller.register(self._out, zmq.POLLIN)

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # so many rings unheard that one more is none
            if self._in >= 0:
                os.write(self._in, b"!")

    def wait(self, socket: zmq.Socket[bytes] | None, at_most_ms: int) -> None:
        """Until a ring, or until `socket` has something to receive."""
        if socket is not None and socket not in self._beside:
            self._beside.register(socket, zmq.POLLIN)
        poller = self._alone if socket is None else self._beside
        if any(source == self._out for source, _ in poller.poll(at_most_ms)):
            os.read(self._out, 1 << 16)

    def close(self) -> None:
        ends, self._in = (self._in, self._out), -1
        for end in ends:
            os.close(end)
