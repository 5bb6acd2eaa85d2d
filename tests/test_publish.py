"""What publishing promises: in order, retired in time, repaired when Redis forgets, fenced when
replaced.
"""

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import DeadlineError, WeightsError
from common.failpoints import Failpoint
from common.pull import fetch
from common.redis_server import RedisServer
from common.stores import Store, open_store
from common.versions import Registry, Tensor, digest
from learner.publish import Publisher


@pytest.fixture
def registry(redis_url: str) -> Iterator[Registry]:
    made = Registry(redis_url, "run")
    yield made
    made.close()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that the test may kill."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


def weights(seed: int) -> tuple[Tensor, ...]:
    array = np.random.default_rng(seed).standard_normal(500).astype(np.float32)
    return (Tensor("w", "F32", (500,), memoryview(array)),)


def publisher(registry: Registry, incarnation: int = 1, **options: Any) -> Publisher:
    store = open_store("redis", registry)
    return Publisher(registry, store, incarnation, 3, Failpoint(), **options)


def publish(to: Publisher, version: int) -> str:
    tensors = weights(version)
    to.publish(version, version, tensors, digest(tensors))
    return digest(tensors)


@pytest.fixture(params=["redis", "file"])
def store(request: pytest.FixtureRequest, registry: Registry, tmp_path: Path) -> Store:
    return open_store("redis" if request.param == "redis" else f"file:{tmp_path}", registry)


def test_the_newest_versions_and_base_0_stay_and_the_blobs_of_others_go(
    registry: Registry, store: Store
) -> None:
    it = Publisher(registry, store, 1, 2, Failpoint())
    for version in range(6):
        publish(it, version)
    assert registry.versions() == [0, 4, 5]
    assert [key.split("-")[0] for key in store.list()] == ["0", "4", "5"]
    for version in (0, 4, 5):
        assert fetch(registry, store, version).digest == digest(weights(version))


def test_blobs_that_a_crash_left_without_a_manifest_are_swept(
    registry: Registry, store: Store
) -> None:
    store.put("3-orphan-0", [memoryview(b"x")])
    publish(Publisher(registry, store, 1, 2, Failpoint()), 4)
    assert [key.split("-")[0] for key in store.list()] == ["4"]


DIES = """
import sys
import numpy as np
from common.failpoints import Failpoint
from common.stores import open_store
from common.versions import Registry, Tensor, digest
from learner.publish import Publisher

registry = Registry(sys.argv[1], "run")
it = Publisher(registry, open_store("redis", registry), 1, 3, Failpoint.parse(sys.argv[2]))
for version in range(9):
    array = np.random.default_rng(version).standard_normal(500).astype(np.float32)
    tensors = (Tensor("w", "F32", (500,), memoryview(array)),)
    it.publish(version, version, tensors, digest(tensors))
"""


@pytest.mark.parametrize(("failpoint", "latest"), [("after_blobs:3", 1), ("after_manifest:3", 2)])
def test_wherever_a_learner_dies_the_latest_version_can_be_fetched_and_the_successor_goes_on(
    registry: Registry, redis_url: str, failpoint: str, latest: int
) -> None:
    done = subprocess.run([sys.executable, "-c", DIES, redis_url, failpoint])
    assert done.returncode == -9
    store = open_store("redis", registry)
    assert fetch(registry, store).version == latest
    registry.fence(2)
    successor = publisher(registry, incarnation=2)
    publish(successor, 2)
    publish(successor, 3)
    got = fetch(registry, store, known_incarnation=2)
    assert (got.version, got.digest) == (3, digest(weights(3)))
    assert len(store.list()) == len(registry.versions())


def test_a_replaced_learner_is_refused_both_when_it_publishes_and_when_it_looks(
    registry: Registry,
) -> None:
    old, new = publisher(registry), publisher(registry, incarnation=2)
    publish(old, 0)
    publish(new, 1)
    with pytest.raises(WeightsError, match="taken over"):
        publish(old, 1)
    with pytest.raises(WeightsError, match="taken over"):
        old.ensure()
    assert fetch(registry, open_store("redis", registry)).version == 1


def test_what_redis_forgot_is_published_again(registry: Registry) -> None:
    it = publisher(registry)
    it.ensure()  # nothing published yet: nothing to do
    content = publish(it, 5)
    registry.client.flushall()
    it.ensure()
    assert fetch(registry, it.store, 5).digest == content


def test_a_blob_that_redis_evicted_is_published_again(registry: Registry) -> None:
    it = publisher(registry)
    content = publish(it, 5)
    it.store.delete(it.store.list())
    it.ensure()
    assert fetch(registry, it.store).digest == content


def test_a_version_that_leans_on_a_base_brings_the_base_back_too(registry: Registry) -> None:
    it = publisher(registry)
    base = publish(it, 0)
    for version in (1, 2):
        tensors = weights(version)
        it.publish(version, version, tensors, digest(tensors), base=0)
    registry.client.flushall()
    it.ensure()
    assert registry.versions() == [0, 2]
    assert fetch(registry, it.store, 0).digest == base
    assert registry.manifest(2).base == 0


def test_a_successor_with_the_same_bits_leaves_the_newer_version_in_place(
    registry: Registry,
) -> None:
    first = publisher(registry)
    for version in range(4):
        publish(first, version)
    second = publisher(registry, incarnation=2)
    publish(second, 2)
    second.ensure()
    assert registry.latest() == 3
    assert registry.manifest(2).incarnation == 2


def test_a_redis_that_dies_and_comes_back_empty_costs_time_but_no_version(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(own_redis.url, "run", timeout_s=2)
    it = publisher(registry, patience_s=60)
    publish(it, 0)
    assert own_redis.process is not None
    own_redis.process.kill()
    own_redis.process.wait()
    it.ensure()  # away: a line in the log, no more
    assert "did not answer" in caplog.text
    published = threading.Thread(target=publish, args=(it, 1))
    with caplog.at_level(logging.WARNING):
        published.start()
        own_redis.start()
        published.join(30)
    assert fetch(registry, it.store).version == 1
    registry.close()


def test_a_redis_that_stays_away_is_given_up_with_the_number_of_attempts(free_port: int) -> None:
    registry = Registry(f"redis://127.0.0.1:{free_port}", "run", timeout_s=0.2)
    failures: list[None] = []
    it = publisher(registry, patience_s=0.3, meanwhile=lambda: failures.append(None))
    with pytest.raises(DeadlineError, match=r"could not publish version 0 in \d+ attempts"):
        publish(it, 0)
    assert failures, "the learner's other ranks hear nothing from one who waits for Redis"
    registry.close()


def test_a_version_that_redis_was_away_for_is_published_when_it_is_back(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(own_redis.url, "run", timeout_s=2)
    it = publisher(registry, patience_s=0.1)
    publish(it, 0)
    assert own_redis.process is not None
    own_redis.process.kill()
    own_redis.process.wait()
    for version in (1, 2):
        tensors = weights(version)
        assert not it.offer(version, version, tensors, digest(tensors))
    assert caplog.text.count("going on; version 1 is published when that is over") == 1
    assert "version 2 is not published yet: could not publish version 2" in it.trouble
    own_redis.start()
    it.ensure()
    assert fetch(registry, it.store).digest == digest(weights(2))
    assert it.trouble == ""
    publish(it, 3)
    assert registry.latest() == 3
    registry.close()
