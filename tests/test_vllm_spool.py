"""What the actor lays into the spool is what a worker finds there, or it is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from actor.engine.vllm_spool import Checkpoint, Spool, read
from common import models
from common.errors import DataError, WeightsError
from common.versions import Tensor, Weights, digest


def tensor(name: str, *shape: int) -> Tensor:
    values = np.arange(np.prod(shape), dtype=np.float32)
    return Tensor(name, "F32", shape, memoryview(values).cast("B"))


def version(*tensors: Tensor) -> Weights:
    return Weights(7, digest(tensors), tensors, 1)


def test_a_worker_finds_what_the_actor_laid_in() -> None:
    given = version(*(tensor(f"layer.{i}.weight", i + 1, 3) for i in range(40)), tensor("a", 5))
    spool = Spool(given, ("frozen.one",))
    header, mapped = read(spool.path)
    spool.close()
    assert (header.version, header.digest, header.frozen) == (7, given.digest, ("frozen.one",))
    assert [entry.name for entry in header.tensors] == sorted(t.name for t in given.tensors)
    content = {t.name: t.data.tobytes() for t in given.tensors}
    for entry in header.tensors:  # mapped memory stays, though the spool is closed
        assert mapped[entry.offset : entry.offset + entry.nbytes] == content[entry.name]
        assert entry.offset % 64 == 0
    ends = [(entry.offset, entry.offset + entry.nbytes) for entry in header.tensors]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ends))


def test_bytes_that_changed_on_the_way_are_refused() -> None:
    spool = Spool(version(tensor("a", 4)), ())
    header, _ = read(spool.path)
    with spool.path.open("r+b") as file:
        file.seek(header.tensors[0].offset)
        file.write(b"x")
    with pytest.raises(WeightsError, match=r"version 7: the spool's digest is \w+, not"):
        read(spool.path)
    spool.close()


def test_a_spool_that_is_gone_or_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is unreadable"):
        read(tmp_path / "none")
    (tmp_path / "cut").write_bytes(b"\xff" * 20)
    with pytest.raises(WeightsError, match="is unreadable"):
        read(tmp_path / "cut")


def test_nothing_is_left_of_a_spool_that_is_closed() -> None:
    spool = Spool(version(tensor("a", 4)), ())
    assert spool.path.exists()
    spool.close()
    assert not spool.path.exists()


def test_a_version_of_some_tensors_is_completed_by_its_layers() -> None:
    checkpoint = Checkpoint(models.find("tiny"))
    layer = "model.layers.2."
    beside = checkpoint.beside([f"{layer}self_attn.q_proj.weight", "model.norm.weight"])
    assert all(name.startswith(layer) for name in beside)
    assert f"{layer}self_attn.q_proj.weight" not in beside
    assert len(beside) == sum(name.startswith(layer) for name in checkpoint.shapes) - 1
    assert checkpoint.beside(list(checkpoint.shapes)) == ()


def test_a_folder_without_safetensors_gets_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no \*\.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0nope!")
    with pytest.raises(DataError, match="is unreadable"):
        Checkpoint(tmp_path)
