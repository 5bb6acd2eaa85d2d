"""Processes are restarted within budgets, drained on request, and never left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from common.redis_server import RedisServer
from common.supervise import Child, ChildFailed, Supervisor

FOREVER = "import signal; signal.pause()"


class Notes:
    """Collects what the supervisor tells people, and calls `look` at every picture."""

    def __init__(self, look: Callable[[], None] = lambda: None) -> None:
        self.said: list[str] = []
        self.refresh = look

    def note(self, text: str) -> None:
        self.said.append(text)


def child(folder: Path, name: str, *codes: str, budget: int = 3) -> Child:
    """A process whose n-th life runs the n-th code; the last code stays."""

    def command(life: int) -> list[str]:
        return [sys.executable, "-c", codes[min(life, len(codes) - 1)]]

    return Child(name, command, folder / f"{name}.log", budget)


def killed_by(signum: int) -> str:
    return f"import os; os.kill(os.getpid(), {signum})"


def after(path: Path) -> str:
    """Ends well as soon as `path` exists."""
    return f"import os, time\nwhile not os.path.exists({str(path)!r}): time.sleep(0.01)"


def test_a_learner_that_ends_well_ends_the_run_and_its_actors(tmp_path: Path) -> None:
    actors = [child(tmp_path, "actor-0", "pass"), child(tmp_path, "actor-1", "pass")]
    supervisor = Supervisor(child(tmp_path, "learner", "pass"), actors, None, Notes())
    supervisor.run()
    assert supervisor.restarts() == {"learner": 0, "actor-0": 0, "actor-1": 0, "redis": 0}
    assert all(actor.process is None or actor.process.poll() == 0 for actor in actors)


def test_a_learner_killed_by_a_signal_is_started_again(tmp_path: Path) -> None:
    notes = Notes()
    learner = child(tmp_path, "learner", killed_by(9), killed_by(11), "pass")
    Supervisor(learner, [], None, notes).run()
    assert learner.restarts == 2
    assert "learner killed by SIGKILL; started with --resume (1 of 3)" in notes.said


def test_a_learner_that_dies_again_and_again_ends_the_run_with_its_last_line(
    tmp_path: Path,
) -> None:
    learner = child(tmp_path, "learner", f"print('so it was', flush=True); {killed_by(9)}")
    with pytest.raises(ChildFailed, match="3 restarts are spent: so it was"):
        Supervisor(learner, [], None, Notes()).run()


@pytest.mark.parametrize("code", [1, 2, 3])
def test_an_error_of_the_learner_ends_the_run_with_its_exit_code_and_line(
    tmp_path: Path, code: int
) -> None:
    learner = child(tmp_path, "learner", f"import sys; print('what is wrong'); sys.exit({code})")
    actor = child(tmp_path, "actor-0", FOREVER)
    with pytest.raises(ChildFailed, match="what is wrong") as caught:
        Supervisor(learner, [actor], None, Notes()).run()
    assert caught.value.exit_code == code
    assert not _runs(actor)


def test_an_actor_that_dies_is_started_again_while_the_learner_goes_on(tmp_path: Path) -> None:
    done = tmp_path / "done"
    actor = child(tmp_path, "actor-0", killed_by(9), f"open({str(done)!r}, 'w')")
    Supervisor(child(tmp_path, "learner", after(done)), [actor], None, Notes()).run()
    assert actor.restarts == 1


def test_an_actor_that_is_misconfigured_ends_the_run(tmp_path: Path) -> None:
    actor = child(tmp_path, "actor-0", "import sys; print('wrong digest'); sys.exit(2)")
    with pytest.raises(ChildFailed, match="wrong digest") as caught:
        Supervisor(child(tmp_path, "learner", FOREVER), [actor], None, Notes()).run()
    assert caught.value.exit_code == 2


def test_the_run_goes_on_without_an_actor_whose_restarts_are_spent(tmp_path: Path) -> None:
    spent = tmp_path / "spent"
    bad = child(tmp_path, "actor-0", killed_by(9), budget=1)
    notes = Notes(lambda: spent.touch() if any("spent" in s for s in notes.said) else None)
    learner = child(tmp_path, "learner", after(spent))
    Supervisor(learner, [bad, child(tmp_path, "actor-1", after(spent))], None, notes).run()
    assert any("going on without" in said for said in notes.said)


def test_a_redis_that_dies_is_started_again_empty_on_the_same_port(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    done = tmp_path / "done"
    seen: list[str] = []

    def look() -> None:
        if server.process is None:
            return
        if not seen:
            seen.append(server.url)
            with redis.Redis.from_url(server.url) as client:
                client.set("soft", "state")
            server.process.kill()
            server.process.wait()
        elif server.process.poll() is None:
            with redis.Redis.from_url(server.url) as client:
                assert client.get("soft") is None
            seen.append(server.url)
            done.touch()

    supervisor = Supervisor(child(tmp_path, "learner", after(done)), [], server, Notes(look))
    supervisor.run()
    assert supervisor.restarts()["redis"] == 1
    assert seen[0] == seen[1]
    assert server.process is None


def test_the_first_signal_drains_the_learner_before_the_actors(tmp_path: Path) -> None:
    drains = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('checkpoint taken'), sys.exit(143)))\n"
        "print('ready', flush=True)\nsignal.pause()"
    )
    learner, actor = child(tmp_path, "learner", drains), child(tmp_path, "actor-0", FOREVER)
    asked = threading.Event()

    def look() -> None:
        if not asked.is_set() and learner.log.exists() and "ready" in learner.log.read_text():
            asked.set()
            os.kill(os.getpid(), signal.SIGINT)

    supervisor = Supervisor(learner, [actor], None, Notes(look))
    supervisor.run()
    assert supervisor.stopped_by == signal.SIGINT
    assert "checkpoint taken" in learner.log.read_text()
    assert learner.restarts == 0
    assert not _runs(actor)


def test_the_second_signal_kills_what_does_not_drain(tmp_path: Path) -> None:
    stubborn = (
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True)\nwhile True: signal.pause()"
    )
    learner = child(tmp_path, "learner", stubborn)

    def look() -> None:
        if _runs(learner) and learner.log.exists() and "ready" in learner.log.read_text():
            os.kill(os.getpid(), signal.SIGINT)

    supervisor = Supervisor(learner, [], None, Notes(look))
    began = time.monotonic()
    supervisor.run()
    assert time.monotonic() - began < 60
    assert not _runs(learner)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of a parent's death")
def test_no_child_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    with _supervising(tmp_path) as process:
        pids = [int(word) for word in _line(process).split()]
        assert all(_exists(pid) for pid in pids)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60
        while any(_exists(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not [pid for pid in pids if _exists(pid)]


@contextlib.contextmanager
def _supervising(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with a Redis, a learner and an actor; it prints their ids."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from common.redis_server import RedisServer\n"
        "from common.supervise import Child, Supervisor\n"
        f"folder = Path({str(folder)!r})\n"
        f"command = lambda life: [sys.executable, '-c', {FOREVER!r}]\n"
        "learner, actor = (Child(n, command, folder / n, 1) for n in ('learner', 'actor'))\n"
        "redis = RedisServer(folder)\n"
        "class View:\n"
        "    def note(self, text): pass\n"
        "    def refresh(self):\n"
        "        print(*(p.process.pid for p in (learner, actor, redis)), flush=True)\n"
        "Supervisor(learner, [actor], redis, View()).run()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _exists(pid: int) -> bool:
    """It runs: a zombie, whose parent is not the one who looks, does not count."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _runs(one: Child) -> bool:
    return one.process is not None and one.process.poll() is None
