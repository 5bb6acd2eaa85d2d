"""Credits follow what the engine can take: up by one, down by a factor, never out of bounds."""

from __future__ import annotations

import asyncio

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from actor import concurrency
from actor.concurrency import Window, adapted, ceiling, resized
from actor.config import ScriptedConfig
from actor.desk import Desk
from actor.engine.base import EngineStats
from actor.engine.scripted import ScriptedEngine
from common.wire import Grant, Sampling
from tests.builders import make_ticket

SLOTS = 64
FULL = Window(10.0, 10)


def looked(
    running: int = SLOTS, waiting: int = 0, kv_use: float = 0.5, preemptions: int = 0
) -> EngineStats:
    return EngineStats(
        tokens_per_s=1.0,
        running=running,
        waiting=waiting,
        kv_use=kv_use,
        version=0,
        busy=1.0,
        pause_s=0.0,
        tokens=0,
        preemptions=preemptions,
    )


def after(window: Window, *looks: EngineStats, held: int | None = None) -> Window:
    """With as many tickets in hand as the window allows, unless `held` says otherwise."""
    for stats in looks:
        window = adapted(window, stats, SLOTS, window.tickets if held is None else held)
    return window


looks = st.builds(
    looked,
    running=st.integers(0, SLOTS),
    waiting=st.integers(0, 300),
    kv_use=st.floats(0, 1),
    preemptions=st.integers(0, 50),
)
windows = st.integers(1, 40).flatmap(
    lambda most: st.floats(1, most).map(lambda size: Window(size, most))
)


@given(windows, st.lists(st.tuples(looks, st.integers(0, 50)), max_size=30), st.integers(1, 40))
def test_whatever_the_engine_says_the_window_stays_within_its_bounds(
    window: Window, seen: list[tuple[EngineStats, int]], other: int
) -> None:
    for stats, held in seen:
        before, window = window, adapted(window, stats, SLOTS, held)
        assert 1 <= window.size <= window.ceiling
        assert 1 <= window.tickets <= window.ceiling
        assert window.size <= before.size + 1
        assert window.size >= min(before.size, max(1, before.size * concurrency.SHRINK))
        if window.size != before.size:
            assert window.why.startswith("larger" if window.size > before.size else "smaller")
    window = resized(window, other)
    assert 1 <= window.tickets <= other


@given(windows, st.lists(looks, max_size=30))
def test_an_engine_whose_slots_are_all_taken_never_costs_a_ticket(
    window: Window, seen: list[EngineStats]
) -> None:
    for stats in seen:
        full = stats._replace(running=SLOTS, preemptions=0)
        before, window = window, after(window, full)
        assert window.size >= before.size


def test_lost_places_make_it_smaller_at_once_and_once_for_all_in_hand() -> None:
    smaller = after(FULL, looked(preemptions=3))
    assert smaller.tickets == 7
    assert smaller.why == "smaller: 3 sequences lost their place in the KV cache"
    resting = after(smaller, looked(preemptions=9), looked(preemptions=12), held=10)
    assert resting.size == smaller.size
    assert after(resting, looked(preemptions=13)).tickets == 4


def test_a_nearly_full_cache_before_which_others_wait_makes_it_smaller() -> None:
    squeezed = looked(running=40, waiting=24, kv_use=0.99)
    assert after(FULL, squeezed) == FULL._replace(waiting=24, stuck=1)
    smaller = after(FULL, squeezed, squeezed)
    assert (smaller.tickets, smaller.why) == (7, "smaller: KV cache at 99 %, 24 sequences wait")


def test_a_queue_that_does_not_get_shorter_beside_free_slots_makes_it_smaller() -> None:
    shrinking = [looked(running=40, waiting=n) for n in (30, 20, 10, 5, 1)]
    assert after(FULL, *shrinking).tickets == 10
    growing = [looked(running=40, waiting=n) for n in (10, 10, 11)]
    assert after(FULL, *growing).why == "smaller: 11 sequences wait beside free slots"


