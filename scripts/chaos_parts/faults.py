"""Faults happen and are healed again: who does what to whom."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from chaos_parts.plan import Fault
from chaos_parts.stage import Stage

VANDAL = Path(__file__).resolve().parent / "vandal.py"
VANDAL_S = 20.0  # for one that is still at work when all is healed
COUNTED = {  # kind's first word: the number it adds to
    "kill": "kills",
    "stop": "stops",
    "cut": "cuts",
    "slow": "slowed",
    "fill": "fills",
    "corrupt": "corruptions",
    "leave": "leaves",
}


class Faults:
    def __init__(self, stage: Stage, note: Callable[[str], None]) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTED.values(), 0))
        self.missed = 0  # whom there was nobody to strike
        self._stage, self._note = stage, note
        self._healing: list[tuple[float, str, str]] = []  # when, kind, target
        self._vandals: list[tuple[str, subprocess.Popen[bytes]]] = []  # what they damage

    def strike(self, fault: Fault) -> None:
        act, _, whom = fault.kind.partition(" ")
        if act == "corrupt" and self._vandalise(whom, fault.seed):
            return  # counted when it has ended, by what it says
        if act != "corrupt" and self._struck(fault):
            self.counts[COUNTED[act]] += 1
            lasting = f" for {fault.seconds:.1f} s" if fault.seconds else ""
            self._note(f"{fault.kind} ({fault.target}){lasting}")
        else:
            self.missed += 1

    def heal(self, everything: bool = False) -> None:
        """What is over by now, or all of it."""
        now = time.monotonic()
        over = [each for each in self._healing if everything or each[0] <= now]
        for each in over:
            self._healing.remove(each)
            self._heal(*each[1:])
        for kind, vandal in [*self._vandals]:
            if everything:
                with suppress(subprocess.TimeoutExpired):
                    vandal.wait(VANDAL_S)
            if vandal.poll() is not None:
                self._vandals.remove((kind, vandal))
                self._count(kind, vandal)

    def close(self) -> None:
        for _, vandal in self._vandals:
            vandal.kill()
            vandal.communicate()

    def _count(self, kind: str, vandal: subprocess.Popen[bytes]) -> None:
        """A corruption is one if the vandal came to its end and says that it struck."""
        said = vandal.communicate()[0].strip()
        times = int(said) if vandal.returncode == 0 and said.isdigit() else 0
        if times:
            self.counts[COUNTED["corrupt"]] += 1
            self._note(f"corrupt {kind}: {times} times")
        else:
            self.missed += 1
            self._note(f"corrupt {kind}: nothing was struck (exit {vandal.returncode})")

    def _struck(self, fault: Fault) -> bool:
        cluster, target = self._stage.cluster, fault.target
        act, _, whom = fault.kind.partition(" ")
        if self._is_ailing(act, target):
            return False
        if act == "kill":
            done = self._kill(whom, target, fault.seed)
        elif act == "leave":
            return cluster.leave(target)
        elif act == "stop":
            done = cluster.stop(target)
        elif act == "fill":
            done = self._fill()
        else:
            getattr(self._stage.ground, act)(target)
            done = True
        if done and fault.seconds:
            self._healing.append((time.monotonic() + fault.seconds, act, target))
        return done

    def _kill(self, whom: str, target: str, choice: int) -> bool:
        cluster = self._stage.cluster
        if whom == "rank":
            return cluster.kill_rank(target, choice)
        return cluster.kill_part(target, choice) if whom == "part" else cluster.kill(target)

    def _is_ailing(self, act: str, target: str) -> bool:
        """The same again, or a link that is cut or slow already."""
        links = ("cut", "slow")
        ill = {kind for _, kind, who in self._healing if who == target or kind == "fill" == act}
        return act in ill or (act in links and bool(ill.intersection(links)))

    def _fill(self) -> bool:
        self._stage.disk_was_full = True
        self._stage.disk.fill()
        return True

    def _heal(self, act: str, target: str) -> None:
        if act == "stop":
            self._stage.cluster.go_on(target)
        elif act == "fill":
            self._stage.disk.empty()
        else:
            self._stage.ground.heal(target)
        self._note(f"healed: {act} ({target})")

    def _vandalise(self, what: str, seed: int) -> bool:
        stage = self._stage
        if what == "blob" and stage.store == "learner":
            return False  # they lie in the learner's memory
        what = "file" if what == "blob" and stage.store != "redis" else what
        where = {"message": stage.endpoint, "file": stage.store.removeprefix("file:")}
        keys = [stage.keys["actor"]] if what == "message" else []
        words = [sys.executable, str(VANDAL), what, where.get(what, stage.redis_url), str(seed)]
        with (stage.logs / "vandal.log").open("ab") as log:
            vandal = subprocess.Popen(
                stage.ground.enter("vandal", [*words, *keys]), stdout=subprocess.PIPE, stderr=log
            )
        self._vandals.append((what, vandal))
        return True
