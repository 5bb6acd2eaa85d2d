"""The running batch: admits continuations, decodes one token of each a step, ends them.

A continuation enters with its prefix but the last token copied into its row of the cache; the last
token of the prefix is its first decode step. So one prefill serves all n continuations, several
prefixes share one prefill, and no logits are kept. All of it lives in one thread.
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import torch

from actor.engine import noise
from actor.engine.draw import draw
from actor.engine.model import Model
from actor.engine.request import Request
from actor.engine.rows import Rows
from actor.engine.weights import Staged
from common.errors import EngineError
from common.wire import Finish

_PREFILL_TOKENS = 8192  # of one prefill, pads included (one prefix may be longer)


def rows_needed(slots: int) -> int:
    """Rows of the KV cache for `slots` sequences: some more, for prefixes computed ahead of their
    slots."""
    return slots + max(4, slots // 4)


class Batch:
    """`inbox` is the only part that another thread writes to; `tokens` and `rows.count` it may
    read."""

    def __init__(self, model: Model, slots: int) -> None:
        self.inbox: deque[Request] = deque()
        chunk = max(16, slots // 4) if model.device.type == "cpu" else slots
        self.rows = Rows(slots, model.length, chunk)
        self.version = 0
        self.tokens = 0  # sampled so far …
        self.steps = 0  # … in so many decode steps
        self.trained: frozenset[str] = (
            frozenset()
        )  # names of the parameters that versions have changed
        self._model = model
        self._slots = slots
        self._queue: deque[Request] = deque()  # those with continuations that have no slot yet
        self._prefix_rows: dict[Request, int] = {}
        self._free_rows = list(range(slots, rows_needed(slots)))
        self._ended: list[Request] = []
        self.interrupt = False  # set by another thread: end the hop after this step

    @property
    def idle(self) -> bool:
        return not (self.rows.count or self.inbox or self._queue)

    @torch.inference_mode()
    def hop(self, seconds: float) -> list[Request]:
        """Decode for about `seconds`; returns the requests that are complete."""
        until = time.monotonic() + seconds
        self._ended = []
        self._sweep()
        while True:
            self._admit()
            if not self.rows.count:
                break
            self._step()
            if self.interrupt or time.monotonic() >= until:
                break
        return self._ended

    @torch.inference_mode()
    def swap(self, staged: Staged) -> float:
        """Serve `staged` from the next token on; running rows keep their cache. Returns the seconds
        it took."""
        started = time.monotonic()
        staged.apply()
        self._model.refresh()
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        self.version, self.trained = staged.version, staged.names
        self.rows.mark_swap(staged.version)
        for request in list(self._prefix_rows):  # of the old weights, and still without a token
            self._free_prefix(request)
        return time.monotonic() - started

    def _step(self) -> None:
        rows, device = self.rows, self._model.device
        B = rows.count
        position = rows.position[:B]
        logits = self._model.decode(_on(device, rows.token[:B]), _on(device, position), rows.cuts())
        uniform = noise.uniform(rows.key[:B], position + 1)
        temperature = rows.temperature[:B]
        warm = None if (temperature == 1.0).all() else _on(device, temperature)
        token_B, logp_B = draw(logits, warm, _on(device, uniform))
        tokens, logps = token_B.cpu().numpy(), logp_B.cpu().numpy()
        if not np.isfinite(logps).all():
            raise EngineError(f"a log-probability under version {self.version} is not finite")
        self.tokens += B
        self.steps += 1
        for row, finish in rows.extend(tokens, logps):
            self._end(row, finish)

    def _admit(self) -> None:
        """Give free rows to the continuations that wait, in order of arrival."""
        self._receive()
        while self._queue and self.rows.count < self._slots:
            request = self._queue[0]
            if request not in self._prefix_rows:
                self._prefill_ahead()
            row = self.rows.add(request, self.version)
            self._model.cache.copy_prefix(self._prefix_rows[request], row, len(request.prefix) - 1)
            if not request.waiting:
                self._queue.popleft()
                self._free_prefix(request)

    def _receive(self) -> None:
        while self.inbox:
            self._queue.append(self.inbox.popleft())

    def _prefill_ahead(self) -> None:
        """Prefixes of the first requests in the queue, as many as there are rows for and one pass
        should take."""
        chosen: list[Request] = []
        widest = 0
        for request in self._queue:
            widest = max(widest, len(request.prefix))
            if len(chosen) == len(self._free_rows) or (
                chosen and widest * (len(chosen) + 1) > _PREFILL_TOKENS
            ):
                break
            chosen.append(request)
        for request in chosen:
            self._prefix_rows[request] = self._free_rows.pop()
        prefixes = [torch.from_numpy(request.prefix[:-1]) for request in chosen]
        self._model.prefill([self._prefix_rows[request] for request in chosen], prefixes)

    def _free_prefix(self, request: Request) -> None:
        row = self._prefix_rows.pop(request, None)
        if row is not None:
            self._free_rows.append(row)

    def _sweep(self) -> None:
        """End what nobody waits for any more, and what is past its deadline."""
        for row in reversed(range(self.rows.count)):
            if self.rows.requests[row].over:
                self._end(row, "aborted")
        self._receive()
        for request in [request for request in self._queue if request.over]:
            self._queue.remove(request)
            request.abort_waiting(self.version)
            self._free_prefix(request)
            if not request.open:
                self._ended.append(request)

    def _end(self, row: int, finish: Finish) -> None:
        request = self.rows.requests[row]
        for source, target in self.rows.remove(row, finish):
            self._model.cache.copy_prefix(source, target, int(self.rows.position[target]))
        if not request.open:
            self._ended.append(request)


def _on(device: torch.device, array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(device)
