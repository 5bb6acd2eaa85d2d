"""A weight version on its way from the actor into vLLM: checked, staged, loaded under a pause.

Until the first parameter is touched whatever is wrong is a WeightsError, and the old version goes
on being served. From then on it is an EngineError: half a version must never be sampled from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actor.engine import vllm_process
from actor.engine.vllm_request import salt
from actor.engine.vllm_spool import Checkpoint, Spool
from common.errors import EngineError, IsentropeError, WeightsError
from common.versions import Weights

if TYPE_CHECKING:
    from actor.engine.vllm_nccl import Sender

BACKENDS = {"spool": "isentrope-spool", "nccl": "nccl"}  # by vLLM's names
_LOOK_S = 0.01  # how often the workers are asked whether they have staged a version


class Transfer:
    def __init__(
        self, folder: Path, hang_s: float, down: asyncio.Event, gpu: int | None = None
    ) -> None:
        """`down` is set once vLLM is known not to answer; `gpu` sends by NCCL, None: workers read
        the spool. Raises DataError when the model's folder declares no tensors."""
        self._checkpoint = Checkpoint(folder)
        self._folder, self._hang_s, self._down, self._gpu = folder, hang_s, down, gpu
        self._sender: Sender | None = None
        self._trained: frozenset[str] = frozenset()  # names that an earlier version brought

    async def stage(self, llm: Any, weights: Weights) -> None:
        """Check, and have every worker map and verify it while decoding goes on. Raises
        WeightsError, or EngineError when vLLM does not answer."""
        spool = await asyncio.to_thread(self._spool, weights)
        try:
            if self._gpu is None:
                await self._stage(llm, spool.path)
            else:
                await self._by_nccl(llm, self._gpu).stage(spool.path)
        finally:
            spool.close()

    async def load(self, llm: Any, weights: Weights, serve: Callable[[], Awaitable[None]]) -> None:
        """Pause, load what is staged, resume; `serve` is awaited before. Raises EngineError: vLLM
        must not be asked for another token."""
        call = self.call
        await call(llm.pause_generation(mode="keep", clear_cache=False), "pause_generation")
        if self._gpu is None:
            await self._load(llm, weights)
        else:
            await self._by_nccl(llm, self._gpu).load()
        await call(llm.update_weight_version(salt(weights)), "update_weight_version")
        await serve()
        await call(llm.resume_generation(), "resume_generation")
        self._trained = frozenset(tensor.name for tensor in weights.tensors)

    def close(self) -> None:
        """When vLLM's processes have ended."""
        if self._sender is not None:
            self._sender.close()

    async def call(self, asked: Awaitable[Any], what: str) -> Any:
        """An answer of vLLM's, or EngineError."""
        answer, down = asyncio.ensure_future(asked), asyncio.ensure_future(self._down.wait())
        try:
            await asyncio.wait(
                [answer, down], timeout=self._hang_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not answer.done():
                why = "died" if down.done() else f"did not answer within {self._hang_s:g} s"
                raise EngineError(f"vLLM {why} in {what} (actor.engine_hang_s)")
            return answer.result()
        except IsentropeError:
            raise
        except Exception as error:  # noqa: BLE001  vLLM's calls raise bare Exceptions
            raise EngineError(f"vLLM failed in {what}: {vllm_process.said(error)}") from None
        finally:
            answer.cancel()
            down.cancel()

    def _spool(self, weights: Weights) -> Spool:
        self._checkpoint.check(weights, self._trained)
        names = [tensor.name for tensor in weights.tensors]
        return Spool(weights, self._checkpoint.beside(names))

    async def _stage(self, llm: Any, path: Path) -> None:
        await self.call(llm.collective_rpc("stage_weights", args=(str(path),)), "stage")
        while None in (found := await self.call(llm.collective_rpc("weights_staged"), "stage")):
            await asyncio.sleep(_LOOK_S)
        if wrong := [said for said in found if said]:
            raise WeightsError(wrong[0])

    async def _load(self, llm: Any, weights: Weights) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        request = WeightTransferUpdateRequest(update_info={"digest": weights.digest})
        await self.call(llm.start_weight_update(), "start_weight_update")
        await self.call(llm.update_weights(request), "update_weights")
        await self.call(llm.finish_weight_update(), "finish_weight_update")

    def _by_nccl(self, llm: Any, gpu: int) -> Sender:
        from actor.engine.vllm_nccl import Sender

        if self._sender is None:
            self._sender = Sender(llm, self._folder, gpu, self.call)
        return self._sender
