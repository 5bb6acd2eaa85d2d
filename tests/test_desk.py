"""The learner's counter over a real ROUTER: what it grants, admits, refuses, and when."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from common import channel, wire
from common import keys as key_files
from common.codec import Codec
from common.failpoints import Failpoint
from common.journal import Journal, read
from common.records import Admit, AnyRecord, Drop, Issue, Open, Step
from common.status import ActorStatus
from learner.config import EvalConfig, LearnerConfig
from learner.desk import Desk
from learner.inbox import Selection
from learner.ledger import Ledger
from learner.prompts.source import Arithmetic
from learner.prompts.stream import Draft, Prompts
from tests.builders import make_group, make_rollout

RUN, DIGEST = "run-1", "digest"
CONFIG = LearnerConfig(
    groups_per_step=2,
    group_size=2,
    max_lag=1,
    lease_s=5.0,
    heartbeat_s=0.05,
    steps=10,
    infra_budget=3,
    quarantine_after=2,
)


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [4 + ord(letter) % 20 for letter in text]}


class Counter:
    """A desk on a real socket, and what is needed to look behind it."""

    def __init__(
        self,
        folder: Path,
        config: LearnerConfig = CONFIG,
        incarnation: int = 1,
        keys: str = "",
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.context: zmq.Context[Any] = zmq.Context()
        socket, self.endpoint = channel.bind_router(
            self.context, "tcp://127.0.0.1:0", key_files.read(keys)
        )
        self.journal = Journal(folder, incarnation)
        self.ledger = Ledger()
        opened = Open(run=RUN, incarnation=incarnation, config={"learner": {}})
        self.ledger.apply(opened, self.journal.append(opened))
        self.prompts = Prompts(Arithmetic(0), config.prompts, Letters(), (2,), 0, 64)  # type: ignore[arg-type]
        self.desk = Desk(
            socket,
            run_id=RUN,
            incarnation=incarnation,
            digest=DIGEST,
            vocab_size=32,
            config=config,
            journal=self.journal,
            ledger=self.ledger,
            prompts=self.prompts,
            failpoint=Failpoint.parse(""),
            meanwhile=meanwhile,
        )
        self.actors: list[Actor] = []

    def actor(self, capacity: int = 8, **fields: Any) -> Actor:
        actor = Actor(self.context, self.endpoint, **fields)
        self.actors.append(actor)
        actor.hello(capacity)
        return actor

    def records(self) -> list[AnyRecord]:
        return [record for _, record in read(self.folder)]

    def close(self) -> None:
        self.desk.close()
        for actor in self.actors:
            actor.socket.close(0)
        self.journal.close()
        self.context.term()


class Actor:
    """The other end, by hand."""

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        name: str = "a",
        pid: int = 1,
        keys: channel.Keys | None = None,
    ) -> None:
        self.socket = channel.connect_dealer(context, endpoint, keys)
        self.socket.setsockopt(zmq.RCVTIMEO, 5000)
        self.name, self.pid = name, pid
        self.codec = Codec(wire.FromLearner)
        self.put_by: list[Any] = []

    def say(self, message: wire.Message) -> None:
        self.socket.send(self.codec.encode(message))

    def hello(
        self, capacity: int, digest: str = DIGEST, protocol: int = wire.PROTOCOL, **fields: Any
    ) -> None:
        self.say(
            wire.Hello(
                protocol=protocol,
                digest=digest,
                actor=self.name,
                pid=self.pid,
                capacity=capacity,
                **fields,
            )
        )

    def hear(self, kind: type, timeout_s: float = 5.0) -> Any:
        """The next message of this kind; others but pulses are put by for later."""
        for message in self.put_by:
            if isinstance(message, kind):
                self.put_by.remove(message)
                return message
        until = time.monotonic() + timeout_s
        while self.socket.poll(max(0, int(1000 * (until - time.monotonic())))):
            message = self.codec.decode(self.socket.recv())
            if isinstance(message, kind):
                return message
            if not isinstance(message, wire.Pulse):
                self.put_by.append(message)
        raise AssertionError(f"no {kind.__name__} within {timeout_s} s; put by: {self.put_by}")

    def grants(self, count: int) -> list[wire.Grant]:
        return [self.hear(wire.Grant) for _ in range(count)]

    def answer(self, grant: wire.Grant, rewards: tuple[float, ...] = (1, 0), **fields: Any) -> str:
        self.say(result(grant.ticket, rewards, **fields))
        return str(self.hear(wire.Answer).verdict)

    def hears_nothing_but_pulses(self, pulses: int = 4) -> bool:
        for _ in range(pulses):
            self.hear(wire.Pulse)
        return not [m for m in self.put_by if isinstance(m, wire.Grant)]


def result(ticket: wire.Ticket, rewards: tuple[float, ...] = (1, 0), **fields: Any) -> wire.Group:
    fields = {"run": RUN, "incarnation": 1, **fields}
    return make_group(rewards, ticket=ticket.id, kind=ticket.kind, problem=ticket.problem, **fields)


@pytest.fixture
def counter(tmp_path: Path) -> Iterator[Counter]:
    made = Counter(tmp_path)
    yield made
    made.close()


def take(counter: Counter) -> Selection:
    until = time.monotonic() + 5
    selection = counter.desk.take(lambda: time.monotonic() > until)
    assert selection is not None, "no batch within 5 s"
    return selection


def train(counter: Counter, selection: Selection) -> None:
    t = selection.t
    counter.desk.record(
        Step(t=t, version=t + 1, digest="", consumed=selection.consumed, dropped=selection.dropped)
    )
    counter.desk.announce(t + 1)


def test_nothing_is_issued_before_the_first_version_is_published(counter: Counter) -> None:
    actor = counter.actor()
    assert actor.hear(wire.Welcome).version == -1
    assert actor.hears_nothing_but_pulses()
    counter.desk.announce(0)
    assert actor.grants(1)[0].ticket.id == 0


def test_no_more_tickets_than_the_credit(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=3)
    grants = actor.grants(3)
    assert actor.hears_nothing_but_pulses()
    assert actor.answer(grants[0]) == "ack"
    assert len(actor.grants(1)) == 1


def test_thousands_of_credits_are_all_used_and_no_sign_of_a_dead_actor(tmp_path: Path) -> None:
    many = LearnerConfig(groups_per_step=3000, group_size=2, max_lag=0, heartbeat_s=0.05)
    counter = Counter(tmp_path, many)
    try:
        counter.desk.announce(0)
        actor = counter.actor(capacity=10_000)
        assert {grant.ticket.id for grant in actor.grants(3000)} == set(range(3000))
        assert counter.desk.look(lambda: counter.desk.counts["lost"]) == 0
    finally:
        counter.close()


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


def test_no_wait_is_lost_while_the_desk_turns(counter: Counter) -> None:
    counter.desk.announce(0)
    for number in range(500):
        assert counter.desk.wait(lambda: number, lambda: False) == number  # noqa: B023


def test_no_more_tickets_than_the_lag_bound_allows(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=99)
    grants = actor.grants(4)  # (max_lag + 1) × groups_per_step
    assert actor.hears_nothing_but_pulses()
    for grant in grants[:2]:
        actor.answer(grant)
    assert actor.hears_nothing_but_pulses(), "buffered groups count too"
    train(counter, take(counter))
    assert len(actor.grants(2)) == 2
    assert actor.hears_nothing_but_pulses()


def test_a_group_that_teaches_nothing_makes_room_at_once(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=99)
    actor.answer(actor.grants(4)[0], (1, 1))
    assert len(actor.grants(1)) == 1


def test_tickets_ask_for_a_version_that_keeps_them_within_the_lag_bound(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=99)
    for step in range(3):
        for grant in actor.grants(4 if step == 0 else 2):
            assert grant.ticket.min_version <= step
            actor.answer(grant, version=step)
        train(counter, take(counter))
    assert max(grant.ticket.min_version for grant in actor.grants(2)) >= 2


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


def test_a_late_result_of_an_expired_lease_is_welcome(tmp_path: Path) -> None:
    counter = Counter(
        tmp_path,
        LearnerConfig(groups_per_step=2, group_size=2, max_lag=0, heartbeat_s=0.05, lease_s=0.3),
    )
    try:
        counter.desk.announce(0)
        slow = counter.actor(capacity=1, name="slow")
        grant = slow.grants(1)[0]
        quick = counter.actor(capacity=8, name="quick", pid=2)
        again = next(
            g for g in iter(lambda: quick.hear(wire.Grant), None) if g.ticket.id == grant.ticket.id
        )
        assert again.attempt > grant.attempt
        assert slow.answer(grant) == "ack"
        assert quick.answer(again) == "duplicate"
    finally:
        counter.close()


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


def test_an_actor_that_vanishes_frees_its_tickets(counter: Counter) -> None:
    counter.desk.announce(0)
    gone = counter.actor(capacity=4, name="gone")
    ids = {grant.ticket.id for grant in gone.grants(4)}
    gone.socket.close(0)
    other = counter.actor(capacity=4, name="other", pid=2)
    assert {grant.ticket.id for grant in other.grants(4)} == ids


def test_an_actor_that_reconnects_keeps_what_it_holds_and_owes(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=4)
    grants = actor.grants(4)
    ids = [grant.ticket.id for grant in grants]
    again = Actor(counter.context, counter.endpoint)
    counter.actors.append(again)
    again.hello(4, run=RUN, held=tuple(ids[:2]), owed=(ids[2],))
    assert again.hear(wire.Welcome).forget == ()
    assert again.grants(1)[0].ticket.id == ids[3], "what it lost is leased anew"
    assert again.answer(grants[2]) == "ack"


def test_an_actor_is_told_to_forget_what_nobody_waits_for(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=4)
    grant = actor.grants(4)[0]
    actor.answer(grant)
    again = Actor(counter.context, counter.endpoint)
    counter.actors.append(again)
    again.hello(4, run=RUN, held=(grant.ticket.id, 999))
    assert again.hear(wire.Welcome).forget == (grant.ticket.id, 999)


@pytest.mark.parametrize(
    ("fields", "reason", "values"),
    [
        ({"protocol": 99}, "protocol", (str(wire.PROTOCOL), "99")),
        ({"digest": "other"}, "digest", (DIGEST, "other")),
    ],
)
def test_another_protocol_or_recipe_is_refused_with_both_values(
    counter: Counter, fields: dict[str, Any], reason: str, values: tuple[str, str]
) -> None:
    actor = Actor(counter.context, counter.endpoint)
    counter.actors.append(actor)
    actor.hello(1, **fields)
    refused = actor.hear(wire.Refused)
    assert (refused.reason, refused.ours, refused.theirs) == (reason, *values)


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


def test_an_actor_whose_results_are_invalid_again_and_again_is_quarantined(
    counter: Counter,
) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=1)
    for _ in range(2):
        grant = actor.grants(1)[0]
        actor.answer(grant, tokens=[[999], [5]])
    assert actor.hear(wire.Refused).reason == "quarantined"
    back = Actor(counter.context, counter.endpoint)
    counter.actors.append(back)
    back.hello(1)
    assert back.hear(wire.Refused).reason == "quarantined"


def test_evaluations_come_first_and_only_the_missing_problems_are_asked(tmp_path: Path) -> None:
    counter = Counter(
        tmp_path,
        LearnerConfig(
            groups_per_step=2, group_size=2, heartbeat_s=0.05, eval=EvalConfig(problems=3)
        ),
    )
    try:
        counter.desk.announce(0)
        drafts = counter.prompts.heldout(3)
        counter.desk.evaluate("before", drafts, 0)
        actor = counter.actor(capacity=3)
        grants = actor.grants(3)
        assert {g.ticket.kind for g in grants} == {"eval"}
        counter.desk.evaluate("before", drafts, 0)
        for grant in grants:
            actor.answer(grant, (1,))
        point = counter.ledger.evaluations["before"]
        assert counter.desk.wait(lambda: point.is_complete(3) or None, lambda: False)
        assert actor.grants(1)[0].ticket.kind == "main"
    finally:
        counter.close()


def test_a_group_dropped_as_stale_has_its_prompt_asked_again(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=99)
    old, *rest = actor.grants(4)
    problem = old.ticket.problem
    asked = list(rest)
    for step in range(3):
        for grant in asked[:2]:
            actor.answer(grant, version=step)
        train(counter, take(counter))
        asked = asked[2:] + actor.grants(1 if step == 2 else 2)
    actor.answer(old, version=0)
    until = time.monotonic() + 5
    while time.monotonic() < until:
        for grant in asked[:2]:
            actor.answer(grant, version=3)
        selection = take(counter)
        train(counter, selection)
        asked = actor.grants(2)
        if (old.ticket.id, "stale") in selection.dropped:
            break
    assert any(
        g.ticket.parent == old.ticket.id and g.ticket.problem == problem
        for g in asked + actor.grants(1)
    )


def test_drain_ends_open_tickets_as_surplus_and_sends_everybody_away(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=4)
    actor.grants(4)
    counter.desk.drain(final=True, deadline_s=0.2)
    assert actor.hear(wire.Drain).final
    assert counter.ledger.sums()["main"].dropped == {"surplus": 4}


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


def test_an_error_in_the_desks_thread_is_raised_in_the_trainers(counter: Counter) -> None:
    def boom(*_: object) -> Draft:
        raise RuntimeError("the prompt stream broke")

    counter.prompts.draw = boom  # type: ignore[method-assign]
    counter.desk.announce(0)
    counter.actor()
    with pytest.raises(RuntimeError, match="the prompt stream broke"):
        counter.desk.take(lambda: False)


def test_prompts_are_the_same_whoever_asks_and_whenever() -> None:
    prompts = Prompts(Arithmetic(0), CONFIG.prompts, Letters(), (2,), 0, 64)  # type: ignore[arg-type]
    one, two = prompts.draw(5), prompts.draw(5)
    assert one.problem == two.problem
    assert np.array_equal(one.prompt, two.prompt)
    assert prompts.sampling(3, 1.0, 8).seed != prompts.sampling(4, 1.0, 8).seed
