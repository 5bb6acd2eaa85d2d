"""vLLM's own NCCL back-end: the actor is its trainer, rank 0 of a group with vLLM's workers.

    staged ─▶ tensor by tensor onto a GPU that no worker uses ─▶ broadcast ─▶ load_weights

NEVER RUN ON A GPU: none was available. A test holds the names used here against the installed vLLM.
The digest is compared in the actor alone. NCCL has no deadline: what waits for it is a daemon
thread, and whoever waits for the thread has one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer import base
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory as Trainers
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from actor.engine.vllm_worker import Staged
from common.errors import EngineError
from common.redis_server import free_port


@dataclass
class Source(base.WeightSource):  # type: ignore[misc]
    """The staged version as vLLM's trainer reads it, in name order."""

    device: str
    staged: Any = None

    def metadata(self) -> list[base.ParamMeta]:
        return [base.ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in self.staged.tensors()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor.to(self.device)) for name, tensor in self.staged.tensors())


class Sender:
    """The trainer, and the client by which it asks the workers (vLLM's VLLMWeightSyncClient)."""

    def __init__(self, llm: Any, folder: Path, gpu: int, call: Callable[..., Any]) -> None:
        """In the event loop. `call`: Transfer's. The group is opened under the first pause."""
        self._llm, self._folder, self._gpu, self._call = llm, folder, gpu, call
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._source = Source(f"cuda:{gpu}")
        self._trainer: Any = None

    async def stage(self, spool: Path) -> None:
        """Map and verify, while decoding goes on. Raises WeightsError."""
        self._source.staged = await asyncio.to_thread(Staged, spool, self._folder)

    async def load(self) -> None:
        """Under the pause: start, send to all workers, finish. Raises EngineError."""
        await self._call(self._sent(), "send_weights by NCCL")
        self._source.staged = None

    def close(self) -> None:
        """Abort what NCCL still waits for: seconds at most."""
        if self._trainer is not None:
            self._trainer.shutdown()

    async def _sent(self) -> None:
        """Or a worker failed, for which the trainer would go on waiting in NCCL."""
        sent = in_thread(self._send)
        await asyncio.wait([sent, self._broken], return_when=asyncio.FIRST_COMPLETED)
        await (self._broken if self._broken.done() else sent)

    def _send(self) -> None:
        torch.cuda.set_device(self._gpu)  # of this thread; vLLM opens and sends on the current one
        if self._trainer is None:
            workers = self._llm.vllm_config.parallel_config.world_size_across_dp
            info = NCCLTrainerInitInfo("127.0.0.1", free_port(), 1 + workers, rank=0)
            self._trainer = Trainers.trainer_init(info, client=self, source=self._source)
        if self._trainer.model_update_group.disabled:  # vLLM would go on, and broadcast nothing
            raise EngineError('no NCCL here: set actor.vllm.weight_transfer to "spool"')
        self._trainer.send_weights()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._ask("init_weight_transfer_engine", base.WeightTransferInitRequest(init_info))

    def start_weight_update(self) -> None:
        self._ask("start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._ask("update_weights", base.WeightTransferUpdateRequest(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._ask("finish_weight_update", weight_version)

    def _ask(self, what: str, *args: Any) -> None:
        asyncio.run_coroutine_threadsafe(self._answer(what, args), self._broken.get_loop()).result()

    async def _answer(self, what: str, args: tuple[Any, ...]) -> None:
        try:
            await self._call(getattr(self._llm, what)(*args), what)
        except EngineError as error:
            if not self._broken.done():
                self._broken.set_exception(error)
            raise


def in_thread(work: Callable[[], Any]) -> asyncio.Future[Any]:
    done: Future[Any] = Future()

    def run() -> None:
        done.set_running_or_notify_cancel()
        try:
            done.set_result(work())
        except Exception as error:  # noqa: BLE001  vLLM, torch and NCCL raise what they like
            done.set_exception(error)

    threading.Thread(target=run, name="nccl", daemon=True).start()
    return asyncio.wrap_future(done)
