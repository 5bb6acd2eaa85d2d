"""The parts of scripts/chaos: its plan, its hosts, its disk. The whole is a command of its own."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

from chaos_parts import compose, hosts, vandal
from chaos_parts.cluster import Cluster, Member
from chaos_parts.disk import Disk
from chaos_parts.faults import Faults
from chaos_parts.hosts import Ground, Loopback
from chaos_parts.plan import KINDS, Fault, plan
from chaos_parts.stage import Stage

ACTORS = ["actor-0", "actor-1", "actor-2"]


def test_the_same_seed_is_the_same_plan_and_another_is_another() -> None:
    assert plan(1, 10, ACTORS) == plan(1, 10, ACTORS)
    assert plan(1, 10, ACTORS) != plan(2, 10, ACTORS)


@pytest.mark.parametrize("seed", range(5))
def test_ten_minutes_have_forty_faults_or_more_and_every_kind(seed: int) -> None:
    faults = plan(seed, 10, ACTORS)
    tally = Counter(fault.kind for fault in faults)
    assert len(faults) >= 40
    assert set(tally) == set(KINDS)
    assert [f.at for f in faults] == sorted(f.at for f in faults)
    assert faults[-1].at < 0.9 * 600, "the end is quiet"


def test_a_fault_lasts_as_its_kind_says_and_strikes_whom_its_kind_names() -> None:
    for fault in plan(3, 20, ACTORS):
        _, shortest, longest = KINDS[fault.kind]
        assert shortest <= fault.seconds <= longest
        whom = fault.kind.partition(" ")[2]
        parts = ("", "actor", "grader", "engine", "blob", "stamp", "message", "result")
        assert fault.target in (ACTORS if whom in parts else [whom, "learner"]) or (
            fault.kind in ("cut", "slow") and fault.target in ("learner", "redis")
        )


def test_an_engine_is_struck_where_it_is_a_process() -> None:
    struck = [f for f in plan(1, 20, ACTORS, engines=["actor-2"]) if f.kind.endswith("engine")]
    assert {fault.target for fault in struck} == {"actor-2"}
    assert {fault.kind for fault in struck} == {"kill engine", "stop engine"}


def test_what_cannot_be_done_here_is_not_planned() -> None:
    kinds = [kind for kind in KINDS if kind not in ("cut", "slow", "fill", "kill rank")]
    assert {fault.kind for fault in plan(1, 10, ACTORS, kinds)} == set(kinds)


# -- hosts -----------------------------------------------------------------------------------------

SPACE = f"itest{os.getpid()}"
LISTEN = """
import socket
server = socket.create_server(("0.0.0.0", 7000))
print("up", flush=True)
server.accept()
"""


@pytest.fixture
def ground() -> Iterator[Ground]:
    ground, why = hosts.choose(SPACE, ["a", "b"], wanted=True)
    if isinstance(ground, Loopback):
        pytest.skip(why)
    yield ground
    ground.close()
    assert SPACE not in hosts.ip("netns", "list"), "nothing is left"


def test_hosts_reach_one_another_until_a_link_is_cut_and_again_when_it_is_healed(
    ground: Ground,
) -> None:
    assert _reaches(ground, "a", "b")
    assert not ground.is_cut("b")
    ground.cut("b")
    assert ground.is_cut("b")
    assert not _reaches(ground, "a", "b")
    ground.heal("b")
    assert not ground.is_cut("b")
    assert _reaches(ground, "a", "b")


def test_a_link_is_slow_once_something_went_through_its_queue(ground: Ground) -> None:
    assert not ground.is_slow("b")
    ground.slow("b")
    _reaches(ground, "a", "b")
    assert ground.is_slow("b")
    ground.heal("b")
    assert not ground.is_slow("b")


def _reaches(ground: Ground, here: str, there: str) -> bool:
    """A connection from one host to a listener on the other, within a second or so."""
    listener = subprocess.Popen(
        ground.enter(there, [sys.executable, "-c", LISTEN]), stdout=subprocess.PIPE
    )
    assert listener.stdout is not None
    listener.stdout.readline()
    call = f"import socket; socket.create_connection(('{ground.address(there)}', 7000), 1.5)"
    command = ground.enter(here, [sys.executable, "-c", call])
    reached = subprocess.run(command, capture_output=True, check=False).returncode == 0
    listener.kill()
    listener.wait()
    listener.stdout.close()
    return reached


def test_hosts_of_a_run_that_died_are_swept_by_the_next_of_its_name(ground: Ground) -> None:
    again, why = hosts.choose(SPACE, ["a", "b", "c"], wanted=True)
    assert not why
    assert _reaches(again, "c", "a")


def test_loopback_says_that_its_links_cannot_be_cut() -> None:
    here, why = hosts.choose("x", ["a"], wanted=False)
    assert (here.cuttable, here.address("a"), bool(why)) == (False, "127.0.0.1", True)
    with socket.create_server(("127.0.0.1", here.port(5555))):
        pass


def test_a_disk_that_is_filled_takes_nothing_more_until_it_is_emptied(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk", 2)
    if not disk.fillable:
        pytest.skip("mounting is not permitted")
    try:
        assert not disk.is_full()
        disk.fill()
        assert disk.is_full()
        with pytest.raises(OSError, match="No space") as full:
            (disk.folder / "more").write_bytes(bytes(100_000))
        assert full.value.errno == errno.ENOSPC
        disk.empty()
        (disk.folder / "more").write_bytes(bytes(100_000))
    finally:
        disk.close(keep=tmp_path / "kept")
    assert not disk.folder.is_mount()
    assert (tmp_path / "kept" / "more").stat().st_size == 100_000


# -- processes -------------------------------------------------------------------------------------


def test_who_ends_by_itself_is_a_violation_and_who_was_killed_is_not(tmp_path: Path) -> None:
    cluster = Cluster(lambda member, words: False)
    says = "import sys, time; print('last words', flush=True); time.sleep(float(sys.argv[1]))"
    for name, seconds in (("short", "0"), ("long", "60")):
        command = [sys.executable, "-c", says, seconds]
        cluster.add(Member(name, lambda life, c=command: c, tmp_path / f"{name}.log"))
    try:
        _tick(cluster, lambda: cluster["long"].up and bool(cluster.violations))
        assert cluster.violations[0] == "short ended by itself (exit 0): last words"
        first = cluster["long"].process
        assert cluster.stop("long")
        assert cluster.kill("long"), "a stopped process as well"
        _tick(cluster, lambda: cluster["long"].process not in (None, first))
        assert not [words for words in cluster.violations if words.startswith("long")]
    finally:
        cluster.close()
    assert not any(member.up for member in cluster.members.values())


PARENT = """
import subprocess, sys, threading, time
sleeper = "import time; time.sleep(60)"
grader = subprocess.Popen([sys.executable, "-c", sleeper, "actor.grade.worker"])
start = lambda: subprocess.run([sys.executable, "-c", sleeper])  # vLLM's, from a thread of its own
threading.Thread(target=start).start()
time.sleep(60)
"""


def test_a_fault_counts_when_its_effect_was_seen_and_every_kind_is_counted(tmp_path: Path) -> None:
    """Kills and stops of processes and of what they started, a polite leave; one that missed."""
    cluster = Cluster(lambda member, words: False)
    polite = (
        "import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); print('up', flush=True)\n"
        "signal.pause()"
    )
    for name, words in (("actor", PARENT), ("learner", PARENT), ("redis", polite)):
        command = [sys.executable, "-c", words]
        cluster.add(Member(name, lambda life, c=command: c, tmp_path / f"{name}.log"))
    faults = Faults(cast("Stage", Scene(cluster)), lambda text: None)
    kinds = ["kill grader", "stop grader", "stop engine", "kill engine", "stop actor", "kill actor"]
    try:
        for kind in kinds:
            _tick(cluster, lambda: len(cluster["actor"].parts("rank")) == 2)
            faults.strike(Fault(0.0, kind, "actor", 0.8 * kind.startswith("stop"), 1))
            _tick(cluster, lambda k=kind: _healed(faults, k))
            if kind == "kill grader":
                faults.strike(Fault(0.0, "kill grader", "actor", 0.0, 1))
                assert faults.missed == {"kill grader": 1}, "there is none any more"
            if kind in ("kill grader", "kill engine"):
                cluster.kill("actor")
                _tick(cluster, lambda: not cluster["actor"].up)
        _tick(cluster, lambda: len(cluster["learner"].parts("rank")) == 2)
        faults.strike(Fault(0.0, "kill rank", "learner", 0.0, 1))
        _tick(cluster, lambda: _healed(faults, "kill rank"))
        _tick(cluster, lambda: "up" in (tmp_path / "redis.log").read_text())
        faults.strike(Fault(0.0, "leave", "redis", 0.0, 1))
        _tick(cluster, lambda: _healed(faults, "leave"))
    finally:
        cluster.close()
    assert faults.by_kind == dict.fromkeys([*kinds, "kill rank", "leave"], 1)
    assert (faults.counts()["kills"], faults.counts()["stops"], faults.unseen) == (4, 3, {})


def _healed(faults: Faults, kind: str) -> bool:
    faults.heal()
    return bool(faults.by_kind[kind]) and not faults.is_anything_ill


class Scene:
    """What faults need of a stage."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster


