"""What the learner's own store promises: its blobs, to all who may have them, through cut
connections and new lives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from common import keys
from common.blobs import CHUNK, ENCODER, Ask, Part, PulledStore, address, bind_address
from common.channel import Keys, connect_dealer
from common.config import RunConfig
from common.errors import ConfigError, DeadlineError, WeightsError
from common.failpoints import Failpoint
from common.pull import fetch
from common.receive import Unfinished
from common.stores import open_source
from common.versions import Registry, Tensor, digest
from learner.blobs import ServedStore, open_blobs
from learner.publish import Publisher
from tests import runs
from tests.cut import Cut

ANY = "tcp://127.0.0.1:0"
SIZE = 5 * CHUNK + 17


@pytest.fixture
def registry(redis_url: str) -> Iterator[Registry]:
    made = Registry(redis_url, "run")
    yield made
    made.close()


@pytest.fixture
def closing() -> Iterator[Callable[[object], None]]:
    """Closes what it was given, last one first."""
    held: list[object] = []
    yield held.append
    for it in reversed(held):
        it.close()  # type: ignore[attr-defined]


@pytest.fixture
def served(registry: Registry, closing: Callable[[object], None]) -> ServedStore:
    """With a blob of several chunks, in odd pieces."""
    store = ServedStore(registry, 1, ANY)
    closing(store)
    store.put("big", in_pieces(content()))
    return store


def content(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, SIZE, np.uint8)


def in_pieces(whole: np.ndarray) -> list[memoryview]:
    cuts = [0, 1, 1, 700_000, 700_064, 3 * CHUNK, SIZE]
    return [whole[a:b].data for a, b in pairwise(cuts)]


def pulled(store: PulledStore, key: str = "big", size: int = SIZE) -> np.ndarray:
    into = np.zeros(size, np.uint8)
    store.get(key, into.data)
    return into


def test_a_blob_arrives_as_it_was_put_whatever_pieces_it_lies_in(
    registry: Registry, served: ServedStore, closing: Callable[[object], None]
) -> None:
    store = PulledStore(registry, "tcp://localhost:1")
    closing(store)
    served.put("empty", [])
    served.put("small", [memoryview(b"abc")])
    assert np.array_equal(pulled(store), content())
    assert bytes(pulled(store, "small", 3)) == b"abc"
    assert pulled(store, "empty", 0).size == 0
    assert store.reconnects == 0
    own = np.zeros(SIZE, np.uint8)
    served.get("big", own.data)
    assert np.array_equal(own, content())


def test_a_missing_blob_and_one_of_another_size_are_named(
    registry: Registry, served: ServedStore, closing: Callable[[object], None]
) -> None:
    store = PulledStore(registry, served.endpoint)
    closing(store)
    with pytest.raises(WeightsError, match="blob gone is missing"):
        pulled(store, "gone")
    with pytest.raises(WeightsError, match=f"blob big has {SIZE} bytes, its manifest says 5"):
        pulled(store, "big", 5)
    served.delete(["big"])
    assert served.list() == []
    with pytest.raises(WeightsError, match="blob big is missing"):
        pulled(store)


def test_eight_actors_pull_at_once(
    registry: Registry, served: ServedStore, closing: Callable[[object], None]
) -> None:
    stores = [PulledStore(registry, served.endpoint) for _ in range(8)]
    for store in stores:
        closing(store)
    with ThreadPoolExecutor(8) as threads:
        everything = list(threads.map(pulled, stores))
    assert all(np.array_equal(one, content()) for one in everything)


def test_a_pull_whose_connection_is_cut_goes_on_where_it_was(
    registry: Registry, served: ServedStore, closing: Callable[[object], None]
) -> None:
    proxy = Cut(served.endpoint, limit=2 * CHUNK + CHUNK // 2, times=2)
    closing(proxy)
    registry.serve(1, proxy.endpoint)
    store = PulledStore(registry, served.endpoint, silence_s=0.2, patience_s=30)
    closing(store)
    assert np.array_equal(pulled(store), content())
    assert proxy.times == 0
    assert store.reconnects >= 1


def test_a_pull_that_was_given_up_goes_on_at_the_byte_that_it_had_reached(
    registry: Registry, served: ServedStore, closing: Callable[[object], None]
) -> None:
    tensors = (Tensor("w", "U8", (SIZE,), content().data),)
    Publisher(registry, served, 1, 2, Failpoint()).publish(0, 0, tensors, digest(tensors))
    proxy = Cut(served.endpoint, limit=3 * CHUNK, times=1)
    closing(proxy)
    registry.serve(1, proxy.endpoint)
    store = PulledStore(registry, served.endpoint, silence_s=1.0, patience_s=0.9)
    closing(store)
    left = Unfinished()
    with pytest.raises(DeadlineError, match="nothing of blob"):
        fetch(registry, store, unfinished=left)
    (room,) = left._rooms.values()
    there = sum(room.there.values())
    assert there >= 2 * CHUNK
    before = proxy.passed
    assert fetch(registry, store, unfinished=left).digest == digest(tensors)
    assert proxy.passed - before < SIZE - there + CHUNK // 2


def test_a_pull_outlives_a_learner_that_comes_back_on_another_port(
    registry: Registry, served: ServedStore, closing: Callable[[object], None]
) -> None:
    proxy = Cut(served.endpoint, limit=CHUNK, times=1_000_000)  # nobody gets past it
    registry.serve(1, proxy.endpoint)
    store = PulledStore(registry, served.endpoint, silence_s=0.1, patience_s=30)
    closing(store)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(pulled, store)
        while store.reconnects < 1:
            assert not coming.done()
            time.sleep(0.01)  # a counter has no event
        proxy.close()
        successor = ServedStore(registry, 2, ANY)
        closing(successor)
        successor.put("big", in_pieces(content()))
        assert np.array_equal(coming.result(30), content())


def test_a_learner_that_went_silent_is_given_up_with_what_is_there(
    registry: Registry, closing: Callable[[object], None], free_port: int
) -> None:
    store = PulledStore(registry, ANY, silence_s=0.05, patience_s=0.2)
    closing(store)
    with pytest.raises(WeightsError, match="no learner serves blobs"):
        pulled(store)
    for junk in (b"\xff", b"1 ", b"1 tcp://127.0.0.1", b"1 nowhere:7"):  # memory may be damaged
        registry.client.set(registry.key("served"), junk)
        with pytest.raises(WeightsError, match="no learner serves blobs"):
            pulled(store)
    registry.serve(1, f"tcp://127.0.0.1:{free_port}")
    with pytest.raises(DeadlineError, match=rf"nothing of blob big for 0.2 s; 0 of {SIZE} bytes"):
        pulled(store)


def test_a_pull_ends_when_its_store_is_closed(registry: Registry, free_port: int) -> None:
    registry.serve(1, f"tcp://127.0.0.1:{free_port}")
    store = PulledStore(registry, ANY)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(pulled, store)
        store.close()
        with pytest.raises(WeightsError, match="blob big"):
            coming.result(10)


def test_a_store_may_be_closed_while_readers_connect(registry: Registry, free_port: int) -> None:
    registry.serve(1, f"tcp://127.0.0.1:{free_port}")
    with ThreadPoolExecutor(4) as threads:
        for _ in range(20):
            store = PulledStore(registry, ANY, silence_s=0.001)  # connects again and again
            coming = [threads.submit(pulled, store) for _ in range(4)]
            store.close()
            for each in coming:
                with pytest.raises(WeightsError, match="blob big"):
                    each.result(10)
    store.close()


def test_frames_that_are_no_asks_are_counted_and_the_others_answered(
    registry: Registry, served: ServedStore, closing: Callable[[object], None]
) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = connect_dealer(context, served.endpoint)
    beyond = ENCODER.encode(Ask(key="big", at=0, size=CHUNK + 1))
    below = ENCODER.encode(Ask(key="big", at=-1, size=1))
    deep = b"\x81\xa1x" + b"\x91" * 8_000 + b"\xc0"  # lists in lists, in a field that nobody knows
    bad = [b"", b"\xc1", msgspec.msgpack.encode({"key": 7}), beyond, below, deep]
    for frame in bad:
        dealer.send(frame)
    dealer.send_multipart([b"two", b"frames"])
    dealer.send(ENCODER.encode(Ask(key="big", at=1, size=2)))
    assert dealer.poll(30_000)
    head, body = dealer.recv_multipart()
    assert msgspec.msgpack.decode(head, type=Part) == Part(key="big", at=1, total=SIZE)
    assert body == content()[1:3].tobytes()
    assert served.refused == {"malformed": len(bad) + 1}
    dealer.close(0)
    context.term()
    store = PulledStore(registry, served.endpoint)
    closing(store)
    assert np.array_equal(pulled(store), content())


def test_one_who_asks_and_does_not_read_costs_the_others_nothing(
    registry: Registry, served: ServedStore, closing: Callable[[object], None]
) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = connect_dealer(context, served.endpoint, max_bytes=CHUNK)
    ask = ENCODER.encode(Ask(key="big", at=0, size=CHUNK))
    for _ in range(400):
        dealer.send(ask)
    store = PulledStore(registry, served.endpoint)
    closing(store)
    assert np.array_equal(pulled(store), content())
    dealer.close(0)
    context.term()


# -- who may ---------------------------------------------------------------------------------------


def test_off_loopback_there_is_no_store_without_keys(registry: Registry) -> None:
    run = RunConfig(store="learner", learner="tcp://0.0.0.0:5555")
    with pytest.raises(ConfigError, match="isentrope keys"):
        open_blobs(run, registry, 1)
    registry.serve(1, "tcp://0.0.0.0:4444")
    store = open_source(RunConfig(store="learner", learner="tcp://192.0.2.1:5555"), registry)
    with pytest.raises(ConfigError, match="isentrope keys"):
        store.get("big", memoryview(bytearray(1)))
    store.close()


def test_whoever_holds_a_listed_key_is_served_and_a_stranger_hears_nothing(
    registry: Registry, tmp_path: Path, closing: Callable[[object], None]
) -> None:
    theirs, mine = keys.make(tmp_path)
    run = RunConfig(store="learner", learner="tcp://0.0.0.0:5555", keys=str(theirs))
    served = open_blobs(run, registry, 1)
    closing(served)
    served.put("big", in_pieces(content()))
    actor = RunConfig(store="learner", learner="tcp://127.0.0.1:5555", keys=str(mine))
    store = open_source(actor, registry)
    closing(store)
    into = np.zeros(SIZE, np.uint8)
    store.get("big", into.data)
    assert np.array_equal(into, content())

    listed = keys.read(str(mine))
    assert listed is not None
    stranger = Keys(*zmq.curve_keypair(), peers=listed.peers)
    for wrong in (stranger, None):
        outside = PulledStore(registry, actor.learner, wrong, silence_s=0.2, patience_s=0.4)
        closing(outside)
        with pytest.raises(DeadlineError, match="0 of"):
            pulled(outside)


def test_a_learner_with_another_key_is_not_believed(
    registry: Registry, closing: Callable[[object], None]
) -> None:
    server, impostor = zmq.curve_keypair(), zmq.curve_keypair()
    actor = Keys(*zmq.curve_keypair(), peers=(server[0],))
    served = ServedStore(registry, 1, ANY, Keys(*impostor, peers=(actor.public,)))
    closing(served)
    served.put("big", in_pieces(content()))
    store = PulledStore(registry, served.endpoint, actor, silence_s=0.2, patience_s=0.4)
    closing(store)
    with pytest.raises(DeadlineError, match="0 of"):
        pulled(store)


# -- where it is -----------------------------------------------------------------------------------


def test_blobs_are_served_beside_the_main_channel_and_found_at_the_host_that_an_actor_knows() -> (
    None
):
    assert bind_address("tcp://0.0.0.0:5555", "learner") == "tcp://0.0.0.0:0"
    assert bind_address("tcp://0.0.0.0:5555", "learner:5556") == "tcp://0.0.0.0:5556"
    assert bind_address("ipc:///run/x", "learner") == "ipc:///run/x.blobs"
    assert address("tcp://gpu-1:5555", "tcp://0.0.0.0:4444") == "tcp://gpu-1:4444"
    assert address("ipc:///run/x", "ipc:///run/x.blobs") == "ipc:///run/x.blobs"


def test_a_zombie_cannot_say_where_blobs_are(
    registry: Registry, closing: Callable[[object], None]
) -> None:
    registry.fence(2)
    zombie = ServedStore(registry, 1, ANY)
    closing(zombie)
    with pytest.raises(WeightsError, match="behind the fence"):
        zombie.put("big", in_pieces(content()))


def test_versions_are_published_fetched_retired_and_announced_again(
    registry: Registry, closing: Callable[[object], None]
) -> None:
    served = ServedStore(registry, 1, ANY)
    closing(served)
    store = PulledStore(registry, served.endpoint)
    closing(store)
    publisher = Publisher(registry, served, 1, 2, Failpoint())
    for version in range(5):
        tensors = (Tensor("w", "U8", (SIZE,), content(version).data),)
        publisher.publish(version, version, tensors, digest(tensors))
        assert fetch(registry, store).digest == digest(tensors)
    assert {key.split("-")[0] for key in served.list()} == {"0", "3", "4"}
    registry.client.flushall()  # Redis holds no byte of them, but it says where they are
    publisher._look_at = 0.0
    publisher.ensure()
    assert fetch(registry, store).digest == digest(tensors)


@pytest.mark.timeout(400)
def test_a_run_in_bf16_with_the_learner_s_store_keeps_all_promises(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = {"run__weights_dtype": "bf16", "run__store": "learner", "learner__lr": "1e-6"}
    done = runs.run(folder, learner__snapshot_every="3", **options)
    assert done["steps"] == 4
    assert runs.promises_kept(folder)
    said = (folder / "logs" / "learner.log").read_text()
    assert "serving blobs on tcp://127.0.0.1:" in said
    assert "version 2 is a patch of version 1" in said
    assert "version 3 is a patch" not in said
    served = (folder / "logs" / "actor-0.log").read_text()
    assert "serving version 4" in served
    assert "refused" not in served