def test_room_that_is_used_makes_it_larger_by_one_and_unused_room_does_not() -> None:
    small = Window(4.0, 10)
    idle = looked(running=32)
    assert after(small, idle).tickets == 5
    assert after(small, idle, held=3) == small
    assert after(small, *[idle] * 20).tickets == 10
    assert after(small, looked(running=32, kv_use=0.92)).tickets == 4
    assert after(small, looked(running=32, waiting=1)).tickets == 4


def test_tickets_of_another_size_keep_the_share_of_the_window() -> None:
    assert ceiling(SLOTS, 8, 2) == 10
    assert ceiling(SLOTS, 100, 2) == 3
    assert resized(FULL, 34).tickets == 34
    assert resized(Window(5.0, 10), 34).tickets == 17
    assert resized(Window(1.0, 10), 3).tickets == 1


def test_while_there_is_no_engine_nothing_is_learnt_of_it() -> None:
    gone = looked(preemptions=99)._replace(up=False)
    assert after(FULL, gone) == FULL


async def test_a_desk_takes_nothing_while_there_is_no_engine_and_less_from_a_small_one() -> None:
    desk = Desk(SLOTS, 2)
    ticket = make_ticket(1, n=8)
    desk.hold(Grant(ticket=ticket, attempt=0), asyncio.ensure_future(asyncio.sleep(0)))
    assert desk.capacity == 10
    desk.observe(looked()._replace(up=False))
    assert desk.capacity == 0
    desk.observe(looked(preemptions=1))
    assert desk.capacity == 7
    fixed = Desk(SLOTS, 2, adaptive=False)
    fixed.observe(looked(preemptions=1))
    assert fixed.capacity == 3  # of 64 rollouts, before any ticket came


async def played(engine: ScriptedEngine, adaptive: bool) -> tuple[Desk, list[float]]:
    """80 tickets of 8 rollouts, granted as long as the desk has room, with a look at the engine
    some ten times a generation; the desk, and the share of the window that was open at each look.
    """
    desk, numbers, open_ = Desk(engine.slots, 2, adaptive), iter(range(80)), []
    prefix = np.array([1, 2, 3], np.int32)

    async def one(id_: int) -> None:
        await engine.generate(prefix, 8, Sampling(max_tokens=50, seed=id_))
        desk.finish(id_, bytearray())

    while desk.counts["groups"] < 80:
        while len(desk.held) < desk.capacity and (id_ := next(numbers, -1)) >= 0:
            grant = Grant(ticket=make_ticket(id_, n=8), attempt=0)
            desk.hold(grant, asyncio.create_task(one(id_)))
        await asyncio.wait(list(desk.held.values()), timeout=0.01)
        desk.observe(engine.stats())
        open_.append(desk.window.size / desk.window.ceiling)
    return desk, open_


async def test_an_engine_without_a_limit_to_its_cache_is_kept_as_full_as_it_can_be() -> None:
    engine = ScriptedEngine(ScriptedConfig(tokens_per_s=500.0), slots=SLOTS)
    _, open_ = await played(engine, adaptive=True)
    assert set(open_) == {1.0}


async def test_a_cache_that_is_too_small_loses_fewer_places_when_less_is_asked_of_it() -> None:
    config = ScriptedConfig(tokens_per_s=500.0, kv_tokens=20 * 53)  # 20 of 64 sequences to the end
    fixed, adaptive = (ScriptedEngine(config, slots=SLOTS) for _ in range(2))
    _, always_open = await played(fixed, adaptive=False)
    desk, open_ = await played(adaptive, adaptive=True)
    assert set(always_open) == {1.0}
    assert adaptive.stats().tokens == fixed.stats().tokens == 80 * 8 * 50
    assert adaptive.stats().preemptions < 0.7 * fixed.stats().preemptions
    assert min(open_) < 0.5
    assert desk.window.why
