"""What a fetch promises: all the bytes that the manifest says, or an error that says why."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from common.blobs import nothing
from common.errors import ConfigError, DeadlineError, WeightsError
from common.failpoints import Failpoint
from common.pull import ALIGNMENT, fetch
from common.receive import Unfinished
from common.stores import FileStore, RedisStore, Store, open_store
from common.versions import Registry, Tensor, digest
from learner.publish import Publisher


@pytest.fixture
def registry(redis_url: str) -> Iterator[Registry]:
    made = Registry(redis_url, "run")
    yield made
    made.close()


@pytest.fixture(params=["redis", "file"])
def store(request: pytest.FixtureRequest, registry: Registry, tmp_path: Path) -> Store:
    spec = "redis" if request.param == "redis" else f"file:{tmp_path}"
    made = open_store(spec, registry)
    made.blob_bytes = 4096  # many blobs from little data
    return made


def some_tensors(
    seed: int = 0, sizes: tuple[int, ...] = (1, 0, 7, 1000, 3000)
) -> tuple[Tensor, ...]:
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((2, size)).astype(np.float32) for size in sizes]
    return tuple(
        Tensor(f"layer.{i}", "F32", array.shape, memoryview(array))
        for i, array in enumerate(arrays)
    )


def publish(registry: Registry, store: Store, tensors: tuple[Tensor, ...], version: int = 0) -> str:
    content = digest(tensors)
    Publisher(registry, store, 1, 3, Failpoint()).publish(version, version, tensors, content)
    return content


def test_what_was_published_is_fetched_bit_for_bit_as_aligned_views(
    registry: Registry, store: Store
) -> None:
    tensors = some_tensors()
    content = publish(registry, store, tensors, 4)
    assert len(store.list()) > 5
    got = fetch(registry, store)
    assert (got.version, got.digest, got.incarnation) == (4, content, 1)
    for ours, theirs in zip(tensors, got.tensors, strict=True):
        assert ours[:3] == theirs[:3]
        assert bytes(theirs.data) == ours.data.tobytes()
        where = np.frombuffer(theirs.data, np.uint8).ctypes.data if theirs.data.nbytes else 0
        first = np.frombuffer(got.tensors[0].data, np.uint8).ctypes.data
        assert where == 0 or (where - first) % ALIGNMENT == 0


def test_a_certain_version_is_fetched_while_it_is_kept(registry: Registry, store: Store) -> None:
    contents = [publish(registry, store, some_tensors(v), v) for v in range(3)]
    assert fetch(registry, store, 1).digest == contents[1]
    with pytest.raises(WeightsError, match="version 7 has no manifest"):
        fetch(registry, store, 7)


def test_before_the_first_version_there_is_nothing_to_fetch(
    registry: Registry, store: Store
) -> None:
    with pytest.raises(WeightsError, match="no version is published"):
        fetch(registry, store)


def test_a_missing_blob_is_named(registry: Registry, store: Store) -> None:
    publish(registry, store, some_tensors())
    victim = store.list()[2]
    store.delete([victim])
    assert store.missing([*store.list(), victim]) == [victim]
    with pytest.raises(WeightsError, match=f"blob {victim} is missing"):
        fetch(registry, store)


def test_a_short_blob_is_named_with_both_sizes(registry: Registry, store: Store) -> None:
    publish(registry, store, some_tensors())
    victim = store.list()[1]
    store.put(victim, [memoryview(b"short")])
    with pytest.raises(WeightsError, match=f"blob {victim} has 5 bytes, its manifest says 4096"):
        fetch(registry, store)


def test_one_flipped_bit_is_refused_before_anything_is_returned(
    registry: Registry, store: Store
) -> None:
    publish(registry, store, some_tensors())
    victim = store.list()[1]
    blob = bytearray(4096)
    store.get(victim, memoryview(blob))
    blob[100] ^= 1
    store.put(victim, [memoryview(blob)])
    with pytest.raises(WeightsError, match="digest"):
        fetch(registry, store)


def test_a_version_of_a_learner_that_was_replaced_is_refused(
    registry: Registry, store: Store
) -> None:
    publish(registry, store, some_tensors())
    with pytest.raises(WeightsError, match="incarnation 1; 2 has taken over"):
        fetch(registry, store, known_incarnation=2)


@pytest.mark.parametrize(
    "change", [{"nbytes": 1 << 20}, {"kind": "patch", "base": 0}, {"blobs": ()}]
)
def test_a_manifest_that_contradicts_itself_is_refused(
    registry: Registry, store: Store, change: dict[str, object]
) -> None:
    publish(registry, store, some_tensors())
    manifest = msgspec.structs.replace(registry.manifest(0), **change)
    registry.client.hset(registry.key("manifests"), "0", msgspec.msgpack.encode(manifest))
    with pytest.raises(WeightsError, match="version 0"):
        fetch(registry, store)


def test_a_fetch_without_a_byte_for_too_long_says_how_far_it_came(
    registry: Registry, tmp_path: Path
) -> None:
    store = FileStore(tmp_path)
    publish(registry, store, some_tensors())
    pipe = tmp_path / f"{store.list()[0]}.blob"
    pipe.unlink()
    os.mkfifo(pipe)  # opens only when somebody writes
    began = time.monotonic()
    try:
        with pytest.raises(DeadlineError, match="0 of"):
            fetch(registry, store, silence_s=0.2)
        assert time.monotonic() - began < 30
    finally:
        os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))  # frees the thread that waits


class Trickling(FileStore):
    """Behind a network that is slow, but never silent."""

    def get(
        self, key: str, into: memoryview, note: Callable[[str, int], None] = nothing, at: int = 0
    ) -> None:
        for _ in range(40):
            time.sleep(0.02)  # the slowness itself: nothing is awaited
            note(key, at)
        super().get(key, into, note, at)


def test_a_slow_fetch_takes_its_time_while_bytes_come(registry: Registry, tmp_path: Path) -> None:
    store = Trickling(tmp_path)
    named = publish(registry, store, some_tensors())
    began = time.monotonic()
    assert fetch(registry, store, silence_s=0.5).digest == named
    assert time.monotonic() - began > 0.5


class Endless(FileStore):
    """The first blob is damaged, and the others never end."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ended = threading.Event()

    def get(
        self, key: str, into: memoryview, note: Callable[[str, int], None] = nothing, at: int = 0
    ) -> None:
        if key.endswith("-0"):
            raise WeightsError("damaged")
        try:
            while True:
                note(key, 1)
        finally:
            self.ended.set()


