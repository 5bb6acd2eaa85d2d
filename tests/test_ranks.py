"""A learner of many processes: the same numbers as one, checkpoints for any number of ranks, and no
rank that outlives another.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from torch import distributed
from torch.distributed import distributed_c10d

from common import journal
from common.audit_checkpoints import read_safetensors, read_weights
from common.config import RunConfig
from common.errors import DataError, JournalError
from common.journal import NO_SPACE
from common.models import FOLDER_VARIABLE
from common.records import Step
from common.runfolder import RunFolder
from common.status import read as read_status
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
from tests import runs
from tests.builders import tiny_model
from tests.conftest import Start, unused_port
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


# ---- the command --------------------------------------------------------------------------------


def test_a_lost_rank_ends_all_and_the_run_goes_on_exactly(
    tmp_path: Path, redis_url: str, free_port: int, processes: Start
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    where = {"run.redis": redis_url, "run.learner": f"tcp://127.0.0.1:{free_port}"}
    processes(
        *("-m", "actor", "scripted", "--name", "bob", "--learner", where["run.learner"]),
        *("--redis", redis_url),
        stderr=subprocess.DEVNULL,
    )
    with log.open("w") as out:
        first = processes(
            *("-P", "-m"), *learner(folder, where, "--ranks=2", steps=1000), stderr=out
        )
    wait_for_step(folder, 4, log)
    follower = re.search(r"rank 1 of 2, pid (\d+)", log.read_text())
    assert follower is not None
    ranks = children(first.pid)
    assert int(follower[1]) in ranks
    assert len(ranks) == 2
    heard = [address for pid in (first.pid, *ranks) for address in listening(pid)]
    assert len(heard) >= 3, "the actors' socket, and gloo of both"
    assert not [address for address in heard if not address.is_loopback]
    os.kill(int(follower[1]), signal.SIGKILL)
    assert first.wait(100) != 0
    assert "rank 1 of the learner is lost, so rank 0 ends" in log.read_text()
    assert "rank 1 of the learner was killed by signal 9, so all 2 ended" in log.read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    last = read_steps(folder)
    with log.open("w") as out:
        more = learner(folder, where, "--resume", steps=last + 2)
        dies = ("-s", "run.failpoint=after_step_record:1")  # torchrun starts both again
        second = processes(*torchrun(), *more, *dies, stderr=out)
    assert second.wait(200) == 0, log.read_text()[-2000:]
    assert "rank 0 of the learner is lost, so rank 1 ends" in log.read_text()
    found = re.findall(r"recomputed \d+ steps from the journal, (\w+)", log.read_text())
    assert set(found) == {"exact"}
    assert runs.promises_kept(folder)
    kept = read_weights(folder / "checkpoints" / f"step-{last + 2:08d}")
    assert digest(read_safetensors(folder / "model" / "model.safetensors")) == digest(kept)


HANGS = """
import os, sys, time
from pathlib import Path
from common.errors import RankError
from learner.config import LearnerConfig, RanksConfig
from learner.ranks import obey, session
Path(sys.argv[1], os.environ["RANK"]).touch()
while len(os.listdir(sys.argv[1])) < 3:  # imports take unequally long on a busy machine
    time.sleep(0.01)
try:
    with session(LearnerConfig(device="cpu", ranks=RanksConfig(timeout_s=6))) as comm:
        os.write(1, f"{comm.rank} {os.getpid()}\\n".encode())
        if comm.rank:
            obey(comm, lambda: None)
        while True:
            comm.beat()
            time.sleep(0.1)
except RankError as error:
    os.write(1, f"{error}\\n".encode())
    sys.exit(1)
"""


def test_a_rank_that_hangs_ends_all_within_the_deadline_and_is_named(tmp_path: Path) -> None:
    start = (
        "import sys\nfrom learner import launch\nlaunch.PATIENCE_S = 5.0\n"
        f"sys.exit(launch.launch(3, [sys.executable, '-c', {HANGS!r}, {str(tmp_path)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        pids = dict(process.stdout.readline().split() for _ in range(3))
        os.kill(int(pids["2"]), signal.SIGSTOP)
        said = process.stdout.read()
    assert process.wait(60) == 1
    for rank in (0, 1):
        assert f"rank 2 of the learner is lost, so rank {rank} ends (" in said
    assert said.count("go on with --resume") == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


LISTENING = """
import os
from learner.config import LearnerConfig
from learner.ranks import _join, _meet
_join(LearnerConfig(device="cpu"), _meet(LearnerConfig(device="cpu")))
mine = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) > 2
        and os.path.islink(f"/proc/self/fd/{fd}")}
