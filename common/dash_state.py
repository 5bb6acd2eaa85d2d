"""What a dashboard shows of one run, gathered from the run folder and Redis. It owns nothing: each
look reads again, and whatever is away is said in words while the rest goes on.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, cast

import msgspec

from common import prometheus, runfolder, status
from common.dash_rollouts import Latest
from common.dash_series import Series, histogram
from common.errors import DeadlineError, JournalError, WeightsError
from common.softstate import LEAVE_ALONE_S, SoftState
from common.status import ActorStatus, Status, actor_idle

SILENT_S = 8.0  # a learner writes twice a second while it waits, and after every step
REDIS_TIMEOUT_S = 1.0
ROLLOUTS_EVERY_S = 2.0


class Watch:
    """One run, looked at by any number of threads. `folder` or `redis` may be missing, not both."""

    def __init__(self, folder: Path | None, redis: str | None = None) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._series = Series((folder or Path("/nowhere")) / "metrics.jsonl")
        self._latest = Latest(folder) if folder is not None else None
        self._looked = -ROLLOUTS_EVERY_S
        self._redis = _Redis(redis) if redis is not None else None

    def status(self) -> dict[str, Any]:
        """This moment: phase, sums, actors, what is wrong."""
        with self._lock:
            now, notes = self._now()
            actors, redis = self._actors(now)
        facts: dict[str, Any] = {
            "title": self.folder.resolve().name if self.folder else getattr(now, "run", ""),
            "notes": notes,
            "redis": redis,
            "actors": actors,
        }
        if now is None:
            return facts
        plain = msgspec.to_builtins(now)
        del plain["actors"]
        silent_s = max(0.0, time.time() - now.at)
        return {
            **facts,
            **plain,
            "silent_s": round(silent_s) if silent_s > SILENT_S and not now.over else 0,
            "actor_idle": actor_idle(now),
            "lag_histogram": histogram(now.lags, now.max_lag),
        }

    def series(self) -> dict[str, Any]:
        """The curves."""
        with self._lock:
            note = self._refresh_series()
            curves = {k: {"x": c.x, "y": c.y} for k, c in self._series.curves().items()}
            return {"curves": curves, "fates": self._series.fates(), "note": note}

    def rollouts(self) -> dict[str, Any]:
        """The last groups, as text."""
        if self._latest is None:
            return {"groups": [], "note": "no run folder here: rollouts are read where it is"}
        with self._lock:
            if time.monotonic() >= self._looked + ROLLOUTS_EVERY_S:
                self._latest.refresh()
                self._looked = time.monotonic()
            return {"groups": self._latest.shown(), "note": self._latest.words()}

    def metrics(self) -> str:
        """Prometheus' text."""
        with self._lock:
            now, _ = self._now()
            self._refresh_series()
            line = self._series.last
        return prometheus.text(now, line, time.time())

    # ---- one source each -------------------------------------------------------------------------

    def _now(self) -> tuple[Status | None, list[str]]:
        """The learner's last word, wherever it is newest, and what there is to say about it."""
        found, notes = _read(self.folder) if self.folder is not None else (None, [])
        if self._redis is not None:
            self._redis.run = _run_id(self.folder) if self.folder is not None else ""
            told = self._redis.learner() if self._redis.run or self.folder is None else None
            if told is not None and (found is None or told.at > found.at):
                return told, []
        return found, notes

    def _refresh_series(self) -> str:
        if self.folder is None:
            return "no run folder here: curves are read where it is"
        try:
            share = self._series.refresh()
        except OSError as error:
            return f"{self._series.path}: {error.strerror}"
        return "" if share == 1.0 else f"{self._series.path.name} is being read: {share:.0%}"

    def _actors(self, now: Status | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Those that the learner knows, then those that only Redis does; and how Redis is."""
        known = dict(now.actors) if now is not None else {}
        rows = [_row(name, actor) for name, actor in sorted(known.items())]
        if self._redis is None:
            return rows, {"asked": False, "words": ""}
        self._redis.run = now.run if now is not None else self._redis.run
        told = self._redis.actors() if self._redis.run else {}
        rows += [_row(k, actor, alone=True) for k, actor in sorted(told.items()) if k not in known]
        return rows, {"asked": True, "words": self._redis.words}


def _run_id(folder: Path) -> str:
    """ "" for a folder that holds no run yet."""
    try:
        return runfolder.RunFolder.open(folder).run_id
    except (JournalError, OSError):
        return ""


def _read(folder: Path) -> tuple[Status | None, list[str]]:
    if not folder.is_dir():
        return None, [f"{folder} is not there yet"]
    try:
        found = status.read(folder)
    except OSError as error:
        return None, [f"{folder / status.FILE}: {error.strerror}"]
    if found is not None:
        return found, []
    told = (folder / status.FILE).exists()
    why = (
        f"{status.FILE} is of another version" if told else "the learner has not said anything yet"
    )
    return None, [why]


def _row(name: str, actor: ActorStatus, alone: bool = False) -> dict[str, Any]:
    remarks = actor.remarks()
    if actor.window < actor.ceiling:
        remarks.append(f"takes {actor.window} of {actor.ceiling} tickets, {actor.window_why}")
    if alone:
        remarks.append("it is in Redis, and the learner does not hear it")
    return {**msgspec.to_builtins(actor), "name": name, "alone": alone, "remarks": remarks}


class _Redis:
    """Read only, never for long: after a failure it is left alone for a while."""

    def __init__(self, url: str) -> None:
        self.run = ""  # "": whichever is there
        self.words = ""
        self._soft = SoftState(url, "*", timeout_s=REDIS_TIMEOUT_S)
        self._leave_alone_until = 0.0

    def learner(self) -> Status | None:
        said = self._said("learner")
        return status.decode(*said.values()) if len(said) == 1 else None

    def actors(self) -> dict[str, ActorStatus]:
        found = {}
        for key, raw in self._said("actor:*").items():
            try:
                actor = msgspec.json.decode(raw, type=ActorStatus)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                continue  # of another version of this program, or damaged
            found[key.partition(":live:actor:")[2]] = actor
        return found

    def _said(self, who: str) -> dict[str, bytes]:
        """What those last said whose name is like `who`, by key; nothing while Redis is away."""
        if time.monotonic() < self._leave_alone_until:
            return {}
        pattern = f"isentrope:{self.run or '*'}:live:{who}"
        try:
            with self._soft.asking("look who lives"):
                client = self._soft.client
                keys = sorted(cast("list[bytes]", list(client.scan_iter(pattern, count=1000))))
                raw = cast("list[bytes | None]", client.mget(keys)) if keys else []
        except (DeadlineError, WeightsError) as error:
            self.words = f"{error}; from files alone meanwhile"
            self._leave_alone_until = time.monotonic() + LEAVE_ALONE_S
            return {}
        self.words = ""
        both = zip(keys, raw, strict=True)
        return {key.decode(errors="replace"): value for key, value in both if value is not None}
