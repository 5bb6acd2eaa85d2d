"""A version goes out: blobs, then its manifest and number, then a hint; then what is too old goes.

With 16-bit weights a version is a patch of the one before it, where that is small; every
`snapshot_every` versions, and whenever an actor could not use a patch, it is whole. What a patch
leans on stays as long as the patch does.

Redis is soft state. A learner waits a moment for one that is away, and then goes on: `ensure`
publishes its newest version, whole, when Redis is back, also when it comes back empty.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from common import patch
from common.errors import DeadlineError, ReplacedError, WeightsError
from common.failpoints import Failpoint
from common.pull import lay_out, put_patch, put_version, size_of
from common.stores import Store
from common.versions import Blob, Entry, Manifest, Registry, TensorLike

log = logging.getLogger("isentrope.publish")

PATIENCE_S = 2.0  # with a Redis that is away: it may only be started again
ENSURE_S = 1.0  # between two looks at Redis
AWAY_S = 5.0  # after a look that nobody answered
PATCH_SHARE = 0.5  # of the whole version: a patch is not larger …
CHAIN_SHARE = 1.0  # … nor are all that a version is made of, for whoever joins late


class _Version(NamedTuple):
    version: int
    step: int
    tensors: tuple[TensorLike, ...]
    digest: str
    base: int


class _Patch(NamedTuple):
    """How a version differs from the one published before it."""

    entries: tuple[Entry, ...]  # of the result
    frames: list[bytes]
    base: Manifest


class Publisher:
    """The one who publishes for one learner incarnation. Keeps the bytes of what it may publish
    again.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        incarnation: int,
        keep: int,
        failpoint: Failpoint,
        patience_s: float = PATIENCE_S,
        snapshot_every: int = 1,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """`snapshot_every`: versions; those between are patches where they can be. 1: none is.
        `meanwhile` runs between two attempts to reach a Redis that is away.
        """
        self.registry = registry
        self.store = store
        self.incarnation = incarnation
        self.keep = max(1, keep)
        self.snapshot_every = snapshot_every
        self._meanwhile = meanwhile
        self._fail = failpoint
        self._held: dict[int, _Version] = {}  # the newest version, and the base it leans on
        self._chain: list[Manifest] = []  # what the newest version is made of, a full one first
        self._said_off = False
        self._look_at = 0.0  # when to look at Redis again
        self.trouble = ""  # why the newest version is not published, in one line
        self._patience_s = self._patience_left_s = patience_s

    def publish(
        self,
        version: int,
        step: int,
        tensors: tuple[TensorLike, ...],
        digest: str,
        base: int = -1,
    ) -> None:
        """Returns when every actor can have it. The tensors' bytes must not change from now on.

        `base`: the version that has the tensors which these lack (-1: none is lacking).
        Raises DeadlineError when Redis stays away (`ensure` will make up for it), WeightsError when
        Redis or a disk refuses, ReplacedError when another learner has taken over.
        """
        new = _Version(version, step, tensors, digest, base)
        change = self._patch(new)
        self._hold(new)
        self._patiently(f"publish version {version}", lambda: self._put_in_room(version, change))
        self._patiently("retire old versions", self._sweep)

    def offer(
        self,
        version: int,
        step: int,
        tensors: tuple[TensorLike, ...],
        digest: str,
        base: int = -1,
    ) -> bool:
        """`publish`, by one who goes on without it: False, and `ensure` makes up for it.

        Raises ReplacedError, and WeightsError when the very first version is refused.
        """
        try:
            self.publish(version, step, tensors, digest, base)
        except (DeadlineError, WeightsError) as error:
            self._go_on(error)
            self._patience_left_s = 0.0  # once is enough until it is over
            return False
        self._recover()
        return True

    def ensure(self) -> None:
        """Publish again what Redis lost, and whole what an actor could not make. Cheap and patient:
        made to be called often, silent while Redis stays away. Raises like `offer`.
        """
        if not self._held or time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + ENSURE_S
        try:
            if self._is_lost():
                log.warning("Redis has no version %d: publishing it again", max(self._held))
                for version in sorted(self._held):
                    self._put(version, Failpoint())
                self.registry.full_wanted()  # granted
            elif self._is_wanted_whole(max(self._held)):
                self._put(max(self._held), Failpoint())
        except (DeadlineError, WeightsError) as error:
            self._look_at = time.monotonic() + AWAY_S
            self._go_on(error)
        else:
            self._recover()

    def _recover(self) -> None:
        self.trouble, self._patience_left_s = "", self._patience_s

    def _go_on(self, error: DeadlineError | WeightsError) -> None:
        """One line for as long as it lasts. Raises an error that will not pass: another learner, or
        a password or a folder that never was right.
        """
        is_refused = isinstance(error, WeightsError) and not self._chain
        if isinstance(error, ReplacedError) or is_refused:
            raise error
        newest = max(self._held)
        if not self.trouble:
            log.error("going on; version %d is published when that is over: %s", newest, error)
        self.trouble = f"version {newest} is not published yet: {error}"

    def _patch(self, new: _Version) -> _Patch | None:
        """None: the version is better published whole."""
        if self.snapshot_every == 1:
            return None
        if not patch.fits(new.tensors):
            if not self._said_off:
                log.info('weights are published whole: patches need [run] weights_dtype = "bf16"')
            self._said_off = True
            return None
        before = self._held.get(self._chain[-1].version) if self._chain else None
        if before is None or len(self._chain) >= self.snapshot_every:
            return None
        entries, _ = lay_out(new.tensors)
        if entries != self._chain[-1].tensors or new.version <= before.version:
            return None
        size = self._chain[-1].nbytes
        patches = sum(blob.nbytes for link in self._chain[1:] for blob in link.blobs)
        most = int(min(PATCH_SHARE * size, CHAIN_SHARE * size - patches))
        firsts = [entry.offset // patch.ITEM_BYTES for entry in entries]
        frames = patch.make(_sorted(before.tensors), _sorted(new.tensors), firsts, most)
        return _Patch(entries, frames, self._chain[-1]) if frames is not None else None

    def _hold(self, new: _Version) -> None:
        self._held = {k: v for k, v in self._held.items() if k == new.base} | {new.version: new}

    def _is_wanted_whole(self, at_least: int) -> bool:
        """Whether an actor asked for all of a version, this one or one after it."""
        wanted = self.registry.full_wanted()
        if wanted is None or wanted < at_least:
            return False
        log.warning("an actor found version %d damaged: all of it is published", wanted)
        return True

    def _is_whole(self, chain: Sequence[Manifest]) -> bool:
        """Whether all that a version is made of is still there."""
        if any(self.registry.known(link.version) != link.digest for link in chain):
            return False
        return not self.store.missing([blob.key for link in chain for blob in link.blobs])

    def _is_lost(self) -> bool:
        stamp = self.registry.stamp()
        newest = self._held[max(self._held)]
        if stamp is not None and stamp.incarnation > self.incarnation:
            raise ReplacedError(
                f"learner incarnation {stamp.incarnation} has taken over this run; end this process"
            )
        if stamp is None or (stamp.version, stamp.digest) != (newest.version, newest.digest):
            return True
        if not self._chain:
            return True
        return self._chain[-1].version != newest.version or not self._is_whole(self._chain)

    def _put(self, version: int, fail: Failpoint, change: _Patch | None = None) -> None:
        it = self._held[version]
        entries, blobs, base = self._put_blobs(it, change)
        fail("after_blobs")
        manifest = Manifest(
            version=it.version,
            step=it.step,
            digest=it.digest,
            dtype="+".join(sorted({tensor.dtype for tensor in it.tensors})),
            nbytes=size_of(entries),
            tensors=entries,
            blobs=blobs,
            incarnation=self.incarnation,
            base=it.base if base is None else base.version,
            kind="full" if base is None else "patch",
            base_digest="" if base is None else base.digest,
            at=time.time(),
        )
        self.registry.publish(manifest)
        fail("after_manifest")
        self._chain = [manifest] if base is None else [*self._chain, manifest]

    def _put_blobs(
        self, it: _Version, change: _Patch | None
    ) -> tuple[tuple[Entry, ...], tuple[Blob, ...], Manifest | None]:
        """The layout of the version, where its bytes are, and what they change."""
        if change is None:
            return *put_version(self.store, it.version, it.digest, it.tensors), None
        blobs = put_patch(self.store, it.version, it.digest, change.frames)
        share = sum(blob.nbytes for blob in blobs) / max(1, change.base.nbytes)
        said = "version %d is a patch of version %d: %.2f %% of its bytes"
        log.info(said, it.version, change.base.version, 100 * share)
        return change.entries, blobs, change.base

    def _put_in_room(self, version: int, change: _Patch | None) -> None:
        """What is too old goes first: the peak is lower, and Redis is faster with memory it has."""
        self.registry.fence(self.incarnation)  # who was replaced deletes nothing
        self._retire(max(1, self.keep - 1))
        if change is not None and (self._is_wanted_whole(0) or not self._is_whole(self._chain)):
            change = None
        self._put(version, self._fail, change)

    def _retire(self, keep: int) -> list[Manifest]:
        """Leaves the newest versions and base 0, which come back, and what they are made of.

        Manifests go before blobs: nobody is sent to blobs that are gone.
        """
        manifests = {manifest.version: manifest for manifest in self.registry.manifests()}
        needed = {0, *self._held, *sorted(manifests)[-keep:]}
        for version, manifest in sorted(manifests.items(), reverse=True):
            if version in needed and manifest.kind == "patch":
                needed.add(manifest.base)
        kept = [manifest for version, manifest in manifests.items() if version in needed]
        gone = [manifest for version, manifest in manifests.items() if version not in needed]
        self.registry.retire([manifest.version for manifest in gone])
        self.store.delete([blob.key for manifest in gone for blob in manifest.blobs])
        return kept

    def _sweep(self) -> None:
        """What is too old goes, and blobs that no manifest names: a learner died before it."""
        kept = self._retire(self.keep) + self._chain  # even if Redis forgot it a moment ago
        needed = {blob.key for manifest in kept for blob in manifest.blobs}
        self.store.delete([key for key in self.store.list() if key not in needed])

    def _patiently(self, what: str, work: Callable[[], None]) -> None:
        """Do `work` again until Redis answers. Raises DeadlineError when it stays away."""
        deadline = time.monotonic() + self._patience_left_s
        for attempt in itertools.count(1):
            try:
                return work()
            except DeadlineError as error:
                if time.monotonic() > deadline:
                    raise DeadlineError(
                        f"could not {what} in {attempt} attempts: {error}"
                    ) from None
                if attempt == 1:
                    log.warning("could not %s, trying again: %s", what, error)
                self._meanwhile()
            time.sleep(min(1.0, 0.05 * 2**attempt))  # a dead Redis gives no sign when it is back


def _sorted(tensors: Sequence[TensorLike]) -> list[TensorLike]:
    """As they lie in a version."""
    return sorted(tensors, key=lambda tensor: tensor.name)
