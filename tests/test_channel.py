"""Sockets of both sides, over real TCP."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import zmq

from common.channel import Keys, bind_router, connect_dealer, is_local
from common.errors import ConfigError

ANY = "tcp://127.0.0.1:*"


class Ends:
    """Both sides' sockets, in two contexts: they are processes apart in life, and each has its own
    authenticator."""

    def __init__(self) -> None:
        self.contexts: list[zmq.Context[zmq.Socket[bytes]]] = [zmq.Context(), zmq.Context()]
        self.sockets: list[zmq.Socket[bytes]] = []

    def bind(
        self, endpoint: str, keys: Keys | None = None, **options: int
    ) -> tuple[zmq.Socket[bytes], str]:
        socket, bound = bind_router(self.contexts[0], endpoint, keys, **options)
        self.sockets.append(socket)
        return socket, bound

    def connect(self, endpoint: str, keys: Keys | None = None, **options: int) -> zmq.Socket[bytes]:
        self.sockets.append(connect_dealer(self.contexts[1], endpoint, keys, **options))
        return self.sockets[-1]

    def close(self) -> None:
        for socket in self.sockets:
            socket.close(0)
        for context in self.contexts:
            context.term()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


def _pair(*trusted: bytes) -> Keys:
    return Keys(*zmq.curve_keypair(), peers=trusted)


def _arrives(router: zmq.Socket[bytes], within_ms: int) -> bool:
    return bool(router.poll(within_ms))


def test_the_endpoint_really_bound_is_returned_and_speaks_both_ways(ends: Ends) -> None:
    router, endpoint = ends.bind(ANY)
    assert endpoint.startswith("tcp://127.0.0.1:")
    assert not endpoint.endswith((":0", ":*"))
    dealer = ends.connect(endpoint)
    dealer.send(b"hello")
    routing_id, frame = router.recv_multipart()
    assert frame == b"hello"
    router.send_multipart([routing_id, b"welcome"])
    assert dealer.recv() == b"welcome"


def test_port_0_is_the_kernels_choice_too(ends: Ends) -> None:
    _, endpoint = ends.bind("tcp://127.0.0.1:0")
    assert int(endpoint.rpartition(":")[2]) > 0


def test_sending_to_a_peer_that_left_is_an_error_not_silence(ends: Ends) -> None:
    router, _ = ends.bind(ANY)
    with pytest.raises(zmq.ZMQError) as failure:
        router.send_multipart([b"nobody", b"x"], zmq.NOBLOCK)
    assert failure.value.errno == zmq.EHOSTUNREACH


def test_a_port_in_use_is_one_line_that_names_it_and_the_way_out(ends: Ends) -> None:
    _, endpoint = ends.bind(ANY)
    with pytest.raises(ConfigError, match=f"{endpoint} is in use.*another port"):
        ends.bind(endpoint)


@pytest.mark.parametrize(
    "endpoint", ["tcp://*:*", "tcp://0.0.0.0:*", "tcp://192.0.2.1:5555", "tcp://some.host:1"]
)
def test_leaving_loopback_without_keys_is_refused_with_the_command_that_makes_them(
    ends: Ends, endpoint: str
) -> None:
    for make in (ends.bind, ends.connect):
        with pytest.raises(ConfigError, match="isentrope keys"):
            make(endpoint)


def test_nonsense_is_a_configuration_error(ends: Ends) -> None:
    for make in (ends.bind, ends.connect):
        with pytest.raises(ConfigError, match=r"tcp://"):
            make("tcp://127.0.0.1:many")


def test_only_this_machine_is_local() -> None:
    assert all(
        map(
            is_local,
            [
                "tcp://127.0.0.1:5",
                "tcp://127.9.9.9:5",
                "tcp://localhost:5",
                "ipc:///x",
                "inproc://x",
            ],
        )
    )
    assert not any(
        map(is_local, ["tcp://*:5", "tcp://10.0.0.1:5", "tcp://learner:5", "tcp://0.0.0.0:5"])
    )


def test_a_listed_key_is_admitted_also_off_loopback(ends: Ends) -> None:
    server = _pair()
    actor = _pair(server.public)
    router, endpoint = ends.bind("tcp://0.0.0.0:*", server._replace(peers=(actor.public,)))
    dealer = ends.connect(endpoint.replace("0.0.0.0", "127.0.0.1"), actor)
    dealer.send(b"hello")
    assert _arrives(router, 5_000)
    assert router.recv_multipart()[1] == b"hello"


def test_a_stranger_and_one_without_keys_are_not_heard_while_a_listed_one_is(
    ends: Ends,
) -> None:
    server = _pair()
    listed, stranger = _pair(server.public), _pair(server.public)
    router, endpoint = ends.bind(ANY, server._replace(peers=(listed.public,)))
    words = {b"stranger": stranger, b"nobody": None, b"listed": listed}
    dealers = {word: ends.connect(endpoint, keys) for word, keys in words.items()}
    for word, dealer in dealers.items():
        dealer.send(word)
    assert _arrives(router, 5_000)
    assert router.recv_multipart()[1] == b"listed"
    assert not _arrives(router, 300)


def test_an_actor_does_not_speak_to_a_learner_with_another_key(ends: Ends) -> None:
    server, impostor = _pair(), _pair()
    actor = _pair(server.public)
    router, endpoint = ends.bind(ANY, impostor._replace(peers=(actor.public,)))
    dealer = ends.connect(endpoint, actor)
    dealer.send(b"hello")
    assert not _arrives(router, 300)


def test_keys_that_trust_nobody_are_refused(ends: Ends) -> None:
    with pytest.raises(ConfigError, match="no peer"):
        ends.bind(ANY, _pair())


def test_a_message_far_over_the_limit_never_arrives_and_others_still_do(ends: Ends) -> None:
    router, endpoint = ends.bind(ANY, max_bytes=1_000)
    huge, small = (ends.connect(endpoint, max_bytes=1_000) for _ in range(2))
    huge.send(bytes(5_000))
    small.send(b"small")
    assert _arrives(router, 5_000)
    assert router.recv_multipart()[1] == b"small"
    assert not _arrives(router, 300)


@pytest.mark.parametrize("which", ["public", "secret", "peers"])
def test_forty_letters_that_are_no_key_are_one_line_and_leave_no_socket_open(which: str) -> None:
    bad = b"'" * 40  # no letter of Z85
    keys = _pair(zmq.curve_keypair()[0])._replace(**{which: (bad,) if which == "peers" else bad})
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with pytest.raises(ConfigError, match="is not 40 letters of Z85") as caught:
        connect_dealer(context, "tcp://127.0.0.1:1", keys)
    assert "\n" not in str(caught.value)
    if which != "peers":
        with pytest.raises(ConfigError, match="is not 40 letters of Z85"):
            bind_router(context, ANY, keys)
    # an open socket would hold this for ever; the authenticator's own closes with the context
    ended = threading.Thread(target=context.term, daemon=True)
    ended.start()
    ended.join(10)
    assert not ended.is_alive()
