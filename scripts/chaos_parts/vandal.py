"""One act of vandalism, and then it ends; prints how often it struck.

python vandal.py blob REDIS_URL SEED          flips bytes of the newest version's blobs in Redis
python vandal.py stamp REDIS_URL SEED         overwrites what names the newest version
python vandal.py file FOLDER SEED             flips bytes of a blob in a file store
python vandal.py message ENDPOINT SEED KEYS   a peer with good keys and bad messages: cut, bits
                                              flipped, invented; and one without keys
"""

from __future__ import annotations

import random
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

FRAMES = 60
LISTEN_S = 2.0
STAMPS = (b"", b"\xff\x00 nonsense", b"7", b"999999 1 beef", b"1e9 2")


def blob(url: str, seed: int) -> int:
    """The newest manifest's blobs: a few bytes each, length as it was."""
    import msgspec

    from common.versions import Manifest

    with _client(url) as client:
        rng, struck = random.Random(seed), 0
        for key in client.keys("isentrope:*:manifests"):
            run = key.decode().rpartition(":")[0]
            manifests = [msgspec.msgpack.decode(raw, type=Manifest) for raw in client.hvals(key)]
            newest = max(manifests, key=lambda manifest: manifest.version)
            for each in newest.blobs:
                at = rng.randrange(each.nbytes)
                client.setrange(f"{run}:blob:{each.key}", at, rng.randbytes(4))
                struck += 1
    return struck


def stamp(url: str, seed: int) -> int:
    rng = random.Random(seed)
    with _client(url) as client:
        keys = client.keys("isentrope:*:latest")
        for key in keys:
            client.set(
                key, rng.choice([b"", b"\xff\x00 nonsense", b"7", b"999999 1 beef", b"1e9 2"])
            )
    return len(keys)


def file(folder: str, seed: int) -> int:
    rng = random.Random(seed)
    found = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    if not found:
        return 0
    chosen = max(found, key=lambda path: path.stat().st_mtime)
    data = bytearray(chosen.read_bytes())
    data[rng.randrange(len(data))] ^= 0xFF
    chosen.write_bytes(data)
    return 1


def message(endpoint: str, seed: int, keys: str) -> int:
    """Frames of every wrong kind; the learner answers with reasons and lives."""
    import zmq

    from common import channel
    from common import keys as key_files
    from common.codec import Codec
    from common.wire import FromActor

    rng, codec = random.Random(seed), Codec(FromActor)
    with zmq.Context() as context:
        dealer = channel.connect_dealer(context, endpoint, key_files.read(keys))
        frames = [bytes(codec.encode(each)) for each in messages(rng)]
        for _ in range(FRAMES):
            dealer.send(damaged(rng, rng.choice(frames)))
        until = time.monotonic() + LISTEN_S
        while (left := until - time.monotonic()) > 0 and dealer.poll(int(1000 * left)):
            dealer.recv()
        dealer.close(0)
    return FRAMES + _shout(endpoint, rng)


def _client(url: str) -> Any:
    from common.softstate import SoftState

    return SoftState(url, "any", timeout_s=5).client


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


def _shout(endpoint: str, rng: random.Random) -> int:
    """Bytes that are no ZeroMQ at all."""
    found = re.fullmatch(r"tcp://(.+):(\d+)", endpoint)
    assert found is not None
    for _ in range(5):
        with socket.create_connection((found[1], int(found[2])), timeout=5) as stranger:
            stranger.sendall(rng.randbytes(500))
    return 5


if __name__ == "__main__":
    _, act, where, number, *rest = sys.argv
    acts: dict[str, Any] = {"blob": blob, "stamp": stamp, "file": file, "message": message}
    print(acts[act](where, int(number), *rest))
