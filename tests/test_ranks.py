"""A learner of many processes: the same numbers as one, checkpoints for any number of ranks."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from torch import distributed
from torch.distributed import distributed_c10d

from common.audit_checkpoints import read_safetensors, read_weights
from common.config import RunConfig
from common.errors import DataError, JournalError
from common.journal import NO_SPACE
from common.models import FOLDER_VARIABLE
from common.versions import digest
from learner import checkpoint
from learner import model as models
from learner.comm import Comm, Order
from learner.config import LearnerConfig, RanksConfig
from learner.item import Item
from learner.model import Policy
from learner.ranks import obey
from learner.state import TrainState, state_of
from learner.step import train_step
from learner.tuning import KappaConfig
from tests.builders import tiny_model
from tests.test_step import a_batch
from tests.together import together

pytestmark = pytest.mark.timeout(600)

FOLD = b"what the ledger knows"
STEPS, KEPT = 3, 2  # steps of a run, and of its checkpoint
HALF = LearnerConfig(warmup_steps=0, lr=1e-3, threads=1, tokens_per_micro=60, dtype="bf16")


def settings() -> LearnerConfig:
    """Several updates and micro-batches a step, and a measurement."""
    return LearnerConfig(
        warmup_steps=0,
        lr=1e-3,
        threads=1,
        tokens_per_micro=40,
        updates_per_batch=2,
        realised_every=1,
    )


def fresh(config: LearnerConfig | None = None) -> TrainState:
    """Of sizes that four ranks cannot share equally."""
    config = config or settings()
    net = tiny_model(vocab=34, intermediate_size=66)
    return state_of(Policy(net, config), RunConfig(), config)


def batch(t: int) -> list[Item]:
    """The second one has fewer rows than there are ranks."""
    items = a_batch(t)
    if t != 1:
        return items
    few = msgspec.structs.replace(items[0].group, rollouts=items[0].group.rollouts[:2])
    return [items[0]._replace(group=few)]


class Found(NamedTuple):
    losses: list[float]
    weights: torch.Tensor
    mean_entropies: list[float]


def weights(state: TrainState) -> torch.Tensor:
    blobs = models.snapshot(state.model, "fp32")
    return torch.frombuffer(bytearray(b"".join(bytes(b.data) for b in blobs)), dtype=torch.float32)


# ---- the processes ------------------------------------------------------------------------------


def straight(folder: Path, state: TrainState, world: int) -> Found:
    """Three steps, and the checkpoint `step-WORLD` after the second."""
    losses, entropies = [], []
    for t in range(STEPS):
        if t == KEPT:
            torch.manual_seed(world)
            checkpoint.save(folder / f"step-{world}", state, FOLD)
        metrics = train_step(state, batch(t), settings()).metrics
        losses.append(float(metrics["loss"]))  # type: ignore[arg-type]
        entropies.append(float(metrics["entropy_realised"]))  # type: ignore[arg-type]
    return Found(losses, weights(state), entropies)


def resumed(folder: Path, state: TrainState, wrote: int) -> torch.Tensor:
    """The third step, from the checkpoint that `wrote` ranks made."""
    assert checkpoint.load(folder / f"step-{wrote}", state) == FOLD
    assert state.t == KEPT
    train_step(state, batch(KEPT), settings())
    return weights(state)


@contextmanager
def no_room(full: bool) -> Iterator[None]:
    """If `full`, this process cannot write files of any size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def errno_of_a_save(path: Path, state: TrainState) -> int:
    with pytest.raises(OSError, match="rank 1's part") as caught:
        checkpoint.save(path, state, FOLD)
    return caught.value.errno or 0


def half(**ranks: Any) -> LearnerConfig:
    return msgspec.structs.replace(HALF, ranks=RanksConfig(**ranks))


def kappa_tuned() -> TrainState:
    """Of which most is frozen."""
    return fresh(msgspec.structs.replace(settings(), kappa_tune=KappaConfig(tensors=5)))


def _refuse(*_: object) -> None:
    raise AssertionError("an object is on its way to another rank, pickled")


def _process(rank: int, folder: str) -> None:
    """One of four: two of them are two ranks first, then all are four."""
    torch.set_num_threads(1)
    os.environ[FOLDER_VARIABLE] = f"{folder}/models"  # condition numbers are kept beside them
    for way in ("_object_to_tensor", "_tensor_to_object"):  # all of torch's object collectives
        setattr(distributed_c10d, way, _refuse)
    if rank < 2:
        _rank(rank, 2, 1, Path(folder))
    _rank(rank, 4, 2, Path(folder))


def _rank(rank: int, world: int, wrote: int, folder: Path) -> None:
    """They leave what they found in WORLD.pt."""
    store = f"file://{folder}/store-{world}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    comm = Comm.current()
    try:
        state, other, bf16 = fresh(), fresh(), fresh(half(recompute=True))
        frozen = kappa_tuned()
        if rank:
            for held in (state, other, frozen, bf16):
                obey(comm, lambda: None, held)  # type: ignore[arg-type,return-value]
            with no_room(rank == 1):
                obey(comm, lambda: None, bf16)  # type: ignore[arg-type,return-value]
            return
        found: dict[str, Any] = straight(folder, state, world)._asdict()
        comm.say(Order.STOP)
        found["resumed"] = resumed(folder, other, wrote)
        comm.say(Order.STOP)
        train_step(frozen, batch(0), settings())
        checkpoint.save(folder / f"kappa-{world}", frozen, FOLD)
        comm.say(Order.STOP)
        train_step(bf16, batch(0), half(recompute=True))
        found["bf16"] = weights(bf16)
        comm.say(Order.STOP)
        found["errno"] = errno_of_a_save(folder / f"full-{world}", bf16)
        comm.say(Order.STOP)
        torch.save(found, folder / f"{world}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one, two and four ranks did: two go on from one's checkpoint, four from two's."""
    path = tmp_path_factory.mktemp("ranks")
    torch.save(straight(path, fresh(), 1)._asdict(), path / "1.pt")
    together(4, _process, str(path))
    return path


def found(folder: Path, world: int) -> dict[str, Any]:
    return torch.load(folder / f"{world}.pt", weights_only=True)  # type: ignore[no-any-return]


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """AdamW's moves are a thousandth each; these differ by roundings."""
    return torch.allclose(one, other, rtol=0, atol=5e-5)


# ---- the same numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
def test_losses_entropies_and_parameters_are_those_of_one_rank(folder: Path, world: int) -> None:
    one, many = found(folder, 1), found(folder, world)
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-4, abs=1e-6)
    assert many["mean_entropies"] == pytest.approx(one["mean_entropies"], rel=1e-3, abs=1e-6)
    assert near(many["weights"], one["weights"])


