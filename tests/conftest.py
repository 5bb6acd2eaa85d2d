"""Real parts for every test: a Redis server, ports from the kernel, processes that are ended by
their id."""

from __future__ import annotations

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before anything imports torch: tests share two cores

import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis

from common import vllm_version
from common.imports import lasting
from common.redis_server import RedisServer
from tests import by_file

TOP = Path(__file__).resolve().parent.parent
Start = Callable[..., "subprocess.Popen[str]"]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    return by_file.processes(config)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> by_file.ByFile | None:
    return by_file.ByFile(config, log) if config.option.dist == "load" else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    with lasting():
        return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fast ones first, those that need vLLM last; without it they are skipped and say how to get
    it."""
    items.sort(key=lambda item: [bool(item.get_closest_marker(m)) for m in ("vllm", "slow")])
    if hasattr(config, "workerinput"):  # one of several processes
        by_file.long_first(items)
    if wrong := vllm_version.wrong():
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason=wrong))


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """A real, empty Redis; the server lives as long as the session."""
    if redis_server.died():
        redis_server.start()
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def free_port() -> int:
    return unused_port()


def unused_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def processes() -> Iterator[Start]:
    """Starts `python -m ...` (or any command) in its own session; ends by id what still runs."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: str, **options: Any) -> subprocess.Popen[str]:
        options = {"cwd": TOP, "text": True, "start_new_session": True, **options}
        process = subprocess.Popen(_command(command), **options)
        started.append(process)
        return process

    yield start
    for process in started:
        _end(process)


def _command(command: Sequence[str]) -> list[str]:
    return [sys.executable, *command] if command[0].startswith("-") else list(command)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait(5)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
