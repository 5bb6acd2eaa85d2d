"""What a learner says about itself while it runs: status.json in the run folder, and the same in
Redis.

The learner makes a `Status` and gives it to `StatusFile.write` as often as it likes; views read it
with `read`. It is a picture for people: nothing decides by it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

FILE = "status.json"
EVERY_S = 0.5

Phase = Literal["starting", "evaluating", "waiting", "training", "draining", "stopped", "done"]
PHASES: tuple[Phase, ...] = (
    "starting",
    "evaluating",
    "waiting",
    "training",
    "draining",
    "stopped",
    "done",
)


class ActorStatus(msgspec.Struct, kw_only=True):
    """One actor as of its last heartbeat."""

    version: int = 0  # of the weights it samples from
    tokens_per_s: float = 0.0
    busy: float = 0.0  # share of the last seconds in which it had something to decode, 0…1
    running: int = 0  # sequences being decoded
    waiting: int = 0  # sequences without a slot
    held: int = 0  # tickets
    capacity: int = 0
    kv_use: float = 0.0  # share of the KV cache in use, 0…1
    pause_s: float = 0.0  # seconds spent so far with decoding held for a swap
    silent_s: float = 0.0  # seconds since its last word
    up: bool = True  # it has an engine
    window: int = 0  # tickets that its engine can take …
    ceiling: int = 0  # … of so many that would fill it
    window_why: str = ""  # it last moved
    restarts: int = 0  # engines that took the place of a broken one
    trouble: str = ""  # what the last one broke of
    refused: int = 0  # weight versions that were not what they should be
    refusal: str = ""  # what was wrong with the last one, and what is served

    @classmethod
    def of(
        cls,
        version: int,
        capacity: int,
        stats: Mapping[str, float],
        notes: Mapping[str, str],
        held: int | None = None,
        silent_s: float = 0.0,
    ) -> ActorStatus:
        """From what a heartbeat says: `stats` and `notes` may lack anything."""
        return cls(
            version=max(version, 0),
            tokens_per_s=stats.get("tokens_per_s", 0.0),
            busy=stats.get("busy", 0.0),
            running=int(stats.get("running", 0)),
            waiting=int(stats.get("waiting", 0)),
            held=int(stats.get("held", 0)) if held is None else held,
            capacity=capacity,
            kv_use=stats.get("kv_use", 0.0),
            pause_s=stats.get("pause_s", 0.0),
            silent_s=silent_s,
            up=bool(stats.get("up", 1.0)),
            window=int(stats.get("window", capacity)),
            ceiling=int(stats.get("ceiling", capacity)),
            window_why=notes.get("window", ""),
            restarts=int(stats.get("restarts", 0)),
            trouble=notes.get("trouble", ""),
            refused=int(stats.get("refused_versions", 0)),
            refusal=notes.get("refused", ""),
        )

    def remarks(self) -> list[str]:
        """What a person should know of it, in words; the window apart, which moves often."""
        said = []
        if not self.up:
            said.append(f"its engine broke and is made again: {self.trouble}")
        elif self.restarts:
            said.append(f"engine restarted {self.restarts} × (the last one: {self.trouble})")
        if self.refusal:
            said.append(f"{self.refusal} ({self.refused} refused so far)")
        return said


class Heldout(msgspec.Struct, kw_only=True):
    """One held-out evaluation, finished or under way."""

    step: int
    accuracy: float  # of the answers so far
    length: float  # tokens, mean
    done: int  # rollouts graded so far
    of: int
    versions: tuple[int, int] = (0, 0)  # oldest and newest version that sampled a token
    label: str = ""


class Status(msgspec.Struct, kw_only=True):
    run: str = ""
    incarnation: int = 0
    at: float = 0.0  # seconds since the epoch
    phase: Phase = "starting"
    step: int = 0  # steps finished
    steps: int = 0
    version: int = 0  # of the published weights
    seconds: float = 0.0  # since this process began to train
    eta_s: float | None = None
    reward: float | None = None  # of the last step
    length: float | None = None
    entropy: float | None = None
    entropy_target: float | None = None  # of the method that has one
    heldout: list[Heldout] = []
    lags: dict[int, int] = {}  # lag -> rollouts trained on, over the run
    max_lag: int = 0
    groups: dict[
        str, dict[str, int]
    ] = {}  # kind -> fate -> tickets; also issued, buffered, in_flight
    conserved: bool = True  # issued = trained + dropped + buffered + in flight, for every kind
    learner_idle: float = 0.0  # share of the time without a batch to train on, 0…1
    tokens_per_s: float = 0.0  # trained, over the last steps
    actors: dict[str, ActorStatus] = {}
    warnings: list[str] = []  # what a person should know now: a full disk, Redis away, no actors

    @property
    def over(self) -> bool:
        """The learner has ended; nothing of this changes any more."""
        return self.phase in ("stopped", "done")


class StatusFile:
    """Writes DIR/status.json atomically, at most every `EVERY_S`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._next = 0.0

    def due(self) -> bool:
        """It is time for another one: ask before gathering the numbers."""
        return time.monotonic() >= self._next

    def write(self, status: Status, force: bool = False) -> bool:
        """False when it was too early, or the disk refused: a picture is not worth stopping for."""
        if not (force or self.due()):
            return False
        self._next = time.monotonic() + EVERY_S
        aside = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            aside.write_bytes(msgspec.json.encode(status))
            aside.replace(self.path)
        except OSError:
            return False
        return True


def read(folder: Path) -> Status | None:
    """The last status of a run, or None when there is none yet."""
    try:
        return decode((folder / FILE).read_bytes())
    except FileNotFoundError:
        return None


def encode(status: Status) -> bytes:
    return msgspec.json.encode(status)


def decode(raw: bytes) -> Status | None:
    """None for bytes that are no status (another version of this program wrote them)."""
    try:
        return msgspec.json.decode(raw, type=Status)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):  # the last two: damaged
        return None


def actor_idle(status: Status) -> float:
    """Mean idle share of the actors, 0…1; 0 when there is none."""
    shares = [1.0 - actor.busy for actor in status.actors.values()]
    return sum(shares) / len(shares) if shares else 0.0
