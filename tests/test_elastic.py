"""Any number of actors, at any time, in whatever state: the learner's counter over real sockets."""

from __future__ import annotations

from collections import Counter as Tally
from contextlib import suppress
from pathlib import Path

import pytest
from msgspec.structs import replace

from actor.line import Line
from common import wire
from common.errors import ConfigError
from common.records import Admit
from learner.config import LearnerConfig
from tests.counter import CONFIG, DIGEST, Actor, Counter, result, take, train

MANY = LearnerConfig(
    groups_per_step=50, group_size=2, max_lag=1, heartbeat_s=0.5, lease_s=20.0, steps=10
)


@pytest.mark.parametrize("count", [1, 50])
def test_every_actor_of_one_or_fifty_has_its_share_and_nothing_is_lost(
    tmp_path: Path, count: int
) -> None:
    counter = Counter(tmp_path, MANY)
    try:
        counter.desk.announce(0)
        actors = [counter.actor(capacity=0, name=f"a{i}", pid=i) for i in range(count)]
        for actor in actors:
            actor.hear(wire.Welcome)
        per_actor = 100 // count  # (max_lag + 1) × groups_per_step in all
        for actor in actors:
            actor.say(wire.Heartbeat(run="run-1", incarnation=1, capacity=per_actor))
        for actor in actors:
            for grant in actor.grants(per_actor):
                assert actor.answer(grant) == "ack"
        admitted = [r.ticket for r in counter.records() if isinstance(r, Admit)]
        assert sorted(admitted) == list(range(100))
        for _ in range(2):
            train(counter, take(counter))
        assert counter.desk.look(lambda: counter.ledger.sums()["main"].trained) == 100
    finally:
        counter.close()


def test_with_no_actor_the_learner_waits_and_goes_on_with_the_first_that_comes(
    tmp_path: Path,
) -> None:
    counter = Counter(tmp_path)
    try:
        counter.desk.announce(0)
        looks = iter([False, False, True])
        assert counter.desk.take(lambda: next(looks)) is None, "it waits, and can be told to stop"
        late = counter.actor()
        for grant in late.grants(2):
            assert late.answer(grant) == "ack"
        train(counter, take(counter))
    finally:
        counter.close()


def test_an_actor_of_another_revision_and_another_engine_is_as_welcome_as_any(
    tmp_path: Path,
) -> None:
    counter = Counter(tmp_path, MANY)
    try:
        counter.desk.announce(0)
        others = (("torch", "1234abc"), ("vllm", "v9.9-other+"), ("scripted", ""))
        for number, (engine, revision) in enumerate(others):
            actor = Actor(counter.context, counter.endpoint, name=engine, pid=number)
            counter.actors.append(actor)
            actor.hello(1, engine=engine, revision=revision)
            assert actor.hear(wire.Welcome)
            assert actor.answer(actor.grants(1)[0]) == "ack"
    finally:
        counter.close()


@pytest.mark.parametrize("name", ["two\nlines", "x" * 300_000])
async def test_a_hello_that_the_learner_cannot_use_is_final_and_says_why(
    tmp_path: Path, name: str
) -> None:
    """As one of a later version may be: nobody waits in vain for a welcome."""
    counter, hello = (
        Counter(tmp_path),
        wire.Hello(protocol=1, digest=DIGEST, actor=name, capacity=1),
    )
    line = Line(counter.endpoint, 1 << 20)
    try:
        with pytest.raises(ConfigError, match=r"this actor's Hello: (name|oversized)"):
            await line.greet(hello)
    finally:
        await line.close()
        counter.close()


def test_a_field_that_only_later_code_knows_is_no_obstacle(tmp_path: Path) -> None:
    """Compatible protocol: maps with more in them than we understand."""
    import msgspec

    counter = Counter(tmp_path)
    try:
        counter.desk.announce(0)
        actor = Actor(counter.context, counter.endpoint)
        counter.actors.append(actor)
        hello = wire.Hello(protocol=wire.PROTOCOL, digest=DIGEST, actor="later", capacity=1)
        said = {**msgspec.to_builtins(hello), "mood": "good", "plans": [1, {"a": 2}]}
        header = msgspec.msgpack.encode(said)
        actor.socket.send(len(header).to_bytes(4, "little") + header)
        assert actor.hear(wire.Welcome)
        assert actor.answer(actor.grants(1)[0]) == "ack"
    finally:
        counter.close()


