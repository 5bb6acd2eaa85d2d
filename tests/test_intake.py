"""Every message that comes in has an answer, over a real ROUTER; none of them ends the run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common import wire
from common.records import Drop
from common.status import ActorStatus
from tests.builders import make_rollout
from tests.counter import RUN, Actor, Counter


@pytest.fixture
def counter(tmp_path: Path) -> Iterator[Counter]:
    made = Counter(tmp_path)
    yield made
    made.close()


def test_every_result_gets_one_of_four_verdicts(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor()
    first, second = actor.grants(2)
    assert actor.answer(first) == "ack"
    assert actor.answer(first) == "duplicate"
    assert (
        actor.answer(second, rollouts=(make_rollout(logps=[float("nan")] * 3), make_rollout()))
        == "refused"
    )
    assert actor.answer(second, run="another") == "unknown"
    nobody_asked = wire.Grant(
        ticket=first.ticket.__class__(**{**_fields(first.ticket), "id": 999}), attempt=0
    )
    assert actor.answer(nobody_asked) == "unknown"


def _fields(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def test_a_late_failure_of_an_old_attempt_kills_nothing(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=1)
    grant = actor.grants(1)[0]
    fail = wire.Failure(
        run=RUN, incarnation=1, ticket=grant.ticket.id, attempt=0, blame="infra", reason="x"
    )
    actor.say(fail)
    second = actor.grants(1)[0]
    assert (second.ticket.id, second.attempt) == (grant.ticket.id, 1)
    for _ in range(5):
        actor.say(fail)
    assert actor.answer(second) == "ack"


def test_a_ticket_whose_budget_is_spent_is_dropped_by_name(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=1)
    first = actor.grants(1)[0]
    for attempt in range(3):
        actor.say(
            wire.Failure(
                run=RUN,
                incarnation=1,
                ticket=first.ticket.id,
                attempt=attempt,
                blame="infra",
                reason="x",
            )
        )
        grant = actor.grants(1)[0]
    assert grant.ticket.id != first.ticket.id
    assert [(r.ticket, r.reason) for r in counter.records() if isinstance(r, Drop)] == [
        (first.ticket.id, "failed")
    ]


def test_a_stranger_is_asked_to_say_hello(counter: Counter) -> None:
    actor = Actor(counter.context, counter.endpoint)
    counter.actors.append(actor)
    actor.say(wire.Heartbeat(capacity=1))
    assert actor.hear(wire.Refused).reason == "hello"


def test_garbage_is_counted_and_answered_and_the_connection_lives(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=1)
    grant = actor.grants(1)[0]
    for garbage in (b"", b"\x00", os.urandom(300), b"\x02\x00\x00\x00\x81\xa4"):
        actor.socket.send(garbage)
        assert actor.hear(wire.Answer).verdict == "refused"
    assert counter.desk.counts["refused_malformed"] == 4
    assert actor.answer(grant) == "ack"


def test_numbers_in_a_heartbeat_that_are_none_or_beyond_all_use_are_left_out(
    counter: Counter,
) -> None:
    actor = counter.actor(capacity=1)
    actor.hear(wire.Welcome)
    mad = {"running": math.nan, "waiting": math.inf, "restarts": 1e300, "busy": -math.inf}
    actor.say(wire.Heartbeat(capacity=1, stats={**mad, "window": 3.0}))
    known = counter.desk.wait(
        lambda: next((a for a in counter.desk.actors.values() if a.stats), None), lambda: False
    )
    assert known is not None
    assert known.stats == {"window": 3.0}
    told = ActorStatus.of(known.version, known.capacity, known.stats, known.notes)
    assert msgspec.json.decode(msgspec.json.encode(told), type=ActorStatus) == told