@pytest.mark.parametrize(("wrote", "read"), [(1, 2), (2, 4)])
def test_a_checkpoint_goes_on_on_more_ranks(folder: Path, wrote: int, read: int) -> None:
    assert near(found(folder, read)["resumed"], found(folder, 1)["weights"])


@pytest.mark.parametrize("wrote", [2, 4])
def test_a_checkpoint_goes_on_on_fewer_ranks(folder: Path, wrote: int) -> None:
    assert near(resumed(folder, fresh(), wrote), found(folder, 1)["weights"])


@pytest.mark.parametrize("wrote", [2, 4])
def test_where_most_is_frozen_one_rank_goes_on_from_many_and_is_told_when_it_is_not_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, wrote: int
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder / "models"))
    alone, again = kappa_tuned(), kappa_tuned()
    train_step(alone, batch(0), settings())
    checkpoint.load(folder / f"kappa-{wrote}", again)
    for state in (alone, again):
        train_step(state, batch(2), settings())
    assert len(again.masters) == 5
    assert near(weights(again), weights(alone))
    with pytest.raises(DataError, match=r"resume with the learner\.kappa_tune that the run had"):
        checkpoint.load(folder / f"kappa-{wrote}", fresh())


@pytest.mark.parametrize("world", [2, 4])
def test_half_precision_and_recomputed_layers_come_near_one_rank(folder: Path, world: int) -> None:
    state, before = fresh(HALF), weights(fresh())
    train_step(state, batch(0), HALF)
    moved, alone = found(folder, world)["bf16"] - before, weights(state) - before
    agree = (moved * alone).sum() / (moved.norm() * alone.norm())
    assert agree > 0.97, "AdamW's first move is nearly the gradient's sign: roundings show"


def test_recomputing_layers_changes_no_bit_on_one_rank() -> None:
    plain, recomputed = (
        settings(),
        msgspec.structs.replace(settings(), ranks=RanksConfig(recompute=True)),
    )
    states = fresh(plain), fresh(recomputed)
    for state, config in zip(states, (plain, recomputed), strict=True):
        train_step(state, batch(0), config)
    assert torch.equal(weights(states[0]), weights(states[1]))


# ---- checkpoints --------------------------------------------------------------------------------


def test_every_rank_writes_its_slices_and_nothing_is_pickled(folder: Path) -> None:
    names = {path.name for path in (folder / "step-2").iterdir()}
    slices = {
        f"{kind}-0000{rank}.safetensors" for kind in ("weights", "optimizer") for rank in "01"
    }
    assert names == slices | {"index.json", "manifest.json", "state.json", "fold.msgpack"}
    of_one = read_safetensors(folder / "step-1" / "weights.safetensors")
    for world in (2, 4):
        for whole, again in zip(of_one, read_weights(folder / f"step-{world}"), strict=True):
            assert (whole.name, whole.shape) == (again.name, again.shape)
    assert digest(read_weights(folder / "step-1")) == digest(of_one)


@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_without_room_is_a_full_disk_for_all_and_no_checkpoint(
    folder: Path, world: int
) -> None:
    assert found(folder, world)["errno"] in NO_SPACE
    assert not (folder / f"full-{world}").exists()


def test_the_index_of_another_checkpoint_is_noticed(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder / "step-2", tmp_path / "step-2"))
    shutil.copyfile(folder / "step-4" / "index.json", copy / "index.json")
    with pytest.raises(JournalError, match=r"index.json is cut or damaged; use an older"):
        checkpoint.load(copy, fresh())
    (copy / "index.json").unlink()
    with pytest.raises(JournalError, match=r"weights.safetensors"):
        checkpoint.load(copy, fresh())


@pytest.mark.parametrize("name", ["weights-00001.safetensors", "index.json"])
@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_a_damaged_or_missing_slice_is_named_and_nothing_is_loaded(
    folder: Path, tmp_path: Path, name: str, damage: str
) -> None:
    copy = Path(shutil.copytree(folder / "step-2", tmp_path / "step-2"))
    data = bytearray((copy / name).read_bytes())
    (copy / name).unlink()
    if damage == "flip":
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
    state = fresh()
    before = weights(state)
    with pytest.raises(JournalError, match=r"safetensors|index"):
        checkpoint.load(copy, state)
    assert torch.equal(weights(state), before)


def test_the_random_state_of_torch_is_in_a_checkpoint_of_many_ranks(folder: Path) -> None:
    checkpoint.load(folder / "step-2", fresh())
    drawn = torch.rand(3)
    torch.manual_seed(2)
    assert torch.equal(drawn, torch.rand(3))
