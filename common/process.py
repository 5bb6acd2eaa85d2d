"""Child processes that never outlive their parent, each in a session of its own, ended by id."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def spawn(
    command: Sequence[str], log: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start `command` with its output appended to `log`; None: it goes where ours does.

    Its own session keeps the terminal's Ctrl-C away from it: its parent decides the order in which
    things end. On Linux the kernel kills it when the parent is gone, even when the parent was
    killed by SIGKILL. Call this from the main thread only: the kernel watches the thread that
    forked.
    """
    with contextlib.ExitStack() as stack:
        out = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            out = stack.enter_context(log.open("ab"))
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=None if out is None else subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()),
            env=env,
        )


def stop(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """SIGTERM, a deadline, SIGKILL; what it had started in its session goes with it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    kill_session(process)


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to whatever is left of the session of `process`."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def import_from_here() -> None:
    """A user's modules in the working folder can be imported, after everything that is installed:
    a folder `common` there does not stand in the way of ours.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent is gone (Linux)."""
    ask = _die_with(os.getppid())
    if ask is not None:
        ask()


def _die_with(parent: int) -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(
        None, use_errno=True
    ).prctl  # looked up before the fork: afterwards only the call is safe

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent was gone before we could ask
            os._exit(1)

    return ask