def _tick(cluster: Cluster, holds: object) -> None:
    assert callable(holds)
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        cluster.tick()
        time.sleep(0.02)  # processes that end: the cluster looks, as in a chaos run


def test_the_vandals_frames_are_what_no_decoder_should_survive_by_luck() -> None:
    """Every way of damage is among them, and each is refused or says nothing true."""
    import random

    from common.codec import Codec
    from common.errors import WireError
    from common.wire import FromActor

    rng, codec, refused = random.Random(1), Codec(FromActor), 0
    frames = [bytes(codec.encode(message)) for message in vandal.messages(rng)]
    for _ in range(300):
        try:
            message = codec.decode(vandal.damaged(rng, rng.choice(frames)))
        except WireError:
            refused += 1
        else:
            assert message.run != "run-1"
    assert refused > 150


def test_composes_commands_are_rendered_with_their_variables_and_volumes() -> None:
    learner = compose.command("learner", {"RANKS": "2"}, {"/runs": Path("/here")})
    assert learner[:4] == ["isentrope", "learner", "tiny", "--ranks=2"]
    assert "/here/run" in learner
    assert not [word for word in learner if "${" in word]
    actor = compose.command("actor", {}, {})
    assert actor[:2] == ["sh", "-c"]
    assert "$HOSTNAME" in actor[2], "what the shell in the container fills in"
