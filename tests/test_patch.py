"""What a patch promises: bit for bit the version that was published, or all of it after all."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import patch
from common.errors import WeightsError
from common.failpoints import Failpoint
from common.pull import fetch
from common.stores import RedisStore
from common.versions import Blob, Registry, Tensor, Weights, digest
from learner.publish import Publisher

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=4)


def bf16(name: str, content: np.ndarray) -> Tensor:
    return Tensor(name, "BF16", content.shape, memoryview(content.astype(np.uint16)).cast("B"))


def firsts_of(tensors: tuple[Tensor, ...]) -> list[int]:
    """Where tensors begin that follow each other with holes, in elements."""
    return [int(n) for n in np.cumsum([0, *(t.data.nbytes // 2 + 32 for t in tensors)])[:-1]]


def laid(tensors: tuple[Tensor, ...]) -> np.ndarray:
    """uint16 of them all, holes of 7 between them."""
    out = np.full(sum(t.data.nbytes // 2 + 32 for t in tensors), 7, np.uint16)
    for tensor, first in zip(tensors, firsts_of(tensors), strict=True):
        out[first : first + tensor.data.nbytes // 2] = np.frombuffer(tensor.data, np.uint16)
    return out


@st.composite
def two_versions(draw: st.DrawFn) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A version, and one that differs from it anywhere."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    share = draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    old, new = [], []
    for index, size in enumerate(draw(SIZES)):
        before = rng.integers(0, 2**16, size, np.uint16)
        after = np.where(rng.random(size) < share, rng.integers(0, 2**16, size), before)
        old.append(bf16(f"{index}", before))
        new.append(bf16(f"{index}", after))
    return tuple(old), tuple(new)


def joined(frames: list[bytes] | None) -> memoryview:
    assert frames is not None
    return memoryview(b"".join(frames))


@given(two_versions())
def test_a_patch_makes_the_new_version_bit_for_bit_however_often_it_is_applied(
    versions: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
) -> None:
    old, new = versions
    frames = joined(patch.make(old, new, firsts_of(old), 1 << 20))
    made, wanted = laid(old), laid(new)
    changed = patch.apply(frames, made)
    assert changed == int((laid(old) != wanted).sum())
    assert np.array_equal(made, wanted)
    patch.apply(frames, made)
    assert np.array_equal(made, wanted)


@given(two_versions(), st.integers(0, 2**31), st.integers(0, 7))
def test_a_damaged_patch_is_an_error_or_changes_elements_and_nothing_else_happens(
    versions: tuple[tuple[Tensor, ...], tuple[Tensor, ...]], where: int, bit: int
) -> None:
    old, new = versions
    frames = bytearray(joined(patch.make(old, new, firsts_of(old), 1 << 20)))
    if not frames:
        return
    frames[where % len(frames)] ^= 1 << bit
    with contextlib.suppress(WeightsError):  # nothing else, and nothing outside the array
        patch.apply(memoryview(frames), laid(old))


@pytest.mark.parametrize("cut", [1, 5, 19, 21, -1])
def test_a_patch_that_is_cut_is_refused(cut: int) -> None:
    old, new = bf16("w", np.zeros(500)), bf16("w", np.arange(500))
    frames = joined(patch.make([old], [new], [0], 1 << 20))
    with pytest.raises(WeightsError, match="damaged"):
        patch.apply(frames[:cut], np.zeros(500, np.uint16))


def test_changes_far_apart_and_many_are_several_frames() -> None:
    sizes = patch.Sizes(slice=64, frame=40, span=1000)
    rng = np.random.default_rng(0)
    old = rng.integers(0, 2**16, 20_000, np.uint16)
    new = np.where(rng.random(20_000) < 0.01, old + 1, old)
    frames = patch.make([bf16("w", old)], [bf16("w", new)], [0], 1 << 20, sizes)
    assert frames is not None
    assert len(frames) > 10
    made = old.copy()
    patch.apply(joined(frames), made)
    assert np.array_equal(made, new)


def test_more_than_the_most_is_no_patch() -> None:
    old, new = (
        bf16("w", np.zeros(5000)),
        bf16("w", np.random.default_rng(0).integers(1, 60000, 5000)),
    )
    assert patch.make([old], [new], [0], 100) is None
    assert patch.make([old], [new], [0], 100_000) is not None


# -- published and fetched -------------------------------------------------------------------------


@pytest.fixture
def registry(redis_url: str) -> Iterator[Registry]:
    made = Registry(redis_url, "run")
    yield made
    made.close()


class Learner:
    """Publishes versions of which each changes one weight in a hundred of the one before."""

    def __init__(self, registry: Registry, incarnation: int = 1, every: int = 4) -> None:
        self.store = RedisStore(registry)
        self.registry = registry
        self.publisher = Publisher(
            registry, self.store, incarnation, 2, Failpoint(), 20.0, snapshot_every=every
        )
        self.content = np.random.default_rng(0).integers(0, 2**16, 3000, np.uint16)
        self.digests: list[str] = []

    def publish(self, count: int = 1) -> None:
        for _ in range(count):
            version = len(self.digests)
            self.content = self.content.copy()
            self.content[version % 100 :: 100] += 1
            tensors = (bf16("a", self.content[:1001]), bf16("b", self.content[1001:]))
            self.digests.append(digest(tensors))
            self.publisher.publish(version, version, tensors, self.digests[-1])

    def fetch(self, version: int | None = None, own: Weights | None = None) -> Weights:
        return fetch(self.registry, self.store, version, own=own)

    def kinds(self) -> dict[int, str]:
        return {m.version: m.kind for m in self.registry.manifests()}

    def key(self, version: int) -> str:
        return self.registry.manifest(version).blobs[0].key

    def spoil(self, version: int) -> None:
        manifest = self.registry.manifest(version)
        blob = bytearray(manifest.blobs[0].nbytes)
        self.store.get(manifest.blobs[0].key, memoryview(blob))
        blob[len(blob) // 2] ^= 4
        self.store.put(manifest.blobs[0].key, [memoryview(blob)])


def test_versions_are_patches_between_snapshots_and_small(registry: Registry) -> None:
    learner = Learner(registry)
    learner.publish(4)
    assert learner.kinds() == {0: "full", 1: "patch", 2: "patch", 3: "patch"}
    manifest = registry.manifest(3)
    assert (manifest.base, manifest.base_digest) == (2, learner.digests[2])
    assert manifest.blobs[0].nbytes < 0.15 * manifest.nbytes
    learner.publish()
    assert registry.manifest(4).kind == "full"


def test_an_actor_goes_from_version_to_version_and_leaves_what_it_serves_as_it_was(
    registry: Registry,
) -> None:
    learner = Learner(registry)
    own = None
    for _ in range(6):
        learner.publish()
        before = own
        held = [bytes(t.data) for t in before.tensors] if before else []
        own = learner.fetch(own=before)
        assert own.digest == digest(own.tensors) == learner.digests[own.version]
        assert before is None or held == [bytes(t.data) for t in before.tensors]


def test_a_patch_is_all_that_an_actor_pulls_that_has_its_base(registry: Registry) -> None:
    learner = Learner(registry)
    learner.publish(2)
    own = learner.fetch()
    learner.publish(2)
    learner.store.delete([learner.key(0), learner.key(1)])
    assert learner.fetch(own=own).digest == learner.digests[3]


def test_who_comes_late_takes_the_snapshot_and_the_patches_behind_it(registry: Registry) -> None:
    learner = Learner(registry)
    learner.publish(7)
    got = learner.fetch()
    assert (got.version, got.digest) == (6, learner.digests[6])
    assert registry.manifest(4).kind == "full"


def test_who_has_a_version_that_is_no_link_takes_the_snapshot(registry: Registry) -> None:
    learner = Learner(registry)
    learner.publish(1)
    own = learner.fetch()
    learner.publish(5)
    assert learner.fetch(own=own).digest == learner.digests[5]
    lie = own._replace(version=4)  # another learner's version of this number
    assert learner.fetch(own=lie).digest == learner.digests[5]


def test_a_damaged_own_copy_is_noticed_by_the_digest_and_left_aside(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    learner = Learner(registry)
    learner.publish(2)
    own = learner.fetch()
    cast("memoryview", own.tensors[0].data)[100] ^= 1
    learner.publish(1)
    assert learner.fetch(own=own).digest == learner.digests[2]
    assert "digest" in caplog.text


@pytest.mark.parametrize("how", ["missing", "damaged"])
@pytest.mark.parametrize("link", [0, 1, 3])
def test_a_chain_with_a_broken_link_is_refused_until_the_learner_publishes_it_whole(
    registry: Registry, how: str, link: int
) -> None:
    learner = Learner(registry)
    learner.publish(4)
    if how == "missing":
        learner.store.delete([learner.key(link)])
    else:
        learner.spoil(link)
    with pytest.raises(WeightsError, match="asked the learner for all of it"):
        learner.fetch()
    learner.publisher._look_at = 0.0  # at once, not in a second
    learner.publisher.ensure()
    assert registry.manifest(3).kind == "full"
    assert learner.fetch().digest == learner.digests[3]
    learner.publish()
    assert registry.manifest(4).kind == "patch"
    assert learner.fetch().digest == learner.digests[4]


def rewrite(registry: Registry, version: int, **fields: Any) -> None:
    """The manifest as it is when these fields were damaged where it lies."""
    wrong = msgspec.structs.replace(registry.manifest(version), **fields)
    registry.client.hset(registry.key("manifests"), str(version), msgspec.msgpack.encode(wrong))


@pytest.mark.parametrize("damaged", ["nbytes", "blob"])
def test_a_manifest_that_asks_for_more_memory_than_there_is_is_damage_like_any_other(
    registry: Registry, damaged: str
) -> None:
    learner = Learner(registry)
    learner.publish(2)
    own = learner.fetch()
    learner.publish()
    huge: dict[str, Any] = {"nbytes": 1 << 60}
    if damaged == "blob":  # … and the root's, all of it of one mind
        huge["blobs"] = (Blob(key=learner.key(2), nbytes=1 << 60),)
    for version in (0, 1, 2):
        if damaged == "blob" or version == 2:
            rewrite(registry, version, **huge)
    for base in (None, own):
        with pytest.raises(WeightsError, match="asked the learner for all of it"):
            learner.fetch(own=base)
    learner.publisher._look_at = 0.0
    learner.publisher.ensure()
    assert learner.fetch(own=own).digest == learner.digests[2]


def test_a_wish_for_a_whole_version_is_granted_with_the_next_one(registry: Registry) -> None:
    learner = Learner(registry)
    learner.publish(2)
    registry.want_full(1)
    learner.publish()
    assert registry.manifest(2).kind == "full"
    learner.publish()
    assert registry.manifest(3).kind == "patch"


def test_a_result_with_another_digest_than_the_manifest_says_is_refused(registry: Registry) -> None:
    learner = Learner(registry)
    learner.publish(3)
    rewrite(registry, 2, digest="0" * 32)
    with pytest.raises(WeightsError, match="version 2: the content's digest is"):
        learner.fetch()


def test_what_a_kept_patch_is_made_of_is_kept_and_no_more(registry: Registry) -> None:
    learner = Learner(registry)
    most = 0
    for version in range(60):
        learner.publish()
        kinds = learner.kinds()
        snapshot = max(v for v in kinds if kinds[v] == "full" and v <= max(0, version - 1))
        assert set(range(snapshot, version + 1)) | {0} == set(kinds)
        assert {key.split("-")[0] for key in learner.store.list()} == {str(v) for v in kinds}
        assert learner.fetch(version).digest == learner.digests[version]
        most = max(most, len(learner.store.list()))
    assert most <= 4 + 2 + 1


def test_redis_does_not_grow_with_the_number_of_versions(registry: Registry) -> None:
    learner = Learner(registry)

    def after(count: int) -> tuple[int, int]:
        learner.publish(count)
        return (
            cast("int", registry.client.dbsize()),
            cast("dict[str, int]", registry.client.info("memory"))["used_memory_dataset"],
        )

    keys, used = after(21)  # one round of snapshots and patches is like the other
    later_keys, later_used = after(200)
    assert later_keys == keys
    assert later_used < used + 100_000  # 220 versions of 6 kB would be 1.3 MB


def test_an_empty_redis_gets_the_newest_version_whole(registry: Registry) -> None:
    learner = Learner(registry)
    learner.publish(3)
    registry.client.flushall()
    learner.publish()  # a patch of what Redis forgot would be of no use
    assert learner.kinds() == {3: "full"}
    registry.client.flushall()
    learner.publisher._look_at = 0.0
    learner.publisher.ensure()
    assert learner.fetch().digest == learner.digests[3]


def test_a_successor_begins_with_a_whole_version_and_goes_on_with_patches(
    registry: Registry,
) -> None:
    first = Learner(registry)
    first.publish(3)
    own = first.fetch()
    registry.fence(2)
    second = Learner(registry, incarnation=2)
    second.publish(1)
    second.content[0] ^= 1  # another history from here on
    second.publish(2)
    assert second.kinds() == {0: "full", 1: "patch", 2: "patch"}
    got = fetch(registry, second.store, known_incarnation=2, own=own)
    assert (got.digest, got.incarnation) == (second.digests[2], 2)


def test_weights_of_32_bits_are_never_patched_and_that_is_said_once(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    learner = Learner(registry)
    content = np.zeros(100, np.float32)
    with caplog.at_level(logging.INFO):
        for version in range(3):
            tensors = (Tensor("w", "F32", (100,), memoryview(content).cast("B")),)
            learner.publisher.publish(version, version, tensors, digest(tensors))
    assert set(learner.kinds().values()) == {"full"}
    assert caplog.text.count('weights_dtype = "bf16"') == 1


def test_a_step_that_changes_much_is_published_whole(registry: Registry) -> None:
    learner = Learner(registry)
    learner.publish(2)
    learner.content = np.random.default_rng(1).integers(0, 2**16, 3000, np.uint16)
    learner.publish()
    assert registry.manifest(2).kind == "full"
