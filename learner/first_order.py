"""Methods on identical data: from points of a recorded run one step with each, then back.

The run is walked as it was recorded. Where a comparison is due, the state is held, every rival
takes one step on the very batch that the run took, what it did is measured on the same tokens, and
the state is put back; the walk goes on to the recorded bits, which says that nothing was left
behind. One step is as far as first-order theory speaks, and further on the data would be another
policy's.

A rival is the methods and the loss of a recipe; batch, learning rate and model are the run's. A
method that asks for aux groups does nothing here but by what the run has recorded of them. Its
state is the recorded one where the run had the method, else that of a first step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from common.config import RunConfig
from common.runfolder import RunFolder
from learner import checkpoint
from learner.advantage import advantages
from learner.batch import Batch, flatten, pack, split
from learner.config import LearnerConfig
from learner.history import catch_up
from learner.inbox import Selection
from learner.loss import ratio, scale
from learner.methods.compose import Methods
from learner.reward import scorer
from learner.state import TrainState, constants
from learner.step import train_step
from learner.tally import correct, seen

PLAIN = "plain"  # the run's own loss without any method: what the others are measured against
TAKEN = (
    "advantage",
    "psr_weight",
    "loss",
    "clip_low",
    "clip_high",
    "dual_clip",
    "correction",
    "correction_low",
    "correction_high",
    "correction_level",
    "proximal",
    "sapo_tau",
    "aggregation",
    "methods",
)


class Point(NamedTuple):
    """One step of one rival. Entropies in nats per token, means over the main tokens."""

    t: int
    name: str
    predicted: float  # entropy change by first-order theory
    realised: float  # and what happened
    surrogate: float  # gain of Σ scale · A exp(l - l before), A and scale being the run's own
    grad_norm: float


def compare(
    folder: RunFolder,
    run: RunConfig,
    config: LearnerConfig,
    rivals: Mapping[str, LearnerConfig],
    every: int,
    *,
    show: Callable[[Point], None],
) -> list[Point]:
    """Points of every `every`-th step of the run, from step 0, in order; `show` sees each at once.

    Raises JournalError when the recorded run does not come out again, ConfigError for a rival that
    the model cannot serve.
    """
    points: list[Point] = []

    def on_batch(state: TrainState, batch: Selection, recorded: LearnerConfig) -> None:
        if batch.t % every:
            return
        plain = msgspec.structs.replace(recorded, methods=())
        field = {PLAIN: plain} | {k: _rival(recorded, v) for k, v in rivals.items()}
        for point in _one_step_each(state, batch, plain, field):
            points.append(point)
            show(point)

    catch_up(folder, run, config, from_start=True, on_batch=on_batch)
    return points


def summary(points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """Means by rival, and how predicted and realised change go together over its points."""
    names = list(dict.fromkeys(point.name for point in points))
    return {name: _means([p for p in points if p.name == name]) for name in names}


def row(point: Point | None = None) -> str:
    """A line of the table, or its head."""
    if point is None:
        heads = ("predicted", "realised", "surrogate", "grad norm")
        return f"{'step':>5}  {'methods':18}" + "".join(f"{head:>12}" for head in heads)
    numbers = (point.predicted, point.realised, point.surrogate, point.grad_norm)
    return f"{point.t:5d}  {point.name:18}" + "".join(f"{number:+12.3e}" for number in numbers)


def _rival(recorded: LearnerConfig, theirs: LearnerConfig) -> LearnerConfig:
    taken = {name: getattr(theirs, name) for name in TAKEN}
    return msgspec.structs.replace(recorded, **taken)


def _one_step_each(
    state: TrainState,
    selection: Selection,
    plain: LearnerConfig,
    field: Mapping[str, LearnerConfig],
) -> list[Point]:
    batch = flatten(selection.items, state.t, scorer(plain))
    push = _push(batch, plain).to(state.model.device)
    main = (batch.static.mask & ~batch.static.aux).to(state.model.device)
    logp, H = _look(state, batch, plain)
    held, points = checkpoint.hold(state), []
    for name, config in field.items():
        quiet = msgspec.structs.replace(config, realised_every=0)
        _give_methods(state, quiet)
        report = train_step(state, selection.items, quiet, correct=correct(seen(selection)))
        logp_after, H_after = _look(state, batch, plain)
        gain = push * (ratio(logp_after, logp) - 1)
        points.append(
            Point(
                t=selection.t,
                name=name,
                predicted=_number(report.metrics["entropy_predicted"]),
                realised=float((H_after - H)[main].double().mean()),
                surrogate=float(gain.double().sum()),
                grad_norm=_number(report.metrics["grad_norm"]),
            )
        )
        checkpoint.put_back(state, held)
    return points


def _give_methods(state: TrainState, config: LearnerConfig) -> None:
    methods = Methods(config.methods)
    methods.fits(constants(state.model, config)["max_entropy"])
    before = state.methods_state
    state.methods_state = {k: before.get(k, v) for k, v in methods.initial().items()}


def _push(batch: Batch, config: LearnerConfig) -> Tensor:
    """float32 [T]: scale · advantage of every main token, 0 elsewhere, without any method."""
    main = batch.row_group < batch.main_groups
    value = torch.zeros(batch.rows)
    score = batch.correct if config.advantage == "psr_nsr" else batch.reward
    own = advantages(score[main], batch.row_group[main], config.advantage, config.psr_weight)
    value[torch.from_numpy(main)] = torch.from_numpy(own).float()
    static = batch.static
    share = scale(static.mask & ~static.aux, static.row, config.aggregation, config.max_tokens)
    return share * value[static.row]


@torch.no_grad()
def _look(state: TrainState, batch: Batch, config: LearnerConfig) -> tuple[Tensor, Tensor]:
    """l and H of all tokens [T] at the current parameters."""
    seen = torch.zeros(2, batch.target.size, device=state.model.device)
    for rows in split(batch.lengths, config.tokens_per_micro, 1, batch.row_group)[0]:
        if rows.size:
            micro = pack(batch, rows, state.model.device)
            _, columns = state.model(micro)
            seen[:, micro.tokens] = torch.stack(columns[:2])
    return seen[0], seen[1]


def _means(points: Sequence[Point]) -> dict[str, float]:
    columns = {
        key: [getattr(p, key) for p in points] for key in ("predicted", "realised", "surrogate")
    }
    means = {key: math.fsum(values) / len(values) for key, values in columns.items()}
    x, y = columns["predicted"], columns["realised"]
    if len(set(x)) > 1 and len(set(y)) > 1:
        means["correlation"] = statistics.correlation(x, y)
    return means


def _number(value: float | dict[str, float]) -> float:
    assert isinstance(value, float)
    return value
