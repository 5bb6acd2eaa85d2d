"""The command that starts the ranks: one that is lost or hangs ends all, and nothing listens where
it should not.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from common import journal
from common.audit_checkpoints import read_safetensors, read_weights
from common.records import Step
from common.runfolder import RunFolder
from common.status import read as read_status
from common.versions import digest
from tests import runs
from tests.conftest import Start, unused_port

pytestmark = pytest.mark.timeout(600)


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
