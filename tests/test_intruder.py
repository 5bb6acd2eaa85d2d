"""Who does not belong there gets nothing in and learns nothing, on real sockets."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from msgspec.structs import replace
from zmq.utils.monitor import recv_monitor_message

from common import channel, keys, wire
from common.channel import Keys, bind_router, connect_dealer
from common.records import Admit
from learner import limits
from scripts.benches.intruder import record_handshake
from tests.counter import CONFIG, Actor, Counter, result

NOTHING_MS = 400
TOLD = (  # what ZeroMQ tells a peer that was refused with a reason
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
)


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    door = Door(tmp_path)
    yield door
    door.close()


class Door:
    """A learner's socket that admits one actor's key."""

    def __init__(self, folder: Path) -> None:
        keys.make(folder)
        self.files = {name: str(folder / f"{name}.json") for name in ("learner", "actor")}
        self.contexts: list[zmq.Context[zmq.Socket[bytes]]] = [zmq.Context(), zmq.Context()]
        learner = keys.read(self.files["learner"])
        self.router, self.endpoint = bind_router(self.contexts[0], "tcp://127.0.0.1:0", learner)
        self.sockets = [self.router]

    def connect(self, who: Keys | None) -> zmq.Socket[bytes]:
        self.sockets.append(connect_dealer(self.contexts[1], self.endpoint, who))
        return self.sockets[-1]

    def stranger(self) -> Keys:
        """It knows whom to ask, and nobody knows it."""
        listed = keys.read(self.files["actor"])
        assert listed is not None
        return Keys(*zmq.curve_keypair(), peers=listed.peers)

    def hears(self) -> list[bytes]:
        heard = []
        while self.router.poll(NOTHING_MS):
            heard.append(self.router.recv_multipart()[1])
        return heard

    def close(self) -> None:
        for each in self.sockets:
            each.close(0)
        for context in self.contexts:
            context.term()


GREETING, HELLO = 64, 202  # bytes of ZeroMQ's greeting, and of CURVE's first message


def _bytes_back(endpoint: str, *said: bytes) -> bytes:
    """What a raw connection is answered to each piece, until it is closed or nothing more comes."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    back = b""
    with socket.create_connection((host, int(port)), timeout=5.0) as raw:
        raw.settimeout(NOTHING_MS / 1000)
        for piece in said:
            raw.sendall(piece)
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                back += raw.recv(1 << 16)
    return back


TOP = Path(__file__).resolve().parents[1]
LISTENERS = {  # who opens a port, or a ZeroMQ socket
    "common/channel.py": "where keys are demanded off loopback",
    "common/dash_server.py": "the page: loopback unless told otherwise",
    "common/doctor.py": "tries a port and closes it",
    "common/redis_server.py": "asks the kernel for a free port of loopback",
}


def test_ports_are_opened_where_keys_are_demanded_and_nowhere_else() -> None:
    opens = re.compile(r"\.bind\(|\.listen\(|create_server\(|server_bind|\.socket\(zmq\.")
    found = {
        str(path.relative_to(TOP))
        for package in ("actor", "common", "learner")
        for path in (TOP / package).rglob("*.py")
        if opens.search(path.read_text(encoding="utf-8"))
    }
    assert found == set(LISTENERS)


def test_a_stranger_with_a_key_of_its_own_is_told_nothing_at_all(door: Door) -> None:
    dealer = door.connect(door.stranger())
    seen: set[int] = set()
    with dealer.get_monitor_socket() as monitor:
        dealer.send(b"let me in")
        until = time.monotonic() + 30  # it connects again and again, and may have before we look
        while monitor.poll(2 * NOTHING_MS) or (
            zmq.EVENT_CONNECTED not in seen and time.monotonic() < until
        ):
            if monitor.poll(0):
                seen.add(recv_monitor_message(monitor)["event"])
        dealer.disable_monitor()
    assert zmq.EVENT_CONNECTED in seen
    assert zmq.EVENT_HANDSHAKE_SUCCEEDED not in seen
    assert not seen.intersection(TOLD), "a reason is a hint"
    assert door.hears() == []


def test_a_recorded_handshake_sent_again_gets_nothing_in(tmp_path: Path) -> None:
    keys.make(tmp_path / "keys")
    listed = str(tmp_path / "keys" / "actor.json")
    counter = Counter(tmp_path, keys=str(tmp_path / "keys" / "learner.json"))
    try:
        recorded = record_handshake(counter.endpoint, listed)
        assert recorded[:1] == b"\xff", "ZeroMQ's greeting, all of the handshake, and a message"
        before = counter.desk.look(lambda: dict(counter.desk.counts))
        assert before["refused_malformed"] == 1, "the real one was heard"
        hello = recorded[GREETING : GREETING + HELLO]
        pieces = (recorded[:GREETING], hello, recorded[GREETING + HELLO :])
        back = _bytes_back(counter.endpoint, *pieces)
        assert back[GREETING:].startswith(b"\x04\xa8\x07WELCOME"), "a handshake begins …"
        assert b"READY" not in back
        _bytes_back(counter.endpoint, recorded)
        assert counter.desk.look(lambda: dict(counter.desk.counts)) == before, "… and never ends"
        friend = Actor(counter.context, counter.endpoint, keys=keys.read(listed))
        counter.actors.append(friend)
        friend.hello(1)
        assert friend.hear(wire.Welcome)
    finally:
        counter.close()


