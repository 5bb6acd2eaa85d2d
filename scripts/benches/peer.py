"""Isentrope against TRL's GRPOTrainer: training seconds to held-out accuracy 0.8, on two cores.

The same model, the same stream of sums in the same order, the same group size, groups a step,
learning rate, warm-up, Adam, clip range, token limit and temperature: the values of the recipe
`tiny`, handed to both. Both may use two cores: TRL as one process with two torch threads,
Isentrope as a learner and two actors of one thread each, its real Redis and all the rest. TRL is
installed by pinned versions in an environment of its own, `.venv-peer`, once. Its configuration is
the fastest that was found for it; `_peer_trl.py` says what was tried.

The clock. For TRL it runs from the start of `train()` to the end of each step, without what our
callback takes to save weights; one generation has warmed it up. For Isentrope it runs from the
moment when the first training group begins to be sampled (its admission in the journal, less the
time that its actor took for it) to the moment when the step's version is published. Imports,
loading and connecting are outside of both. Isentrope's checkpoints, one every `EVERY` steps, are
inside its clock.

Accuracy is measured afterwards, on saved weights, outside of both clocks and for both by the same
function: `PROBLEMS` held-out sums, sampled at T = 1 by transformers' `generate`. The time to 0.8 is
interpolated between the last evaluation below and the first one not below, from which on two in
a row are not below. A round is one seed; the ratio is the median over rounds of TRL's seconds over
ours.

It needs a quiet machine: two threads that wait for each other suffer from a third far more than
processes that do not, so a busy machine flatters Isentrope. `others_*` is the largest share of the
two cores' time that went to other processes; above `BUSY` the bench says that its ratio is void.

What is not the same, because it is what is compared: Isentrope samples while it trains, so its
data is up to `max_lag` versions old, and it replaces groups whose answers are all right or all
wrong instead of training on them; so it samples more prompts a step than TRL. `steps_*` and
`groups_*` show what each side needed.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import journal, metrics, models, recipe
from common.codec import Codec
from common.figures import BLUE, GREY, ORANGE, STYLE
from common.records import Admit, Issue
from common.wire import FromActor
from learner.config import LearnerConfig
from learner.prompts.arithmetic import draw
from scripts.benches._peer_judge import GOAL, PROBLEMS, Curve, Judge, crossing

LIMITS = {"ratio_time": (">=", 3.0)}
TOP = Path(__file__).resolve().parents[2]
PEER = TOP / ".venv-peer"
PINS = ("trl==1.16.0", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0")
SEEDS = (0, 1, 2)
STEPS, EVERY = 36, 2  # enough of both; steps between two evaluations
BUSY = 0.05
RECIPE = (
    "actor.count=2",
    "actor.threads=1",
    "learner.threads=1",
    "learner.eval.first=false",
    "learner.eval.last=false",
    f"learner.steps={STEPS}",
    f"learner.checkpoint_every={EVERY}",
    f"learner.keep_checkpoints={STEPS}",
)


def bench() -> dict[str, object]:
    python = environment()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # and so for every child
    config = recipe.load("tiny", {"learner": LearnerConfig}, RECIPE)["learner"]
    assert isinstance(config, LearnerConfig)
    rounds: list[dict[str, Curve]] = []
    with tempfile.TemporaryDirectory(prefix="peer-") as scratch:
        for seed in SEEDS:
            say(f"seed {seed}: {STEPS} steps by TRL")
            theirs = run_trl(python, config, seed, Path(scratch) / f"trl-{seed}")
            say(f"seed {seed}: {STEPS} steps by Isentrope")
            ours = run_isentrope(seed, Path(scratch) / f"isentrope-{seed}")
            rounds.append({"trl": theirs, "isentrope": ours})
        judge = Judge()
        for seed, sides in zip(SEEDS, rounds, strict=True):
            for name, curve in sides.items():
                say(f"seed {seed}: held-out accuracy of {name}")
                judge.measure(curve)
    numbers = compare(rounds)
    if not is_quiet(numbers):
        say("other processes took part of the two cores: this ratio is void, measure again alone")
    numbers["picture"] = str(picture(rounds, numbers))
    return {**numbers, "trl": PINS[0]}


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


# ---- the peer's environment ----------------------------------------------------------------------


def environment() -> Path:
    """The peer's Python; installed once for each set of pins."""
    constraints = (TOP / "constraints.txt").read_text().split()
    torch = next(line for line in constraints if line.startswith("torch=="))
    python, stamp, wanted = PEER / "bin/python", PEER / ".installed", "\n".join((torch, *PINS))
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    say(f"installing {torch}, {', '.join(PINS)} into {PEER.name}")
    call([sys.executable, "-m", "venv", str(PEER)])
    call([str(python), "-m", "pip", "install", torch])  # alone: this is the CPU build
    call([str(python), "-m", "pip", "install", torch, *PINS])
    stamp.write_text(wanted)
    return python


