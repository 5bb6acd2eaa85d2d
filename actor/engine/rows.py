"""The sequences being decoded: row i of every array and of the KV cache is one continuation.

Rows 0 … count - 1 are in use: a step never computes an empty row. They stay roughly sorted, oldest
first, in chunks: when a row ends, the oldest row of the next chunk takes its place, and so on to
the end. So attention can stop early for the young chunks; on a CPU its cost is what it reads.
"""

from __future__ import annotations

import numpy as np

from actor.engine.base import Sample
from actor.engine.request import Request, Spans, closed, mark_swap
from common.wire import Finish

_WIDTH_STEP = 8  # attended positions are rounded up to a multiple


class Rows:
    def __init__(self, slots: int, length: int, chunk: int) -> None:
        self.count = 0
        self._length, self._chunk = length, chunk
        self.requests: list[Request] = []
        self._index: list[int] = []  # which continuation of its request
        self._spans: list[Spans] = []
        self.token = np.zeros(slots, np.int64)  # the newest token, not yet in the cache …
        self.position = np.zeros(slots, np.int64)  # … and where it stands
        self.key = np.zeros(slots, np.uint64)
        self.temperature = np.ones(slots, np.float32)
        self._size = np.zeros(slots, np.int64)  # tokens sampled
        self._limit = np.zeros(slots, np.int64)
        self._stop = np.full((slots, 1), -1, np.int64)
        self._tokens = np.zeros((slots, length), np.int32)
        self._logps = np.zeros((slots, length), np.float32)
        self._all = np.arange(slots)

    def add(self, request: Request, version: int) -> int:
        """Start the next continuation of `request` after the last token of its prefix; returns the
        row."""
        row, index = self.count, request.placed
        self.requests.append(request)
        self._index.append(index)
        self._spans.append([(0, version)])
        self.token[row] = request.prefix[-1]
        self.position[row] = len(request.prefix) - 1
        self.key[row] = request.keys[index]
        self.temperature[row] = request.sampling.temperature
        self._size[row], self._limit[row] = 0, request.limit
        self._set_stop(row, request.sampling.stop)
        self.count += 1
        request.placed += 1
        return row

    def extend(self, tokens: np.ndarray, logps: np.ndarray) -> list[tuple[int, Finish]]:
        """One more token for every row; returns the rows that end with it, last row first."""
        B = self.count
        here = (self._all[:B], self._size[:B])
        self._tokens[here], self._logps[here] = tokens, logps
        self.token[:B] = tokens
        self.position[:B] += 1
        self._size[:B] += 1
        stopped = (self._stop[:B] == tokens[:, None]).any(1)
        ended = np.flatnonzero(stopped | (self._size[:B] >= self._limit[:B]))[::-1]
        return [(int(row), "stop" if stopped[row] else "length") for row in ended]

    def cuts(self) -> list[tuple[int, int, int]]:
        """(first row, last row + 1, positions to attend to) of consecutive rows."""
        cuts: list[tuple[int, int, int]] = []
        for first in range(0, self.count, self._chunk):
            stop = min(first + self._chunk, self.count)
            width = int(self.position[first:stop].max()) // _WIDTH_STEP * _WIDTH_STEP + _WIDTH_STEP
            width = min(width, self._length)
            if cuts and cuts[-1][2] == width:
                first = cuts.pop()[0]
            cuts.append((first, stop, width))
        return cuts

    def remove(self, row: int, finish: Finish) -> list[tuple[int, int]]:
        """End `row` and give its request the sample; returns how rows moved, (from, to) in
        order."""
        size = int(self._size[row])
        spans = closed(self._spans[row], size)
        tokens, logps = self._tokens[row, :size].copy(), self._logps[row, :size].copy()
        self.requests[row].put(self._index[row], Sample(tokens, logps, spans, finish))
        moves, hole = [], row
        while (source := self._successor(hole)) != hole:
            self._move(source, hole)
            moves.append((source, hole))
            hole = source
        self.count -= 1
        del self.requests[-1], self._index[-1], self._spans[-1]
        return moves

    def _successor(self, hole: int) -> int:
        """The oldest row of the next chunk, or the last row."""
        first = (hole // self._chunk + 1) * self._chunk
        if first >= self.count:
            return self.count - 1
        return first + int(self.position[first : min(first + self._chunk, self.count)].argmax())

    def mark_swap(self, version: int) -> None:
        for spans, size in zip(self._spans, self._size.tolist(), strict=False):
            mark_swap(spans, size, version)

    def _move(self, source: int, target: int) -> None:
        self.requests[target] = self.requests[source]
        self._index[target] = self._index[source]
        self._spans[target] = self._spans[source]
        for array in (
            self.token,
            self.position,
            self.key,
            self.temperature,
            self._size,
            self._limit,
            self._stop,
        ):
            array[target] = array[source]
        size = int(self._size[source])
        for block in (self._tokens, self._logps):
            block[target, :size] = block[source, :size]

    def _set_stop(self, row: int, stop: tuple[int, ...]) -> None:
        if len(stop) > self._stop.shape[1]:
            missing = len(stop) - self._stop.shape[1]
            self._stop = np.pad(self._stop, ((0, 0), (0, missing)), constant_values=-1)
        self._stop[row] = -1
        self._stop[row, : len(stop)] = stop
