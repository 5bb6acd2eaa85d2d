"""What vLLM tells of itself after every step: the numbers of EngineStats, and that it moves."""

from __future__ import annotations

import time
from typing import Any

from actor.engine.meter import Meter


class Statistics:
    """Shared by vLLM's engines of one actor (data parallel: several); written on the event loop."""

    def __init__(self) -> None:
        self.meter = Meter()
        self.tokens = 0
        self.preemptions = 0
        self.moved = time.monotonic()  # when something last moved
        self._latest: dict[int, Any] = {}

    def logger(self, _config: Any, index: int) -> EngineLogger:
        """vLLM's factory of a logger for each of its engines."""
        return EngineLogger(self, index)

    def wake(self) -> None:
        """From here on something is expected to move."""
        self.moved = time.monotonic()

    def step(self, index: int, scheduler: Any, iteration: Any) -> None:
        now = time.monotonic()
        if scheduler is not None:
            self._latest[index] = scheduler
        if iteration is not None:
            self.tokens += iteration.num_generation_tokens
            self.preemptions += iteration.num_preempted_reqs
            self.meter.count(iteration.num_generation_tokens, now - self.moved)
        self.moved = now

    def running(self, alive: int) -> int:
        """Of `alive` requests: an idle engine sends no news, so there are never more than those."""
        return min(alive, sum(int(latest.num_running_reqs) for latest in self._latest.values()))

    def kv_use(self, alive: int) -> float:
        """Share of the KV cache in use, of all engines."""
        if not alive or not self._latest:
            return 0.0
        used = [float(latest.kv_cache_usage) for latest in self._latest.values()]
        return sum(used) / len(used)


class EngineLogger:
    """vLLM's StatLoggerBase, by shape."""

    def __init__(self, statistics: Statistics, index: int) -> None:
        self._statistics, self._index = statistics, index

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, *_args: Any, **_kwargs: Any
    ) -> None:
        self._statistics.step(self._index, scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        pass

    def log(self) -> None:
        pass

    def record_sleep_state(self, *_args: Any) -> None:
        pass

    def record_admission_rejection(self, *_args: Any) -> None:
        pass
