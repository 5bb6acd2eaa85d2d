"""Training while somebody floods the learner's port, against the same flood at another port.

A learner behind CURVE and a scripted actor train as fast as they can. Two floods, one after the
other, each for rounds of two windows: at the learner's port, and at a port of another process.

    strangers   connections that end in nothing: noise, a handshake without keys, a recorded
                handshake of a real actor sent again
    insider     one connection with a listed key, whose frames are no messages

`ratio_*` = steps a second in all first windows / in all second ones, by the times that the steps'
lines say; `spread_*`: the lowest and the highest of the rounds, which is how well it is known.
`cpu_us_per_*` = CPU of the learner's threads but the one that trains (desk, journal, ZeroMQ) in the
first window beyond that of the second, a knock. `admitted_from_others`: groups in the journal that
are not the actor's. `lost`: results that were acknowledged and are not in the journal, or tickets
without a fate.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

TOP = Path(__file__).resolve().parents[2]
WINDOW_S, ROUNDS = 8.0, 7
STRANGERS_PER_S, INSIDER_PER_S = 100.0, 2000.0
START_S = 180.0
FAST = {"slots": "64", "scripted.tokens_per_s": "2000.0"}
LIMITS = {
    "ratio_strangers": (">=", 0.9),
    "ratio_insider": (">=", 0.9),
    "admitted_from_others": ("<=", 0.0),
    "lost": ("<=", 0.0),
}


class Window(NamedTuple):
    steps: int
    seconds: float
    cpu_share: float  # of one core, of the learner's threads that do not train
    knocks_per_s: float


def bench() -> dict[str, object]:
    sys.path.append(str(TOP / "scripts"))
    from chaos_parts.stage import Stage

    work = Path(tempfile.mkdtemp(prefix="intruder-"))
    stage = Stage(work, "intruder", 1, loopback=True, minutes=5, settings=FAST)
    elsewhere = f"tcp://127.0.0.1:{stage.ground.port(0)}"
    sink = _process("sink", elsewhere, stage.keys["learner"])
    try:
        stage.populate()
        _until(stage, lambda: stage.step() >= 5)
        numbers = _floods(stage, elsewhere, work)
        stage.cluster.expect_the_end()
        stage.cluster.leave("learner")
        _until(stage, lambda: not stage.cluster["learner"].up)
        return {**numbers, **_entered(stage)}
    finally:
        sink.kill()
        sink.wait()
        stage.close()
        shutil.rmtree(work)


def _floods(stage: Any, elsewhere: str, work: Path) -> dict[str, object]:
    recorded = work / "handshake"
    recorded.write_bytes(record_handshake(stage.endpoint, stage.keys["actor"]))
    numbers: dict[str, object] = {}
    floods = (
        ("strangers", STRANGERS_PER_S, str(recorded)),
        ("insider", INSIDER_PER_S, stage.keys["actor"]),
    )
    for name, per_s, how in floods:
        pairs = []
        for turn in range(ROUNDS):
            places = [stage.endpoint, elsewhere]
            both = [
                _window(stage, name, place, per_s, how) for place in places[:: 1 - 2 * (turn % 2)]
            ]
            pairs.append(both[:: 1 - 2 * (turn % 2)])
        numbers |= _summary(name, pairs)
    return numbers


def _summary(name: str, pairs: list[list[Window]]) -> dict[str, object]:
    here, there = ([pair[i] for pair in pairs] for i in (0, 1))
    extra = [
        1e6 * (a.cpu_share - b.cpu_share) / a.knocks_per_s for a, b in zip(here, there, strict=True)
    ]
    ratios = [_pace([a]) / _pace([b]) for a, b in zip(here, there, strict=True)]
    return {
        f"ratio_{name}": round(_pace(here) / _pace(there), 3),
        f"spread_{name}": f"{min(ratios):.2f} to {max(ratios):.2f}",
        f"steps_per_s_{name}": round(_pace(here), 2),
        f"steps_per_s_{name}_elsewhere": round(_pace(there), 2),
        f"knocks_per_s_{name}": round(statistics.median(w.knocks_per_s for w in here), 1),
        f"cpu_us_per_{name}_knock": round(statistics.median(extra), 1),
    }


def _window(stage: Any, flood: str, endpoint: str, per_s: float, how: str) -> Window:
    learner = stage.cluster["learner"].process
    assert learner is not None
    process = _process(flood, endpoint, str(per_s), how)
    time.sleep(1.0)  # until it floods; a pace has no event
    began, cpu, (steps, at) = time.monotonic(), _cpu_s(learner.pid), _steps(stage)
    _until(stage, lambda: time.monotonic() - began >= WINDOW_S)
    seconds = time.monotonic() - began
    cpu_share, (later, end) = (_cpu_s(learner.pid) - cpu) / seconds, _steps(stage)
    process.terminate()
    knocks, _ = process.communicate(timeout=20)
    return Window(later - steps, end - at, cpu_share, int(knocks) / (seconds + 1.0))


def _pace(windows: list[Window]) -> float:
    return sum(window.steps for window in windows) / sum(window.seconds for window in windows)


def _steps(stage: Any) -> tuple[int, float]:
    """So many, and when the last of them ended, by the lines of metrics.jsonl."""
    *_, last, _rest = (lines := (stage.run_folder / "metrics.jsonl").read_text().split("\n"))
    return len(lines) - 1, float(json.loads(last)["time"])


def _cpu_s(pid: int) -> float:
    """Of all threads of a process but its first, which has the process' number."""
    threads = [p for p in Path(f"/proc/{pid}/task").iterdir() if p.name != str(pid)]
    stats = [(p / "stat").read_text().rpartition(")")[2].split() for p in threads]
    ticks = sum(int(fields[11]) + int(fields[12]) for fields in stats)
    return ticks / os.sysconf("SC_CLK_TCK")


