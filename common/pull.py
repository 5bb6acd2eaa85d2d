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

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from common import patch
from common.errors import WeightsError
from common.receive import Unfinished, room_for
from common.stores import Source, Store
from common.versions import (
    Blob,
    Entry,
    Manifest,
    Registry,
    Tensor,
    TensorLike,
    Weights,
    begin_digest,
)

log = logging.getLogger(__name__)

ALIGNMENT = 64  # of every tensor in its version: any dtype may be viewed in place


class _Origin(NamedTuple):
    """Where to take versions from, how patiently, and whom to believe."""

    registry: Registry
    source: Source
    known_incarnation: int
    silence_s: float
    unfinished: Unfinished


def put_version(
    store: Store, version: int, digest: str, tensors: Sequence[TensorLike]
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
    unfinished: Unfinished | None = None,
) -> Weights:
    """The newest version (None), or a certain one, complete and verified; its tensors are views
    into one buffer of its own. `own`: a version at hand, which patches may be applied to a copy of.
    It may take as long as it takes while bytes come; `silence_s` without one is its end.
    `unfinished`: what an earlier fetch left, which broke off; this one goes on from there.

    Raises WeightsError with the reason (nothing published, a learner older than
    `known_incarnation`, a missing or short blob, a wrong digest) and DeadlineError. For a blob that
    is not as it should be the learner is asked to publish the version again, whole.
    """
    if version is None:
        version = registry.latest()
        if version is None:
            raise WeightsError("no version is published yet")
    left = Unfinished() if unfinished is None else unfinished
    origin = _Origin(registry, source, known_incarnation, silence_s, left)
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
            return _made(manifest, _copied(own, manifest), _received(origin, chain))
        except WeightsError as error:
            log.warning("from the last full version, since from version %d: %s", own.version, error)
        chain, root = _chain(origin, manifest, None)
    assert root is not None, "a chain that does not begin at one's own begins at a full version"
    buffer, *patches = _received(origin, [root, *chain])
    return _made(manifest, buffer, patches)


def _received(origin: _Origin, manifests: Sequence[Manifest]) -> list[memoryview]:
    """The blobs of each, not hashed: what is made of them will be. A patch changes the bytes that
    it is applied to, so all are there before the first is.
    """
    origin.unfinished.only(manifests)
    found = [origin.unfinished.receive(origin.source, m, origin.silence_s) for m in manifests]
    origin.unfinished.forget()
    return found


def _made(manifest: Manifest, buffer: memoryview, patches: Sequence[memoryview]) -> Weights:
    """`buffer` is changed to the version that the patches end at."""
    elements = np.frombuffer(buffer, np.uint16)
    for frames in patches:
        patch.apply(frames, elements)
    content = _Content(manifest)
    content.arrived(buffer, len(buffer))
    return _weights(manifest, buffer, content.digest())


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
    entries, _ = lay_out(own.tensors)
    if (entries, size_of(entries)) != (manifest.tensors, manifest.nbytes):
        raise WeightsError(f"version {own.version} at hand has other tensors")
    buffer = np.frombuffer(room_for(manifest, manifest.nbytes), np.uint8)
    for tensor, entry in zip(own.tensors, manifest.tensors, strict=True):
        buffer[entry.offset : entry.offset + entry.nbytes] = np.frombuffer(tensor.data, np.uint8)
    return buffer.data


# -- whole versions --------------------------------------------------------------------------------


def _pull(origin: _Origin, manifest: Manifest) -> Weights:
    content = _Content(manifest)
    origin.unfinished.only([manifest])
    buffer = origin.unfinished.receive(origin.source, manifest, origin.silence_s, content.arrived)
    origin.unfinished.forget()  # if the digest is wrong, nobody knows which bytes are
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


class _Content:
    """Hashes a version's tensors as its bytes arrive from the front."""

    def __init__(self, manifest: Manifest) -> None:
        self.there = 0  # bytes that have arrived
        self._hash = begin_digest([(e.name, e.dtype, e.shape) for e in manifest.tensors])
        self._left = [(e.offset, e.offset + e.nbytes) for e in reversed(manifest.tensors)]

    def arrived(self, buffer: memoryview, nbytes: int) -> None:
        """The next `nbytes` of the version are in `buffer`, which is room for all of it."""
        self.there += nbytes
        while self._left and self._left[-1][0] < self.there:
            start, end = self._left.pop()
            self._hash.update(buffer[start : min(end, self.there)])
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


def _put(store: Store, name: str, pieces: Iterable[memoryview]) -> tuple[Blob, ...]:
    blobs = []
    for index, group in enumerate(_cut(pieces, store.blob_bytes)):
        blob = Blob(key=f"{name}-{index}", nbytes=sum(map(len, group)))
        store.put(blob.key, group)
        blobs.append(blob)
    return tuple(blobs)


def lay_out(tensors: Sequence[TensorLike]) -> tuple[tuple[Entry, ...], Iterator[memoryview]]:
    """Entries, and the bytes in pieces: each tensor, and the zeros up to the next one. A tensor's
    bytes are asked for when it is its turn.
    """
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    entries, at = [], 0
    for t in ordered:
        at += -at % ALIGNMENT
        entries.append(Entry(name=t.name, dtype=t.dtype, shape=t.shape, offset=at, nbytes=t.nbytes))
        at += t.nbytes
    return tuple(entries), _pieces(ordered, entries)


def size_of(entries: Sequence[Entry]) -> int:
    """Bytes of a version that is laid out so."""
    return entries[-1].offset + entries[-1].nbytes if entries else 0


def _pieces(tensors: Sequence[TensorLike], entries: Sequence[Entry]) -> Iterator[memoryview]:
    at = 0
    for tensor, entry in zip(tensors, entries, strict=True):
        if gap := entry.offset - at:
            yield memoryview(bytes(gap))
        at = entry.offset + entry.nbytes
        if entry.nbytes:
            yield tensor.data.cast("B")


def _cut(pieces: Iterable[memoryview], most: int) -> Iterator[list[memoryview]]:
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
