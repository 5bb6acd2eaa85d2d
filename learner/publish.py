"""A version goes out: blobs, then its manifest and number, then a hint; then what is too old goes.

Redis is soft state. When it is away, publishing is tried again up to a deadline; when it comes
back empty, `ensure` publishes what this learner published last.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from common.errors import DeadlineError, WeightsError
from common.failpoints import Failpoint
from common.stores import Store, put_version
from common.versions import Manifest, Registry, Tensor

log = logging.getLogger("isentrope.publish")

PATIENCE_S = 120.0  # with a Redis that is away
ENSURE_S = 1.0  # between two looks at Redis
AWAY_S = 5.0  # after a look that nobody answered


class _Version(NamedTuple):
    version: int
    step: int
    tensors: tuple[Tensor, ...]
    digest: str
    base: int


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
    ) -> None:
        self.registry = registry
        self.store = store
        self.incarnation = incarnation
        self.keep = max(1, keep)
        self.patience_s = patience_s
        self._fail = failpoint
        self._held: dict[int, _Version] = {}  # the newest version, and the base it leans on
        self._newest: Manifest | None = None
        self._look_at = 0.0  # when to look at Redis again

    def publish(
        self, version: int, step: int, tensors: tuple[Tensor, ...], digest: str, base: int = -1
    ) -> None:
        """Returns when every actor can have it. The tensors' bytes must not change from now on.

        `base`: the version that has the tensors which these lack (-1: none is lacking).
        Raises DeadlineError when Redis stays away (`ensure` will make up for it), and WeightsError
        when this learner has been replaced.
        """
        self._hold(_Version(version, step, tensors, digest, base))
        self._patiently(f"publish version {version}", lambda: self._put_in_room(version))
        self._patiently("retire old versions", self._sweep)

    def ensure(self) -> None:
        """Publish again what Redis lost. Cheap and patient: made to be called often, silent when
        Redis is away.

        Raises WeightsError when this learner has been replaced.
        """
        if not self._held or time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + ENSURE_S
        try:
            if self._is_lost():
                log.warning("Redis lost version %d: publishing it again", max(self._held))
                for version in sorted(self._held):
                    self._put(version, Failpoint())
        except DeadlineError as error:
            self._look_at = time.monotonic() + AWAY_S
            log.warning("%s", error)

    def _hold(self, new: _Version) -> None:
        self._newest = None
        self._held = {k: v for k, v in self._held.items() if k == new.base} | {new.version: new}

    def _is_lost(self) -> bool:
        stamp = self.registry.stamp()
        newest = self._held[max(self._held)]
        if stamp is not None and stamp.incarnation > self.incarnation:
            raise WeightsError(
                f"learner incarnation {stamp.incarnation} has taken over this run; end this process"
            )
        if stamp is None or self._newest is None or stamp.version < newest.version:
            return True
        if self.registry.known(newest.version) != newest.digest:
            return True
        return bool(self.store.missing([blob.key for blob in self._newest.blobs]))

    def _put(self, version: int, fail: Failpoint) -> None:
        it = self._held[version]
        entries, blobs = put_version(self.store, it.version, it.digest, it.tensors)
        fail("after_blobs")
        manifest = Manifest(
            version=it.version,
            step=it.step,
            digest=it.digest,
            dtype="+".join(sorted({tensor.dtype for tensor in it.tensors})),
            nbytes=sum(blob.nbytes for blob in blobs),
            tensors=entries,
            blobs=blobs,
            incarnation=self.incarnation,
            base=it.base,
            at=time.time(),
        )
        self.registry.publish(manifest)
        fail("after_manifest")
        self._newest = manifest

    def _put_in_room(self, version: int) -> None:
        """What is too old goes first: the peak is lower, and Redis is faster with memory it has."""
        self.registry.fence(self.incarnation)  # who was replaced deletes nothing
        self._retire(max(1, self.keep - 1))
        self._put(version, self._fail)

    def _retire(self, keep: int) -> list[Manifest]:
        """Leaves the newest versions and base 0, which come back.

        Manifests go before blobs: nobody is sent to blobs that are gone.
        """
        manifests = self.registry.manifests()
        newest = [manifest.version for manifest in manifests][-keep:]
        kept = [m for m in manifests if m.version in {0, *self._held, *newest}]
        gone = [m for m in manifests if m not in kept]
        self.registry.retire([manifest.version for manifest in gone])
        self.store.delete([blob.key for manifest in gone for blob in manifest.blobs])
        return kept

    def _sweep(self) -> None:
        """What is too old goes, and blobs that no manifest names: a learner died before it."""
        kept = self._retire(self.keep)
        if self._newest is not None:  # even if Redis forgot it a moment ago
            kept.append(self._newest)
        needed = {blob.key for manifest in kept for blob in manifest.blobs}
        self.store.delete([key for key in self.store.list() if key not in needed])

    def _patiently(self, what: str, work: Callable[[], None]) -> None:
        patiently(what, work, self.patience_s)


def patiently(what: str, work: Callable[[], None], patience_s: float = PATIENCE_S) -> None:
    """Do `work` again until Redis answers. Raises DeadlineError when it stays away."""
    deadline = time.monotonic() + patience_s
    for attempt in itertools.count(1):
        try:
            return work()
        except DeadlineError as error:
            if time.monotonic() > deadline:
                raise DeadlineError(f"could not {what} in {attempt} attempts: {error}") from None
            log.warning("attempt %d to %s failed, trying again: %s", attempt, what, error)
        time.sleep(min(1.0, 0.05 * 2**attempt))  # a dead Redis gives no sign when it is back
