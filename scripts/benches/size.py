"""`isentrope size` against what really happens: one run's measurements predict other runs.

Real runs (`isentrope run`: learner, Redis, actors as processes) of the tiny task with the scripted
engine, whose sequences take time and no processor, so that learner and actors do not share cores.
The run with BASE actors is measured; the others are predicted from it alone.

    learner_idle_error    largest |predicted − measured| of the learner's idle share
    actor_idle_error      … of the actors'
    lag_error             … of the mean lag (steps)
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common.size import predict
from common.size_of import Measured, measure

TOP = Path(__file__).resolve().parents[2]
BASE, OTHERS = 2, (1, 4, 8)
STEPS = {1: 24, 2: 40, 4: 60, 8: 80}  # of so many actors: half a minute and more
LIMITS = {
    "learner_idle_error": ("<=", 0.1),
    "actor_idle_error": ("<=", 0.1),
    "lag_error": ("<=", 0.5),
}
SETTINGS = (
    'actor.engine="scripted"',
    "actor.slots=32",
    "actor.scripted.tokens_per_s=60",
    'learner.advantage="psr_nsr"',  # a scripted answer is never right, and all groups are used
    "learner.eval.first=false",
    "learner.eval.last=false",
    "learner.checkpoint_every=1000",
)


def bench() -> dict[str, object]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("ISENTROPE_BENCH_DIR", ".")) as folder:
        runs = {count: _run(Path(folder) / str(count), count) for count in (BASE, *OTHERS)}
    shape = runs[BASE].shape
    numbers: dict[str, object] = {}
    errors: dict[str, list[float]] = {"learner_idle": [], "actor_idle": [], "lag_mean": []}
    for count in OTHERS:
        predicted, measured = predict(shape, count)._asdict(), runs[count].numbers
        for name, found in errors.items():
            found.append(abs(predicted[name] - measured[name]))
            numbers[f"{name}_{count}"] = f"{predicted[name]:.2f} for {measured[name]:.2f}"
    return {
        "learner_idle_error": max(errors["learner_idle"]),
        "actor_idle_error": max(errors["actor_idle"]),
        "lag_error": max(errors["lag_mean"]),
        **numbers,
    }


def _run(out: Path, actors: int) -> Measured:
    command = [str(Path(sys.executable).with_name("isentrope")), "run", "tiny", "--out", str(out)]
    for setting in (*SETTINGS, f"learner.steps={STEPS[actors]}", f"actor.count={actors}"):
        command += ["-s", setting]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TOP)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return measure(out)
