"""A link that breaks."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Cut:
    """A TCP proxy that breaks every connection after `limit` bytes, the first `times` times."""

    def __init__(self, target: str, limit: int, times: int) -> None:
        self._port = int(target.rpartition(":")[2])
        self._limit, self.times = limit, times
        self.passed = 0  # bytes, both ways together
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
                passed += len(data)
                self.passed += len(data)
                if passed > self._limit and self.times > 0:
                    self.times -= 1
                    break
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.close()
