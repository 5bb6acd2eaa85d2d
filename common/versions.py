"""Weight versions: what one is, and the registry in Redis that says which exist.

A version is (number, content digest). Its bytes lie in a store (stores.py); Redis holds its
manifest and the stamp of the newest. Redis is soft state: everything here can be lost and is then
published again. Keys, each behind `isentrope:<run id>:`

    fence             the highest learner incarnation that ever spoke; lower ones are refused
    latest            stamp of the newest version: "<version> <incarnation> <digest>"
    manifests         hash: version -> manifest (MessagePack)
    digests           hash: version -> content digest
    blobs             set: names of the blobs that the redis store holds
    blob:<name>       bytes of one blob, in the redis store
    served            where the learner serves its own blobs: "<incarnation> <endpoint>" (blobs.py)
    full_wanted       a version that an actor could not make from its patches
    hint              channel: somebody published; only a hint, polling is the truth
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple, Protocol, cast

import msgspec
import redis
import xxhash

from common.errors import ReplacedError, WeightsError
from common.softstate import SoftState


class Tensor(NamedTuple):
    """One tensor as bytes: common never imports torch."""

    name: str
    dtype: str  # safetensors' names: "F32", "BF16", "F16", …
    shape: tuple[int, ...]
    data: memoryview  # contiguous little-endian bytes

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


class TensorLike(Protocol):
    """A tensor to publish. Its bytes may be somewhere else until they are asked for: ask once, and
    keep them no longer than needed.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def data(self) -> memoryview: ...


class Weights(NamedTuple):
    """A verified version, ready to be loaded. `tensors` are those that are trained, over base
    version 0."""

    version: int
    digest: str
    tensors: tuple[Tensor, ...]
    incarnation: int = 0  # of the learner that published it


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """Where a tensor lies in the version's bytes (its blobs, one behind the other)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Blob(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    nbytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """All about a version but its bytes.

    A `full` version has every tensor that its step trained. `base`: the version whose other tensors
    it leaves as they are (-1: it has them all). A `patch` changes the tensors of `base`, whose
    digest is `base_digest`; its blobs are the patch (patch.py), all else is said of the result.
    """

    version: int
    step: int
    digest: str
    dtype: str
    nbytes: int  # of the version, whole
    tensors: tuple[Entry, ...]  # in name order, rising offsets
    blobs: tuple[Blob, ...]
    incarnation: int
    base: int = -1
    kind: Literal["full", "patch"] = "full"
    base_digest: str = ""  # of a patch
    at: float = 0.0  # seconds since the epoch, for people


class Stamp(NamedTuple):
    """What changes when actors have something new to fetch."""

    version: int
    incarnation: int
    digest: str


def digest(tensors: Sequence[TensorLike]) -> str:
    """xxh3-128 over (name, dtype, shape) of all tensors, then their bytes, both in name order."""
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    content = begin_digest([(t.name, t.dtype, t.shape) for t in ordered])
    for tensor in ordered:
        content.update(tensor.data)
    return content.hexdigest()


def begin_digest(shapes: Sequence[tuple[str, str, tuple[int, ...]]]) -> xxhash.xxh3_128:
    """A digest that has seen the (name, dtype, shape) list and waits for the bytes."""
    return xxhash.xxh3_128(json.dumps([[n, d, list(s)] for n, d, s in shapes]).encode())


_STAMP = re.compile(rb"(\d{1,18}) (\d{1,18}) (\S{1,64})")
_SERVED = re.compile(rb"\d{1,18} (tcp://[!-~]+:\d{1,5}|(?:ipc|inproc)://[!-~]+)")
# what msgspec raises for bytes that are no manifest: text in them may be none, or nested too deep
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_FENCE = """
local held = (tonumber(redis.call('GET', KEYS[1]) or '0') or 0)
if tonumber(ARGV[1]) < held then return held end
redis.call('SET', KEYS[1], ARGV[1])
return 0
"""

_SERVE = """
if tonumber(ARGV[1]) < (tonumber(redis.call('GET', KEYS[1]) or '0') or 0) then return 0 end
redis.call('SET', KEYS[2], ARGV[1] .. ' ' .. ARGV[2])
return 1
"""

# The same pair again only renews its manifest. A step back, or another digest for a known number,
# is for a newer learner only; then what its predecessor made from there on is no version any more.
# A stamp that is no stamp, or names no version, counts as none: memory may be damaged, too.
_PUBLISH = """
local fence, latest, manifests, digests, hint = unpack(KEYS)
local incarnation, version = tonumber(ARGV[1]), tonumber(ARGV[2])
local digest, manifest = ARGV[3], ARGV[4]
local held = tonumber(redis.call('GET', fence) or '0') or 0
if incarnation < held then return {'fenced', tostring(held)} end
local newest, owner = string.match(redis.call('GET', latest) or '', '^(%d+) (%d+) ')
if not newest or not redis.call('HGET', digests, newest) then newest, owner = '-1', '0' end
newest, owner = tonumber(newest), tonumber(owner)
local known = redis.call('HGET', digests, ARGV[2])
local behind = version < newest and known ~= digest
if (behind or (known and known ~= digest)) and incarnation <= owner then
  return {known and 'digest' or 'back', known or tostring(newest)}