def test_a_reader_that_is_left_behind_ends(registry: Registry, tmp_path: Path) -> None:
    store = Endless(tmp_path)
    store.blob_bytes = 4096
    publish(registry, store, some_tensors())
    with pytest.raises(WeightsError, match="damaged"):
        fetch(registry, store)
    assert store.ended.wait(10)


class Breaking(FileStore):
    """Its link breaks in the middle of every blob, so often."""

    def __init__(self, folder: Path, breaks: int) -> None:
        super().__init__(folder)
        self.breaks, self.asked = breaks, list[tuple[str, int]]()

    def get(
        self, key: str, into: memoryview, note: Callable[[str, int], None] = nothing, at: int = 0
    ) -> None:
        self.asked.append((key[-1], at))
        if self.breaks <= 0:
            return super().get(key, into, note, at)
        whole = memoryview(bytearray(len(into)))
        super().get(key, whole)
        into[at : len(into) // 2] = whole[at : len(into) // 2]
        note(key, len(into) // 2)
        self.breaks -= 1
        raise DeadlineError("the link broke")


def test_a_fetch_that_broke_goes_on_at_the_bytes_that_it_had_reached(
    registry: Registry, tmp_path: Path
) -> None:
    store = Breaking(tmp_path, breaks=2)
    store.blob_bytes = 1 << 14
    named = publish(registry, store, some_tensors())  # two blobs
    left = Unfinished()
    while store.breaks > 0:
        with pytest.raises(DeadlineError, match="the link broke"):
            fetch(registry, store, unfinished=left)
    store.asked.clear()
    assert fetch(registry, store, unfinished=left).digest == named
    assert dict(store.asked)["0"] == (1 << 14) // 2
    store.asked.clear()
    assert fetch(registry, store, unfinished=left).digest == named
    assert dict(store.asked) == {"0": 0, "1": 0}, "what was fetched is its owner's, not the next's"


def test_bytes_kept_of_a_broken_fetch_that_are_wrong_are_refused_and_fetched_again(
    registry: Registry, tmp_path: Path
) -> None:
    store = Breaking(tmp_path, breaks=2)
    store.blob_bytes = 1 << 14
    named = publish(registry, store, some_tensors())
    left = Unfinished()
    with pytest.raises(DeadlineError):
        fetch(registry, store, unfinished=left)
    (room,) = left._rooms.values()
    room.data[5] ^= 1
    store.breaks = 0
    with pytest.raises(WeightsError, match="the content's digest is"):
        fetch(registry, store, unfinished=left)
    assert fetch(registry, store, unfinished=left).digest == named


def test_what_was_kept_of_a_version_goes_when_another_is_fetched(
    registry: Registry, tmp_path: Path
) -> None:
    store = Breaking(tmp_path, breaks=2)
    publish(registry, store, some_tensors())
    left = Unfinished()
    with pytest.raises(DeadlineError):
        fetch(registry, store, unfinished=left)
    store.breaks = 0
    named = publish(registry, store, some_tensors(1), version=1)
    assert fetch(registry, store, unfinished=left).digest == named
    assert not left._rooms


def test_a_file_store_leaves_nothing_half_written_under_a_blob_s_name(
    registry: Registry, tmp_path: Path
) -> None:
    store = open_store(f"file:{tmp_path}", registry)
    assert isinstance(store, FileStore)
    assert store.folder == tmp_path / "run"
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(WeightsError, match="could not be written"):
        store.put("0-d-0", [memoryview(b"x")])
    with pytest.raises(WeightsError, match="no name of a blob"):
        store.get("../run", memoryview(bytearray(1)))


def test_an_unknown_store_is_refused_with_the_two_there_are(registry: Registry) -> None:
    assert isinstance(open_store("redis", registry), RedisStore)
    for spec in ("s3:bucket", "file:", "rediss"):
        with pytest.raises(ConfigError, match="file:FOLDER"):
            open_store(spec, registry)
