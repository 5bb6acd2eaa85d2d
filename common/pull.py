"""A version's bytes into a store and out of it: `put_version` lays them in, `fetch` takes them out
verified.

They are the tensors in name order, each at a multiple of 64, cut into blobs. Of a patch the blobs
are the patch, and the version is made from its base:

    own copy ──▶ patch ─▶ patch ─▶ digest ok? ──▶ the version
        (none, or it came out wrong)  │ no
    full version ─▶ patch ─▶ … ─▶ digest ok? ──▶ the version
                                      │ no
                          ask the learner for this version whole
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np

from common import patch
from common.errors import DeadlineError, WeightsError
from common.stores import Source, Store
from common.versions import Blob, Entry, Manifest, Registry, Tensor, Weights, begin_digest

log = logging.getLogger(__name__)

ALIGNMENT = 64  # of every tensor in its version: any dtype may be viewed in place
_READERS = 2  # blobs on their way at once: one is received while the one before is hashed


class _Origin(NamedTuple):
    """Where to take versions from, how patiently, and whom to believe."""

    registry: Registry
    source: Source
    known_incarnation: int
    silence_s: float


def put_version(
    store: Store, version: int, digest: str, tensors: Sequence[Tensor]
) -> tuple[tuple[Entry, ...], tuple[Blob, ...]]:
    """Lay the bytes of a version into the store; what its manifest says of them comes back.

    Blobs are named by content: another learner's blobs of the same number are others.
    """
    entries, pieces = lay_out(tensors)
    return entries, _put(store, f"{version}-{digest}", pieces)


def put_patch(store: Store, version: int, digest: str, frames: Sequence[bytes]) -> tuple[Blob, ...]:
    """Lay a patch into the store. `version` and `digest` are those of its result."""
    return _put(store, f"{version}-{digest}-patch", [memoryview(frame) for frame in frames])


def fetch(
    registry: Registry,
    source: Source,
    version: int | None = None,
    known_incarnation: int = 0,
    silence_s: float = 120.0,
    own: Weights | None = None,
) -> Weights:
    """The newest version (None), or a certain one, complete and verified; its tensors are views
    into one buffer of its own. `own`: a version at hand, which patches may be applied to a copy of.
    It may take as long as it takes while bytes come; `silence_s` without one is its end.

    Raises WeightsError with the reason (nothing published, a learner older than
    `known_incarnation`, a missing or short blob, a wrong digest) and DeadlineError. For a blob that
    is not as it should be the learner is asked to publish the version again, whole.
    """
    if version is None:
        version = registry.latest()
        if version is None:
            raise WeightsError("no version is published yet")
    origin = _Origin(registry, source, known_incarnation, silence_s)
    manifest = _manifest(origin, version)
    try:
        if manifest.kind == "full":
            return _pull(origin, manifest)
        return _patched(origin, manifest, own)
    except WeightsError as error:
        if registry.latest() != version:  # the learner went on and retired what this needed
            raise
        registry.want_full(version)
        raise WeightsError(f"{error}; asked the learner for all of it") from None


# -- patches ---------------------------------------------------------------------------------------


def _patched(origin: _Origin, manifest: Manifest, own: Weights | None) -> Weights:
    """Raises WeightsError when a link is missing or damaged, or the result is not what it should
    be.
    """
    chain, root = _chain(origin, manifest, own)
    if root is None and own is not None:
        try:
            return _made(origin, _copied(own, manifest), chain)
        except WeightsError as error:
            log.warning("from the last full version, since from version %d: %s", own.version, error)
        chain, root = _chain(origin, manifest, None)
    assert root is not None, "a chain that does not begin at one's own begins at a full version"
    buffer = _room(root, root.nbytes)
    _receive(origin, root, buffer)  # not hashed: what is made of it will be
    return _made(origin, buffer, chain)


def _made(origin: _Origin, buffer: memoryview, chain: Sequence[Manifest]) -> Weights:
    """`buffer` is changed to the version that the chain ends at."""
    elements = np.frombuffer(buffer, np.uint16)
    for link in chain:
        frames = _room(link, sum(blob.nbytes for blob in link.blobs))
        _receive(origin, link, frames)
        patch.apply(frames, elements)
    content = _Content(chain[-1], buffer)
    content.arrived(len(buffer))
    return _weights(chain[-1], buffer, content.digest())


def _chain(
    origin: _Origin, manifest: Manifest, own: Weights | None
) -> tuple[list[Manifest], Manifest | None]:
    """The patches to apply, first one first, and the full version that they begin at; None: at
    one's own.
    """
    chain = [manifest]
    while own is None or (chain[-1].base, chain[-1].base_digest) != (own.version, own.digest):
        link = chain[-1]
        base = _manifest(origin, link.base)
        same = (base.nbytes, base.tensors) == (manifest.nbytes, manifest.tensors)
        if base.digest != link.base_digest or not same:
            raise WeightsError(f"version {base.version} is not what {link.version} changes")
        if base.kind == "full":
            return chain[::-1], base
        chain.append(base)
    return chain[::-1], None


def _copied(own: Weights, manifest: Manifest) -> memoryview:
    """One's own version as bytes laid out as the manifest says: others still read the original."""
    entries, pieces = lay_out(own.tensors)
    if (entries, sum(map(len, pieces))) != (manifest.tensors, manifest.nbytes):
        raise WeightsError(f"version {own.version} at hand has other tensors")
    buffer = np.frombuffer(_room(manifest, manifest.nbytes), np.uint8)
    for tensor, entry in zip(own.tensors, manifest.tensors, strict=True):
        buffer[entry.offset : entry.offset + entry.nbytes] = np.frombuffer(tensor.data, np.uint8)
    return buffer.data


