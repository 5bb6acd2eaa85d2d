"""A metrics.jsonl that grows, as columns: read on from where the last look ended, and thinned out
for a picture.

A line may be cut (it is read when it is whole), a step may come again (the last line counts), and
the file may be replaced by a shorter one (a resume cuts what it does again): then it is read anew.
"""

from __future__ import annotations

import math
import os
import time
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from common import metrics

CHUNK_BYTES = 1 << 20
LOOK_S = 0.5  # a look at a long file ends then, and the next one goes on
MOST_POINTS = 500  # of one curve
MOST_BARS = 80
TARGET = "target"  # that of whichever method has one
SCALARS = (
    *("reward", "correct", "heldout", "length", "heldout_length", "entropy", "ess_share"),
    *("entropy_predicted", "entropy_realised", "entropy_slope", "entropy_correlation"),
    *("lag_mean", "lag_max", "learner_idle", "actor_idle", "tokens_per_s", "sampled_tokens_per_s"),
    *("grad_norm", "groups", "actors"),
)
BY_LAG = ("ratio", "clipped")  # shown as a mean over the rollouts
DROPPED = "dropped/"

NAN = math.nan


class Curve(NamedTuple):
    x: list[int]  # steps
    y: list[float]


class Series:
    """The columns of one file. `refresh` takes what is new; nothing here raises for a bad line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: dict[str, Any] = {}  # the newest line of a step, whole
        self._forget(None)

    def _forget(self, identity: tuple[int, int] | None) -> None:
        self._identity = identity  # device and inode
        self._at = 0
        self._rest = b""
        self.steps: array[int] = array("q")  # rising
        self.columns: dict[str, array[float]] = {}

    def refresh(self) -> float:
        """Read what was written since, or for `LOOK_S`; the share of the file that is read, 0…1.

        Raises OSError when the file is there and unreadable.
        """
        deadline = time.monotonic() + LOOK_S
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return 1.0
        with file:
            found = _stat(file.fileno())
            if (found.identity != self._identity) or found.size < self._at:
                self._forget(found.identity)
            file.seek(self._at)
            while time.monotonic() < deadline and (chunk := file.read(CHUNK_BYTES)):
                self._at += len(chunk)
                self._take(self._rest + chunk)
        return min(1.0, self._at / found.size) if found.size else 1.0

    def _take(self, data: bytes) -> None:
        *whole, self._rest = data.split(b"\n")
        for raw in whole:
            line = _decoded(raw)
            if line is not None:
                self._note(line)

    def _note(self, line: dict[str, Any]) -> None:
        step = line["step"]
        row = bisect_left(self.steps, step)
        if row == len(self.steps) or self.steps[row] != step:
            self.steps.insert(row, step)
            for column in self.columns.values():
                column.insert(row, NAN)
        values = dict(_numbers(line))
        for name in values.keys() - self.columns.keys():
            self.columns[name] = array("d", [NAN]) * len(self.steps)
        for name, column in self.columns.items():
            column[row] = values.get(name, NAN)
        if "reward" in line and row == len(self.steps) - 1:
            self.last = line

    def curves(self) -> dict[str, Curve]:
        """Every column, at most `MOST_POINTS` points each: means of neighbours where there are
        more."""
        steps = np.frombuffer(self.steps, np.int64) if self.steps else np.zeros(0, np.int64)
        found = {}
        for name, column in self.columns.items():
            if not name.startswith(DROPPED):
                values = np.array(column)
                there = ~np.isnan(values)
                found[name] = thinned(steps[there], values[there])
        return found

    def fates(self) -> dict[str, list[float]]:
        """Groups a step by fate, as at most `MOST_BARS` bars: means over the steps of a bar."""
        names = [n for n in self.columns if n.startswith(DROPPED)]
        rows = [
            i for i, value in enumerate(self.columns.get("groups", ())) if not math.isnan(value)
        ]
        if not rows:
            return {"step": []}
        edges = _edges(len(rows), MOST_BARS)
        starts = edges[:-1]
        width = np.diff(edges)
        steps = np.array([self.steps[i] for i in rows])
        bars = {"step": steps[edges[1:] - 1].tolist()}
        for name in ("groups", *sorted(names)):
            column = np.nan_to_num(np.array(self.columns[name])[rows])
            means = np.add.reduceat(column, starts) / width
            bars[name.removeprefix(DROPPED)] = [_short(v) for v in means]
        return bars


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> Curve:
    """x int64 [n], y float64 [n] → at most `most` points; the last one's x is the last x."""
    if x.size == 0:
        return Curve([], [])
    edges = _edges(x.size, most)
    means = np.add.reduceat(y, edges[:-1]) / np.diff(edges)
    return Curve(x[edges[1:] - 1].tolist(), [_short(v) for v in means])


def _edges(count: int, most: int) -> np.ndarray:
    """Ends of at most `most` runs of neighbours, as equal as can be: int64 [k + 1], from 0."""
    return np.linspace(0, count, min(count, most) + 1).round().astype(np.int64)


def _short(value: float) -> float:
    """Enough digits for a picture."""
    return float(f"{value:.5g}")


def _decoded(raw: bytes) -> dict[str, Any] | None:
    try:
        line = msgspec.json.decode(raw)
    except msgspec.DecodeError:
        return None
    good = isinstance(line, dict) and isinstance(line.get("step"), int)
    return line if good and abs(line["step"]) < 1 << 53 else None


def _numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What the pictures need of a line, as far as it is there."""
    for name in SCALARS:
        if (value := _number(line.get(name))) is not None:
            yield name, value
    if (aim := _number(metrics.target(line))) is not None:
        yield TARGET, aim
    for name in BY_LAG:
        if (value := _weighted(line.get(name), line.get("lag"))) is not None:
            yield name, value
    dropped = line.get("dropped")
    for reason, count in dropped.items() if isinstance(dropped, dict) else ():
        if (value := _number(count)) is not None:
            yield f"{DROPPED}{reason}", value


def _weighted(values: object, counts: object) -> float | None:
    """Mean over the lags, by how many rollouts have each."""
    if not isinstance(values, dict) or not isinstance(counts, dict):
        return None
    pairs = [(_number(v), _number(counts.get(k))) for k, v in values.items()]
    good = [(v, n) for v, n in pairs if v is not None and n]
    total = sum(n for _, n in good)
    return sum(v * n for v, n in good) / total if total else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None


class _Found(NamedTuple):
    identity: tuple[int, int]
    size: int


def _stat(fd: int) -> _Found:
    found = os.fstat(fd)
    return _Found((found.st_dev, found.st_ino), found.st_size)


def histogram(lags: Mapping[int, int], max_lag: int) -> list[Sequence[int]]:
    """(lag, rollouts) from 0 to the largest that was seen or is allowed."""
    return [(lag, lags.get(lag, 0)) for lag in range(max([max_lag, *lags]) + 1)]
