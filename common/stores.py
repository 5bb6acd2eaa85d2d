"""Where the bytes of weight versions lie. Stores move blobs and know nothing of versions (pull.py):

redis           default, up to about 1 GiB a version
file:FOLDER     a disk that learner and actors share
learner[:PORT]  the learner's own memory, over a socket of its own (blobs.py)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, cast

from common import keys
from common.blobs import PulledStore, nothing
from common.config import RunConfig
from common.errors import ConfigError, WeightsError
from common.versions import Registry, wrong_size

_RANGE_BYTES = 1 << 20  # of one reply from Redis
_READ_BYTES = 8 << 20  # of one look at a file, which may lie behind a slow network


class Source(Protocol):
    """What an actor needs of a store."""

    def get(
        self, key: str, into: memoryview, note: Callable[[str, int], None] = nothing, at: int = 0
    ) -> None:
        """Fill `into` from byte `at` on: those before are there. `note` is told the key and how
        many bytes from the front are there whenever they are more; what it raises ends the work.
        Raises WeightsError for a blob that is missing or of another size, and DeadlineError.
        """
        ...

    def close(self) -> None: ...


class Store(Source, Protocol):
    blob_bytes: int  # the most that one blob should hold

    def put(self, key: str, data: Sequence[memoryview]) -> None:
        """Store the pieces as one blob; whoever gets it sees all of it or none."""
        ...

    def missing(self, keys: Sequence[str]) -> list[str]: ...

    def delete(self, keys: Sequence[str]) -> None: ...

    def list(self) -> list[str]: ...


class RedisStore:
    """Blobs as plain values, named in a set so that leftovers of a crash can be found."""

    blob_bytes = 16 << 20

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._redis = registry.client
        self._names = registry.key("blobs")

    def put(self, key: str, data: Sequence[memoryview]) -> None:
        with self._registry.asking(f"store blob {key}"):
            self._redis.sadd(self._names, key)
            self._redis.set(self._key(key), data[0] if len(data) == 1 else b"".join(data))

    def get(
        self, key: str, into: memoryview, note: Callable[[str, int], None] = nothing, at: int = 0
    ) -> None:
        # in ranges: a reply is parsed and copied while it is small enough for the processor's cache
        for first in range(at, max(1, len(into)), _RANGE_BYTES):
            want = into[first : first + _RANGE_BYTES]
            with self._registry.asking(f"give blob {key}"):
                part = cast(
                    "bytes", self._redis.getrange(self._key(key), first, first + len(want) - 1)
                )
            if len(part) != len(want):
                raise wrong_size(key, first + len(part), len(into))
            want[:] = part
            note(key, first + len(part))

    def missing(self, keys: Sequence[str]) -> list[str]:
        with (
            self._registry.asking("look for blobs"),
            self._redis.pipeline(transaction=False) as pipe,
        ):
            for key in keys:
                pipe.exists(self._key(key))
            return [key for key, there in zip(keys, pipe.execute(), strict=True) if not there]

    def delete(self, keys: Sequence[str]) -> None:
        if keys:
            with self._registry.asking("delete blobs"):
                self._redis.unlink(*map(self._key, keys))
                self._redis.srem(self._names, *keys)

    def list(self) -> list[str]:
        with self._registry.asking("list blobs"):
            return sorted(
                name.decode() for name in cast("set[bytes]", self._redis.smembers(self._names))
            )

    def close(self) -> None:
        """The connection is the registry's."""

    def _key(self, key: str) -> str:
        return self._registry.key(f"blob:{key}")


class FileStore:
    """Blobs as files of one folder a run, written aside and renamed.

    Not synced: after a crash of the machine the digest refuses what was lost, and a resumed
    learner publishes again.
    """

    blob_bytes = 64 << 20

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, key: str, data: Sequence[memoryview]) -> None:
        path = self._path(key)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with aside.open("wb", buffering=0) as file:
                for piece in data:
                    while piece:
                        piece = piece[file.write(piece) :]
            aside.rename(path)
        except OSError as error:
            with suppress(OSError):
                aside.unlink()
            raise WeightsError(f"blob {path} could not be written: {error.strerror}") from None

    def get(
        self, key: str, into: memoryview, note: Callable[[str, int], None] = nothing, at: int = 0
    ) -> None:
        path = self._path(key)
        try:
            with path.open("rb", buffering=0) as file:
                size, at = os.fstat(file.fileno()).st_size, file.seek(at)
                while size == len(into) and at < size:
                    read = file.readinto(into[at : at + _READ_BYTES])
                    if not read:
                        break
                    at += read
                    note(key, at)
        except FileNotFoundError:
            raise wrong_size(key, 0, len(into)) from None
        except OSError as error:
            raise WeightsError(f"blob {path} could not be read: {error.strerror}") from None
        if (size, at) != (len(into), len(into)):
            raise wrong_size(key, size, len(into))

    def missing(self, keys: Sequence[str]) -> list[str]:
        return [key for key in keys if not self._path(key).exists()]

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def list(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.blob"))

    def close(self) -> None:
        """Nothing is kept open."""

    def _path(self, key: str) -> Path:
        if "/" in key or key.startswith("."):
            raise WeightsError(f"{key!r} is no name of a blob")
        return self.folder / f"{key}.blob"


def open_store(spec: str, registry: Registry) -> Store:
    """By `[run] store`: "redis" or "file:FOLDER". Raises ConfigError."""
    kind, _, folder = spec.partition(":")
    if spec == "redis":
        return RedisStore(registry)
    if kind == "file" and folder:
        return FileStore(Path(folder).expanduser() / registry.run_id)
    raise ConfigError(f'run.store: {spec!r} must be "redis", "file:FOLDER" or "learner"')


def open_source(run: RunConfig, registry: Registry) -> Source:
    """Where an actor takes blobs from. Raises ConfigError."""
    if run.store.partition(":")[0] == "learner":
        return PulledStore(registry, run.learner, keys.read(run.keys))
    return open_store(run.store, registry)
