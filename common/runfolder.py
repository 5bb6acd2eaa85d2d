"""The run folder: where one run lives, who may write to it, and which life of its learner this is.

run.json        run id, made once
recipe.toml     the recipe the run was started with
lock            locked (flock) by the one live learner, holds its pid
incarnation     how many learner processes this run has had
journal/        the only truth (journal.py)
checkpoints/    cached folds of it, plus tensors
metrics.jsonl   one line a step
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from pathlib import Path

from common.errors import JournalError


class RunFolder:
    """A run folder that exists. `claim` makes this process its one writer."""

    def __init__(self, path: Path, run_id: str) -> None:
        self.path = path
        self.run_id = run_id
        self._lock: int | None = None

    @classmethod
    def create(cls, path: Path, run_id: str = "") -> RunFolder:
        """A new run, with an id of its own if none is given. Raises JournalError over a run."""
        if (path / "run.json").exists():
            raise JournalError(
                f"{path} already holds a run; go on with --resume {path}, or choose another folder"
            )
        run_id = run_id or f"{time.strftime('%y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        folder = cls(path, run_id)
        folder.journal.mkdir(parents=True, exist_ok=True)
        folder.checkpoints.mkdir(exist_ok=True)
        write_durable(
            path / "run.json", json.dumps({"run": run_id, "created": time.time()}).encode()
        )
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Raises JournalError when there is no run at `path`."""
        try:
            run_id = json.loads((path / "run.json").read_bytes())["run"]
        except FileNotFoundError:
            raise JournalError(
                f"{path} holds no run (it has no run.json); give the folder of a run"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(
                f"{path / 'run.json'} is damaged ({error}); restore it from a copy"
            ) from None
        return cls(path, run_id)

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def claim(self) -> int:
        """Become the run's learner for the life of this process; returns its incarnation (1, 2, …).

        The counter is durable before it is returned. Raises JournalError while another lives.
        """
        self._take_lock()
        counter = self.path / "incarnation"
        before = int(counter.read_text()) if counter.exists() else 0
        seen = max((incarnation_of(p.name) for p in self.journal.glob("*-*")), default=0)
        write_durable(counter, str(max(before, seen) + 1).encode())
        return max(before, seen) + 1

    def release(self) -> None:
        """Give the lock back before the process ends."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def has_holder(self) -> bool:
        """Whether the process that took the lock last is there: a learner, or one that starts. Asks
        without touching the lock, which a learner might want at this moment.
        """
        try:
            os.kill(int((self.path / "lock").read_text()), 0)
        except PermissionError:  # it is another user's
            return True
        except (OSError, ValueError):  # no such process; no lock, or one that says nothing
            return False
        return True

    def check_free(self, patience_s: float = 3.0) -> None:
        """Raises JournalError while a learner lives; one that was just killed may take a moment."""
        deadline = time.monotonic() + patience_s
        while True:
            try:
                self._take_lock()
            except JournalError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.05)  # a lock cannot be waited for with a deadline
            else:
                return self.release()

    def _take_lock(self) -> None:
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise JournalError(
                f"{self.path} already has a learner (pid {pid}); "
                f"wait until it ends, or end it with: kill {pid}"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        self._lock = lock


def incarnation_of(segment: str) -> int:
    """Of the name of a journal segment, `<incarnation>-<number>`; 0 for any other name."""
    head = segment.partition("-")[0]
    return int(head) if head.isdecimal() else 0


def write_durable(path: Path, content: bytes) -> None:
    """Replace a small file so that a crash leaves the old content or the new, never a mixture."""
    aside = path.with_name(path.name + ".new")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, content)
        os.fsync(fd)
    finally:
        os.close(fd)
    aside.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a new file survives a crash only if its name is."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
