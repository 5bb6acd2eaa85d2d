"""Acknowledged, journaled transport against its two parts alone, and against Redis streams.

The same groups (8 rollouts × 512 tokens, about 34 kB) go three ways between two processes on loopback:

    ours      DEALER → desk (ROUTER, validation, journal, group commit with fsync) → ack; tickets issued and journaled
    bare      the lesser of PUSH → PULL of the same frames, and write + fsync of the same bytes at our group commit
    streams   XADD of an entry a rollout, XREAD count 1, as MessagePack

Medians of interleaved rounds. `ratio_limit` = ours / bare, `ratio_redis_streams` = ours / streams, in bytes a second.
"""

from __future__ import annotations

import os
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
from common.failpoints import Failpoint
from common.journal import Journal
from common.records import Open
from common.redis_server import RedisServer
from learner.config import LearnerConfig
from learner.desk import Desk
from learner.ledger import Ledger
from learner.prompts.source import Arithmetic
from learner.prompts.stream import Prompts

ROLLOUTS, TOKENS, GROUPS, ROUNDS, CAPACITY = 8, 512, 2000, 5, 256
STREAM_GROUPS = 150
LIMITS = {"ratio_limit": (">=", 0.5), "ratio_redis_streams": (">=", 10.0)}


class Letters:
    """A tokenizer of one token a character: prompts cost what they cost, without a model."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 128 for letter in text]}


def group(ticket: int, problem: str, number: int = 0, run: str = "") -> wire.Group:
    rng = np.random.default_rng(number)
    rollouts = tuple(
        wire.Rollout(
            segments=(
                wire.Segment(
                    role="policy",
                    tokens=rng.integers(0, 50_000, TOKENS, np.int32),
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
    frame_bytes = len(wire.Codec(wire.FromActor).encode(group(1, "p")))
    rates: dict[str, list[float]] = {"ours": [], "push": [], "disk": [], "streams": []}
    with tempfile.TemporaryDirectory(dir=os.environ.get("ISENTROPE_BENCH_DIR", ".")) as folder:
        server = RedisServer(Path(folder) / "redis")
        server.start()
        try:
            for number in range(ROUNDS):
                ours, commits = _ours(Path(folder) / f"journal-{number}")
                rates["ours"].append(ours * frame_bytes)
                rates["push"].append(_push() * frame_bytes)
                rates["disk"].append(
                    _disk(Path(folder) / f"disk-{number}", frame_bytes, GROUPS / commits)
                    * frame_bytes
                )
                rates["streams"].append(_streams(server.url) * frame_bytes)
        finally:
            server.stop()
    middle = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "ratio_limit": statistics.median(
            ours / min(push, disk)
            for ours, push, disk in zip(rates["ours"], rates["push"], rates["disk"], strict=True)
        ),
        "ratio_redis_streams": statistics.median(
            ours / streams for ours, streams in zip(rates["ours"], rates["streams"], strict=True)
        ),
        "ours_mb_per_s": middle["ours"] / 1e6,
        "push_mb_per_s": middle["push"] / 1e6,
        "disk_mb_per_s": middle["disk"] / 1e6,
        "streams_mb_per_s": middle["streams"] / 1e6,
        "groups_per_s": middle["ours"] / frame_bytes,
        "groups_per_commit": GROUPS / commits,
    }


def _ours(folder: Path) -> tuple[float, int]:
    """(groups acknowledged a second, commits)."""
    folder.mkdir()
    context: zmq.Context[Any] = zmq.Context()
    socket, endpoint = channel.bind_router(context, "tcp://127.0.0.1:0")
    journal, ledger = CountingJournal(folder, 1), Ledger()
    ledger.apply(
        Open(run="bench", incarnation=1, config={}),
        journal.append(Open(run="bench", incarnation=1, config={})),
    )
    config = LearnerConfig(
        groups_per_step=GROUPS, max_lag=0, group_size=ROLLOUTS, max_tokens=TOKENS, steps=1
    )
    desk = Desk(
        socket,
        run_id="bench",
        incarnation=1,
        digest="",
        vocab_size=50_000,
        config=config,
        journal=journal,
        ledger=ledger,
        prompts=Prompts(Arithmetic(0), config.prompts, Letters(), (0,), 0, 512),  # type: ignore[arg-type]
        failpoint=Failpoint.parse(""),
    )
    with _producer("dealer", endpoint) as producer:
        producer.ready()
        desk.announce(0)
        began, before = time.perf_counter(), journal.commits
        batch = desk.take(lambda: False)
        seconds = time.perf_counter() - began
        assert batch is not None
        assert len(batch.items) == GROUPS
        commits = journal.commits - before
        desk.close()
    journal.close()
    context.term()
    return GROUPS / seconds, commits


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
        producer.ready()
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
            producer.ready()
            began, last = time.perf_counter(), b"0"
            for _ in range(STREAM_GROUPS * ROLLOUTS):
                ((_, ((last, fields),)),) = client.xread({"rollouts": last}, count=1, block=5000)
                msgspec.msgpack.decode(fields[b"rollout"])
            return STREAM_GROUPS / (time.perf_counter() - began)


# ---- the other process ------------------------------------------------------------------------------------------


class _producer:
    """This file as a process in the role of a sender; it says when it is ready and is told to begin."""

    def __init__(self, role: str, endpoint: str) -> None:
        command = [sys.executable, "-m", "scripts.benches.wire", role, endpoint]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE)

    def __enter__(self) -> _producer:
        return self

    def ready(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        assert self._process.stdout.readline() == b"ready\n", "the sender did not start"
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()

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
    """An actor without an engine: every grant is answered at once, freshly encoded."""
    socket = channel.connect_dealer(zmq.Context(), endpoint)
    ours, theirs = wire.Codec(wire.FromActor), wire.Codec(wire.FromLearner)
    made = [group(0, "", number).rollouts for number in range(16)]
    _begin()
    hello = wire.Hello(protocol=wire.PROTOCOL, digest="", actor="bench", capacity=CAPACITY)
    socket.send(ours.encode(hello))
    while True:
        message = theirs.decode(socket.recv())
        if isinstance(message, wire.Grant):
            ticket = message.ticket
            result = wire.Group(
                run="bench",
                incarnation=1,
                ticket=ticket.id,
                attempt=message.attempt,
                kind="main",
                problem=ticket.problem,
                rollouts=made[ticket.id % len(made)],
            )
            socket.send(ours.encode(result))


def _send_frames(endpoint: str) -> None:
    socket = zmq.Context().socket(zmq.PUSH)
    socket.connect(endpoint)
    frame = bytes(wire.Codec(wire.FromActor).encode(group(1, "p")))
    _begin()
    while True:
        socket.send(frame)


def _send_stream(url: str) -> None:
    client = redis.Redis.from_url(url)
    rollouts = [
        {
            "tokens": r.segments[0].tokens.tolist(),
            "logps": r.segments[0].logps.tolist(),
            "correct": r.correct,
        }
        for r in group(1, "p").rollouts
    ]
    _begin()
    for _ in range(STREAM_GROUPS):
        for rollout in rollouts:
            client.xadd("rollouts", {"rollout": msgspec.msgpack.encode(rollout)})
    sys.stdin.readline()


ROLES: dict[str, Callable[[str], None]] = {
    "dealer": _send_results,
    "push": _send_frames,
    "streams": _send_stream,
}

if __name__ == "__main__":
    ROLES[sys.argv[1]](sys.argv[2])