for line in open("/proc/net/tcp").readlines()[1:]:  # torch's store is in the other table, tcp6
    _, local, _, state, *_, inode = line.split()[:10]
    if state == "0A" and f"socket:[{inode}]" in mine:
        print(local.partition(":")[0])
"""


def test_ranks_of_one_machine_do_not_listen_where_its_name_points_to(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.9.9.9 somewhere\n")
    begin = "ip link set lo up && ip addr add 10.9.9.9/32 dev lo && hostname somewhere"
    apart = ["unshare", "--net", "--uts", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or (
        subprocess.run([*apart, begin], capture_output=True, check=False).returncode
    ):
        pytest.skip("no namespaces here")
    alone = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    known = f"mount --bind {tmp_path}/hosts /etc/hosts"
    done = subprocess.run(
        [*apart, f'{begin} && {known} && exec "$0" -c "$1"', sys.executable, LISTENING],
        env={k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"} | alone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["0100007F"], done.stderr[-2000:]


def test_ranks_do_not_outlive_the_command_and_an_early_error_ends_all(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '0': sys.exit(3)\n"
        "print(os.environ['WORLD_SIZE'], flush=True)\n"
        "time.sleep(300)\n"
    )
    start = (
        "import sys\nfrom learner import launch\nlaunch.PATIENCE_S = 0.1\n"
        f"sys.exit(launch.launch(2, [sys.executable, '-c', {code!r}]))"
    )
    assert subprocess.run([sys.executable, "-c", start], check=False, timeout=60).returncode == 3
    well = start.replace("sys.exit(3)", "sys.exit(0)")  # rank 1 hangs in its end
    assert subprocess.run([sys.executable, "-c", well], check=False, timeout=60).returncode == 0
    stays = start.replace("sys.exit(3)", "time.sleep(300)")
    process = subprocess.Popen([sys.executable, "-c", stays], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"2\n"
    process.kill()
    with process.stdout:
        assert process.stdout.read() == b"", "the pipe closes when the last rank has ended"
    process.wait()


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def listening(pid: int) -> list[IPv4Address | IPv6Address]:
    """Where the TCP sockets of a process listen."""
    mine = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            mine.add(os.readlink(fd))
    found: list[IPv4Address | IPv6Address] = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state != "0A" or f"socket:[{rest[5]}]" not in mine:
                continue
            words = bytes.fromhex(local.partition(":")[0])  # of 32 bits, each in the host's order
            address = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
            found.append(IPv4Address(address) if len(address) == 4 else IPv6Address(address))
    return found


def torchrun() -> tuple[str, ...]:
    where = ("--rdzv-backend=static", f"--rdzv-endpoint=127.0.0.1:{unused_port()}")
    many = ("--nproc-per-node=2", "--max-restarts=1")
    return ("-P", "-m", "torch.distributed.run", *where, *many, "-m")


def learner(folder: Path, where: dict[str, str], *options: str, steps: int) -> list[str]:
    small = {"learner.steps": str(steps), "learner.groups_per_step": "4"}
    small |= {"learner.checkpoint_every": "3"}
    small |= {"learner.eval.first": "false", "learner.eval.last": "false"}
    chosen = [part for k, v in {**where, **small}.items() for part in ("-s", f"{k}={v}")]
    return ["learner", "scripted", "--run-folder", str(folder), *options, *chosen]


def read_steps(folder: Path) -> int:
    """Steps that the journal has."""
    records = journal.read(RunFolder.open(folder).journal)
    return sum(isinstance(record, Step) for _, record in records)


def wait_for_step(folder: Path, step: int, log: Path, within_s: float = 250.0) -> None:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        status = read_status(folder) if folder.exists() else None
        if status is not None and status.step >= step:
            return
        time.sleep(0.05)  # a file that another process replaces: nothing to await
    raise AssertionError(f"no step {step} within {within_s} s: {log.read_text()[-2000:]}")