@pytest.mark.parametrize("said", [b"GET / HTTP/1.0\r\n\r\n", b"", b"\x00" * 4000, b"\xff" * 4000])
def test_what_is_no_zeromq_gets_no_more_than_a_greeting(door: Door, said: bytes) -> None:
    assert len(_bytes_back(door.endpoint, said)) <= GREETING, "ZeroMQ's own greeting"
    assert door.hears() == []


def test_who_connects_and_says_nothing_is_cut_off_in_the_end(door: Door) -> None:
    assert door.router.getsockopt(zmq.HANDSHAKE_IVL) == channel.HANDSHAKE_MS <= 5_000


def test_a_flood_of_malformed_frames_gets_nothing_in_and_costs_honest_actors_nothing(
    tmp_path: Path,
) -> None:
    counter = Counter(tmp_path)
    try:
        counter.desk.announce(0)
        honest = counter.actor(name="honest")
        flooder = counter.actor(name="flooder", pid=2, capacity=0)
        flooder.hear(wire.Welcome)
        _flood(flooder, 3_000)
        for grant in honest.grants(2):
            assert honest.answer(grant) == "ack"
        counts: dict[str, int] = counter.desk.look(lambda: dict(counter.desk.counts))
        assert counts["refused_malformed"] > limits.EXPLAINED
        assert counts["answer_refused"] <= limits.EXPLAINED + 5, "told a few times, not each time"
        assert [r.ticket for r in counter.records() if isinstance(r, Admit)] == [0, 1]
        stranger = Actor(counter.context, counter.endpoint, name="late", pid=3)
        counter.actors.append(stranger)
        stranger.hello(1)
        assert stranger.hear(wire.Welcome), "and others join as ever"
    finally:
        counter.close()


def test_leases_run_out_in_the_middle_of_a_flood(tmp_path: Path) -> None:
    """A vanished actor's tickets must not be held by somebody who never stops talking."""
    counter = Counter(tmp_path, replace(CONFIG, lease_s=0.5))
    stop = threading.Event()
    flooder = counter.actor(name="flooder", pid=2, capacity=0)
    flood = threading.Thread(target=lambda: _flood(flooder, 1 << 30, stop))
    try:
        counter.desk.announce(0)
        silent = counter.actor(capacity=1, name="silent")
        taken = silent.grants(1)[0].ticket.id
        flood.start()
        quick = counter.actor(capacity=8, name="quick", pid=3)
        seen = {quick.hear(wire.Grant, 15.0).ticket.id for _ in range(3)}
        while taken not in seen:
            seen.add(quick.hear(wire.Grant, 15.0).ticket.id)
    finally:
        stop.set()
        flood.join(10)
        counter.close()


def _flood(actor: Actor, frames: int, stop: threading.Event | None = None) -> None:
    rng = random.Random(0)
    for _ in range(frames):
        if stop is not None and stop.is_set():
            return
        actor.socket.send(rng.randbytes(rng.randrange(4, 100)))


def test_a_result_is_admitted_from_the_one_who_has_the_key_only(tmp_path: Path) -> None:
    """The desk never sees who is not admitted: the socket is where strangers end."""
    keys.make(tmp_path / "keys")
    counter = Counter(tmp_path, keys=str(tmp_path / "keys" / "learner.json"))
    try:
        counter.desk.announce(0)
        stranger = Actor(counter.context, counter.endpoint, name="stranger")
        stranger.hello(4)
        listed = keys.read(str(tmp_path / "keys" / "actor.json"))
        friend = Actor(counter.context, counter.endpoint, keys=listed)
        counter.actors += [stranger, friend]
        friend.hello(1)
        grant = friend.grants(1)[0]
        assert friend.answer(grant) == "ack"
        with contextlib.suppress(zmq.Again):  # nowhere to send to: that is as good
            frame = stranger.codec.encode(result(grant.ticket))
            stranger.socket.send(frame, zmq.NOBLOCK)
        assert not stranger.socket.poll(NOTHING_MS)
        assert counter.desk.look(lambda: [a.name for a in counter.desk.actors.values()]) == ["a"]
    finally:
        counter.close()
