"""Where the bytes of weight versions lie: `put_version` lays them into a store, `fetch` takes them
out verified.

A version's bytes are its tensors in name order, each at a multiple of 64, cut into blobs. Stores
move blobs and know nothing of versions: `redis` (default, up to about 1 GiB a version), or
`file:FOLDER` on a disk that learner and actors share.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from common.errors import ConfigError, DeadlineError, WeightsError
from common.versions import Blob, Entry, Manifest, Registry, Tensor, Weights, begin_digest

ALIGNMENT = 64  # of every tensor in its version: any dtype may be viewed in place
_READERS = 2  # blobs on their way at once: one is received while the one before is hashed
_RANGE_BYTES = 1 << 20  # of one reply from Redis


class Store(Protocol):
    blob_bytes: int  # the most that one blob should hold

    def put(self, key: str, data: Sequence[memoryview]) -> None:
        """Store the pieces as one blob; whoever gets it sees all of it or none."""
        ...

    def get(self, key: str, into: memoryview) -> None:
        """Fill `into`. Raises WeightsError for a blob that is missing or of another size."""
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

    def get(self, key: str, into: memoryview) -> None:
        # in ranges: a reply is parsed and copied while it is small enough for the processor's cache
        for first in range(0, max(1, len(into)), _RANGE_BYTES):
            want = into[first : first + _RANGE_BYTES]
            with self._registry.asking(f"give blob {key}"):
                part = cast(
                    "bytes", self._redis.getrange(self._key(key), first, first + len(want) - 1)
                )
            if len(part) != len(want):
                raise _wrong_size(key, first + len(part), len(into))
            want[:] = part

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

    def get(self, key: str, into: memoryview) -> None:
        path = self._path(key)
        try:
            with path.open("rb", buffering=0) as file:
                size, at = os.fstat(file.fileno()).st_size, 0
                while size == len(into) and at < size and (read := file.readinto(into[at:])):
                    at += read
        except FileNotFoundError:
            raise _wrong_size(key, 0, len(into)) from None
        except OSError as error:
            raise WeightsError(f"blob {path} could not be read: {error.strerror}") from None
        if (size, at) != (len(into), len(into)):
            raise _wrong_size(key, size, len(into))

    def missing(self, keys: Sequence[str]) -> list[str]:
        return [key for key in keys if not self._path(key).exists()]

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def list(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.blob"))

    def _path(self, key: str) -> Path:
        if "/" in key or key.startswith("."):
            raise WeightsError(f"{key!r} is no name of a blob")
        return self.folder / f"{key}.blob"


def open_store(spec: str, registry: Registry) -> Store:
    """By `[run] store`: "redis", or "file:FOLDER". Raises ConfigError."""
    if spec == "redis":
        return RedisStore(registry)
    kind, _, folder = spec.partition(":")
    if kind == "file" and folder:
        return FileStore(Path(folder).expanduser() / registry.run_id)
    raise ConfigError(f'run.store: {spec!r} must be "redis" or "file:FOLDER"')


def put_version(
    store: Store, version: int, digest: str, tensors: Sequence[Tensor]
) -> tuple[tuple[Entry, ...], tuple[Blob, ...]]:
    """Lay the bytes of a version into the store; what its manifest says of them comes back.

    Blobs are named by content: another learner's blobs of the same number are others.
    """
    entries, pieces = _lay_out(tensors)
    blobs = []
    for index, group in enumerate(_cut(pieces, store.blob_bytes)):
        blob = Blob(key=f"{version}-{digest}-{index}", nbytes=sum(map(len, group)))
        store.put(blob.key, group)
        blobs.append(blob)
    return entries, tuple(blobs)


def fetch(
    registry: Registry,
    store: Store,
    version: int | None = None,
    known_incarnation: int = 0,
    timeout_s: float = 120.0,
) -> Weights:
    """The newest version (None), or a certain one, complete and verified; its tensors are views
    into one buffer.

    Raises WeightsError with the reason (nothing published, a learner older than
    `known_incarnation`, a missing or short blob, a wrong digest) and DeadlineError.
    """
    if version is None:
        version = registry.latest()
        if version is None:
            raise WeightsError("no version is published yet")
    manifest = registry.manifest(version)
    _check(manifest, known_incarnation)
    buffer = np.empty(manifest.nbytes, np.uint8).data
    deadline = time.monotonic() + timeout_s
    content = _Content(manifest, buffer)
    readers = ThreadPoolExecutor(_READERS, "fetch")
    try:
        coming = _start(readers, store, manifest.blobs, buffer)
        for blob, future in zip(manifest.blobs, coming, strict=True):
            future.result(timeout=max(0.0, deadline - time.monotonic()))
            content.arrived(blob.nbytes)
    except DeadlineError:
        raise
    except TimeoutError:
        raise DeadlineError(
            f"version {version}: {content.there} of {manifest.nbytes} bytes in {timeout_s:g} s"
        ) from None
    finally:
        readers.shutdown(wait=False, cancel_futures=True)
    if content.digest() != manifest.digest:
        raise WeightsError(
            f"version {version}: the content's digest is {content.digest()}, "
            f"its manifest says {manifest.digest}"
        )
    tensors = tuple(
        Tensor(e.name, e.dtype, e.shape, buffer[e.offset : e.offset + e.nbytes])
        for e in manifest.tensors
    )
    return Weights(version, manifest.digest, tensors, manifest.incarnation)


class _Content:
    """Hashes a version's tensors as its bytes arrive from the front."""

    def __init__(self, manifest: Manifest, buffer: memoryview) -> None:
        self.there = 0  # bytes that have arrived
        self._buffer = buffer
        self._hash = begin_digest([(e.name, e.dtype, e.shape) for e in manifest.tensors])
        self._left = [(e.offset, e.offset + e.nbytes) for e in reversed(manifest.tensors)]

    def arrived(self, nbytes: int) -> None:
        self.there += nbytes
        while self._left and self._left[-1][0] < self.there:
            start, end = self._left.pop()
            self._hash.update(self._buffer[start : min(end, self.there)])
            if end > self.there:
                self._left.append((self.there, end))
                return

    def digest(self) -> str:
        return self._hash.hexdigest()


