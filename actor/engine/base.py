"""What an engine is: prefixes in, samples out, weights swapped under way.

Sampling noise is a pure function of (sampling.seed, rollout number, position in the sequence):
whatever else runs beside a sequence, the same prefix under the same weights samples the same tokens
(up to float ties).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from common.versions import Weights
from common.wire import Finish, Sampling


class Sample(NamedTuple):
    """One continuation. `spans`: (index of the first token, version), first index 0, run-length
    coded.
    """

    tokens: np.ndarray  # int32 [T], the stop token included when there was one
    logps: np.ndarray  # float32 [T], after temperature, under the weights that sampled each token
    spans: tuple[tuple[int, int], ...]
    finish: Finish


class EngineStats(NamedTuple):
    tokens_per_s: float  # sampled, over the last seconds
    running: int  # sequences being decoded
    waiting: int  # sequences without a slot
    kv_use: float  # share of the KV cache in use, 0…1
    version: int
    busy: float  # share of the last seconds in which there was something to decode, 0…1
    pause_s: float  # seconds spent so far with decoding held for a swap of weights
    tokens: int  # sampled so far
    preemptions: int = 0  # sequences that lost their place in the KV cache, so far
    up: bool = True  # False: there is no engine just now, another one is being made
    restarts: int = 0  # engines that took the place of a broken one, so far
    trouble: str = ""  # what the last one broke of


class Engine(Protocol):
    vocab_size: int
    max_length: int  # longest prefix + continuation
    slots: int  # sequences it decodes side by side

    async def generate(
        self,
        prefix: np.ndarray,
        n: int,
        sampling: Sampling,
        *,
        first: int = 0,
        deadline: float | None = None,
    ) -> Sequence[Sample]:
        """`n` continuations of `prefix` (int32 [P]), as rollouts number `first` … `first + n - 1`
        of their ticket.

        Past `deadline` (time.monotonic) unfinished ones come back as they are with finish
        "aborted"; the same when the task that waits is cancelled, except that then nobody reads
        them: their slots are freed at once. Raises DataError when the prefix does not fit,
        EngineError when the engine is broken.
        """
        ...

    async def update_weights(self, weights: Weights) -> None:
        """Swap to these (already verified) weights between two tokens; running sequences go on, KV
        cache kept.

        Raises WeightsError and keeps serving the old version when names, shapes or dtypes do not
        fit the model.
        """
        ...

    def stats(self) -> EngineStats: ...

    async def watch(self) -> None:
        """Waits for as long as the engine can serve; raises EngineError, with the reason, once it
        no longer can: its process died, or has stood still for too long."""
        ...

    async def close(self) -> None: ...
