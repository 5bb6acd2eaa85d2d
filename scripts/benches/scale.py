"""A thousand actors on one learner: what a group costs it, and whether anything is lost.

Scripted actors (a socket each, many in one process, scripts/benches/_scale_actors.py) against the
real desk: ROUTER, journal with fsync, ledger, leases, batches. The step does nothing. Rounds of 10
and of 1,000 actors are interleaved; both answer as many tickets and may hold as many in all.

    groups_per_s               acknowledged groups, 1,000 actors
    learner_thread_cpu         share of one core that the desk's thread takes meanwhile
    us_per_group_10, _1000     its CPU time a group
    cost_ratio_1000_over_10    median of the rounds' ratios
    lost                       tickets without an end, groups that the count does not balance
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import zmq

from common import channel
from common.journal import Journal
from common.records import Finish, Step
from common.runfolder import RunFolder
from learner.config import LearnerConfig
from learner.desk import Desk
from scripts.benches import _desk

TOP = Path(__file__).resolve().parents[2]
FEW, MANY, IN_ALL, STEPS, GROUPS, ROLLOUTS, ROUNDS, PROCESSES = 10, 1000, 2000, 24, 500, 8, 3, 4
WORDS = 32
LIMITS = {"cost_ratio_1000_over_10": ("<=", 1.5), "lost": ("<=", 0)}


class Round(NamedTuple):
    groups_per_s: float
    us_per_group: float
    share: float
    lost: int
    joined: int


def bench() -> dict[str, object]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 16 * MANY)), hard))
    rounds: list[tuple[Round, Round]] = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("ISENTROPE_BENCH_DIR", ".")) as folder:
        for number in range(ROUNDS):
            few = _round(Path(folder) / f"{number}-few", FEW)
            rounds.append((few, _round(Path(folder) / f"{number}-many", MANY)))
    every = [one for pair in rounds for one in pair]
    return {
        "groups_per_s": statistics.median(many.groups_per_s for _, many in rounds),
        "learner_thread_cpu": statistics.median(many.share for _, many in rounds),
        "us_per_group_10": statistics.median(few.us_per_group for few, _ in rounds),
        "us_per_group_1000": statistics.median(many.us_per_group for _, many in rounds),
        "cost_ratio_1000_over_10": statistics.median(
            many.us_per_group / few.us_per_group for few, many in rounds
        ),
        "lost": sum(one.lost for one in every),
        "actors": min(many.joined for _, many in rounds),
    }


def _round(path: Path, actors: int) -> Round:
    folder = RunFolder.create(path)
    context: zmq.Context[Any] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 2 * MANY)
    socket, endpoint = channel.bind_router(context, "tcp://127.0.0.1:0")
    journal = Journal(folder.journal, 1)
    desk = _open(socket, journal, folder.run_id)
    desk.announce(0)
    swarms = _swarms(endpoint, actors)
    try:
        _train(desk, 0)  # all have joined when the clock starts
        joined = desk.wait(lambda: len(desk.actors) if len(desk.actors) == actors else None, _never)
        began, cpu = time.perf_counter(), desk.look(time.thread_time)
        for t in range(1, STEPS):
            _train(desk, t)
        seconds, cpu = time.perf_counter() - began, desk.look(time.thread_time) - cpu
        desk.drain(final=True, deadline_s=30.0)
        desk.record(Finish(t=STEPS, reason="done"))
        codes = [swarm.wait(30) for swarm in swarms]
    finally:
        for swarm in swarms:
            if swarm.poll() is None:
                swarm.kill()
                swarm.wait()
        lost = sum(not sums.holds for sums in desk.ledger.sums().values()) + len(desk.ledger.open)
        desk.close()
        journal.close()
        context.term()
    assert not any(codes), f"actors ended with {codes}"
    groups = (STEPS - 1) * GROUPS
    return Round(groups / seconds, 1e6 * cpu / groups, cpu / seconds, lost, joined or 0)


def _never() -> bool:
    return False


def _swarms(endpoint: str, actors: int) -> list[subprocess.Popen[bytes]]:
    each = -(-actors // PROCESSES)
    firsts = range(0, actors, each)
    module = [sys.executable, "-m", "scripts.benches._scale_actors", endpoint]
    sizes = ((first, min(each, actors - first), IN_ALL // actors, ROLLOUTS) for first in firsts)
    return [subprocess.Popen([*module, *map(str, size)], cwd=TOP) for size in sizes]


def _train(desk: Desk, t: int) -> None:
    """Take a batch and be done with it: a step without its work."""
    batch = desk.take(_never)
    assert batch is not None
    desk.record(Step(t=t, version=t + 1, digest="", consumed=batch.consumed, dropped=batch.dropped))


def _open(socket: Any, journal: Journal, run: str) -> Desk:
    config = LearnerConfig(
        groups_per_step=GROUPS,
        max_lag=STEPS,
        group_size=ROLLOUTS,
        max_tokens=48,
        steps=STEPS + 8,  # there is room to ask until the end
    )
    return _desk.desk(socket, journal, run, config, WORDS)
