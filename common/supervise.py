"""Start the processes of a run on this machine, restart those that die, and leave none behind.

    redis dies             started again, empty, on the same port (the learner republishes)
    an actor dies          started again after a pause, up to a budget (its tickets go elsewhere)
    the learner is killed  started again with --resume, up to a budget
    any exits by itself    with an error: the run ends with its last line

One loop waits for all of it at once: children (SIGCHLD), Ctrl-C and SIGTERM, and the next picture.
The first Ctrl-C drains (the learner takes a checkpoint), the second kills.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from common.errors import IsentropeError
from common.process import kill_session, spawn, stop
from common.redis_server import RedisServer

ACTOR_BUDGET = 10
LEARNER_BUDGET = 5
REDIS_BUDGET = 20
PICTURE_S = 0.5
DRAIN_DEADLINE_S = 300.0  # after SIGTERM: a large model's step, and its last checkpoint
LEAVE_DEADLINE_S = 8.0  # for actors after the learner's end
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ChildFailed(IsentropeError):
    """A child ended in a way that no restart mends; carries its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class View(Protocol):
    def refresh(self) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass
class Child:
    """One supervised process. `command` maps the number of the life (0, 1, …) to a command line."""

    name: str
    command: Callable[[int], Sequence[str]]
    log: Path
    budget: int  # restarts
    lives: int = 0
    process: subprocess.Popen[bytes] | None = None
    due: float | None = None  # when to start it again (monotonic)
    _log_start: int = 0

    def start(self) -> None:
        self.due = None
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self.process = spawn(self.command(self.lives), self.log)
        self.lives += 1

    @property
    def restarts(self) -> int:
        return max(0, self.lives - 1)

    def alive(self) -> bool:
        """It runs, or will run again."""
        running = self.process is not None and self.process.poll() is None
        return running or self.due is not None

    def ended(self) -> int | None:
        """Its exit code (negative: the signal), once; its session is gone by then."""
        if self.process is None or self.process.poll() is None:
            return None
        process, self.process = self.process, None
        kill_session(process)
        return process.returncode

    def last_words(self) -> str:
        """The last line that this life wrote."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "it said nothing")

    def start_later(self) -> bool:
        """Schedule a restart with growing pauses; False when the budget is spent."""
        if self.restarts >= self.budget:
            return False
        self.due = time.monotonic() + min(5.0, 0.1 * 2**self.restarts)
        return True


@dataclass
class Supervisor:
    learner: Child
    actors: Sequence[Child]
    redis: RedisServer | None  # None: somebody else's
    view: View
    stopped_by: int = 0  # the first signal that asked to stop
    redis_restarts: int = 0
    _signals: list[int] = field(default_factory=list)
    _kill_at: float | None = None

    def run(self) -> None:
        """Until the learner has ended; afterwards nothing runs any more. Raises ChildFailed."""
        with self._waking() as wake:
            try:
                self._start()
                while not self._learner_ended():
                    self._redis_died()
                    self._actors_died()
                    self._asked_to_stop()
                    self.view.refresh()
                    _wait(wake, PICTURE_S)
                if not self.stopped_by:
                    self._let_actors_leave(wake)
            finally:
                self._stop_all()
        self.view.refresh()

    def restarts(self) -> dict[str, int]:
        children = {child.name: child.restarts for child in (self.learner, *self.actors)}
        return {**children, "redis": self.redis_restarts}

    def _start(self) -> None:
        if self.redis is not None:
            self.redis.start()
        for child in (self.learner, *self.actors):
            child.start()

    def _learner_ended(self) -> bool:
        child = self.learner
        if child.due is not None and time.monotonic() >= child.due:
            child.start()
        code = child.ended()
        if code is None:
            return (
                bool(self.stopped_by) and child.process is None
            )  # asked to stop between two lives
        if code == 0 or self.stopped_by:
            return True
        if code > 0:
            raise ChildFailed(f"{child.last_words()} (log: {child.log})", code)
        self._restart(child, code, "with --resume")
        return False

    def _actors_died(self) -> None:
        now = time.monotonic()
        for child in self.actors:
            if child.due is not None and now >= child.due and not self.stopped_by:
                child.start()
            code = child.ended()
            if code is None or code == 0 or self.stopped_by:
                continue
            if code == 2:  # configuration or data: another life would say the same
                raise ChildFailed(f"{child.last_words()} (log: {child.log})", code)
            self._restart(child, code, "again")

    def _restart(self, child: Child, code: int, how: str) -> None:
        died = (
            f"killed by {signal.Signals(-code).name}"
            if code < 0
            else f"ended with exit code {code}"
        )
        if child.start_later():
            self.view.note(
                f"{child.name} {died}; started {how} ({child.restarts + 1} of {child.budget})"
            )
        elif child is self.learner or not any(actor.alive() for actor in self.actors):
            raise ChildFailed(
                f"{child.name} {died} and its {child.budget} restarts are spent: "
                f"{child.last_words()} (log: {child.log})",
                1,
            )
        else:
            self.view.note(
                f"{child.name} {died}; its {child.budget} restarts are spent, going on without"
            )

    def _redis_died(self) -> None:
        if self.redis is None or not self.redis.died():
            return
        self.redis_restarts += 1
        if self.redis_restarts > REDIS_BUDGET:
            raise ChildFailed(f"redis-server died {REDIS_BUDGET} times; see {self.redis.log}", 1)
        self.redis.start()
        self.view.note(
            f"redis died; started again, empty ({self.redis_restarts} of {REDIS_BUDGET})"
        )

    def _asked_to_stop(self) -> None:
        """First signal: drain. Second, or the deadline: kill."""
        asked, self._signals[:] = list(self._signals), []
        if asked and not self.stopped_by:
            self.stopped_by = asked.pop(0)
            self._kill_at = time.monotonic() + DRAIN_DEADLINE_S
            self.view.note("stopping: the learner drains and takes a checkpoint (again to kill)")
            if self.learner.process is not None:
                self.learner.process.terminate()
        late = self._kill_at is not None and time.monotonic() > self._kill_at
        if self.stopped_by and (asked or late) and self.learner.process is not None:
            self.view.note("killed" if asked else f"no end after {DRAIN_DEADLINE_S:.0f} s: killed")
            self.learner.process.kill()
            self._kill_at = None

    def _let_actors_leave(self, wake: socket.socket) -> None:
        """The learner's end told them to; those that stay too long are stopped afterwards."""
        for child in self.actors:
            child.due = None
        deadline = time.monotonic() + LEAVE_DEADLINE_S
        while time.monotonic() < deadline and not self._signals:
            if not any(child.alive() for child in self.actors):
                return
            _wait(wake, PICTURE_S)

    def _stop_all(self) -> None:
        running = [
            child.process for child in (self.learner, *self.actors) if child.process is not None
        ]
        for process in running:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + 3.0
        for process in running:
            stop(process, patience_s=max(0.0, deadline - time.monotonic()))
        if self.redis is not None:
            self.redis.stop()

    @contextlib.contextmanager
    def _waking(self) -> Iterator[socket.socket]:
        """Signals wake the loop through a socket; earlier behaviour comes back at the end."""
        receive, send = socket.socketpair()
        receive.setblocking(False)
        send.setblocking(False)
        before = {number: signal.getsignal(number) for number in (*ENDING, signal.SIGCHLD)}
        fd = signal.set_wakeup_fd(send.fileno(), warn_on_full_buffer=False)
        for number in ENDING:
            signal.signal(number, lambda signum, _: self._signals.append(signum))
        signal.signal(signal.SIGCHLD, lambda *_: None)
        try:
            yield receive
        finally:
            signal.set_wakeup_fd(fd)
            for number, action in before.items():
                signal.signal(number, action)
            receive.close()
            send.close()


def _wait(wake: socket.socket, seconds: float) -> None:
    """Until a signal arrives, or the time is over."""
    select.select([wake], [], [], seconds)
    with contextlib.suppress(BlockingIOError):
        while wake.recv(1024):
            pass
