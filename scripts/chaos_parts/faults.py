"""Faults happen and are healed again: who does what to whom, and whether it was seen to happen.

A fault counts once its effect was seen from outside (effects.py; a vandal says what it changed or
what it was answered). `missed`: there was nobody to strike; `unseen`: struck, and nothing was seen.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from chaos_parts import effects
from chaos_parts import vandal as vandals
from chaos_parts.effects import Part, Seen
from chaos_parts.plan import Fault
from chaos_parts.stage import Stage

VANDAL = Path(__file__).resolve().parent / "vandal.py"
VANDAL_S = 30.0  # for one that is still at work when all is healed
SEEN_S = 10.0  # until an effect has to be seen …
LEFT_S = 60.0  # … and that of being asked to leave
COUNTED = {  # kind's first word: the number it adds to
    "kill": "kills",
    "stop": "stops",
    "cut": "cuts",
    "slow": "slowed",
    "fill": "fills",
    "corrupt": "corruptions",
    "leave": "leaves",
}


class Ill(NamedTuple):
    """What lasts, and how it ends."""

    until: float
    kind: str
    target: str
    undo: Callable[[], None]


class Faults:
    def __init__(self, stage: Stage, note: Callable[[str], None]) -> None:
        self.by_kind: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self.unseen: Counter[str] = Counter()
        self._stage, self._note = stage, note
        self._ills: list[Ill] = []
        self._doubtful: list[tuple[float, str, Seen]] = []  # until when, kind, what has to be seen
        self._vandals: list[tuple[str, subprocess.Popen[bytes]]] = []  # and of what kind

    def counts(self) -> dict[str, int]:
        numbers = dict.fromkeys(COUNTED.values(), 0)
        for kind, count in self.by_kind.items():
            numbers[COUNTED[kind.partition(" ")[0]]] += count
        return numbers

    @property
    def is_anything_ill(self) -> bool:
        return bool(self._ills)

    def strike(self, fault: Fault) -> None:
        act, _, whom = fault.kind.partition(" ")
        if act == "corrupt":
            self._vandalise(fault.kind, whom, fault.seed)
            return
        seen = None if self._is_ailing(act, fault.target) else self._struck(fault, act, whom)
        if seen is None:
            self.missed[fault.kind] += 1
            return
        lasting = f" for {fault.seconds:.1f} s" if fault.seconds else ""
        self._note(f"{fault.kind} ({fault.target}){lasting}")
        patience_s = LEFT_S if act == "leave" else SEEN_S
        self._doubtful.append((time.monotonic() + patience_s, fault.kind, seen))
        self._look()

    def heal(self, everything: bool = False) -> None:
        """What is over by now, or all of it."""
        self._look()
        now = time.monotonic()
        for ill in [ill for ill in self._ills if everything or ill.until <= now]:
            self._ills.remove(ill)
            ill.undo()
            self._note(f"healed: {ill.kind} ({ill.target})")
        for kind, vandal in [*self._vandals]:
            if everything:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    vandal.wait(VANDAL_S)
            if vandal.poll() is not None:
                self._vandals.remove((kind, vandal))
                self._judge(kind, vandal)

    def close(self) -> None:
        for _, vandal in self._vandals:
            vandal.kill()
            vandal.communicate()

    def _look(self) -> None:
        now = time.monotonic()
        for each in [*self._doubtful]:
            until, kind, seen = each
            if seen():
                self.by_kind[kind] += 1
            elif now > until:
                self.unseen[kind] += 1
                self._note(f"{kind}: nothing was seen of it")
            else:
                continue
            self._doubtful.remove(each)

    def _judge(self, kind: str, vandal: subprocess.Popen[bytes]) -> None:
        """A corruption is one if the vandal came to its end and says that it struck."""
        said = vandal.communicate()[0].strip()
        if vandal.returncode == vandals.ADMITTED:
            self._stage.cluster.violations.append("a result that lies was acknowledged")
        times = int(said) if vandal.returncode == 0 and said.isdigit() else 0
        if times:
            self.by_kind[kind] += 1
            self._note(f"{kind}: {times} times")
        else:
            self.unseen[kind] += 1
            self._note(f"{kind}: nothing was struck (exit {vandal.returncode})")

    # ---- one kind after the other: what has to be seen, or None when there is nobody to strike --

    def _struck(self, fault: Fault, act: str, whom: str) -> Seen | None:
        if whom in ("grader", "engine", "rank"):
            return self._strike_part(fault, act, whom)
        if act in ("cut", "slow"):
            return self._strike_link(fault, act)
        if act == "fill":
            return self._fill(fault)
        cluster, process = self._stage.cluster, self._stage.cluster[fault.target].process
        if process is None:
            return None
        if act == "leave":
            return effects.ended(process, 0) if cluster.leave(fault.target) else None
        if act == "kill":
            killed = cluster.kill(fault.target)
            return effects.ended(process, -signal.SIGKILL) if killed else None
        if not cluster.stop(fault.target):
            return None
        self._lasts(fault, lambda: cluster.go_on(fault.target))
        return effects.asleep([process.pid])

    def _strike_part(self, fault: Fault, act: str, whom: str) -> Seen | None:
        cluster = self._stage.cluster
        parts = [] if cluster[fault.target].stopped else cluster[fault.target].parts(whom)
        if not parts or (fault.kind == "kill rank" and not cluster.expect_rank(fault.target)):
            return None
        try:
            part = Part(parts[fault.seed % len(parts)])
            part.signal(signal.SIGKILL if act == "kill" else signal.SIGSTOP)
        except ProcessLookupError:
            return None
        if act == "stop":
            self._lasts(fault, lambda: _wake(part))
            return effects.asleep([part.pid])
        if whom == "engine":
            cluster[fault.target].engine_killed = cluster[fault.target].lives
        part.close()
        return effects.gone(part.pid)

    def _strike_link(self, fault: Fault, act: str) -> Seen:
        ground, host = self._stage.ground, fault.target
        getattr(ground, act)(host)
        self._lasts(fault, lambda: ground.heal(host))
        return lambda: ground.is_cut(host) if act == "cut" else ground.is_slow(host)

    def _fill(self, fault: Fault) -> Seen:
        stage = self._stage
        stage.disk_was_full = True
        stage.disk.fill()
        self._lasts(fault, stage.disk.empty)
        return stage.disk.is_full

    def _lasts(self, fault: Fault, undo: Callable[[], None]) -> None:
        until = time.monotonic() + fault.seconds
        self._ills.append(Ill(until, fault.kind, fault.target, undo))

    def _is_ailing(self, act: str, target: str) -> bool:
        """The same again, or a link that is cut or slow already."""
        links = ("cut", "slow")
        ills = [ill for ill in self._ills if ill.target == target or act == "fill"]
        acts = {ill.kind.partition(" ")[0] for ill in ills}
        return act in acts or (act in links and bool(acts.intersection(links)))

    def _vandalise(self, kind: str, what: str, seed: int) -> None:
        stage = self._stage
        what = "file" if what == "blob" and stage.store != "redis" else what
        where = {
            "message": stage.endpoint,
            "result": stage.endpoint,
            "file": stage.store.removeprefix("file:"),
        }
        more = {
            "message": [stage.keys["actor"]],
            "result": [stage.keys["actor"], str(stage.recipe)],
        }
        words = [sys.executable, str(VANDAL), what, where.get(what, stage.redis_url), str(seed)]
        words += more.get(what, [])
        with (stage.logs / "vandal.log").open("ab") as log:
            vandal = subprocess.Popen(
                stage.ground.enter("vandal", words), stdout=subprocess.PIPE, stderr=log
            )
        self._vandals.append((kind, vandal))


def _wake(part: Part) -> None:
    with contextlib.suppress(ProcessLookupError):
        part.signal(signal.SIGCONT)
    part.close()