def _room(manifest: Manifest, nbytes: int) -> memoryview:
    """Raises WeightsError: what its manifest asks for is more than there is."""
    try:
        return np.empty(nbytes, np.uint8).data
    except (MemoryError, ValueError):  # ValueError: no machine could address it
        raise WeightsError(f"version {manifest.version}: no memory for {nbytes} bytes") from None


# -- whole versions --------------------------------------------------------------------------------


def _pull(origin: _Origin, manifest: Manifest) -> Weights:
    buffer = _room(manifest, manifest.nbytes)
    content = _Content(manifest, buffer)
    _receive(origin, manifest, buffer, content)
    return _weights(manifest, buffer, content.digest())


def _weights(manifest: Manifest, buffer: memoryview, found: str) -> Weights:
    if found != manifest.digest:
        raise WeightsError(
            f"version {manifest.version}: the content's digest is {found}, "
            f"its manifest says {manifest.digest}"
        )
    tensors = tuple(
        Tensor(e.name, e.dtype, e.shape, buffer[e.offset : e.offset + e.nbytes])
        for e in manifest.tensors
    )
    return Weights(manifest.version, manifest.digest, tensors, manifest.incarnation)


def _receive(
    origin: _Origin, manifest: Manifest, buffer: memoryview, content: _Content | None = None
) -> None:
    """All blobs of a version into `buffer`; `content` hashes them as they come."""
    there = 0
    progress = _Progress()
    readers = ThreadPoolExecutor(_READERS, "fetch")
    try:
        coming = _start(readers, origin.source, manifest.blobs, buffer, progress.note)
        for blob, future in zip(manifest.blobs, coming, strict=True):
            if not progress.until(future, origin.silence_s):
                raise DeadlineError(
                    f"version {manifest.version}: no byte came for {origin.silence_s:g} s; "
                    f"{there} of {len(buffer)} are there"
                )
            future.result()
            there += blob.nbytes
            if content is not None:
                content.arrived(blob.nbytes)
    finally:
        progress.is_over = True
        readers.shutdown(wait=False, cancel_futures=True)


class _Progress:
    """When the last bytes came, whichever reader's; readers left behind end at their next bytes."""

    def __init__(self) -> None:
        self.is_over = False
        self._at = time.monotonic()

    def note(self) -> None:
        if self.is_over:
            raise WeightsError("nobody waits for this blob any more")
        self._at = time.monotonic()

    def until(self, future: Future[None], silence_s: float) -> bool:
        """False: there was none for so long."""
        while not wait([future], max(0.0, self._at + silence_s - time.monotonic())).done:
            if time.monotonic() >= self._at + silence_s:
                return False
        return True


def _start(
    readers: ThreadPoolExecutor,
    source: Source,
    blobs: Sequence[Blob],
    buffer: memoryview,
    note: Callable[[], None],
) -> list[Future[None]]:
    starts = itertools.accumulate((blob.nbytes for blob in blobs), initial=0)
    pairs = zip(blobs, starts, strict=False)  # one start more than blobs: the end
    return [
        readers.submit(source.get, blob.key, buffer[at : at + blob.nbytes], note)
        for blob, at in pairs
    ]


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


# -- manifests and layout --------------------------------------------------------------------------


def _manifest(origin: _Origin, version: int) -> Manifest:
    """One that this process may follow, and that contradicts itself nowhere."""
    manifest = origin.registry.manifest(version)
    name = f"version {manifest.version}"
    if manifest.incarnation < origin.known_incarnation:
        raise WeightsError(
            f"{name} is of learner incarnation {manifest.incarnation}; "
            f"{origin.known_incarnation} has taken over"
        )
    ends = [0, *(entry.offset + entry.nbytes for entry in manifest.tensors)]
    starts = [*(entry.offset for entry in manifest.tensors), manifest.nbytes]
    wrong = any(entry.nbytes < 0 for entry in manifest.tensors)
    wrong |= any(blob.nbytes < 0 for blob in manifest.blobs)
    wrong |= any(start < end for start, end in zip(starts, ends, strict=True))
    blobs = sum(blob.nbytes for blob in manifest.blobs)
    if manifest.kind == "patch":
        wrong |= manifest.base >= version or blobs > manifest.nbytes
        wrong |= manifest.nbytes % patch.ITEM_BYTES != 0
    else:
        wrong |= blobs != manifest.nbytes
    if wrong:
        raise WeightsError(f"{name}: its manifest contradicts itself about sizes")
    return manifest


def _put(store: Store, name: str, pieces: Sequence[memoryview]) -> tuple[Blob, ...]:
    blobs = []
    for index, group in enumerate(_cut(pieces, store.blob_bytes)):
        blob = Blob(key=f"{name}-{index}", nbytes=sum(map(len, group)))
        store.put(blob.key, group)
        blobs.append(blob)
    return tuple(blobs)


def lay_out(tensors: Sequence[Tensor]) -> tuple[tuple[Entry, ...], list[memoryview]]:
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
