"""A version of many ranks goes out tensor by tensor: the same bytes as of one rank, and nobody
holds all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from common.failpoints import Failpoint
from common.pull import fetch
from common.stores import open_store
from common.versions import Registry, digest
from learner import slices
from learner.comm import Comm, Order
from learner.publish import Publisher
from learner.shard import local

pytestmark = pytest.mark.timeout(400)

LAYERS, WIDTH = 24, 1024  # 2 MB each in bf16
ONE = 2 * WIDTH * WIDTH
RUN = "run-slices"


def net() -> nn.Sequential:
    """The same on every rank; the last layer cannot be cut into equal parts."""
    torch.manual_seed(3)
    made = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    return nn.Sequential(*made, nn.Linear(WIDTH, 7, bias=False))


def step(parameters: dict[str, Tensor]) -> None:
    """As a step does, in place: few weights pass a border of bf16, the same on any ranks."""
    with torch.no_grad():
        for parameter in parameters.values():
            mine = local(parameter)
            mine[:, ::50] *= -1


def published(parameters: dict[str, Tensor]) -> bytes:
    """What a version of one rank would be."""
    whole = [p.detach().bfloat16().reshape(-1).view(torch.uint8) for _, p in named(parameters)]
    return torch.cat(whole).numpy().tobytes()


def named(parameters: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return sorted(parameters.items())


def memory(kind: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def _rank(rank: int, folder: str, redis_url: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        model = net()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        parameters = dict(named(dict(model.named_parameters())))
        found = _lead(parameters, Path(folder), redis_url) if rank == 0 else _follow(parameters)
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
    finally:
        distributed.destroy_process_group()


def _lead(parameters: dict[str, Tensor], folder: Path, redis_url: str) -> dict[str, object]:
    comm, shelf = Comm.current(), slices.Shelf()
    registry = Registry(redis_url, RUN)
    disk = open_store(f"file:{folder}", registry)
    disk.blob_bytes = 1 << 20
    publisher = Publisher(registry, disk, 1, 3, Failpoint(), snapshot_every=3)
    peaks, before = [], None
    for version in range(4):
        tensors = slices.take(parameters, "bf16", shelf)
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest point so far
        at_first = memory("VmRSS")
        content = digest(tensors)
        publisher.publish(version, version, tensors, content)
        peaks.append(memory("VmHWM") - at_first)
        if version == 1:
            before = (tensors, content)
        comm.say(Order.STEP)
        step(parameters)
        assert before is None or digest(before[0]) == before[1], "steps change what was taken"
    registry.client.flushall()  # what Redis lost is gathered again
    publisher.ensure()
    comm.say(Order.STOP)
    registry.close()
    return {"peaks": peaks, "remembered": sorted(shelf.alive)}


def _follow(parameters: dict[str, Tensor]) -> dict[str, object]:
    comm, shelf = Comm.current(), slices.Shelf()
    while True:
        order, facts = comm.hear()
        if order is Order.STOP:
            return {"kept": sorted(shelf.kept)}
        if order is Order.SNAPSHOT:
            slices.keep(parameters, facts, shelf)
        elif order is Order.SHOW:
            slices.show(facts, shelf)
        else:
            step(parameters)


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, redis_server: object
) -> Iterator[tuple[Path, str]]:
    """Four versions of two ranks, published and looked at by nobody yet."""
    path = tmp_path_factory.mktemp("slices")
    url: str = redis_server.url  # type: ignore[attr-defined]
    multiprocessing.spawn(_rank, (str(path), url), nprocs=2)
    yield path, url
    registry = Registry(url, RUN)
    registry.client.flushall()
    registry.close()


def test_the_newest_version_is_what_one_rank_would_have_published(
    folder: tuple[Path, str],
) -> None:
    path, url = folder
    registry = Registry(url, RUN)
    got = fetch(registry, open_store(f"file:{path}", registry))
    registry.close()
    parameters = dict(net().named_parameters())
    for _ in range(3):
        step(parameters)
    assert got.version == 3
    found = b"".join(np.frombuffer(t.data, np.uint8).tobytes() for t in got.tensors)
    assert found == published(parameters)


def test_patches_are_made_of_slices_too(folder: tuple[Path, str]) -> None:
    assert list((folder[0] / RUN).glob("1-*-patch-*")), "version 1 changes few weights of 0"
    assert not list((folder[0] / RUN).glob("3-*-patch-*")), "a snapshot every third version"


def test_rank_0_never_holds_a_whole_version(folder: tuple[Path, str]) -> None:
    peaks = json.loads((folder[0] / "0.json").read_text())["peaks"]
    patch, whole = peaks[2:]  # the first of each kind pay for what is imported and warmed up
    assert max(patch, whole) < 16 * ONE, "of 24 layers: one at a time, in few copies"


def test_slices_go_with_the_last_tensor_that_rank_0_remembers(folder: tuple[Path, str]) -> None:
    assert json.loads((folder[0] / "1.json").read_text())["kept"] == [1, 2, 3]
    assert json.loads((folder[0] / "0.json").read_text())["remembered"] == [1, 3]
