"""A run's soft state in Redis: a connection whose every wait has a deadline, and who lives.

Whatever is here may be lost at any moment. Who needs it says it again. Keys, each behind
`isentrope:<run id>:`

    live              set: names of those who said that they live
    live:<name>       what one of them last said, until it expires
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast
from urllib.parse import parse_qs, parse_qsl, unquote, urlencode, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from common.channel import is_local
from common.config import without_password
from common.errors import ConfigError, DeadlineError, WeightsError

SWEPT = 16  # names looked at whenever somebody says that it lives
LEAVE_ALONE_S = 5.0  # after a silence, by somebody who only wants to be seen


class SoftState:
    """Redis for one run. Every call ends within about `timeout_s`, or raises DeadlineError.

    Safe to use from several threads at once; an asyncio program calls it by `asyncio.to_thread`.
    """

    def __init__(self, url: str, run_id: str, timeout_s: float = 10.0) -> None:
        self.run_id = run_id
        self.timeout_s = timeout_s
        try:
            address, password = _secret(url)
            self.client = redis.Redis.from_url(
                address,
                password=password,
                protocol=2,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                socket_read_size=1 << 20,  # of blobs; the default of 64 KiB halves their speed
                # a pooled connection may have died with its server; silence is waited for once
                retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
            )
        except ConfigError as error:
            raise ConfigError(f"run.redis: {error}") from None
        except ValueError:  # whose words may quote a part of the password
            raise ConfigError(
                f"run.redis: {without_password(url)} is no address of a Redis; give "
                "redis://HOST:PORT/0 (in a password / : @ % are written %2F %3A %40 %25)"
            ) from None
        self._where = _place(self.client)
        self.unguarded = _unguarded(self.client)  # why strangers may change what is there, or ""
        self._leave_alone_until = 0.0

    def key(self, name: str) -> str:
        return f"isentrope:{self.run_id}:{name}"

    @contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Redis' exceptions inside become DeadlineError (away) or WeightsError (it refuses)."""
        try:
            yield
        except redis.AuthenticationError as error:
            raise WeightsError(f"Redis at {self._where} refused to {what}: {error}") from None
        except (redis.ConnectionError, redis.TimeoutError) as error:
            raise DeadlineError(
                f"Redis at {self._where} did not answer within {self.timeout_s:g} s "
                f"({what}): {_one_line(error)}"
            ) from None
        except redis.RedisError as error:
            raise WeightsError(f"Redis at {self._where} refused to {what}: {error}") from None

    def close(self) -> None:
        self.client.close()

    def live(self, name: str, what: bytes | str, ttl_s: float = 10.0) -> bool:
        """Say that `name` ("learner", "actor:…") lives, with anything that people want to know.

        Some of the others, drawn anew each time, are dropped if they fell silent: names of actors
        that come and go do not gather. Never raises for Redis' sake: False when it is away, and
        then it is left alone for a while.
        """
        if time.monotonic() < self._leave_alone_until:
            return False
        try:
            with self.asking("note who lives"), self.client.pipeline(transaction=False) as pipe:
                pipe.sadd(self.key("live"), name)
                pipe.set(self.key(f"live:{name}"), what, px=max(1, int(ttl_s * 1000)))
                pipe.srandmember(self.key("live"), SWEPT)
                *_, drawn = pipe.execute()
                self._said(sorted(name.decode(errors="replace") for name in drawn))
        except (DeadlineError, WeightsError):
            self._leave_alone_until = time.monotonic() + LEAVE_ALONE_S
            return False
        return True

    def leave(self, name: str) -> None:
        """Say that `name` lives no more. Raises DeadlineError."""
        with self.asking("note who leaves"), self.client.pipeline(transaction=False) as pipe:
            pipe.srem(self.key("live"), name)
            pipe.delete(self.key(f"live:{name}"))
            pipe.execute()

    def living(self) -> dict[str, bytes]:
        """What everybody who lives last said."""
        with self.asking("list who lives"):
            names = sorted(
                n.decode() for n in cast("set[bytes]", self.client.smembers(self.key("live")))
            )
            return self._said(names)

    def _said(self, names: Sequence[str]) -> dict[str, bytes]:
        """What those of them said who live; the others' names are dropped."""
        if not names:
            return {}
        keys = [self.key(f"live:{name}") for name in names]
        said = cast("list[bytes | None]", self.client.mget(keys))
        silent = [name for name, what in zip(names, said, strict=True) if what is None]
        if silent:
            self.client.srem(self.key("live"), *silent)
        return {name: what for name, what in zip(names, said, strict=True) if what is not None}


def _secret(url: str) -> tuple[str, str | None]:
    """`url` without `password_file`, and the password that this file holds (its last line end cut
    off): so neither a recipe nor a list of processes shows it. Raises ConfigError (why only).
    """
    parts = urlsplit(url)
    options = parse_qs(parts.query, keep_blank_values=True)
    path = options.pop("password_file", [""])[0]
    if not path:
        return url, None
    try:
        password = Path(path).expanduser().read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"cannot read password_file {path}: {why}") from None
    return parts._replace(query=urlencode(options, doseq=True)).geturl(), password


def hidden(url: str) -> str:
    """The same address for processes that this one starts, whose command lines others can read: the
    password is in nameless memory of this process for as long as it lives (Linux; elsewhere in the
    address as before).
    """
    parts = urlsplit(url)
    if not parts.password or not hasattr(os, "memfd_create"):
        return url
    memory = os.memfd_create("password")
    os.write(memory, unquote(parts.password).encode())
    user, _, host = parts.netloc.rpartition("@")
    netloc = f"{user.partition(':')[0]}@{host}".removeprefix("@")
    options = [*parse_qsl(parts.query), ("password_file", f"/proc/{os.getpid()}/fd/{memory}")]
    return parts._replace(netloc=netloc, query=urlencode(options, safe="/")).geturl()


def _place(client: redis.Redis) -> str:
    """Where it is, without the password that its URL may hold."""
    options = client.connection_pool.connection_kwargs
    return str(options.get("path") or f"{options.get('host')}:{options.get('port')}")


def _unguarded(client: redis.Redis) -> str:
    options = client.connection_pool.connection_kwargs
    host = str(options.get("host", ""))
    if options.get("password") or not host or is_local(f"tcp://{host}:0"):
        return ""
    return (
        f"Redis at {host} has no password: whoever reaches it can give actors other weights; take "
        "redis://USER@HOST:PORT/0?password_file=PATH, or rediss://… where others may listen"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
