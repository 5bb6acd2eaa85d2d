"""The actor's side of the dialogue, against a real ROUTER in the learner's place."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zmq.asyncio

from actor.config import ScriptedConfig
from actor.engine.scripted import ScriptedEngine
from actor.line import Line
from common import wire
from common.errors import DeadlineError, EngineError
from common.group_check import check_group
from common.recipe import digest
from common.versions import Registry
from common.wire import (
    Answer,
    Bye,
    Drain,
    Failure,
    Grading,
    Group,
    Heartbeat,
    Hello,
    Pulse,
    Refused,
)
from tests.fake_learner import FAST, RUN, TOP, Stage, open_stage, ticket
from tests.published import put

SLOW = ScriptedConfig(tokens_per_s=1.0)


@pytest.fixture
async def stage(redis_url: str) -> AsyncIterator[Stage]:
    async with open_stage(redis_url) as stage:
        yield stage


async def test_a_granted_ticket_comes_back_as_a_graded_group(stage: Stage) -> None:
    desk, learner = stage.start(), stage.learner
    hello = await learner.welcome()
    assert (hello.protocol, hello.digest) == (wire.PROTOCOL, digest(stage.run))
    assert (hello.actor, hello.pid, hello.held, hello.owed) == ("bob", os.getpid(), (), ())
    await learner.grant(7, n=3, problem="q", template="t", source="s")
    group = await learner.receive(Group)
    assert (group.run, group.incarnation) == (RUN, 1)
    assert (group.ticket, group.attempt, group.problem, group.actor) == (7, 0, "q", "bob")
    assert [r.correct for r in group.rollouts] == [0.0] * 3
    assert [r.parts for r in group.rollouts] == [({"correct": 0.0},)] * 3
    check_group(group, ticket(7, n=3, problem="q"), vocab_size=32, clock_version=0)
    assert list(desk.owed) == [7]
    await learner.ack(7)
    await asyncio.wait_for(desk.settled.wait(), 5)


@pytest.mark.parametrize("verdict", ["ack", "duplicate", "unknown", "refused"])
async def test_every_verdict_frees_the_copy(stage: Stage, verdict: wire.Verdict) -> None:
    desk, learner = stage.start(), stage.learner
    await learner.welcome()
    await learner.grant(1)
    await learner.receive(Group)
    await learner.send(Answer(ticket=1, verdict=verdict, reason="nan"))
    await asyncio.wait_for(desk.settled.wait(), 5)
    assert desk.counts[verdict] == 1


async def test_one_answer_frees_the_copies_of_many_results(stage: Stage) -> None:
    desk, learner = stage.start(), stage.learner
    await learner.welcome()
    for id_ in (1, 2, 3):
        await learner.grant(id_)
    for _ in range(3):
        await learner.receive(Group)
    await learner.send(Answer(ticket=2, verdict="ack", also=(1, 3)))
    await asyncio.wait_for(desk.settled.wait(), 5)
    assert desk.counts["ack"] == 3


async def test_an_unacknowledged_result_is_sent_again_after_a_reconnect(stage: Stage) -> None:
    desk, learner = stage.start(), stage.learner
    await learner.welcome()
    await learner.grant(1)
    await learner.receive(Group)
    first = learner.frame
    await learner.restart()
    await learner.receive(Heartbeat)  # from a connection that this life does not know
    stranger = learner.peer
    await learner.send(Refused(reason="hello"))
    put(stage.registry, 0, incarnation=2)
    hello = await learner.welcome()
    assert hello.owed == (1,)
    assert learner.peer != stranger
    await learner.receive(Group)
    assert learner.frame == first
    await learner.ack(1)
    await asyncio.wait_for(desk.settled.wait(), 5)


async def test_an_acknowledgement_lost_in_a_silent_connection_is_asked_for_again(
    stage: Stage,
) -> None:
    stage.start()
    learner = stage.learner
    await learner.welcome()
    await learner.grant(1)
    await learner.receive(Group)
    hello = await learner.receive(Hello)  # no pulse, no answer: 5 s of patience
    assert hello.owed == (1,)


async def test_pulses_keep_a_connection(stage: Stage) -> None:
    stage.start()
    learner = stage.learner
    await learner.welcome()
    async with asyncio.timeout(40):
        for _ in range(3):
            await learner.receive(Heartbeat)
            await learner.send(Pulse(version=0))
    await learner.silence(Hello)


async def test_a_ticket_granted_twice_is_answered_once(stage: Stage) -> None:
    desk = stage.start(ScriptedEngine(ScriptedConfig(tokens_per_s=40.0), slots=8))
    learner = stage.learner
    await learner.welcome()
    await learner.grant(1, attempt=0)
    await learner.grant(1, attempt=1)
    group = await learner.receive(Group)
    assert group.attempt == 1
    assert desk.counts["granted"] == 1
    await learner.silence(Group)


async def test_a_ticket_granted_while_its_result_is_owed_brings_the_result_again(
    stage: Stage,
) -> None:
    desk, learner = stage.start(), stage.learner
    await learner.welcome()
    await learner.grant(1)
    await learner.receive(Group)
    first = learner.frame
    await learner.grant(1, attempt=1)
    await learner.receive(Group)
    assert learner.frame == first
    assert desk.counts["granted"] == 1


async def test_an_answer_from_an_older_incarnation_is_ignored(stage: Stage) -> None:
    learner = stage.learner
    learner.incarnation = 2
    put(stage.registry, 0, incarnation=2)
    desk = stage.start()
    await learner.welcome()
    await learner.grant(1)
    await learner.receive(Group)
    await learner.ack(1, incarnation=1)
    await learner.ack(1, run="another")
    while desk.counts["zombie"] < 2:
        await learner.receive(Heartbeat)
    assert list(desk.owed) == [1]
    await learner.ack(1)
    await asyncio.wait_for(desk.settled.wait(), 5)


async def test_a_welcome_from_an_older_incarnation_is_no_welcome(stage: Stage) -> None:
    stage.start()
    learner = stage.learner
    learner.incarnation = 2
    await learner.welcome()
    await learner.receive(Heartbeat)
    await learner.send(Refused(reason="hello"))
    learner.incarnation = 1
    await learner.welcome()
    learner.incarnation = 2
    assert (await learner.welcome()).incarnation == 2


async def test_what_nobody_waits_for_any_more_is_forgotten(stage: Stage) -> None:
    engine = ScriptedEngine(SLOW, slots=8)
    desk, learner = stage.start(engine), stage.learner
    await learner.welcome()
    await learner.grant(1)
    await learner.grant(2)
    while engine.stats().running < 4:
        await learner.receive(Heartbeat)
    await learner.restart()
    await learner.receive(Heartbeat)
    await learner.send(Refused(reason="hello"))
    put(stage.registry, 0, incarnation=2)
    assert (await learner.welcome(forget=(1,))).held == (1, 2)
    while (await learner.receive(Heartbeat)).held != (2,):
        pass
    assert engine.stats().running == 2
    assert list(desk.held) == [2]


async def test_another_run_drops_the_old_ones_work(stage: Stage) -> None:
    desk, learner = stage.start(), stage.learner
    await learner.welcome()
    await learner.grant(1)
    await learner.receive(Group)
    learner.run = "run-2"
    await learner.receive(Heartbeat)
    await learner.send(Refused(reason="hello"))
    put(Registry(stage.run.redis, "run-2"), 0)
    assert (await learner.welcome()).owed == (1,)
    connection = learner.peer
    while not desk.settled.is_set():
        await learner.receive(Heartbeat)  # may be one of the connection before, read late
    learner.peer = connection
    await learner.grant(1)
    assert (await learner.receive(Group)).run == "run-2"


async def test_capacity_follows_the_size_of_the_groups(stage: Stage) -> None:
    stage.start(ScriptedEngine(SLOW, slots=8), prefetch=3)
    learner = stage.learner
    assert (await learner.welcome()).capacity == 1 + 3
    await learner.grant(1, n=2)
    while (beat := await learner.receive(Heartbeat)).held != (1,):
        pass
    assert beat.capacity == 4 + 3


async def test_heartbeats_say_how_the_engine_is_doing(stage: Stage) -> None:
    stage.start()
    learner = stage.learner
    await learner.welcome()
    await learner.grant(1)
    await learner.receive(Group)
    beat = await learner.receive(Heartbeat)
    assert beat.version == 0
    assert beat.stats["tokens"] == 16
    assert beat.stats["owed"] == 1
    assert 0 <= beat.stats["idle"] <= 1
    assert {"tokens_per_s", "busy", "running", "waiting", "kv_use", "pause_s"} <= set(beat.stats)


async def test_a_ticket_waits_for_its_version(stage: Stage) -> None:
    stage.start()
    learner = stage.learner
    await learner.welcome()
    await learner.grant(1, min_version=1)
    await learner.silence(Group)
    put(stage.registry, 1)
    assert (await learner.receive(Group)).rollouts[0].oldest_version == 1


async def test_a_version_that_does_not_come_gives_the_ticket_back_untouched(stage: Stage) -> None:
    desk, learner = stage.start(), stage.learner
    await learner.welcome(lease_s=0.1)
    await learner.grant(1, attempt=3, min_version=9)
    failure = await learner.receive(Failure)
    assert (failure.ticket, failure.attempt) == (1, 3)
    assert (failure.blame, failure.reason) == ("none", "version")
    assert not desk.held


async def test_a_prompt_that_does_not_fit_is_blamed_on_the_data(stage: Stage) -> None:
    stage.start(ScriptedEngine(FAST, slots=8, max_length=16))
    learner = stage.learner
    await learner.welcome()
    await learner.grant(1, prompt=[1] * 100)
    assert (await learner.receive(Failure)).blame == "data"
    await learner.grant(2)
    assert (await learner.receive(Group)).ticket == 2


async def test_an_engine_that_only_fails_ends_the_actor(stage: Stage) -> None:
    engine = ScriptedEngine(SLOW, slots=8)
    stage.start(engine)
    learner = stage.learner
    await learner.welcome()
    for id in (1, 2, 3):
        await learner.grant(id)
    while len((await learner.receive(Heartbeat)).held) < 3 or engine.stats().running < 6:
        pass
    await engine.close()
    for _ in range(3):
        assert (await learner.receive(Failure)).blame == "infra"
    await learner.receive(Bye)
    with pytest.raises(EngineError):
        await stage.ended()


async def test_a_grader_that_hangs_gives_verifier_error_and_the_next_ticket_is_graded(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import time\ndef hang(completions, **_): time.sleep(1_000)\n"
    code += "def fine(completions, **_): return [0.5] * len(completions)\n"
    (tmp_path / "slow_graders.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{TOP}")
    stage.start()
    learner = stage.learner
    await learner.welcome()
    hangs, fine = (
        Grading(parts=(wire.GradePart(name=name, grader=f"python:slow_graders:{name}"),))
        for name in ("hang", "fine")
    )
    await learner.grant(1, grading=hangs)
    group = await learner.receive(Group)
    said = "verifier_error: hang: no verdict within 0.25 s"
    assert [r.error for r in group.rollouts] == [said] * 2
    await learner.grant(2, grading=fine)
    assert [r.correct for r in (await learner.receive(Group)).rollouts] == [0.5, 0.5]


async def test_a_message_that_cannot_be_read_is_passed_over(stage: Stage) -> None:
    stage.start()
    learner = stage.learner
    await learner.welcome()
    await learner.socket.send_multipart([learner.peer, b"\x00\x01nonsense"])
    await learner.grant(1)
    await learner.receive(Group)
    while (await learner.receive(Heartbeat)).stats["malformed"] != 1:
        pass


async def test_drain_hands_back_what_is_held_and_delivers_what_is_owed(stage: Stage) -> None:
    engine = ScriptedEngine(SLOW, slots=8)
    stage.start(engine)
    learner = stage.learner
    await learner.welcome()
    await learner.grant(1, max_tokens=1)
    await learner.grant(2, attempt=4)
    await learner.receive(Group)
    await learner.send(Drain())
    failure = await learner.receive(Failure)
    assert (failure.ticket, failure.attempt, failure.blame) == (2, 4, "none")
    await learner.grant(3)
    assert (await learner.receive(Failure)).ticket == 3
    await learner.silence(Bye)  # ticket 1 is not answered yet
    await learner.ack(1)
    await learner.receive(Bye)
    await stage.ended()


async def test_a_final_drain_only_delivers(stage: Stage) -> None:
    stage.start(ScriptedEngine(SLOW, slots=8))
    learner = stage.learner
    await learner.welcome()
    await learner.grant(1)
    while not (await learner.receive(Heartbeat)).held:
        pass
    await learner.send(Drain(final=True))
    message = await learner.receive(wire.Message)
    while isinstance(message, Heartbeat):
        message = await learner.receive(wire.Message)
    assert isinstance(message, Bye)
    await stage.ended()


@pytest.mark.parametrize("reason", ["protocol", "digest", "model", "quarantined"])
async def test_a_refusal_is_final_and_names_both_values(stage: Stage, reason: str) -> None:
    stage.start()
    await stage.learner.receive(Hello)
    await stage.learner.send(Refused(reason=reason, ours="1234", theirs="5678"))
    with pytest.raises(Exception, match=f"{reason}.*'1234'.*'5678'"):
        await stage.ended()


async def test_an_actor_shows_in_the_registry(stage: Stage) -> None:
    stage.start()
    await stage.learner.welcome()
    async with asyncio.timeout(40):
        while "actor:bob" not in await asyncio.to_thread(stage.registry.living):
            await stage.learner.receive(Heartbeat)


async def test_a_learner_that_does_not_answer_a_hello_is_tried_again(stage: Stage) -> None:
    line = Line(stage.learner.endpoint, 1 << 20, welcome_s=0.1)
    hello = Hello(protocol=1, digest="", actor="bob", capacity=1)
    for _ in range(2):
        with pytest.raises(DeadlineError, match=r"no answer from a learner at tcp.* do not fit"):
            await line.greet(hello)
    await stage.learner.receive(Hello)
    first = stage.learner.peer
    await stage.learner.receive(Hello)
    assert stage.learner.peer != first
    await line.close()


async def test_many_lines_share_one_context_and_their_last_words_arrive(stage: Stage) -> None:
    context = zmq.asyncio.Context()
    endpoint, learner = stage.learner.endpoint, stage.learner
    lines = [Line(endpoint, 1 << 20, context=context) for _ in range(20)]
    for line in lines:
        greeting = asyncio.create_task(
            line.greet(Hello(protocol=wire.PROTOCOL, digest="", actor="bob", capacity=1))
        )
        await learner.welcome()
        await greeting
    for line in lines:
        await line.send(Bye(run=RUN, incarnation=1))
        await line.close()
    await asyncio.to_thread(context.term)
    for _ in lines:
        await learner.receive(Bye)