end
redis.call('SET', fence, incarnation)
redis.call('HSET', manifests, version, manifest)
redis.call('HSET', digests, version, digest)
if version >= newest or behind then
  for _, other in ipairs(redis.call('HKEYS', digests)) do
    if tonumber(other) > version then
      redis.call('HDEL', manifests, other)
      redis.call('HDEL', digests, other)
    end
  end
  redis.call('SET', latest, version .. ' ' .. incarnation .. ' ' .. digest)
end
redis.call('PUBLISH', hint, version)
return {'ok', ''}
"""


class Registry(SoftState):
    """Which versions of a run exist. Every call ends within about `timeout_s`, or raises.

    Safe to use from several threads at once; an asyncio program calls it by `asyncio.to_thread`.
    """

    def __init__(self, url: str, run_id: str, timeout_s: float = 10.0) -> None:
        super().__init__(url, run_id, timeout_s)
        self._hints: Any = None

    def fence(self, incarnation: int) -> None:
        """From now on lower incarnations are refused. Raises ReplacedError when this one is."""
        with self.asking("raise the fence"):
            held = self.client.eval(_FENCE, 1, self.key("fence"), str(incarnation))
        if held:
            raise ReplacedError(_fenced(incarnation, cast("int", held)))

    def publish(self, manifest: Manifest) -> None:
        """Manifest and latest in one transaction; the blobs are in the store already.

        The same (version, digest) again changes nothing. Raises ReplacedError for a learner behind
        the fence, WeightsError for a step back or a second digest without a new incarnation. A
        newer learner may do both: what its predecessor published from there on ceases to exist.
        """
        names = ("fence", "latest", "manifests", "digests", "hint")
        version, inner = str(manifest.version), msgspec.msgpack.encode(manifest)
        arguments = (str(manifest.incarnation), version, manifest.digest, inner)
        with self.asking(f"publish version {version}"):
            reply = self.client.eval(_PUBLISH, len(names), *map(self.key, names), *arguments)
        verdict, detail = (part.decode() for part in cast("list[bytes]", reply))
        if verdict == "fenced":
            raise ReplacedError(_fenced(manifest.incarnation, int(detail)))
        if verdict == "back":
            raise WeightsError(f"version {version} would go back behind version {detail}")
        if verdict == "digest":
            raise WeightsError(
                f"version {version} exists with digest {detail}, not {manifest.digest}"
            )

    def latest(self) -> int | None:
        """Number of the newest version; None before the first."""
        stamp = self.stamp()
        return stamp.version if stamp else None

    def stamp(self) -> Stamp | None:
        with self.asking("name the latest version"):
            raw = cast("bytes | None", self.client.get(self.key("latest")))
        found = _STAMP.fullmatch(raw or b"")  # what is no stamp says as little as none
        return Stamp(int(found[1]), int(found[2]), found[3].decode()) if found else None

    def known(self, version: int) -> str | None:
        """Content digest under which a version is published."""
        with self.asking(f"give the digest of version {version}"):
            raw = cast("bytes | None", self.client.hget(self.key("digests"), str(version)))
        return raw.decode(errors="replace") if raw is not None else None

    def manifest(self, version: int) -> Manifest:
        """Raises WeightsError when there is none, or one that this version cannot read."""
        with self.asking(f"give the manifest of version {version}"):
            raw = cast("bytes | None", self.client.hget(self.key("manifests"), str(version)))
        if raw is None:
            raise WeightsError(
                f"version {version} has no manifest; it was retired or never published"
            )
        try:
            return msgspec.msgpack.decode(raw, type=Manifest)
        except _UNREADABLE as error:
            raise WeightsError(
                f"the manifest of version {version} is unreadable: {error}"
            ) from None

    def manifests(self) -> list[Manifest]:
        """All that this version can read, in one look, versions rising."""
        with self.asking("give all manifests"):
            raws = cast("list[bytes]", self.client.hvals(self.key("manifests")))
        found = []
        for raw in raws:
            with suppress(*_UNREADABLE):
                found.append(msgspec.msgpack.decode(raw, type=Manifest))
        return sorted(found, key=lambda manifest: manifest.version)

    def versions(self) -> list[int]:
        """All that have a manifest, rising."""
        with self.asking("list the versions"):
            return sorted(
                int(v) for v in cast("list[bytes]", self.client.hkeys(self.key("digests")))
            )

    def retire(self, versions: Sequence[int]) -> None:
        """Forget these manifests; their blobs may be deleted afterwards."""
        if versions:
            with self.asking("retire versions"), self.client.pipeline(transaction=True) as pipe:
                for name in ("manifests", "digests"):
                    pipe.hdel(self.key(name), *map(str, versions))
                pipe.execute()

    def serve(self, incarnation: int, endpoint: str) -> None:
        """Say where this learner serves its blobs. Raises ReplacedError behind the fence."""
        keys = (self.key("fence"), self.key("served"))
        with self.asking("say where blobs are served"):
            if not self.client.eval(_SERVE, 2, *keys, str(incarnation), endpoint):
                raise ReplacedError(f"learner incarnation {incarnation} is behind the fence")

    def served(self) -> str | None:
        """The endpoint at which the newest learner serves its blobs; None: nobody does."""
        with self.asking("say where blobs are served"):
            raw = cast("bytes | None", self.client.get(self.key("served")))
        found = _SERVED.fullmatch(raw or b"")
        return found[1].decode() if found else None

    def want_full(self, version: int) -> None:
        """Ask the learner for this version, whole: its patches cannot be used."""
        with self.asking("ask for a full version"):
            self.client.set(self.key("full_wanted"), version)

    def full_wanted(self) -> int | None:
        """The version that somebody last asked for whole; asked and forgotten in one go."""
        with self.asking("tell who wants a full version"), self.client.pipeline() as pipe:
            pipe.get(self.key("full_wanted"))
            pipe.delete(self.key("full_wanted"))
            raw, _ = pipe.execute()
        return int(raw) if raw is not None and raw.isdigit() else None

    def wait_hint(self, timeout_s: float) -> bool:
        """Sleep until somebody publishes (True) or `timeout_s` passed. One thread at a time."""
        with self.asking("wait for a hint"):
            try:
                if self._hints is None:
                    self._hints = self.client.pubsub(  # type: ignore[no-untyped-call]
                        ignore_subscribe_messages=True
                    )
                    self._hints.subscribe(self.key("hint"))
                return _next_message(self._hints, timeout_s)
            except redis.RedisError:
                self._hints = None  # the subscription died with the connection
                raise


def wrong_size(key: str, found: int, expected: int) -> WeightsError:
    """What a store says of a blob that is not as its manifest says; 0 found: it has none."""
    if found == 0:
        return WeightsError(f"blob {key} is missing")
    return WeightsError(f"blob {key} has {found} bytes, its manifest says {expected}")


def _next_message(hints: Any, timeout_s: float) -> bool:
    until = time.monotonic() + timeout_s
    while (left := until - time.monotonic()) > 0:
        if hints.get_message(timeout=left) is not None:
            return True
    return False


def _fenced(incarnation: int, held: int) -> str:
    return (
        f"learner incarnation {incarnation} is behind the fence: incarnation {held} has taken over "
        "this run; end this process"
    )
