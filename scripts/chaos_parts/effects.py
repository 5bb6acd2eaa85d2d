"""Whether a fault really happened: what is looked for after each, from outside."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

Seen = Callable[[], bool]


def ended(process: subprocess.Popen[bytes], code: int) -> Seen:
    """It ended so: minus the signal, or its exit code."""
    return lambda: process.poll() == code


def gone(pid: int) -> Seen:
    return lambda: _state(pid) in ("", "Z", "X")


def asleep(pids: Sequence[int]) -> Seen:
    """All of them that still are there stand still."""
    return lambda: {_state(pid) for pid in pids} - {"", "Z", "X"} == {"T"}


def _state(pid: int) -> str:
    """As the kernel says it: R, S, D, T (stopped), Z; "" when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


class Part:
    """One process by a handle of the kernel's, which never means another one of the same number."""

    def __init__(self, pid: int) -> None:
        """Raises ProcessLookupError."""
        self.pid, self._handle = pid, os.pidfd_open(pid)

    def signal(self, number: int) -> None:
        """Raises ProcessLookupError."""
        signal.pidfd_send_signal(self._handle, number)

    def close(self) -> None:
        os.close(self._handle)
