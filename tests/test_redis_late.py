"""A learner that cannot publish says so, goes on with what it can do, and publishes when it can."""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import WeightsError
from common.failpoints import Failpoint
from common.pull import fetch
from common.redis_server import RedisServer
from common.status import Status
from common.status import read as read_status
from common.stores import FileStore
from common.versions import Registry, digest
from learner.publish import Publisher
from tests import runs
from tests.conftest import Start
from tests.test_launch import learner
from tests.test_publish import publish, weights


@pytest.fixture
def late(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis whose address is known and that does not run yet."""
    server = RedisServer(tmp_path)
    server.choose_port()
    yield server
    server.stop()


@pytest.fixture
def registry(redis_url: str) -> Iterator[Registry]:
    made = Registry(redis_url, "run")
    yield made
    made.close()


def status_with(warning: str, folder: Path, within_s: float = 60.0) -> Status:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        status = read_status(folder) if folder.exists() else None
        if status is not None and any(warning in said for said in status.warnings):
            return status
        time.sleep(0.05)  # a file that another process replaces: nothing to await
    raise AssertionError(f"no {warning!r} in the status within {within_s} s")


@pytest.mark.timeout(200)
def test_a_learner_that_starts_before_its_redis_waits_visibly_and_trains_when_it_comes(
    tmp_path: Path, late: RedisServer, free_port: int, processes: Start
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    where = {"run.redis": late.url, "run.learner": f"tcp://127.0.0.1:{free_port}"}
    with log.open("w") as out:
        process = processes("-P", "-m", *learner(folder, where, steps=2), stderr=out)
    first = status_with("version 0 is not published yet", folder)
    assert status_with("version 0 is not published yet", folder).at >= first.at
    assert process.poll() is None
    late.start()
    actor = ("-m", "actor", "scripted", "--name", "bob", "--learner", where["run.learner"])
    processes(*actor, "--redis", late.url, stderr=subprocess.DEVNULL)
    assert process.wait(100) == 0, log.read_text()[-2000:]
    assert log.read_text().count("going on; version 0 is published when that is over") == 1
    status = read_status(folder)
    assert status is not None
    assert not [said for said in status.warnings if "published" in said]
    assert runs.promises_kept(folder)


def test_a_store_that_refuses_a_version_later_does_not_end_the_learner(
    registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Fillable(FileStore):
        full = False

        def put(self, key: str, data: object) -> None:
            if self.full:
                raise WeightsError("blob x could not be written: No space left on device")
            super().put(key, data)  # type: ignore[arg-type]

    store = Fillable(tmp_path)
    it = Publisher(registry, store, 1, 3, Failpoint())
    publish(it, 0)
    store.full = True
    with caplog.at_level(logging.ERROR):
        for version in (1, 2):
            tensors = weights(version)
            assert not it.offer(version, version, tensors, digest(tensors))
    assert len(caplog.records) == 1
    assert "No space left" in it.trouble
    store.full = False
    it.ensure()
    assert fetch(registry, store).digest == digest(weights(2))
    assert it.trouble == ""


def test_a_first_version_that_is_refused_ends_the_learner(
    registry: Registry, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    it = Publisher(registry, FileStore(tmp_path / "file"), 1, 3, Failpoint())
    tensors = weights(0)
    with pytest.raises(WeightsError, match="could not be written"):
        it.offer(0, 0, tensors, digest(tensors))