def test_an_actor_that_leaves_politely_frees_what_it_had_at_once(tmp_path: Path) -> None:
    counter = Counter(tmp_path, replace(CONFIG, lease_s=60.0))
    try:
        counter.desk.announce(0)
        leaving = counter.actor(capacity=2, name="leaving")
        had = {grant.ticket.id for grant in leaving.grants(2)}
        leaving.say(wire.Bye(run="run-1", incarnation=1))
        staying = counter.actor(capacity=4, name="staying", pid=2)
        assert had <= {grant.ticket.id for grant in staying.grants(4)}
        assert counter.desk.look(lambda: counter.desk.counts["left"]) == 1
    finally:
        counter.close()


def test_an_actor_that_comes_back_under_its_name_is_a_fresh_one_and_the_old_is_let_go(
    tmp_path: Path,
) -> None:
    """A restarted process knows nothing of what its predecessor held: others get it, or itself."""
    counter = Counter(tmp_path, replace(CONFIG, lease_s=60.0))
    try:
        counter.desk.announce(0)
        before = counter.actor(capacity=4, name="one", pid=10)
        had = {grant.ticket.id for grant in before.grants(4)}
        before.socket.close(0)
        again = counter.actor(capacity=4, name="one", pid=11)
        assert {grant.ticket.id for grant in again.grants(4)} == had
        assert counter.desk.look(lambda: len(counter.desk.actors)) == 1
    finally:
        counter.close()


def test_a_slow_actor_holds_no_step_hostage(tmp_path: Path) -> None:
    """It heartbeats and keeps its tickets; the batch rule takes what others bring meanwhile."""
    counter = Counter(tmp_path)
    try:
        counter.desk.announce(0)
        slow = counter.actor(capacity=1, name="slow")
        kept = slow.grants(1)[0]
        quick = counter.actor(capacity=3, name="quick", pid=2)
        for step in range(3):
            for grant in quick.grants(2):
                slow.say(
                    wire.Heartbeat(run="run-1", incarnation=1, capacity=1, held=(kept.ticket.id,))
                )
                assert quick.answer(grant, version=step) == "ack"
            train(counter, take(counter))
        assert counter.desk.look(lambda: counter.ledger.t) == 3
        assert slow.answer(kept, version=0) == "ack", "late, and counted all the same"
    finally:
        counter.close()


def test_what_only_a_slow_actor_holds_is_asked_of_another_that_has_nothing_to_do(
    tmp_path: Path,
) -> None:
    """Without lag a step needs every ticket that is out: one of them must not be all-deciding."""
    counter = Counter(tmp_path, replace(CONFIG, max_lag=0, lease_s=0.4))
    try:
        counter.desk.announce(0)
        slow = counter.actor(capacity=1, name="slow")
        kept = slow.grants(1)[0]
        beat = wire.Heartbeat(run="run-1", incarnation=1, capacity=1, held=(kept.ticket.id,))
        quick = counter.actor(capacity=2, name="quick", pid=2)
        assert quick.answer(quick.grants(1)[0]) == "ack"
        again = None
        while again is None:
            slow.say(beat)
            with suppress(AssertionError):
                again = quick.hear(wire.Grant, 0.1)
        assert (again.ticket.id, again.attempt) == (kept.ticket.id, kept.attempt + 1)
        assert quick.answer(again) == "ack"
        train(counter, take(counter))
        slow.say(result(kept.ticket))
        assert slow.hear(wire.Answer).verdict == "duplicate", "late, and counted once"
    finally:
        counter.close()


def test_a_partition_heals_and_every_result_is_counted_once(tmp_path: Path) -> None:
    """Both sides answered for the same tickets while they did not see each other."""
    counter = Counter(tmp_path, replace(CONFIG, lease_s=60.0))
    try:
        counter.desk.announce(0)
        away = counter.actor(capacity=2, name="away")
        grants = away.grants(2)
        away.socket.close(0)  # its side of the cut
        here = counter.actor(capacity=8, name="here", pid=2)
        mine = {g.ticket.id: g for g in here.grants(4)}
        assert set(mine) >= {grant.ticket.id for grant in grants}
        assert here.answer(mine[grants[0].ticket.id]) == "ack"
        back = Actor(counter.context, counter.endpoint, name="away")
        counter.actors.append(back)
        back.hello(2, run="run-1", incarnation=1, owed=tuple(g.ticket.id for g in grants))
        back.hear(wire.Welcome)
        verdicts = []
        for grant in grants:
            back.say(result(grant.ticket))
            verdicts.append(back.hear(wire.Answer).verdict)
        assert verdicts == ["duplicate", "ack"]
        tally = Tally(r.ticket for r in counter.records() if isinstance(r, Admit))
        assert [tally[grant.ticket.id] for grant in grants] == [1, 1]
    finally:
        counter.close()
