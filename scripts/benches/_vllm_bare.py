"""vLLM without us: its offline loop, and the barest change of weights that it allows."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from vllm import LLM, AsyncEngineArgs, SamplingParams
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

Requests = Sequence[tuple[list[int], SamplingParams]]


class Held:
    """vLLM loads this by name into its worker: weights that lie ready in the worker's memory."""

    model_runner: Any
    vllm_config: Any

    def hold(self, path: str) -> None:
        self._held = {name: tensor.clone() for name, tensor in load_file(path).items()}

    def copy(self) -> None:
        """Into the model, which runs nothing meanwhile."""
        model = self.model_runner.model
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
            model.load_weights(self._held.items())
            finalize_layerwise_reload(model, self.vllm_config.model_config)
            if model.config.tie_word_embeddings:  # a CPU's packed copy of it would stay the old one
                model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


class Offline:
    """`LLM.generate`: everything handed over at once, answered at the end."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.llm = LLM(**arguments)

    def time(self, requests: Requests) -> float:
        """Seconds for all of them."""
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        params = [how for _, how in requests]
        started = time.perf_counter()
        answers = self.llm.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - started
        for answer, how in zip(answers, params, strict=True):
            assert len(answer.outputs[0].token_ids) == how.max_tokens
        return took

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


class Bare:
    """`AsyncLLM` with nothing around it."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        worker = f"{Held.__module__}.{Held.__qualname__}"
        args = AsyncEngineArgs(**arguments, worker_extension_cls=worker)
        self.llm = AsyncLLM.from_engine_args(args)
        self._asked = 0

    async def hold(self, path: str) -> None:
        await self.llm.collective_rpc("hold", args=(path,))

    @contextlib.asynccontextmanager
    async def decoding(self, requests: Requests) -> AsyncIterator[None]:
        """While they are decoded; entered when each has a token."""
        flowing = [asyncio.Event() for _ in requests]
        decoding = [
            asyncio.create_task(self._decode(prompt, how, begun))
            for (prompt, how), begun in zip(requests, flowing, strict=True)
        ]
        for begun in flowing:
            await begun.wait()
        try:
            yield
            assert not any(task.done() for task in decoding), "it was to run on after the swaps"
        finally:
            for task in decoding:
                task.cancel()
            await asyncio.gather(*decoding, return_exceptions=True)

    async def _decode(self, prompt: list[int], how: SamplingParams, begun: asyncio.Event) -> None:
        self._asked += 1
        how = how.clone()
        how.output_kind = RequestOutputKind.DELTA  # tell of every token
        async for _ in self.llm.generate({"prompt_token_ids": prompt}, how, f"bare-{self._asked}"):
            begun.set()

    async def swap(self) -> float:
        """Seconds from asking for the pause until decoding may go on."""
        started = time.perf_counter()
        await self.llm.pause_generation(mode="keep", clear_cache=False)
        await self.llm.collective_rpc("copy")
        await self.llm.resume_generation()
        return time.perf_counter() - started

    def close(self) -> None:
        self.llm.shutdown()
        del self.llm  # at the interpreter's end it could no longer clean up