def call(command: Sequence[str], **environ: str) -> None:
    """Run to the end; what it says is shown only if it fails."""
    # Beside the peer's own packages only this checkout may be found.
    env = {**os.environ, "PYTHONPATH": str(TOP), "HF_HUB_OFFLINE": "1", **environ}
    done = subprocess.run(
        command, cwd=TOP, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        say(done.stdout.decode(errors="replace")[-4000:])
        raise SystemExit(f"failed with {done.returncode}: {' '.join(command)}")


def alone(command: Sequence[str], **environ: str) -> float:
    """`call`, and the share of our two cores' time that was not ours."""

    def times() -> tuple[float, float, float]:
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        ticks = sum(int(n) for line in lines if line[0] in cores for n in line[1:4])
        own = resource.getrusage(resource.RUSAGE_CHILDREN)
        return ticks / os.sysconf("SC_CLK_TCK"), own.ru_utime + own.ru_stime, time.monotonic()

    before = times()
    call(command, **environ)
    busy, own, wall = (b - a for a, b in zip(before, times(), strict=True))
    return max(0.0, (busy - own) / (wall * len(os.sched_getaffinity(0))))


# ---- two runs ------------------------------------------------------------------------------------


def run_trl(python: Path, config: LearnerConfig, seed: int, folder: Path) -> Curve:
    folder.mkdir()
    wanted = (
        "group_size groups_per_step max_tokens temperature lr warmup_steps betas weight_decay "
        "clip_low clip_high grad_clip steps"
    )
    problems = [draw(seed, i, "train") for i in range(config.steps * config.groups_per_step)]
    settings = {name: getattr(config, name) for name in wanted.split()}
    settings |= {"model": str(models.find("tiny")), "seed": seed, "threads": 2, "every": EVERY}
    settings["problems"] = [{"prompt": p.text, "answer": p.answer} for p in problems]
    path = folder / "settings.json"
    path.write_text(json.dumps(settings))
    program = str(TOP / "scripts/benches/_peer_trl.py")
    others = alone([str(python), "-P", program, str(path), str(folder)], OMP_NUM_THREADS="2")
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return Curve(
        seconds={line["step"]: line["seconds"] for line in lines},
        weights={t: folder / f"version-{t}.safetensors" for t in points()},
        groups={line["step"]: line["step"] * config.groups_per_step for line in lines},
        others=others,
        accuracy={},
    )


def run_isentrope(seed: int, folder: Path) -> Curve:
    overrides = [part for value in (*RECIPE, f"run.seed={seed}") for part in ("-s", value)]
    program = str(Path(sys.executable).with_name("isentrope"))
    others = alone([program, "run", "tiny", "--plain", "--json", "--out", str(folder), *overrides])
    lines = metrics.read(folder)
    sampled = sorted(sampling(folder))
    began = sampled[0][0]
    return Curve(
        seconds={line["step"]: line["time"] - began for line in lines},
        weights={t: folder / f"checkpoints/step-{t:08d}/weights.safetensors" for t in points()},
        groups={t["step"]: sum(end <= t["time"] for _, end in sampled) for t in lines},
        others=others,
        accuracy={},
    )


def points() -> range:
    return range(EVERY, STEPS + 1, EVERY)


def sampling(folder: Path) -> Iterator[tuple[float, float]]:
    """When each training group began to be sampled and was admitted (seconds since the epoch)."""
    codec, kinds = Codec(FromActor), {}
    for _, record in journal.read(folder / "journal"):
        if isinstance(record, Issue):
            kinds[record.ticket.id] = record.ticket.kind
        elif isinstance(record, Admit) and kinds[record.ticket] == "main":
            took = codec.decode(record.frame).timings
            yield record.at - took["generate_s"] - took["grade_s"], record.at


# ---- the verdict ---------------------------------------------------------------------------------


def compare(rounds: Sequence[dict[str, Curve]]) -> dict[str, Any]:
    """A round in which a side misses the goal counts as ratio 0: not faster, whoever missed it."""
    numbers: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {}
    for name in ("trl", "isentrope"):
        curves = [sides[name] for sides in rounds]
        found = [crossing(curve) for curve in curves]
        reached = [not math.isnan(it.seconds) for it in found]
        if not all(reached):
            say(
                f"{name} did not reach {GOAL} within {STEPS} steps in {reached.count(False)} rounds"
            )
        seconds[name] = [it.seconds for it in found]
        rows = list(zip(curves, found, reached, strict=True))
        numbers |= {
            f"seconds_{name}": [round(it.seconds, 2) if ok else None for _, it, ok in rows],
            f"steps_{name}": [it.step if ok else None for _, it, ok in rows],
            f"groups_{name}": [c.groups[math.ceil(it.step)] if ok else None for c, it, ok in rows],
            f"others_{name}": round(max(curve.others for curve in curves), 3),
            f"step_s_{name}": round(statistics.median(c.seconds[STEPS] / STEPS for c in curves), 3),
        }
    ratios = [a / b for a, b in zip(seconds["trl"], seconds["isentrope"], strict=True)]
    whole = [0.0 if math.isnan(ratio) else ratio for ratio in ratios]
    return {"ratio_time": round(statistics.median(whole), 3), **numbers}


def is_quiet(numbers: dict[str, Any]) -> bool:
    return max(numbers["others_trl"], numbers["others_isentrope"]) <= BUSY


def picture(rounds: Sequence[dict[str, Curve]], numbers: dict[str, Any]) -> Path:
    """Accuracy against training seconds, and against steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    path = TOP / "runs" / f"peer-{time.strftime('%Y%m%d-%H%M%S')}.png"
    path.parent.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.6), sharey=True, layout="constrained")
        for name, label, colour in (
            ("trl", f"TRL {PINS[0].partition('==')[2]}, GRPOTrainer", ORANGE),
            ("isentrope", "Isentrope", BLUE),
        ):
            for index, sides in enumerate(rounds):
                curve = sides[name]
                steps = sorted(curve.accuracy)
                values = [curve.accuracy[t] for t in steps]
                seconds = [{0: 0.0, **curve.seconds}[t] for t in steps]
                for axis, at in zip(axes, (seconds, steps), strict=True):
                    axis.plot(
                        at, values, ".-", color=colour, alpha=0.8, label="" if index else label
                    )
        for axis, what in zip(
            axes, ("training seconds, two cores", "optimiser steps"), strict=True
        ):
            axis.axhline(GOAL, color=GREY, linewidth=1, linestyle="--")
            axis.set_xlabel(what)
            axis.set_xlim(left=0)
        axes[0].set_ylabel(f"held-out accuracy, {PROBLEMS:,} sums at T = 1")
        axes[0].legend(loc="lower right")
        void = "" if is_quiet(numbers) else " (void: the machine was busy)"
        axes[0].set_title(f"{numbers['ratio_time']:.2f} × as fast to {GOAL}{void}")
        axes[1].set_title("and by steps")
        figure.savefig(path)
        plt.close(figure)
    return path
