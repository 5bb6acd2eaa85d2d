"""What is damaged where it lies is noticed, and mended by whoever has it right."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from common import keys
from common.config import RunConfig
from common.metrics import Metrics
from common.metrics import read as read_metrics
from common.pull import fetch
from common.recipe import digest
from common.records import Admit
from common.stores import open_store
from common.versions import Registry
from tests.counter import Counter
from tests.test_publish import publish, publisher

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

from chaos_parts import vandal
from chaos_parts.disk import Disk
from chaos_parts.faults import Faults
from chaos_parts.plan import Fault
from chaos_parts.stage import Stage


@pytest.fixture
def registry(redis_url: str) -> Iterator[Registry]:
    registry = Registry(redis_url, "run-1")
    yield registry
    registry.close()


@pytest.mark.parametrize("stamp", [*vandal.STAMPS, b"999999999999999999999 1 x", b"-1 0 x"])
def test_a_damaged_stamp_is_none_and_the_learner_writes_it_again(
    registry: Registry, stamp: bytes
) -> None:
    it = publisher(registry)
    named = publish(it, 3)
    registry.client.set(registry.key("latest"), stamp)
    assert registry.latest() in (None, 999999), "readers live"
    it.ensure()
    assert registry.stamp() == (3, 1, named)
    assert publish(it, 4)
    assert registry.latest() == 4


def test_a_successor_is_not_stopped_by_a_stamp_that_its_predecessor_never_wrote(
    registry: Registry,
) -> None:
    publish(publisher(registry), 3)
    registry.client.set(registry.key("latest"), b"999 1 beef")
    registry.client.set(registry.key("fence"), b"nonsense")
    registry.fence(2)
    publish(publisher(registry, 2), 3)
    assert registry.latest() == 3
    store = open_store("redis", registry)
    assert fetch(registry, store, 3, 2).version == 3


def test_metrics_of_a_full_disk_are_written_when_there_is_space(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk", 2)
    if not disk.fillable:
        pytest.skip("mounting is not permitted")
    try:
        metrics = Metrics(disk.folder)
        metrics.write(1, {"reward": 0.5})
        disk.fill()
        for step in range(2, 400):
            metrics.write(step, {"reward": 1.0 / step})
        assert len(read_metrics(disk.folder)) < 399
        disk.empty()
        metrics.write(400, {"reward": 0.0})
        metrics.close()
        assert [line["step"] for line in read_metrics(disk.folder)] == list(range(1, 401))
    finally:
        disk.close(keep=None)


def test_the_vandal_strikes_where_the_versions_lie(registry: Registry, redis_url: str) -> None:
    publish(publisher(registry), 1)
    command = [sys.executable, vandal.__file__, "blob", redis_url, "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."}
    )
    assert int(done.stdout) >= 1
    with pytest.raises(Exception, match="digest"):
        fetch(registry, open_store("redis", registry), 1, 1)


class Scene:
    """What a vandal needs of a stage: where things lie, and a host to be on."""

    store, disk_was_full = "redis", False
    endpoint, keys, recipe = "tcp://127.0.0.1:1", {"actor": "no such file"}, "tiny"

    def __init__(self, redis_url: str, logs: Path) -> None:
        self.redis_url, self.logs, self.ground = redis_url, logs, self

    def enter(self, _host: str, words: list[str]) -> list[str]:
        return ["env", f"PYTHONPATH={Path(__file__).resolve().parents[1]}", *words]


def test_the_vandal_says_how_many_of_its_messages_were_refused_and_none_of_its_lies_enters(
    tmp_path: Path,
) -> None:
    """At the learner's own counter, with keys; the recipe's digest is what gets the liar in."""
    made = keys.make(tmp_path / "keys")
    recipe = tmp_path / "r.toml"
    recipe.write_text("[run]\n")
    digest_of = digest(RunConfig())
    counter = Counter(tmp_path / "journal", keys=str(made[0]), digest=digest_of)
    try:
        counter.desk.announce(0)
        assert vandal.message(counter.endpoint, 1, str(made[1]), listen_s=0.3) > 10
        assert vandal.result(counter.endpoint, 1, str(made[1]), str(recipe)) == 2, "turned away"
        assert not [r for r in counter.records() if isinstance(r, Admit)]
        assert counter.desk.look(lambda: counter.desk.counts["quarantined"]) == 1
    finally:
        counter.close()


def test_a_corruption_counts_when_the_vandal_says_that_it_struck(
    registry: Registry, redis_url: str, tmp_path: Path
) -> None:
    notes: list[str] = []
    faults = Faults(cast("Stage", Scene(redis_url, tmp_path)), notes.append)
    corrupt = [Fault(0.0, f"corrupt {what}", "", 0.0, 1) for what in ("blob", "message")]
    for fault in corrupt:  # no version lies there yet; no keys to be admitted with
        faults.strike(fault)
    faults.heal(everything=True)
    assert faults.counts()["corruptions"] == 0, notes
    assert faults.unseen == {"corrupt blob": 1, "corrupt message": 1}
    publish(publisher(registry), 1)
    faults.strike(corrupt[0])
    faults.heal(everything=True)
    assert faults.counts()["corruptions"] == 1, notes
    assert faults.by_kind == {"corrupt blob": 1}
    faults.close()
