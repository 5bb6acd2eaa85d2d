"""One act of vandalism, and then it ends; prints how often it struck: bytes that are not as they
were, messages that were answered with a refusal.

python vandal.py blob REDIS_URL SEED          flips bytes of the blobs in Redis that the newest
                                              version is made of: patches, the whole one below them
python vandal.py stamp REDIS_URL SEED         overwrites what names the newest version
python vandal.py file FOLDER SEED             flips bytes of the newest blob in a file store
python vandal.py message ENDPOINT SEED KEYS   a peer with good keys and bad messages: cut, bits
                                              flipped, invented; and one without keys
python vandal.py result ENDPOINT SEED KEYS RECIPE
                                              a peer with good keys that takes tickets and answers
                                              with lies; ends with ADMITTED if one was acknowledged
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FRAMES = 60
ANSWER_S = 15.0  # until the first answer: the learner may be stopped, or just be starting
LISTEN_S = 2.0  # after that, without one more
STAMPS = (b"", b"\xff\x00 nonsense", b"7", b"999999 1 beef", b"1e9 2")
ADMITTED = 3  # exit code


# ---- what lies in Redis, and in files ------------------------------------------------------------


def blob(url: str, seed: int) -> int:
    rng, struck = random.Random(seed), 0
    with _client(url) as client:
        for key in client.keys("isentrope:*:manifests"):
            run = key.decode().rpartition(":")[0]
            for name in _newest_blobs(client.hvals(key)):
                where = f"{run}:blob:{name}"
                if not (length := client.strlen(where)):
                    continue  # retired since
                at = rng.randrange(length)
                if before := client.getrange(where, at, at):
                    client.setrange(where, at, bytes([before[0] ^ 0xFF]))
                    struck += client.getrange(where, at, at) != before
    return struck


def _newest_blobs(raws: list[bytes]) -> list[str]:
    """Of the newest version, and of all those that it is a change of."""
    import msgspec

    from common.versions import Manifest

    known = {m.version: m for m in (msgspec.msgpack.decode(raw, type=Manifest) for raw in raws)}
    found, version = list[str](), max(known, default=-1)
    while version in known:
        found += [each.key for each in known[version].blobs]
        version = known[version].base if known[version].kind == "patch" else -1
    return found


def stamp(url: str, seed: int) -> int:
    """Counted where Redis had another one: a learner may write it again within milliseconds."""
    rng = random.Random(seed)
    with _client(url) as client:
        bad = {key: rng.choice(STAMPS) for key in client.keys("isentrope:*:latest")}
        return sum(client.set(key, value, get=True) != value for key, value in bad.items())


def file(folder: str, seed: int) -> int:
    rng = random.Random(seed)
    found = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    if not found:
        return 0
    chosen = max(found, key=lambda path: path.stat().st_mtime)
    before = chosen.read_bytes()
    data = bytearray(before)
    data[rng.randrange(len(data))] ^= 0xFF
    chosen.write_bytes(data)
    return int(chosen.read_bytes() != before)


def _client(url: str) -> Any:
    from common.softstate import SoftState

    return SoftState(url, "any", timeout_s=5).client


# ---- what is said to the learner -----------------------------------------------------------------


def message(endpoint: str, seed: int, keys: str, listen_s: float = LISTEN_S) -> int:
    """Frames of every wrong kind; the learner answers with reasons and lives. Counted are those."""
    from common.codec import Codec
    from common.wire import FromActor

    rng, codec = random.Random(seed), Codec(FromActor)
    with _line(endpoint, keys) as dealer:
        frames = [bytes(codec.encode(each)) for each in messages(rng)]
        for _ in range(FRAMES):
            dealer.send(damaged(rng, rng.choice(frames)))
        struck = sum(_refuses(answer) for answer in _answers(dealer, listen_s))
    _shout(endpoint, rng)
    return struck


def result(endpoint: str, seed: int, keys: str, recipe: str) -> int:
    """Counted are results that were refused, until the learner turns this peer away."""
    from common import wire
    from common.codec import Codec

    rng, codec, refused = random.Random(seed), Codec(wire.FromActor), 0
    with _line(endpoint, keys) as dealer:
        dealer.send(codec.encode(_hello(recipe, seed)))
        for answer in _answers(dealer, ANSWER_S):
            match answer:
                case wire.Grant():
                    dealer.send(codec.encode(lie(rng, answer)))
                case wire.Answer(verdict="ack"):
                    sys.exit(ADMITTED)
                case wire.Answer(verdict="refused", ticket=ticket) if ticket >= 0:
                    refused += 1
                case wire.Refused():
                    break
    return refused


def _hello(recipe: str, seed: int) -> Any:
    from common import wire
    from common.config import RunConfig
    from common.recipe import digest, load

    run = load(recipe, {"run": RunConfig})["run"]
    assert isinstance(run, RunConfig)
    return wire.Hello(
        protocol=wire.PROTOCOL,
        digest=digest(run),
        actor=f"liar-{seed}",
        capacity=3,
        pid=os.getpid(),
        engine="none",
    )


@contextlib.contextmanager
def _line(endpoint: str, keys: str) -> Iterator[Any]:
    import zmq

    from common import channel
    from common import keys as key_files

    with zmq.Context() as context:
        dealer = channel.connect_dealer(context, endpoint, key_files.read(keys))
        try:
            yield dealer
        finally:
            dealer.close(0)


def _answers(dealer: Any, then_s: float) -> Iterator[Any]:
    """What the learner says, but for pulses, until it says nothing for so long."""
    from common import wire
    from common.codec import Codec

    codec, until = Codec(wire.FromLearner), time.monotonic() + ANSWER_S
    while (left := until - time.monotonic()) > 0 and dealer.poll(int(1000 * left)):
        answer = codec.decode(dealer.recv())
        if not isinstance(answer, wire.Pulse):
            until = time.monotonic() + then_s
            yield answer


def _refuses(answer: Any) -> bool:
    from common import wire

    refused = isinstance(answer, wire.Answer) and answer.verdict == "refused"
    return refused or isinstance(answer, wire.Refused)


def lie(rng: random.Random, grant: Any) -> Any:
    """A result of the ticket that cannot be true."""
    import numpy as np
    from msgspec.structs import replace

    from common import wire

    ticket, size = grant.ticket, rng.randrange(1, grant.ticket.sampling.max_tokens + 1)
    segment = wire.Segment(
        role="policy",
        tokens=np.full(size, 3, np.int32),
        logps=-np.ones(size, np.float32),
        spans=((0, 0),),
    )
    lies = (
        replace(segment, logps=np.full(size, np.nan, np.float32)),
        replace(segment, logps=np.full(size, 0.5, np.float32)),
        replace(segment, tokens=np.full(size, 1 << 30, np.int32)),
        replace(segment, tokens=np.full(size, -1, np.int32)),
        replace(segment, spans=((0, 1 << 40),)),
        replace(segment, spans=((0, 0), (size + 5, 0))),
        replace(segment, logps=segment.logps[:-1]),
    )
    rollout = wire.Rollout(segments=(rng.choice(lies),), finish="stop", correct=1.0)
    return wire.Group(
        run=grant.run,
        incarnation=grant.incarnation,
        ticket=ticket.id,
        attempt=grant.attempt,
        kind=ticket.kind,
        problem=ticket.problem,
        rollouts=(rollout,) * ticket.n,
        actor="liar",
    )


def messages(rng: random.Random) -> list[Any]:
    """Messages as an actor sends them, of no life of this run."""
    import numpy as np

    from common import wire

    segment = wire.Segment(
        role="policy",
        tokens=np.array([rng.randrange(1 << 31) for _ in range(8)], np.int32),
        logps=-np.ones(8, np.float32),
        spans=((0, 0),),
    )
    rollout = wire.Rollout(segments=(segment,), finish="stop", correct=1.0)
    lies = {"run": "another", "incarnation": 1 << 40}
    return [
        wire.Hello(protocol=99, digest="none", actor="vandal", capacity=9, pid=1, **lies),
        wire.Heartbeat(capacity=-5, held=tuple(range(50)), version=1 << 40, **lies),
        wire.Group(
            ticket=rng.randrange(100),
            attempt=0,
            kind="main",
            problem="p",
            rollouts=(rollout, rollout),
            **lies,
        ),
        wire.Failure(ticket=0, attempt=0, blame="data", reason="because", **lies),
        wire.Bye(held=(1, 2, 3), **lies),
    ]


def damaged(rng: random.Random, frame: bytes) -> bytes:
    way = rng.randrange(4)
    if way == 0:
        return frame[: rng.randrange(len(frame))]
    if way == 1:
        return rng.randbytes(rng.randrange(200))
    damaged = bytearray(frame)
    for _ in range(rng.randrange(way == 2, 6)):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _shout(endpoint: str, rng: random.Random) -> None:
    """Bytes that are no ZeroMQ at all."""
    found = re.fullmatch(r"tcp://(.+):(\d+)", endpoint)
    assert found is not None
    for _ in range(5):
        with contextlib.suppress(OSError):  # gone, or it hung up: as good as an answer
            stranger = socket.create_connection((found[1], int(found[2])), timeout=5)
            with stranger:
                stranger.sendall(rng.randbytes(500))


if __name__ == "__main__":
    _, act, where, number, *rest = sys.argv
    acts: dict[str, Any] = {
        "blob": blob,
        "stamp": stamp,
        "file": file,
        "message": message,
        "result": result,
    }
    print(acts[act](where, int(number), *rest))
