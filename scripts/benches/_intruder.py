"""Who does not belong there: the floods of intruder.py, each a process of its own.

    python _intruder.py strangers ENDPOINT PER_S RECORDED
    python _intruder.py insider ENDPOINT PER_S KEYS
    python _intruder.py sink ENDPOINT KEYS

strangers: connections that end in nothing (noise, a handshake without keys, an old one); insider: a
listed key, and frames that are no message; sink: a port that is none of the learner's.

A flood goes on until SIGTERM and then prints how often it knocked.
"""

from __future__ import annotations

import random
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from common import channel
from common import keys as key_files

SLICE_S = 0.02  # a pace is kept over so long
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
OPEN = 64  # connections kept open at once, the oldest is closed first

stop = threading.Event()


def strangers(endpoint: str, per_s: float, recorded: str) -> int:
    """One connection a knock: what comes back is not waited for."""
    rng, replayed = random.Random(0), Path(recorded).read_bytes()
    found = re.fullmatch(r"tcp://(.+):(\d+)", endpoint)
    assert found is not None
    where, opened = (found[1], int(found[2])), list[socket.socket]()

    def knock() -> None:
        words = (rng.randbytes(200), GREETING + rng.randbytes(64), replayed)
        try:
            stranger = socket.create_connection(where, timeout=2.0)
            stranger.sendall(rng.choice(words))
            opened.append(stranger)
        except OSError:  # refused or reset: that is an answer as well
            pass
        if len(opened) > OPEN:
            opened.pop(0).close()

    return _pace(knock, per_s)


def insider(endpoint: str, per_s: float, keys: str) -> int:
    rng = random.Random(1)
    with zmq.Context() as context:
        dealer = channel.connect_dealer(context, endpoint, key_files.read(keys))
        dealer.setsockopt(zmq.SNDTIMEO, 200)

        def knock() -> None:
            try:
                dealer.send(rng.randbytes(rng.randrange(4, 200)))
            except zmq.Again:  # nobody reads as fast: the flood waits
                return
            while dealer.poll(0):
                dealer.recv()

        count = _pace(knock, per_s)
        dealer.close(0)
    return count


def sink(endpoint: str, keys: str) -> int:
    """Reads and forgets."""
    count = 0
    with zmq.Context() as context:
        router, _ = channel.bind_router(context, endpoint, key_files.read(keys))
        while not stop.is_set():
            if router.poll(100):
                router.recv_multipart()
                count += 1
        router.close(0)
    return count


def _pace(act: Callable[[], None], per_s: float) -> int:
    began, done = time.monotonic(), 0
    while not stop.wait(SLICE_S):
        due = per_s * (time.monotonic() - began)
        while done < due and not stop.is_set():
            act()
            done += 1
    return done


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    _, act, endpoint, *rest = sys.argv
    if act == "sink":
        count = sink(endpoint, rest[0])
    else:
        count = {"strangers": strangers, "insider": insider}[act](endpoint, float(rest[0]), rest[1])
    print(count)
