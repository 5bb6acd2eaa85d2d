"""One rollout as one request of vLLM, and what comes back as a sample."""

from __future__ import annotations

from typing import Any

import numpy as np

from actor.engine.base import Sample
from actor.engine.request import Spans, closed, empty_sample, mark_swap
from common.errors import EngineError
from common.versions import Weights
from common.wire import Finish, Sampling

_FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "aborted"}
_SEED_BITS = (1 << 63) - 1


class Rollout:
    """A continuation that is waited for; `sample` when it is there."""

    def __init__(self, prefix: np.ndarray, sampling: Sampling, limit: int, seed: int) -> None:
        self.prefix, self.sampling, self.limit = prefix.tolist(), sampling, limit
        self.seed = seed & _SEED_BITS
        self.id = ""  # of its request in vLLM; empty: it has none
        self.queue: Any = None  # where vLLM puts its one output
        self.again = False  # its request was aborted to be made afresh, under new weights
        self.sample: Sample | None = None

    @property
    def open(self) -> bool:
        """vLLM is at work on it."""
        return bool(self.id) and self.sample is None

    def ask(self, salt: str) -> tuple[Any, Any]:
        """vLLM's prompt and sampling parameters."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=self.sampling.temperature,
            max_tokens=self.limit,
            seed=self.seed,
            stop_token_ids=list(self.sampling.stop),
            ignore_eos=True,  # the ticket names its stop tokens
            logprobs=0,  # that of the sampled token
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        return tokens_input(self.prefix, cache_salt=salt or None), sampling

    def take(self, output: Any, version: int) -> None:
        """vLLM's last word on the request; `version` is served now. Raises EngineError."""
        (said,) = output.outputs
        if said.finish_reason not in _FINISH:
            raise EngineError(f"vLLM ended a request with {said.finish_reason!r}")
        tokens = np.array(said.token_ids, np.int32)
        if tokens.size == 0:
            self.sample = empty_sample(version)
            return
        logps = np.array(said.logprobs.logprobs, np.float32)[said.logprobs.start_indices]
        if logps.size != tokens.size:
            raise EngineError(f"vLLM gave {logps.size} log-probabilities for {tokens.size} tokens")
        spans = _spans(said.weight_versions, tokens.size)
        self.sample = Sample(tokens, logps, spans, _FINISH[said.finish_reason])

    def take_what_there_is(self, version: int) -> None:
        """After an abort: the tokens so far."""
        output = self.queue.get_nowait() if self.open else None
        if output is not None:
            self.take(output, version)


def salt(weights: Weights) -> str:
    """Of the prefix cache, and the label of the weights in vLLM: one of its own for each
    content."""
    return f"{weights.version}-{weights.digest}"


def _version(label: str) -> int:
    """What `salt` made of it; vLLM's own word for the weights it started with is version 0."""
    head = label.partition("-")[0]
    return int(head) if head.isdigit() else 0


def _spans(reported: Any, size: int) -> tuple[tuple[int, int], ...]:
    if not reported:
        raise EngineError("vLLM did not say which weights sampled its tokens")
    spans: Spans = []
    for span in reported:
        mark_swap(spans, span.start, _version(span.version))
    return closed(spans, size)
