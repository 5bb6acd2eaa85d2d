"""Whoever is killed, and whenever: nothing is lost, nothing is trained twice, the run finishes."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import redis

from common.redis_server import RedisServer
from common.status import read as read_status
from tests import runs

# Each learner dies at one of these places and its successor at the next.
LIVES = {
    "on the way of a ticket and its result": (
        "after_issue:2,after_send:3,after_receive:4,after_append:2,after_ack:5"
    ),
    "on the way of a step and its version": (
        "after_step:1,after_step_record:1,after_checkpoint:1,after_blobs:2,after_manifest:2"
    ),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("failpoints", LIVES.values(), ids=LIVES.keys())
def test_a_learner_killed_between_any_two_of_its_deeds_finishes_exactly(
    failpoints: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    summary = runs.run(folder, recipe="scripted", run__failpoint=failpoints)
    assert summary["restarts"]["learner"] == 5, "every failpoint was passed"
    assert summary["steps"] == 4
    assert runs.promises_kept(folder)
    again = runs.replay(folder)
    assert (again["steps"], again["equal"]) == (4, 4)


@pytest.mark.timeout(600)
def test_an_actor_killed_in_mid_generation_and_before_its_ack_costs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    summary = runs.run(folder, recipe="scripted", run__failpoint="mid_generation:2,before_ack:5")
    assert summary["restarts"]["actor-0"] == 2
    assert runs.promises_kept(folder)


@pytest.mark.timeout(600)
def test_redis_killed_and_back_empty_is_told_again_what_it_knew(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis")
    server.start()
    folder = tmp_path / "run"
    process = runs.begin(folder, run__redis=server.url, learner__steps="12")
    try:
        wait_for_step(folder, 2)
        with redis.Redis.from_url(server.url) as client:
            os.kill(int(client.info("server")["process_id"]), signal.SIGKILL)
        while not server.died():
            time.sleep(0.01)  # the kernel takes a moment to reap it; there is no event to await
        server.start()
        assert runs.end(process) == 0, runs.said(folder)[-2000:]
    finally:
        server.stop()
    assert runs.summary(folder)["steps"] == 12
    assert runs.promises_kept(folder)


@pytest.mark.timeout(600)
def test_a_run_killed_three_times_at_random_moments_ends_bit_equal_to_its_replay(
    tmp_path: Path,
) -> None:
    folder, rng = tmp_path / "run", random.Random(5)
    process = runs.begin(folder, learner__steps="30", learner__checkpoint_every="5")
    for _ in range(3):
        wait_for_step(folder, rng.randint(1, 3))
        time.sleep(rng.random() / 4)  # anywhere within a step
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        process = runs.begin(folder, resume=True)
    assert runs.end(process) == 0, runs.said(folder)[-2000:]
    assert runs.summary(folder)["steps"] == 30
    assert runs.promises_kept(folder)
    again = runs.replay(folder)
    assert (again["steps"], again["equal"]) == (30, 30)


def wait_for_step(folder: Path, more: int, within_s: float = 300.0) -> None:
    """Until the live status is `more` steps further than when first seen in this life."""
    first, began = None, time.time()
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        status = read_status(folder)
        if status is not None and status.at > began and status.phase in ("waiting", "training"):
            assert status.step < status.steps, "the run was over before it could be killed"
            first = status.step if first is None else first
            if status.step >= first + more:
                return
        time.sleep(0.02)  # a file that another process replaces: nothing to await
    raise AssertionError(f"no {more} steps within {within_s} s: {runs.said(folder)[-1000:]}")
