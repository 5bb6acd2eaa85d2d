"""What the registry promises: numbers rise, zombies are refused, waiting ends."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import redis

from common.errors import ConfigError, DeadlineError, WeightsError
from common.redis_server import RedisServer
from common.softstate import SWEPT
from common.versions import Blob, Entry, Manifest, Registry, Stamp, Tensor, digest


@pytest.fixture
def registry(redis_url: str) -> Iterator[Registry]:
    made = Registry(redis_url, "run")
    yield made
    made.close()


def made(version: int, content: str = "", incarnation: int = 1) -> Manifest:
    content = content or f"d{version}"
    return Manifest(
        version=version,
        step=version,
        digest=content,
        dtype="F32",
        nbytes=4,
        tensors=(Entry(name="w", dtype="F32", shape=(1,), offset=0, nbytes=4),),
        blobs=(Blob(key=f"{version}-{content}-0", nbytes=4),),
        incarnation=incarnation,
    )


def tensor(name: str, data: bytes, dtype: str = "U8", shape: tuple[int, ...] = ()) -> Tensor:
    return Tensor(name, dtype, shape or (len(data),), memoryview(data))


def test_a_manifest_comes_back_as_published_and_latest_follows(registry: Registry) -> None:
    assert registry.latest() is None
    for version in range(3):
        registry.publish(made(version))
        assert registry.latest() == version
        assert registry.manifest(version) == made(version)
    assert registry.stamp() == Stamp(2, 1, "d2")
    assert registry.versions() == [0, 1, 2]


def test_the_same_version_and_digest_again_changes_nothing(registry: Registry) -> None:
    for version in (0, 1, 0):
        registry.publish(made(version))
    assert registry.stamp() == Stamp(1, 1, "d1")


def test_a_learner_neither_goes_back_nor_changes_what_a_number_means(registry: Registry) -> None:
    registry.publish(made(5))
    with pytest.raises(WeightsError, match="go back behind version 5"):
        registry.publish(made(4))
    with pytest.raises(WeightsError, match="exists with digest d5"):
        registry.publish(made(5, "other"))
    assert registry.stamp() == Stamp(5, 1, "d5")


def test_a_learner_behind_the_fence_publishes_nothing(registry: Registry) -> None:
    registry.publish(made(1))
    registry.fence(2)
    with pytest.raises(WeightsError, match="incarnation 2 has taken over"):
        registry.publish(made(2))
    with pytest.raises(WeightsError, match="incarnation 2 has taken over"):
        registry.fence(1)
    assert registry.versions() == [1]
    registry.fence(2)


def test_publishing_raises_the_fence_that_an_empty_redis_lost(registry: Registry) -> None:
    registry.publish(made(7, incarnation=3))
    with pytest.raises(WeightsError, match="taken over"):
        registry.publish(made(8, incarnation=2))


def test_a_newer_learner_may_replace_what_its_predecessor_published(registry: Registry) -> None:
    for version in range(4):
        registry.publish(made(version))
    registry.publish(made(1, incarnation=2))  # the same bits: nobody has to fetch again
    assert registry.stamp() == Stamp(3, 1, "d3")
    assert registry.manifest(1).incarnation == 2
    registry.publish(made(2, "other", incarnation=2))
    assert registry.stamp() == Stamp(2, 2, "other")
    assert registry.versions() == [0, 1, 2]
    registry.publish(made(3, incarnation=2))
    assert registry.stamp() == Stamp(3, 2, "d3")


def test_a_missing_or_unreadable_manifest_is_one_clear_error(registry: Registry) -> None:
    with pytest.raises(WeightsError, match="version 9 has no manifest"):
        registry.manifest(9)
    flipped = msgspec.msgpack.encode(made(9)).replace(b"d9", b"\xff9")  # no text any more
    deep = b"\x81\xa1x" + b"\x91" * 8_000 + b"\xc0"
    for damaged in (b"\xc1", flipped, deep):
        registry.client.hset(registry.key("manifests"), "9", damaged)
        with pytest.raises(WeightsError, match="version 9 is unreadable"):
            registry.manifest(9)
        assert registry.manifests() == []


def test_a_hint_wakes_whoever_waits_and_its_absence_costs_only_the_timeout(
    registry: Registry,
) -> None:
    assert registry.wait_hint(0.05) is False  # subscribed from here on
    woken: list[bool] = []
    waiter = threading.Thread(target=lambda: woken.append(registry.wait_hint(20)))
    waiter.start()
    registry.publish(made(0))
    waiter.join(10)
    assert woken == [True]


def test_runs_in_one_redis_do_not_see_each_other(registry: Registry, redis_url: str) -> None:
    registry.publish(made(3))
    other = Registry(redis_url, "other")
    assert other.latest() is None
    other.close()


def test_a_redis_that_is_away_ends_every_wait_and_hides_its_password(free_port: int) -> None:
    away = Registry(f"redis://:secret@127.0.0.1:{free_port}/0", "run", timeout_s=0.3)
    calls = (away.latest, away.versions, lambda: away.fence(1), lambda: away.wait_hint(5))
    for call in calls:
        with pytest.raises(DeadlineError, match=f"127.0.0.1:{free_port}") as caught:
            call()
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)
    assert away.live("learner", "{}") is False
    with pytest.raises(ConfigError, match="redis://"):
        Registry("http://x", "run")


def test_a_redis_that_hangs_ends_every_wait_too(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    registry = Registry(server.url, "run", timeout_s=0.3)
    registry.publish(made(0))
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        with pytest.raises(DeadlineError, match=r"within 0\.3 s"):
            registry.latest()
        assert registry.live("learner", "{}") is False
        assert registry.live("learner", "{}") is False  # left alone by now
        assert time.monotonic() - began < 30
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert registry.latest() == 0
    registry.close()
    server.stop()


def test_silence_is_waited_for_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        registry = Registry(f"redis://127.0.0.1:{mute.getsockname()[1]}", "run", timeout_s=1.0)
        with pytest.raises(DeadlineError, match="did not answer within 1 s"):
            registry.latest()
        registry.close()
        asked = 0
        mute.settimeout(0.0)
        with suppress(BlockingIOError):
            while True:
                mute.accept()[0].close()
                asked += 1
    assert asked == 1


def test_who_lives_is_known_until_it_leaves_or_falls_silent(registry: Registry) -> None:
    assert registry.living() == {}
    registry.live("learner", '{"step": 1}')
    registry.live("actor:a", b"{}", ttl_s=30)
    registry.live("actor:b", "{}", ttl_s=0.001)
    wait_until_gone(registry.client, registry.key("live:actor:b"))
    assert registry.living() == {"learner": b'{"step": 1}', "actor:a": b"{}"}
    registry.leave("actor:a")
    assert registry.living() == {"learner": b'{"step": 1}'}


def test_names_of_the_dead_are_dropped_by_whoever_says_that_it_lives(registry: Registry) -> None:
    dead = [f"actor:{n}" for n in range(100)]
    registry.client.sadd(registry.key("live"), *dead)  # their keys have expired
    registry.live("actor:a", b"{}", ttl_s=60)
    assert registry.client.scard(registry.key("live")) >= 101 - SWEPT, "bounded work each time"
    for _ in range(200):  # the learner does so twice a second
        registry.live("learner", "{}", ttl_s=60)
    assert registry.client.smembers(registry.key("live")) == {b"learner", b"actor:a"}


def wait_until_gone(client: "redis.Redis", key: str) -> None:
    while client.exists(key):
        pass


def test_the_digest_sees_names_dtypes_shapes_and_bytes_but_not_the_order() -> None:
    a, b = tensor("a", b"12345678"), tensor("b", b"87654321")
    same = digest((a, b))
    assert digest((b, a)) == same
    assert len(same) == 32
    others = [
        (a, tensor("b", b"87654320")),
        (a, tensor("c", b"87654321")),
        (a, tensor("b", b"87654321", dtype="I8")),
        (a, tensor("b", b"87654321", shape=(2, 4))),
        (tensor("a", b"1234567"), tensor("b", b"887654321")),
        (a,),
    ]
    assert len({same, *map(digest, others)}) == 1 + len(others)
