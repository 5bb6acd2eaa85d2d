"""Acknowledged, journaled transport against its two parts alone, and against Redis streams.

The same groups (8 rollouts × 512 tokens, about 34 kB) go three ways between two processes on
loopback:

    ours     DEALER → desk (ROUTER, decoded, validated, journaled in group commits) → ack
    bare     the lesser of PUSH → PULL of such frames, and write + fsync of the same bytes at our
             group commit
    streams  XADD of an entry a rollout, XREAD of one at a time: arrays as bytes in MessagePack

All three senders have their bytes ready, and tickets are granted, before the clock starts. Ours
runs in the sender, from its first result to its last acknowledgement, with at most WINDOW results
unacknowledged; a trainer that has nothing to compute takes batches of them meanwhile.
Rounds are interleaved, the medians of their ratios are held against the limits: `ratio_limit` =
ours / bare, `ratio_redis_streams` = ours / streams, in bytes a second.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import redis
import zmq

from common import channel, wire
from common.codec import Codec
from common.journal import Journal
from common.records import Step
from common.redis_server import RedisServer
from learner.config import LearnerConfig
from learner.desk import Desk
from scripts.benches import _desk

TOP = Path(__file__).resolve().parents[2]
ROLLOUTS, TOKENS, GROUPS, STEPS, ROUNDS, WINDOW = 8, 512, 4000, 16, 7, 256
STREAM_GROUPS = 150
VOCABULARY = 50_000
LIMITS = {"ratio_limit": (">=", 0.5), "ratio_redis_streams": (">=", 10.0)}


def group(ticket: int, problem: str, number: int = 0, run: str = "") -> wire.Group:
    rng = np.random.default_rng(number)
    rollouts = tuple(
        wire.Rollout(
            segments=(
                wire.Segment(
                    role="policy",
                    tokens=rng.integers(0, VOCABULARY, TOKENS, np.int32),
                    logps=-rng.random(TOKENS, np.float32),
                    spans=((0, 0),),
                ),
            ),
            finish="stop",
            correct=float(i % 2),
            parts=({"correct": float(i % 2)},),
        )
        for i in range(ROLLOUTS)
    )
    return wire.Group(
        run=run,
        incarnation=1,
        ticket=ticket,
        attempt=0,
        kind="main",
        problem=problem,
        rollouts=rollouts,
    )


def bench() -> dict[str, float]:
    frame_bytes = len(Codec(wire.FromActor).encode(group(1, "p")))
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("ISENTROPE_BENCH_DIR", ".")) as folder:
        server = RedisServer(Path(folder) / "redis")
        server.start()
        try:
            for number in range(ROUNDS):
                ours, commits, cpu_us = _ours(Path(folder) / f"journal-{number}")
                push, disk = _push(), _disk(Path(folder) / "disk", frame_bytes, GROUPS / commits)
                streams = _streams(server.url)
                rounds.append(
                    {
                        "ratio_limit": ours / min(push, disk),
                        "ratio_redis_streams": ours / streams,
                        "ours_mb_per_s": ours * frame_bytes / 1e6,
                        "push_mb_per_s": push * frame_bytes / 1e6,
                        "disk_mb_per_s": disk * frame_bytes / 1e6,
                        "streams_mb_per_s": streams * frame_bytes / 1e6,
                        "groups_per_s": ours,
                        "groups_per_commit": GROUPS / commits,
                        "desk_us_per_group": cpu_us,
                    }
                )
        finally:
            server.stop()
    return {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


def _ours(folder: Path) -> tuple[float, int, float]:
    """(groups acknowledged a second, commits, µs of CPU a group in the desk's thread)."""
    folder.mkdir()
    context: zmq.Context[Any] = zmq.Context()
    socket, endpoint = channel.bind_router(context, "tcp://127.0.0.1:0")
    journal = CountingJournal(folder, 1)
    desk = _open(socket, journal)
    desk.announce(0)
    with _producer("dealer", endpoint) as producer:
        producer.begin()
        commits, cpu = journal.commits, desk.look(time.thread_time)
        for t in range(STEPS):
            _train(desk, t)
        seconds = producer.seconds()
        commits, cpu = journal.commits - commits, desk.look(time.thread_time) - cpu
    desk.close()
    journal.close()
    context.term()
    shutil.rmtree(folder)
    return GROUPS / seconds, commits, cpu / GROUPS * 1e6


def _train(desk: Desk, t: int) -> None:
    """Take a batch and be done with it: a step without its work."""
    batch = desk.take(lambda: False)
    assert batch is not None
    assert len(batch.items) == GROUPS // STEPS
    desk.record(Step(t=t, version=t + 1, digest="", consumed=batch.consumed))


def _open(socket: Any, journal: Journal) -> Desk:
    config = LearnerConfig(
        groups_per_step=GROUPS // STEPS,
        max_lag=STEPS,
        group_size=ROLLOUTS,
        max_tokens=TOKENS,
        steps=STEPS,
    )
    return _desk.desk(socket, journal, "bench", config, VOCABULARY)


class CountingJournal(Journal):
    commits = 0

    def commit(self) -> None:
        self.commits += 1
        super().commit()


def _push() -> float:
    context: zmq.Context[Any] = zmq.Context()
    pull = context.socket(zmq.PULL)
    port = pull.bind_to_random_port("tcp://127.0.0.1")
    with _producer("push", f"tcp://127.0.0.1:{port}") as producer:
        producer.begin()
        pull.recv()
        began = time.perf_counter()
        for _ in range(GROUPS):
            pull.recv()
        seconds = time.perf_counter() - began
    pull.close(0)
    context.term()
    return GROUPS / seconds


def _disk(path: Path, frame_bytes: int, per_commit: float) -> float:
    block = os.urandom(frame_bytes) * max(1, round(per_commit))
    with path.open("wb", buffering=0) as file:
        began, written = time.perf_counter(), 0
        while written < GROUPS * frame_bytes:
            written += file.write(block)
            os.fsync(file.fileno())
        seconds = time.perf_counter() - began
    path.unlink()
    return written / frame_bytes / seconds


def _streams(url: str) -> float:
    with redis.Redis.from_url(url) as client:
        client.flushall()
        with _producer("streams", url) as producer:
            producer.begin()
            began, last = time.perf_counter(), b"0"
            for _ in range(STREAM_GROUPS * ROLLOUTS):
                ((_, ((last, fields),)),) = client.xread({"rollouts": last}, count=1, block=5000)
                msgspec.msgpack.decode(fields[b"rollout"])
            return STREAM_GROUPS / (time.perf_counter() - began)


# ---- the other process ---------------------------------------------------------------------------


class _producer:
    """This file as a process in the role of a sender; it says when it is ready and is told to
    begin.
    """

    def __init__(self, role: str, endpoint: str) -> None:
        command = [sys.executable, "-m", "scripts.benches.wire", role, endpoint]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, cwd=TOP
        )

    def __enter__(self) -> _producer:
        return self

    def begin(self) -> None:
        assert self._process.stdin is not None
        assert self._line() == b"ready\n", "the sender did not start"
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()

    def seconds(self) -> float:
        """What it measured, once it is done."""
        return float(self._line())

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _begin() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def _send_results(endpoint: str) -> None:
    """An actor whose engine is done with everything it was granted."""
    socket = channel.connect_dealer(zmq.Context(), endpoint)
    ours, theirs = Codec(wire.FromActor), Codec(wire.FromLearner)
    made = [group(0, "", number).rollouts for number in range(16)]
    hello = wire.Hello(protocol=wire.PROTOCOL, digest="", actor="bench", capacity=GROUPS)
    socket.send(ours.encode(hello))
    grants: list[wire.Grant] = []
    while len(grants) < GROUPS:
        message = theirs.decode(socket.recv())
        if isinstance(message, wire.Grant):
            grants.append(message)
    frames = [ours.encode(_result(grant, made)) for grant in grants]
    _begin()
    began, acknowledged = time.perf_counter(), 0
    for sent, frame in enumerate(frames):
        while sent - acknowledged >= WINDOW:
            acknowledged += _acknowledged(theirs.decode(socket.recv()))
        socket.send(frame)
    while acknowledged < GROUPS:
        acknowledged += _acknowledged(theirs.decode(socket.recv()))
    print(time.perf_counter() - began, flush=True)
    sys.stdin.readline()


