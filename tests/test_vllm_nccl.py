"""The NCCL adapter, as far as it goes without a GPU: vLLM has what it calls, as it calls it."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actor.engine.vllm_spool import Spool
from actor.engine.vllm_transfer import Transfer
from common import models
from common.errors import EngineError, WeightsError
from common.versions import Tensor, Weights, digest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # of vLLM's imports


def version() -> Weights:
    """Of one projection, which vLLM keeps in one parameter with others of its layer."""
    values = np.arange(32 * 32, dtype=np.float32)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = (Tensor(name, "F32", (32, 32), memoryview(values).cast("B")),)
    return Weights(3, digest(tensors), tensors)


def parameters(what: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(what).parameters if name != "self"]


def test_vllm_has_what_the_adapter_calls() -> None:
    from vllm.config.parallel import ParallelConfig
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.distributed.weight_transfer import base, factory, nccl_engine
    from vllm.v1.engine.async_llm import AsyncLLM

    assert parameters(AsyncLLM.init_weight_transfer_engine) == ["request"]
    assert parameters(AsyncLLM.start_weight_update) == []
    assert parameters(AsyncLLM.update_weights) == ["request"]
    assert parameters(AsyncLLM.finish_weight_update) == ["weight_version"]
    assert parameters(AsyncLLM.update_weight_version) == ["new_version"]
    trainer = nccl_engine.NCCLTrainerWeightTransferEngine
    found = inspect.signature(factory.WeightTransferTrainerFactory.trainer_init).parameters
    assert list(found) == ["init_info", "client", "source"]
    assert found["client"].kind is found["source"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters(trainer.send_weights) == parameters(trainer.shutdown) == []
    assert trainer(client=None, source=None).model_update_group is None
    info = nccl_engine.NCCLTrainerInitInfo("127.0.0.1", 1, 3, rank=0)
    assert (info.backend, info.is_sender, info.world_size) == ("nccl", True, 3)
    assert (info.master_address, info.master_port) == ("127.0.0.1", 1)
    assert [field.name for field in dataclasses.fields(base.ParamMeta)] == [
        "name",
        "dtype",
        "shape",
    ]
    assert base.WeightSource.__abstractmethods__ == {"metadata", "__iter__"}
    assert base.WeightTransferInitRequest({"a": 1}).init_info == {"a": 1}
    assert base.WeightTransferUpdateRequest({"a": 1}).update_info == {"a": 1}
    assert isinstance(ParallelConfig.world_size_across_dp, property)
    alone = StatelessProcessGroup(rank=0, world_size=1, store=None)
    assert PyNcclCommunicator(alone, device="cpu").disabled is True


@pytest.mark.asyncio
async def test_the_sender_asks_by_vllms_client_protocol_and_names_what_failed() -> None:
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient
    from vllm.v1.engine.async_llm import AsyncLLM

    from actor.engine.vllm_nccl import Sender

    transfer = Transfer(models.find("tiny"), 30.0, asyncio.Event(), gpu=1)
    dead = AsyncLLM.__new__(AsyncLLM)  # no process behind it: every call of it fails
    sender = Sender(dead, models.find("tiny"), 1, transfer.call)
    assert isinstance(sender, VLLMWeightSyncClient)
    for name in ("init_weight_transfer_engine", "update_weights"):
        ours, theirs = getattr(Sender, name), getattr(VLLMWeightSyncClient, name)
        assert parameters(ours) == parameters(theirs)
    with pytest.raises(EngineError, match="vLLM failed in update_weights: "):
        await asyncio.to_thread(sender.update_weights, {"names": []})
    with pytest.raises(EngineError, match=r"^vLLM failed in update_weights: [^\n]+$"):
        await sender.load()  # the first failure is told, though the trainer has another
    sender.close()
    transfer.close()


@pytest.mark.asyncio
async def test_without_a_gpu_sending_breaks_the_engine_in_one_line() -> None:
    from actor.engine.vllm_nccl import Sender

    transfer = Transfer(models.find("tiny"), 30.0, asyncio.Event(), gpu=1000)
    parallel = SimpleNamespace(world_size_across_dp=1)
    llm = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel))
    sender = Sender(llm, models.find("tiny"), 1000, transfer.call)
    with pytest.raises(EngineError, match=r"^vLLM failed in send_weights by NCCL: [^\n]+$"):
        await sender.load()


@pytest.mark.asyncio
async def test_what_is_staged_is_what_vllms_trainer_would_send(tmp_path: Path) -> None:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    from actor.engine.vllm_nccl import Sender, Source
    from actor.engine.vllm_worker import Staged

    folder, given = models.find("tiny"), version()
    frozen = ("model.layers.0.self_attn.k_proj.weight",)
    spool, source = Spool(given, frozen), Source("cpu")
    source.staged = Staged(spool.path, folder)
    pairs = list(NCCLTrainerWeightTransferEngine._checked_iter(source, source.metadata()))
    assert [name for name, _ in pairs] == sorted([*frozen, given.tensors[0].name])
    assert pairs[1][1].numpy().tobytes() == given.tensors[0].data.tobytes()
    spool.close()
    sender = Sender(None, folder, 1, Transfer(folder, 30.0, asyncio.Event(), gpu=1).call)
    with pytest.raises(WeightsError, match="is unreadable"):
        await sender.stage(tmp_path / "none")


@pytest.mark.asyncio
async def test_a_thread_that_nccl_never_lets_go_is_left_behind_after_the_deadline() -> None:
    from actor.engine.vllm_nccl import in_thread

    transfer, freed = Transfer(models.find("tiny"), 0.2, asyncio.Event(), gpu=1), threading.Event()
    with pytest.raises(EngineError, match=r"did not answer within 0\.2 s in send"):
        await transfer.call(in_thread(freed.wait), "send")
    (thread,) = (t for t in threading.enumerate() if t.name == "nccl")
    assert thread.daemon
    freed.set()
    thread.join()
