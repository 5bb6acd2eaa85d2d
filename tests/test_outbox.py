"""Nothing leaves the desk before it is durable, over a real ROUTER and a real disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common import wire
from common.records import Admit, Issue
from tests.counter import Counter, result


@pytest.fixture
def counter(tmp_path: Path) -> Iterator[Counter]:
    made = Counter(tmp_path)
    yield made
    made.close()


def test_results_that_come_together_are_acknowledged_together_each_once(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor()
    ids = set()
    for grant in actor.grants(4):
        ids.add(grant.ticket.id)
        actor.say(result(grant.ticket))
    acknowledged: list[int] = []
    while len(acknowledged) < 4:
        answer = actor.hear(wire.Answer)
        assert answer.verdict == "ack"
        acknowledged += [answer.ticket, *answer.also]
    assert sorted(acknowledged) == sorted(ids)
    assert [r.ticket for r in counter.records() if isinstance(r, Admit)] == acknowledged


def test_an_admitted_group_is_durable_before_its_ack(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor()
    grant = actor.grants(1)[0]
    assert actor.answer(grant) == "ack"
    assert [r.ticket for r in counter.records() if isinstance(r, Admit)] == [grant.ticket.id]


def test_an_issue_is_durable_before_the_ticket_arrives(counter: Counter) -> None:
    counter.desk.announce(0)
    grant = counter.actor().grants(1)[0]
    assert grant.ticket.id in [r.ticket.id for r in counter.records() if isinstance(r, Issue)]


def test_the_disk_being_full_stops_acks_and_issues_until_there_is_space(tmp_path: Path) -> None:
    counter = Counter(tmp_path)
    try:
        counter.desk.announce(0)
        actor = counter.actor(capacity=1)
        grant = actor.grants(1)[0]
        with limited_file_size(counter):
            actor.say(result(grant.ticket))
            wait_for(lambda: bool(counter.desk.blocked))
            assert counter.desk.look(lambda: counter.ledger.sums()["main"].holds)
            for _ in range(3):
                actor.hear(wire.Pulse)
            assert not [m for m in actor.put_by if isinstance(m, wire.Answer)]
        assert actor.hear(wire.Answer).verdict == "ack"
        assert grant.ticket.id in [r.ticket for r in counter.records() if isinstance(r, Admit)]
    finally:
        counter.close()


def test_whoever_waits_for_space_says_meanwhile_that_it_is_there(tmp_path: Path) -> None:
    beats = []

    def meanwhile() -> None:
        beats.append(counter.desk.blocked)
        if len(beats) == 2:
            limit.__exit__()

    counter = Counter(tmp_path, meanwhile=meanwhile)
    try:
        counter.desk.announce(0)
        actor = counter.actor(capacity=1)
        grant = actor.grants(1)[0]
        limit = limited_file_size(counter)
        with limit:
            actor.say(result(grant.ticket))
            wait_for(lambda: bool(counter.desk.blocked))
            counter.desk.announce(1)
    finally:
        counter.close()
    assert len(beats) >= 2
    assert beats[0]


class limited_file_size:
    """No file of this process may grow (RLIMIT_FSIZE): the kernel's own way to refuse a write."""

    def __init__(self, counter: Counter) -> None:
        self._size = max(p.stat().st_size for p in counter.folder.iterdir())

    def __enter__(self) -> None:
        import resource
        import signal

        self._signal = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, self._before[1]))

    def __exit__(self, *_: object) -> None:
        import resource
        import signal

        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)
        signal.signal(signal.SIGXFSZ, self._signal)


def wait_for(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)  # there is no event to wait on: the condition belongs to the desk's thread