def _until(stage: Any, holds: Any) -> None:
    deadline = time.monotonic() + START_S
    while not holds():
        stage.cluster.tick()
        if stage.cluster.violations or time.monotonic() > deadline:
            raise RuntimeError(f"{stage.cluster.violations or 'no progress'}; {stage.work}")
        time.sleep(0.05)


def _entered(stage: Any) -> dict[str, object]:
    """What is in the journal that should not be, and what is not and should."""
    from common.audit import audit
    from common.codec import Codec
    from common.journal import read
    from common.records import Admit
    from common.wire import FromActor

    codec, admitted, others = Codec(FromActor, 1 << 30), set[int](), 0
    for _, record in read(stage.run_folder / "journal"):
        if isinstance(record, Admit):
            admitted.add(record.ticket)
            others += codec.decode(record.frame).actor not in stage.actors
    verdict = audit(stage.run_folder)
    lost = len(stage.acked() - admitted) + sum(not s.conserved for s in verdict.sums.values())
    return {
        "admitted_from_others": others,
        "lost": lost + len(verdict.violations),
        "groups_admitted": len(admitted),
    }


def record_handshake(endpoint: str, keys: str) -> bytes:
    """All that a real actor sends until it is heard, as a listener on the wire has it."""
    import zmq

    from common import channel
    from common import keys as key_files

    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    taken = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as between, zmq.Context() as context:
        dealer = channel.connect_dealer(
            context, f"tcp://127.0.0.1:{between.getsockname()[1]}", key_files.read(keys)
        )
        dealer.send(b"not a message")
        actor, _ = between.accept()
        with actor, socket.create_connection((host, int(port))) as learner:
            back = threading.Thread(target=_copy, args=(learner, actor, bytearray()), daemon=True)
            back.start()
            forth = threading.Thread(target=_copy, args=(actor, learner, taken), daemon=True)
            forth.start()
            assert dealer.poll(10_000), "the learner answers whoever has a listed key"
            dealer.close(0)
    return bytes(taken)


def _copy(source: socket.socket, target: socket.socket, taken: bytearray) -> None:
    try:
        while data := source.recv(1 << 16):
            taken += data
            target.sendall(data)
    except OSError:  # one end was closed: that is the end
        return


def _process(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", str(Path(__file__).with_name("_intruder.py")), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
