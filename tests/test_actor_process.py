"""Actors as processes: signals, exit codes, one clear line, places to die at."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import pytest

from common.recipe import digest
from common.wire import (
    Bye,
    Failure,
    Group,
    Hello,
    Refused,
)
from tests.fake_learner import TOP, Stage, open_stage


@pytest.fixture
async def stage(redis_url: str) -> AsyncIterator[Stage]:
    async with open_stage(redis_url) as stage:
        yield stage


def start_actor(stage: Stage, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "actor", "scripted", "--name", "bob"]
    command += ["--learner", stage.run.learner, "--redis", stage.run.redis]
    for override in ("run.model=tiny", "run.seed=0", *overrides):
        command += ["-s", override]
    return subprocess.Popen(command, cwd=TOP, stderr=subprocess.PIPE, text=True)


async def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, said = await asyncio.to_thread(process.communicate, timeout=60)
    finally:
        process.kill()
    return process.returncode, said


async def test_sigterm_hands_tickets_back_and_delivers_owed_results(stage: Stage) -> None:
    process, learner = start_actor(stage, "actor.scripted.tokens_per_s=1"), stage.learner
    await learner.welcome()
    await learner.grant(1, max_tokens=1)
    await learner.grant(2)
    await learner.receive(Group)
    process.send_signal(signal.SIGTERM)
    assert (await learner.receive(Failure)).ticket == 2
    await learner.ack(1)
    await learner.receive(Bye)
    code, said = await end_of(process)
    assert code == 0, said


async def test_sigterm_ends_an_actor_whose_engine_is_still_starting(stage: Stage) -> None:
    process = start_actor(stage, "actor.scripted.startup_s=600")
    assert process.stderr is not None
    while "starts" not in await asyncio.to_thread(process.stderr.readline):
        pass
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, said = await end_of(process)
    assert code == 0, said
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["actor.scripted.fails_to_start=true"], "did not start (actor.scripted.fails_to_start)"),
        (
            ["actor.scripted.startup_s=600", "actor.engine_start_s=0.2"],
            "the engine was not up within 0.2 s (actor.engine_start_s)",
        ),
    ],
)
async def test_an_engine_that_does_not_start_ends_the_actor_with_one_line(
    stage: Stage, overrides: list[str], said: str
) -> None:
    code, words = await end_of(start_actor(stage, *overrides))
    assert code == 1
    assert said in words.strip().splitlines()[-1]
    assert "Traceback" not in words


async def test_a_refused_digest_ends_with_one_line_naming_both_values(stage: Stage) -> None:
    process, learner = start_actor(stage, "run.seed=1"), stage.learner
    hello = await learner.receive(Hello)
    await learner.send(Refused(reason="digest", ours=digest(stage.run), theirs=hello.digest))
    code, said = await end_of(process)
    last = said.strip().splitlines()[-1]
    assert code == 2
    assert digest(stage.run) in last
    assert hello.digest in last
    assert "Traceback" not in said


@pytest.mark.parametrize("point", ["mid_generation", "before_ack"])
async def test_an_actor_dies_where_it_is_told_to(stage: Stage, point: str) -> None:
    speed = "actor.scripted.tokens_per_s=100"
    process, learner = start_actor(stage, f"run.failpoint={point}:2", speed), stage.learner
    await learner.welcome()
    for id in (1, 2):
        await learner.grant(id)
        if point == "before_ack" or id == 1:
            await learner.receive(Group)
        await learner.ack(id)
    code, said = await end_of(process)
    assert code == -signal.SIGKILL, said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('run.learner="tcp://192.0.2.1:5"', "isentrope keys"),
        ("run.store=files:x", 'expected "redis", "file:FOLDER"'),
        ("run.failpoint=midgeneration", "the nearest is 'mid_generation'"),
        ("run.redis=http://x", "run.redis"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(override: str, said: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "actor", "tiny", "-s", override]
    process = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert said in process.stderr.splitlines()[-1]
    assert "torch" not in process.stderr.replace("_torch", "")


def test_help_and_configuration_errors_import_no_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from actor.cli import actor\n"
        "CliRunner().invoke(actor, ['--help'])\n"
        "CliRunner().invoke(actor, ['tiny', '-s', 'actor.slot=3'])\n"
        "sys.exit('torch' in sys.modules or 'zmq' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
