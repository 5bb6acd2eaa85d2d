"""The two ends of the channel between actors and the learner: how the sockets are made, nothing
else.

The learner binds one ROUTER, every actor connects a DEALER; one message is one frame (wire.py). Off
loopback both ends authenticate each other with CURVE: the learner admits the public keys it was
given, an actor speaks only to the holder of the learner's key. What is said, and when, is up to the
two loops.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from typing import Any, NamedTuple, TypeVar

import zmq

from common.errors import ConfigError

log = logging.getLogger("isentrope.channel")

HIGH_WATER = 512  # messages queued a peer; credits bound the work, this a peer that went mad
ANSWERS_HIGH_WATER = 16_384  # to one actor: small ones, at most two for each of its credits
HEARTBEAT_MS = 2_000
DEAD_MS = 6_000  # a peer that answered no ZMTP ping for so long is gone
HANDSHAKE_MS = 5_000  # who has not shown a listed key by then is cut off
SAY_S = 30.0  # between two lines about strangers
BACKLOG = 1_024  # connections that wait to be accepted: a flood of them does not push actors out
ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # fixed by ZeroMQ's RFC 27

S = TypeVar("S", bound=zmq.Socket)  # type: ignore[type-arg]


class Keys(NamedTuple):
    """A CURVE key pair in Z85, and whom to trust: the learner lists its actors' keys, an actor the
    learner's one.
    """

    public: bytes
    secret: bytes
    peers: tuple[bytes, ...]


def bind_router(
    context: zmq.Context[S],
    endpoint: str,
    keys: Keys | None = None,
    max_bytes: int = 64 << 20,
    answers: int = ANSWERS_HIGH_WATER,
) -> tuple[S, str]:
    """The learner's socket and the endpoint really bound (port `*` or 0 is the kernel's choice).
    `answers`: how many are queued for one peer at most.

    Raises ConfigError: the endpoint is in use or unusable, or leaves loopback without keys.
    """
    demand_keys(endpoint, keys, "bind")
    socket = context.socket(zmq.ROUTER)
    _configure(socket, max_bytes)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.BACKLOG, BACKLOG)
    socket.setsockopt(zmq.SNDHWM, answers)
    try:
        if keys is not None:
            _admit(context, keys.peers)
            _authenticate(socket, keys, server=True)
        socket.bind(endpoint)
    except BaseException as error:
        socket.close(0)
        if not isinstance(error, zmq.ZMQError):
            raise
        raise ConfigError(_why_not_bound(endpoint, error)) from None
    return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)


def connect_dealer(
    context: zmq.Context[S], endpoint: str, keys: Keys | None = None, max_bytes: int = 64 << 20
) -> S:
    """An actor's socket with a routing id of its own; connecting goes on in the background, for
    ever.

    Raises ConfigError: the endpoint or a key is unusable, or it leaves loopback without keys.
    """
    demand_keys(endpoint, keys, "connect to")
    socket = context.socket(zmq.DEALER)
    try:
        _configure(socket, max_bytes)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1_000)
        if keys is not None:
            _authenticate(socket, keys)
        socket.connect(endpoint)
    except BaseException as error:
        socket.close(0)
        if not isinstance(error, zmq.ZMQError) or isinstance(error, zmq.ContextTerminated):
            raise
        raise ConfigError(
            f"cannot connect to {endpoint}: {error.strerror}; give tcp://HOST:PORT"
        ) from None
    return socket


def is_local(endpoint: str) -> bool:
    """Whether nobody outside this machine can reach `endpoint`."""
    transport, _, address = endpoint.partition("://")
    if transport in ("ipc", "inproc"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host in ("localhost", "lo") or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name or `*`: anywhere
        return False


def _configure(socket: Any, max_bytes: int) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IPV6, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
    # Beyond this ZeroMQ drops the connection unread. Twice the limit: a message somewhat too long
    # still reaches the codec, which refuses it by name, and the connection lives.
    socket.setsockopt(zmq.MAXMSGSIZE, 2 * max_bytes)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, DEAD_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, DEAD_MS)


def _authenticate(socket: Any, keys: Keys, server: bool = False) -> None:
    """Raises ConfigError: one of the keys cannot be one. It is not quoted: it may be the secret."""
    try:
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        if server:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
        else:
            socket.setsockopt(zmq.CURVE_SERVERKEY, keys.peers[0])
    except zmq.ZMQError as error:
        if isinstance(error, zmq.ContextTerminated):
            raise
        raise ConfigError(
            "a key of run.keys is not 40 letters of Z85: take the file as `isentrope keys` made it"
        ) from None


def demand_keys(endpoint: str, keys: Keys | None, verb: str) -> None:
    """Raises ConfigError: an endpoint off loopback without keys, or keys that trust nobody."""
    if keys is not None and not keys.peers:
        raise ConfigError(
            f"will not {verb} {endpoint}: the keys name no peer to trust; "
            "add one with `isentrope keys`"
        )
    if keys is None and not is_local(endpoint):
        raise ConfigError(
            f"will not {verb} {endpoint} without keys: it leaves this machine; "
            "make a pair for each side with `isentrope keys`, or use tcp://127.0.0.1:PORT"
        )


def _why_not_bound(endpoint: str, error: zmq.ZMQError) -> str:
    if error.errno == zmq.EADDRINUSE:
        return f"{endpoint} is in use: end who holds it, or choose another port (0: any free one)"
    return f"cannot bind {endpoint}: {error.strerror}; give tcp://127.0.0.1:PORT (0: any free port)"


def _admit(context: zmq.Context[Any], allowed: tuple[bytes, ...]) -> None:
    """Answer ZeroMQ's authentication requests (RFC 27) in this context, until the context is
    terminated.
    """
    plain: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(context.underlying)
    socket = plain.socket(zmq.REP)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(ZAP_ENDPOINT)
    keys = frozenset(allowed)
    threading.Thread(target=_answer_zap, args=(socket, keys), name="zap", daemon=True).start()


def _answer_zap(socket: zmq.Socket[bytes], allowed: frozenset[bytes]) -> None:
    """300 in place of 400: ZeroMQ then says nothing more until the handshake's time is over, so
    that a stranger cannot tell a key that is not listed from a network that fails."""
    strangers = Strangers()
    try:
        while True:
            version, request, _domain, address, _identity, mechanism, *credentials = (
                socket.recv_multipart()
            )
            known = mechanism == b"CURVE" and _z85(credentials) in allowed
            verdict = (b"200", b"OK") if known else (b"300", b"")
            if not known:
                strangers.note(address.decode(errors="replace"), time.monotonic())
            socket.send_multipart([version, request, *verdict, b"", b""])
    except zmq.ContextTerminated:
        socket.close(0)


class Strangers:
    """Says in the log that unlisted keys knock, at most once in `SAY_S` seconds."""

    def __init__(self) -> None:
        self._count, self._say_at = 0, 0.0

    def note(self, address: str, now: float) -> None:
        self._count += 1
        if now >= self._say_at:
            self._say_at = now + SAY_S
            log.warning(
                "refused a key that is not listed (%d so far, the last from %s); if it is one of "
                "ours: isentrope keys, and start the learner again",
                self._count,
                address,
            )


def _z85(credentials: list[bytes]) -> bytes:
    from zmq.utils import z85

    return bytes(z85.encode(credentials[0])) if len(credentials) == 1 else b""
