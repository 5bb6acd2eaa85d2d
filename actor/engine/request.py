"""One call of `generate` while it is under way, and what both engines do alike: checks and version
spans."""

from __future__ import annotations

import asyncio
import math
import time

import numpy as np

from actor.engine import noise
from actor.engine.base import Sample
from common.errors import DataError
from common.wire import Sampling

Spans = list[tuple[int, int]]  # (index of the first token, version), run-length coded


class Request:
    """`n` continuations of one prefix; `done` receives them when the last one ends."""

    def __init__(
        self,
        prefix: np.ndarray,
        n: int,
        sampling: Sampling,
        first: int,
        deadline: float | None,
        limit: int,
    ) -> None:
        self.prefix = np.asarray(prefix, np.int64)
        self.sampling = sampling
        self.deadline = deadline
        self.limit = limit  # tokens a continuation may have
        self.keys = noise.keys(sampling.seed, np.arange(first, first + n))
        self.samples: list[Sample | None] = [None] * n
        self.placed = 0  # continuations that have been given a slot
        self.open = n
        self.done: asyncio.Future[list[Sample]] = asyncio.get_running_loop().create_future()
        self.cancelled = False  # set by the event loop, read by the engine's thread

    @property
    def over(self) -> bool:
        """Nobody waits for more tokens of this request."""
        return self.cancelled or (self.deadline is not None and time.monotonic() >= self.deadline)

    @property
    def waiting(self) -> int:
        return len(self.samples) - self.placed

    def put(self, index: int, sample: Sample) -> None:
        self.samples[index] = sample
        self.open -= 1

    def deliver(self) -> None:
        """Wake whoever waits; nobody does after a cancellation."""
        if not self.done.done():
            self.done.set_result([sample for sample in self.samples if sample is not None])

    def abort_waiting(self, version: int) -> None:
        """Continuations that never had a slot end without a token."""
        for index in range(self.placed, len(self.samples)):
            self.put(index, empty_sample(version))
        self.placed = len(self.samples)


def check(prefix: np.ndarray, n: int, sampling: Sampling, vocab_size: int, max_length: int) -> int:
    """The number of tokens a continuation may have; raises DataError for what cannot be sampled."""
    if not 1 <= prefix.size < max_length:
        raise DataError(
            f"a prefix of {prefix.size} tokens: the engine takes 1 to {max_length - 1} "
            "(actor.max_length)"
        )
    if int(prefix.min()) < 0 or int(prefix.max()) >= vocab_size:
        raise DataError(f"the prefix has a token outside the model's vocabulary [0, {vocab_size})")
    if n < 1 or sampling.max_tokens < 1:
        raise DataError(
            f"{n} continuations of {sampling.max_tokens} tokens: both must be at least 1"
        )
    if not (math.isfinite(sampling.temperature) and sampling.temperature > 0):
        raise DataError(f"temperature {sampling.temperature}: it must be above 0")
    if sampling.top_p != 1.0 or sampling.top_k != 0:
        raise DataError(
            f"top_p = {sampling.top_p}, top_k = {sampling.top_k}: the log-probabilities of a "
            "truncated distribution are not the policy's; use top_p = 1 and top_k = 0"
        )
    return min(sampling.max_tokens, max_length - prefix.size)


def empty_sample(version: int) -> Sample:
    return Sample(np.zeros(0, np.int32), np.zeros(0, np.float32), ((0, version),), "aborted")


def mark_swap(spans: Spans, index: int, version: int) -> None:
    """From token `index` on, tokens come from `version`."""
    if spans and spans[-1][0] == index:
        spans.pop()
    if not spans or spans[-1][1] != version:
        spans.append((index, version))


def closed(spans: Spans, length: int) -> tuple[tuple[int, int], ...]:
    """The spans of a continuation of `length` tokens: a swap after the last token is not in it."""
    return tuple(span for span in spans if span[0] < max(length, 1))
