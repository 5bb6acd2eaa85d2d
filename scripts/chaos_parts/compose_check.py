"""A cluster of compose's services in namespaces, from keys to verdict."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos_parts import compose
from chaos_parts.cluster import Cluster, Member
from chaos_parts.conduct import Stopped, alone
from chaos_parts.hosts import Namespaces

from common import keys
from common.audit import audit
from common.redis_server import binary
from common.status import read as read_status

NAME = "icluster"
TARGET = 0.8
ACTORS = ("actor-1", "actor-2", "actor-3")
CUT = "actor-1"  # a torch one
# As in a container of its own: the secrets where compose puts them, who is called what.
ENTER = """
mount -t tmpfs none /run && mkdir /run/secrets && mount --bind "$1" /run/secrets
mount --bind "$2" /etc/hosts && echo "$3" > /proc/sys/kernel/hostname && shift 3 && exec "$@"
"""


class Check:
    def __init__(self, chosen: argparse.Namespace, work: Path) -> None:
        self.chosen, self.work = chosen, work
        self.stop, self.began = threading.Event(), time.monotonic()
        self.ground = Namespaces(NAME, ["learner", "redis", *ACTORS])
        self.cluster = Cluster(lambda member, words: False)
        self.run_folder = work / "runs" / "run"
        self._prepare()

    def close(self) -> None:
        self.cluster.close()
        self.ground.close()

    def run(self) -> dict[str, Any]:
        for name in ("redis", "learner", *ACTORS):
            self.cluster.add(self._member(name))
        self._until(lambda: self.step() >= 8 and CUT in self._connected())
        self.note(f"{CUT} is cut off")
        self.ground.cut(CUT)
        self._until_time(self.chosen.cut)
        at, gone = self.step(), CUT not in self._connected()
        self.ground.heal(CUT)
        self.note(f"healed; the learner had {'noticed' if gone else 'not noticed'}")
        self._until(lambda: CUT in self._connected() or self._is_over())
        heard = CUT in self._connected()
        self._until(self._is_over)
        return self._verdict(at, gone, heard)

    def step(self) -> int:
        status = read_status(self.run_folder)
        return status.step if status is not None else -1

    def note(self, text: str) -> None:
        seconds = time.monotonic() - self.began
        print(f"{seconds:7.1f} s  step {self.step():4d}  {text}", file=sys.stderr, flush=True)

    def _verdict(self, cut_until_step: int, gone: bool, heard: bool) -> dict[str, Any]:
        summary = json.loads((self.run_folder / "summary.json").read_text())
        found = audit(self.run_folder)
        wrong = [*self.cluster.violations, *found.violations]
        after = summary.get("heldout_after") or 0.0
        good = after >= TARGET and not wrong and heard
        return {
            "ok": good,
            "ranks": self.chosen.ranks,
            "engines": ["vllm" if self._is_vllm(name) else "torch" for name in ACTORS],
            "heldout_before": summary.get("heldout_before"),
            "heldout_after": after,
            "steps": summary["steps"],
            "cut_s": self.chosen.cut,
            "cut_until_step": cut_until_step,
            "noticed": gone,
            "heard_again": heard,
            "violations": len(wrong),
            "what": wrong,
            "wall_s": round(time.monotonic() - self.began, 1),
        }

    # ---- the services ----------------------------------------------------------------------------

    def _prepare(self) -> None:
        for name in ("secrets", "runs", "weights", "models", "recipes", "redis", "bin", "logs"):
            (self.work / name).mkdir()
        keys.make(self.work / "secrets")
        for side in ("learner", "actor"):
            made = self.work / "secrets" / f"{side}.json"
            made.rename(made.with_name(f"{side}_keys"))
        (self.work / "secrets" / "redis_password").write_text(os.urandom(16).hex())
        names = ["localhost", "learner", "redis", *ACTORS]
        places = ["127.0.0.1", *map(self.ground.address, names[1:])]
        hosts = "".join(f"{at} {name}\n" for at, name in zip(places, names, strict=True))
        (self.work / "hosts").write_text(hosts)
        (self.work / "bin" / "redis-server").symlink_to(binary())

    def _member(self, name: str) -> Member:
        return Member(name, lambda life: self._command(name), self.work / "logs" / f"{name}.log")

    def _command(self, name: str) -> list[str]:
        """`unshare` becomes the shell, which becomes the command: one process id."""
        service = name.partition("-")[0]
        variables = {"RANKS": str(self.chosen.ranks), "REDIS_MEMORY": "512mb"}
        variables["ENGINE"] = "vllm" if self._is_vllm(name) else ""
        roots = ("runs", "weights", "models", "recipes")
        places = {f"/{root}": self.work / root for root in roots}
        if service == "redis":
            places["/tmp"] = self.work / "redis"
        wanted = compose.environment(service, variables) | {
            "HOSTNAME": name,
            "PATH": self._path(name),
        }
        words = [
            "env",
            *(f"{key}={value}" for key, value in (wanted | {"OMP_NUM_THREADS": "1"}).items()),
        ]
        inner = [*words, *compose.command(service, variables, places)]
        mine = [str(self.work / "secrets"), str(self.work / "hosts"), name]
        enter = ["unshare", "--mount", "--uts", "sh", "-c", ENTER, "sh", *mine]
        return self.ground.enter(name, [*enter, *inner])

    def _is_vllm(self, name: str) -> bool:
        return self.chosen.vllm_bin is not None and name == ACTORS[-1]

    def _path(self, name: str) -> str:
        ours = (
            self.chosen.vllm_bin.resolve() if self._is_vllm(name) else Path(sys.executable).parent
        )
        return f"{ours}:{self.work / 'bin'}:{os.environ['PATH']}"

    # ---- waiting ---------------------------------------------------------------------------------

    def _connected(self) -> set[str]:
        """Those whom the learner has heard lately."""
        status = read_status(self.run_folder)
        actors = status.actors if status is not None else {}
        return {name for name, actor in actors.items() if actor.silent_s < 5}

    def _is_over(self) -> bool:
        learner = self.cluster["learner"]
        if self.step() > 0 and (self.run_folder / "summary.json").exists():
            self.cluster.expect_the_end()
        return bool(learner.lives) and not learner.up and bool(learner.expected)

    def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            if time.monotonic() - self.began > 60 * self.chosen.minutes:
                raise TimeoutError(f"not done within {self.chosen.minutes:g} minutes; {self.work}")
            if self.cluster.violations:
                raise RuntimeError(f"{self.cluster.violations[0]}; {self.work}")
            self.cluster.tick()
            if self.stop.wait(0.1):
                raise Stopped

    def _until_time(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._until(lambda: time.monotonic() >= until)


def check(chosen: argparse.Namespace) -> int:
    """Its exit code."""
    with alone(NAME):
        work = (chosen.out or Path(tempfile.mkdtemp(prefix=f"{NAME}-"))).resolve()
        work.mkdir(parents=True, exist_ok=True)
        it = Check(chosen, work)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: it.stop.set())
        try:
            line = it.run()
        except Stopped:
            return 130
        finally:
            it.close()
    if line["ok"] and not chosen.out:
        shutil.rmtree(work)
    print(json.dumps(line))
    return 0 if line["ok"] else 1
