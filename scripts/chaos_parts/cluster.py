"""The processes of one cluster: started, killed, stopped, started again, and never left behind.

Whatever ends without having been killed here is a violation, and is started again all the same.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common.process import kill_session, spawn

PAUSE_S = (0.3, 3.0)  # before a member is started again: at first, at most
RANKS_END_S = 90.0  # for the ranks of a learner that lost one


@dataclass
class Member:
    """One process and its successors. `command` maps the number of the life to a command line."""

    name: str
    command: Callable[[int], list[str]]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    lives: int = 0
    process: subprocess.Popen[bytes] | None = None
    due: float | None = None  # when to start it (monotonic)
    expected: str = ""  # why it may end just now
    stopped: bool = False
    engine_killed: int = 0  # the life in which its engine was
    _log_start: int = 0

    @property
    def up(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        self.due, self.expected, self.stopped = None, "", False
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self.process = spawn(self.command(self.lives), self.log)
        self.lives += 1

    def signal(self, number: int) -> bool:
        """To the process alone; `signal_all` to what it started as well."""
        if self.process is None or self.process.poll() is not None:
            return False
        self.process.send_signal(number)
        return True

    def signal_all(self, number: int) -> bool:
        """Ranks, engines and graders too, some of which have sessions of their own."""
        if self.process is None or self.process.poll() is not None:
            return False
        found = [self.process.pid]
        for pid in found:
            found += _children(pid)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return True

    def last_words(self) -> str:
        """The last line of this life."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "it said nothing")

    def parts(self, kind: str) -> list[int]:
        """Process ids of what it started: `rank`, `grader`, or `engine`."""
        if self.process is None:
            return []
        found = _children(self.process.pid)
        if kind == "rank":
            return found if len(found) > 1 else []
        for pid in found:
            found += _children(pid)
        return sorted(pid for pid in found if _kind(pid) == kind)


def _children(pid: int) -> list[int]:
    """Those that any of its threads started: an engine's are not the first one's."""
    found = list[int]()
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(p) for p in thread.read_text().split()]
    return found


def _kind(pid: int) -> str:
    """Of a process that an actor started, by its command line."""
    try:
        said = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    if b"actor.grade.worker" in said:
        return "grader"
    return "engine" if said and b"resource_tracker" not in said else ""  # it has none when dead


class Cluster:
    """`tolerated` says whether a member may end with these last words just now."""

    def __init__(self, tolerated: Callable[[Member, str], bool]) -> None:
        self.members: dict[str, Member] = {}
        self.violations: list[str] = []
        self.ends: Counter[str] = Counter()  # ends that were tolerated, by member
        self.restarting = True
        self._ending = (0, 0.0)  # the life whose rank was killed, and when it has to be over
        self._tolerated = tolerated

    def add(self, member: Member, start_in_s: float = 0.0) -> None:
        self.members[member.name] = member
        member.due = time.monotonic() + start_in_s

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    def tick(self) -> None:
        """Notice who ended, start who is due."""
        now = time.monotonic()
        for member in self.members.values():
            if member.process is not None and member.process.poll() is not None:
                self._ended(member)
            if member.expected == "a rank was killed" and self._ending < (member.lives, now):
                self.violations.append(
                    f"{member.name} goes on {RANKS_END_S:.0f} s after a rank was killed"
                )
                self.kill(member.name)
            if member.due is not None and now >= member.due and self.restarting:
                member.start()

    def kill(self, name: str) -> bool:
        """SIGKILL, to a stopped process as well."""
        member = self.members[name]
        member.expected = member.expected or "killed"
        return member.signal_all(signal.SIGKILL)

    def stop(self, name: str) -> bool:
        member = self.members[name]
        member.stopped = member.signal_all(signal.SIGSTOP)
        return member.stopped

    def go_on(self, name: str) -> None:
        member = self.members[name]
        member.stopped = False
        member.signal_all(signal.SIGCONT)

    def leave(self, name: str) -> bool:
        member = self.members[name]
        if member.stopped:
            return False
        member.expected = member.expected or "asked to leave"
        return member.signal(signal.SIGTERM)

    def expect_the_end(self) -> None:
        """From now on every member may end, and none is started again."""
        self.restarting = False
        for member in self.members.values():
            member.expected = member.expected or "the end"

    def expect_rank(self, name: str) -> bool:
        """One of its ranks is about to be killed: the others have to end by themselves,
        `RANKS_END_S` at most."""
        member = self.members[name]
        if member.expected:
            return False
        member.expected = "a rank was killed"
        self._ending = (member.lives, time.monotonic() + RANKS_END_S)
        return True

    def close(self) -> None:
        """Kill by process id, sessions and all."""
        self.restarting = False
        for member in self.members.values():
            if member.process is not None:
                member.signal_all(signal.SIGKILL)
                kill_session(member.process)
                member.process = None

    def _ended(self, member: Member) -> None:
        process, member.process = member.process, None
        assert process is not None
        kill_session(process)
        if not member.expected:
            words = member.last_words()
            if self._tolerated(member, words):
                self.ends[member.name] += 1
            else:
                self.violations.append(
                    f"{member.name} ended by itself (exit {process.returncode}): {words[:300]}"
                )
        shortest, longest = PAUSE_S
        member.due = time.monotonic() + min(longest, shortest * (1 + member.lives))
