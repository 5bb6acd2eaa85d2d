"""A chaos run from its beginning to its verdict; every wait has a deadline.

settle   the first steps are made (START_S)
act      faults by the plan, healed when they are over; whoever ended is started again
calm     all is healed: more steps, every actor there (CALM_S)
end      SIGTERM to the learner: it drains, takes a checkpoint (END_S)
judge    audit, replay, resume, each with a deadline
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos_parts.faults import Faults
from chaos_parts.plan import KINDS, plan
from chaos_parts.stage import Stage
from chaos_parts.verdict import judge

START_S, CALM_S, END_S = 240.0, 240.0, 180.0
TICK_S = 0.1
CALM_STEPS = 4


class Stopped(Exception):
    """Ctrl-C or SIGTERM."""


class Conductor:
    def __init__(self, chosen: argparse.Namespace, work: Path) -> None:
        self.chosen, self.violations = chosen, list[str]()
        self.stop = threading.Event()
        self.began = time.monotonic()
        self.stage = Stage(
            work,
            chosen.name,
            chosen.actors,
            loopback=chosen.loopback,
            minutes=chosen.minutes,
            store=chosen.store,
            ranks=chosen.ranks,
            engines=chosen.engines.split(","),
        )
        self.faults = Faults(self.stage, self.note)

    def note(self, text: str) -> None:
        print(
            f"{time.monotonic() - self.began:7.1f} s  step {self.stage.step():5d}  {text}",
            file=sys.stderr,
            flush=True,
        )

    def run(self) -> dict[str, Any]:
        self.stage.populate()
        self._until("the first steps", START_S, lambda: self.stage.step() >= 2)
        self._act()
        self.faults.heal(everything=True)
        self.note("all is healed")
        self._calm()
        self._end()
        return self._verdict()

    def close(self) -> None:
        self.faults.close()
        self.stage.close()

    def _act(self) -> None:
        began, seconds = time.monotonic(), 60.0 * self.chosen.minutes
        stage = self.stage
        left = plan(
            self.chosen.seed, self.chosen.minutes, stage.actors, stage.possible(KINDS), stage.apart
        )
        while (now := time.monotonic() - began) < seconds:
            while left and left[0].at <= now:
                self.faults.strike(left.pop(0))
            self.faults.heal()
            self._tick()

    def _calm(self) -> None:
        first, wanted = self.stage.step(), set(self.stage.actors)

        def calm() -> bool:
            status = self.stage.status()
            if status is None or time.time() - status.at > 5:
                return False
            return status.step >= first + CALM_STEPS and wanted <= set(status.actors)

        self._until("steps and every actor after all was healed", CALM_S, calm)

    def _end(self) -> None:
        """Polite: the actors are sent away by the learner, which is the last to go."""
        cluster = self.stage.cluster
        cluster.expect_the_end()
        learner = cluster["learner"]
        process = learner.process
        cluster.leave("learner")
        self._until("the learner's end", END_S, lambda: not learner.up)
        if process is not None and process.poll() != 0:
            self.violations.append(
                f"the learner ended with exit {process.poll()}: {learner.last_words()[:300]}"
            )
        for name in self.stage.actors:
            cluster.leave(name)

    def _verdict(self) -> dict[str, Any]:
        self.note("the cluster has ended; audit, replay and resume")
        numbers, wrong = judge(self.stage, 60.0 * self.chosen.minutes)
        self.violations += [*self.stage.cluster.violations, *wrong]
        counts = self.faults.counts()
        return {
            **counts,
            "faults": sum(counts.values()),
            "by_kind": dict(sorted(self.faults.by_kind.items())),
            "missed": dict(self.faults.missed),
            "unseen": dict(self.faults.unseen),
            **numbers,
            "minutes": self.chosen.minutes,
            "seed": self.chosen.seed,
            "hosts": "namespaces" if self.stage.ground.cuttable else "loopback",
            "left_out": self.stage.left_out,
            "violations": len(self.violations),
            "what": self.violations,
        }

    def _until(self, what: str, within_s: float, holds: Callable[[], bool]) -> None:
        """A wait that is not fulfilled is a violation, and the run goes on to its verdict."""
        deadline = time.monotonic() + within_s
        while not holds():
            if time.monotonic() > deadline:
                self.violations.append(f"waited {within_s:.0f} s in vain for {what}")
                return
            self._tick()

    def _tick(self) -> None:
        self.stage.cluster.tick()
        if self.stop.wait(TICK_S):
            raise Stopped


def conduct(chosen: argparse.Namespace) -> int:
    """Its exit code."""
    with alone(chosen.name):
        work = chosen.out or Path(tempfile.mkdtemp(prefix=f"{chosen.name}-"))
        work.mkdir(parents=True, exist_ok=True)
        conductor = Conductor(chosen, work.resolve())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: conductor.stop.set())
        keep = True
        try:
            line = conductor.run()
            keep = bool(line["violations"] or chosen.out)
            line["folder"] = str(work) if keep else ""
        except Stopped:
            conductor.note("stopped")
            return 130
        finally:
            conductor.stage.keep = work / "kept" if keep else None
            conductor.close()
            if not keep:
                shutil.rmtree(work)
    if chosen.json:
        print(json.dumps(line))
    else:
        print("\n".join(f"{name:20} {value}" for name, value in line.items()))
    return 1 if line["violations"] else 0


def alone(name: str) -> Any:
    """A lock a name: whatever else is called so belongs to a run that is dead."""
    lock = (Path(tempfile.gettempdir()) / f"{name}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"a chaos run called {name} is under way; give another --name or --seed")
    return lock