def _result(grant: wire.Grant, made: list[tuple[wire.Rollout, ...]]) -> wire.Group:
    ticket = grant.ticket
    return wire.Group(
        run="bench",
        incarnation=1,
        ticket=ticket.id,
        attempt=grant.attempt,
        kind="main",
        problem=ticket.problem,
        rollouts=made[ticket.id % len(made)],
    )


def _acknowledged(message: wire.FromLearner) -> int:
    assert isinstance(message, wire.Answer | wire.Pulse | wire.Welcome), message
    if not isinstance(message, wire.Answer):
        return 0
    assert message.verdict == "ack", message
    return 1 + len(message.also)


def _send_frames(endpoint: str) -> None:
    socket = zmq.Context().socket(zmq.PUSH)
    socket.connect(endpoint)
    frame = bytes(Codec(wire.FromActor).encode(group(1, "p")))
    _begin()
    while True:
        socket.send(frame)


def _send_stream(url: str) -> None:
    client = redis.Redis.from_url(url)
    entries = [
        msgspec.msgpack.encode(
            {
                "tokens": rollout.segments[0].tokens.tobytes(),
                "logps": rollout.segments[0].logps.tobytes(),
                "correct": rollout.correct,
            }
        )
        for rollout in group(1, "p").rollouts
    ]
    _begin()
    for _ in range(STREAM_GROUPS):
        for entry in entries:
            client.xadd("rollouts", {"rollout": entry})
    sys.stdin.readline()


ROLES: dict[str, Callable[[str], None]] = {
    "dealer": _send_results,
    "push": _send_frames,
    "streams": _send_stream,
}

if __name__ == "__main__":
    ROLES[sys.argv[1]](sys.argv[2])