def _check(manifest: Manifest, known_incarnation: int) -> None:
    """A manifest that this process can and may follow, and that contradicts itself nowhere."""
    name = f"version {manifest.version}"
    if manifest.incarnation < known_incarnation:
        raise WeightsError(
            f"{name} is of learner incarnation {manifest.incarnation}; "
            f"{known_incarnation} has taken over"
        )
    if manifest.kind != "full":
        raise WeightsError(f"{name} is a {manifest.kind}; this actor takes full versions")
    ends = [0, *(entry.offset + entry.nbytes for entry in manifest.tensors)]
    starts = [*(entry.offset for entry in manifest.tensors), manifest.nbytes]
    negative = any(entry.nbytes < 0 for entry in manifest.tensors)
    blobs = sum(blob.nbytes for blob in manifest.blobs)
    if (
        negative
        or blobs != manifest.nbytes
        or any(s < e for s, e in zip(starts, ends, strict=True))
    ):
        raise WeightsError(f"{name}: its manifest contradicts itself about sizes")


def _start(
    readers: ThreadPoolExecutor, store: Store, blobs: Sequence[Blob], buffer: memoryview
) -> list[Future[None]]:
    starts = itertools.accumulate((blob.nbytes for blob in blobs), initial=0)
    pairs = zip(blobs, starts, strict=False)  # one start more than blobs: the end
    return [
        readers.submit(store.get, blob.key, buffer[at : at + blob.nbytes]) for blob, at in pairs
    ]


def _lay_out(tensors: Sequence[Tensor]) -> tuple[tuple[Entry, ...], list[memoryview]]:
    """Entries, and the bytes in pieces: each tensor, and the zeros up to the next one."""
    entries: list[Entry] = []
    pieces: list[memoryview] = []
    at = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        if gap := -at % ALIGNMENT:
            pieces.append(memoryview(bytes(gap)))
            at += gap
        data = tensor.data.cast("B") if tensor.data.nbytes else memoryview(b"")
        entries.append(
            Entry(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                offset=at,
                nbytes=len(data),
            )
        )
        pieces.append(data)
        at += len(data)
    return tuple(entries), pieces


def _cut(pieces: Sequence[memoryview], most: int) -> Iterator[list[memoryview]]:
    """The pieces in the same order, in groups of exactly `most` bytes but for the last."""
    group: list[memoryview] = []
    room = most
    for piece in pieces:
        while len(piece):
            part, piece = piece[:room], piece[room:]
            group.append(part)
            room -= len(part)
            if room == 0:
                yield group
                group, room = [], most
    if group:
        yield group


def _wrong_size(key: str, found: int, expected: int) -> WeightsError:
    if found == 0:
        return WeightsError(f"blob {key} is missing")
    return WeightsError(f"blob {key} has {found} bytes, its manifest says {expected}")
