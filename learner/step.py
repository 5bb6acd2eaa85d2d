"""One step: a batch, a version. The story of `train_step`, top to bottom:

    flatten ──▶ advantages ──▶ split into micro-batches
    each update:  table (only where it is wanted) ──▶ factors of the methods
                  micro-batches: body ──▶ head, gradients by token ──▶ backward
                  gradients of all ranks ──▶ clip ──▶ AdamW ──▶ weights
    metrics, the realised entropy change, the methods' states ──▶ t + 1

Every one of the `updates_per_batch` updates trains on the whole batch. The proximal log-probs lp
are those at the start of the step. They cost no pass of their own: before the first update lp is
l, and that update's forward pass leaves them for the later ones. A pass without gradient runs
only for methods that need the table.

`train_step` is a pure function of (state, items, config): on a CPU with the same torch and
threads it gives the same bits again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.errors import DataError
from learner import shard
from learner.agreement import agreement
from learner.batch import Micro
from learner.comm import Comm
from learner.config import LearnerConfig
from learner.head import Objective
from learner.item import Item
from learner.loss import Rows, rows, rows_wanted
from learner.measure import Metrics, add, by_lag, entropy_change, entropy_forecast, rollouts_by_lag
from learner.methods.base import Ask
from learner.methods.compose import Factors, Methods
from learner.methods.effect import scaled
from learner.origin import of_step
from learner.overlong import facts as overlong_facts
from learner.slopes import coefficients, credit, weighted, with_surrogate
from learner.state import TrainState, constants, make_state
from learner.table import Table
from learner.tally import correct as share_right
from learner.work import Work, prepare, receive

__all__ = ["StepReport", "TrainState", "make_state", "train_step"]


@dataclass(frozen=True)
class StepReport:
    """`metrics` by names of common.metrics.GLOSSARY; `ask`: how the next aux tickets shall be."""

    metrics: Metrics
    ask: Ask | None = None


@dataclass(frozen=True)
class _Pass:
    """What one update saw: the table at its start, gathered, and what it did."""

    table: Table
    c: Tensor  # dLoss/dl [T]
    loss: float
    bonus: float
    effects: Metrics  # of the methods, methods/NAME/…
    credit: Metrics  # what each adds to the prediction
    norm: float = 0.0  # of the gradient, before clipping


def train_step(
    state: TrainState,
    items: Sequence[Item],
    config: LearnerConfig,
    comm: Comm | None = None,
    *,
    correct: float | None = None,
) -> StepReport:
    """Train on one batch and make version t + 1. Rank 0 calls it; the others `follow_step`.

    `correct`: share of right answers, of the groups that the batch rule passed over as well; None:
    it passed over none. Methods are told.

    Raises DataError when a gradient is not finite or a method answers nonsense; the parameters are
    then those of the last update that worked.
    """
    began = time.perf_counter()
    work, batch, of_groups = prepare(state, items, config, comm or Comm.current())
    passes: list[_Pass] = []
    forecast: Metrics = {}
    for done in _updates(state, work):
        forecast = add(forecast, entropy_forecast(done.table, done.c, work.lr) | done.credit)
        passes.append(done)
    first, last = passes[0], passes[-1]
    metrics: Metrics = {"lr": work.lr, "grad_norm": last.norm, "loss": last.loss}
    metrics |= {"tokens": float((work.shares.main > 0).sum()), "entropy_bonus": last.bonus}
    for name, factor in of_groups.items():
        metrics |= scaled(name, factor, work.of_groups[name], work.plain, first.table)
    groups = [item.group for item in batch.items[: batch.main_groups]]
    metrics |= work.methods.group_numbers(groups) | last.effects
    if config.overlong is not None:
        metrics["overlong"] = overlong_facts(
            [i.group for i in batch.items], config.overlong, config.max_tokens
        )
    # ratios of the last update, which moved furthest; the entropy before the first
    metrics |= rollouts_by_lag(batch) | by_lag(last.table, config) | forecast
    metrics |= agreement(first.table, batch, state.t, config)
    metrics |= of_step(batch, first.table, config)
    metrics["entropy"] = _mean_entropy(first.table)
    if _is_measured(config, state.t):
        metrics |= _realised(state, work, first.table, forecast)
    metrics |= state.law.metrics()
    told: Metrics = {"correct": share_right(groups) if correct is None else correct}
    ask = _tell_methods(state, config, work.methods, metrics | told)
    state.t += 1
    metrics["train_s"] = time.perf_counter() - began
    return StepReport(metrics, ask)


def follow_step(state: TrainState, facts: bytes, comm: Comm) -> None:
    """The step that rank 0 takes, on this rank's micro-batches. `facts`: with its order."""
    work = receive(state, facts, comm)
    for _ in _updates(state, work):
        pass
    if _is_measured(work.config, state.t):
        _columns(state, work)
    state.t += 1


def _updates(state: TrainState, work: Work) -> Iterator[_Pass]:
    first: Table | None = None
    for update in range(work.config.updates_per_batch):
        done = _gradients(state, work, update, first)
        first = first or done.table
        yield replace(done, norm=_apply(state, work.config, work.lr))


def _is_measured(config: LearnerConfig, t: int) -> bool:
    return bool(config.realised_every) and t % config.realised_every == 0


# ---- one update --------------------------------------------------------------------------------


def _gradients(state: TrainState, work: Work, update: int, first: Table | None) -> _Pass:
    """Leave the gradient of this rank's share of the loss in the parameters. `first`: the table of
    the step's first update; None: this is it, and lp is l.
    """
    when, updates = (state.seed, state.t, update), work.config.updates_per_batch
    lp = None if first is None else first.lp
    table, of_row, wants_table = None, Rows(), work.methods.needs_table
    if wants_table or rows_wanted(work.config, first=update == 0):
        logp, H, N = _columns(state, work)
        table = Table.join(work.static, logp, logp if lp is None else lp, H, N, when, updates)
        lp = table.lp
    if lp is not None:
        static, logp_now = work.static, None if table is None else table.logp
        of_row = rows(logp_now, lp, static.lb, static.mask, static.row, work.config)
    if wants_table and table is not None:
        table = with_surrogate(_with_start(table, first), work.config, of_row)
    factors = work.methods.factors(
        table if wants_table else None,
        lambda weight: _coefficients(work, table, weight, of_row),
        state.methods_state,
    )
    state.forget_gradients()
    seen = work.plain.new_zeros((5, work.plain.numel()))  # l, H, N, c, loss
    for number, micro in enumerate(work.micros, 1):
        made = seen.new_zeros((2, micro.tokens.numel()))  # c, loss
        objective = _objective(work, micro, lp, of_row, factors, when, made)
        shard.accumulate(state.model, last=number == len(work.micros))
        scalar, columns = state.model(micro, objective)
        scalar.backward()
        seen[:, micro.tokens] = torch.cat([torch.stack(columns), made])
    logp, H, N, c, loss = work.comm.gather(seen)
    table = Table.join(work.static, logp, logp if lp is None else lp, H, N, when, updates)
    added = credit(
        work.methods,
        factors,
        work.of_groups,
        table,
        lambda: _coefficients(work, replace(table, advantage=work.plain), None, of_row),
        work.shares,
        work.lr,
    )
    return _Pass(table, c, float(loss.double().sum()), factors.bonus, factors.effects, added)


def _with_start(table: Table, first: Table | None) -> Table:
    return table if first is None else replace(table, H0=first.H, N0=first.N)


def _objective(
    work: Work,
    micro: Micro,
    lp: Tensor | None,
    of_row: Rows,
    factors: Factors,
    when: tuple[int, int, int],
    made: Tensor,
) -> Objective:
    """dLoss/dl and dLoss/dH of a micro-batch's tokens: autograd over 1-D columns, no model.

    Notes dLoss/dl and the loss of every token in `made` [2, tokens].
    """
    here = micro.tokens
    static, updates = work.static.take(here), work.config.updates_per_batch
    share, extra_share = work.shares.main[here], work.shares.extra[here]
    start, of_row = None if lp is None else lp[here], of_row.take(here)
    weight = None if factors.weight is None else factors.weight[here]
    bonus = share * factors.bonus if factors.where is None else _bonus(share, factors, here)
    plans = {name: plan[here] for name, plan in factors.plans.items()}
    uses_H = work.methods.has_extra or factors.bonus != 0

    def objective(
        logp: Tensor, H: Tensor, N: Tensor, lo: int, hi: int
    ) -> tuple[Tensor, Tensor | None]:
        part = slice(lo, hi)
        with torch.enable_grad():
            logp, H = logp.detach().requires_grad_(), H.detach().requires_grad_(uses_H)
            before = logp.detach() if start is None else start[part]
            table = Table.join(static.take(part), logp, before, H, N, when, updates)
            own = None if weight is None else weight[part]
            loss = weighted(table, share[part], work.config, own, of_row.take(part))
            extra = work.methods.extra_loss(table, {k: p[part] for k, p in plans.items()})
            if extra is not None:
                loss = loss + extra_share[part] * extra
            if factors.bonus:
                loss = loss - bonus[part] * H
            wanted = (logp, H) if uses_H else (logp,)
            found = torch.autograd.grad(loss.sum(), wanted, allow_unused=True)
        g_logp = torch.zeros_like(logp) if found[0] is None else found[0]
        made[0, part], made[1, part] = g_logp, loss.detach()
        return g_logp, found[1] if uses_H else None

    return objective


def _bonus(share: Tensor, factors: Factors, here: Tensor) -> Tensor:
    """[tokens of a micro-batch]: the entropy bonus's coefficient in the total loss."""
    assert factors.where is not None, "a bonus that is everywhere has no column"
    return share * factors.bonus * factors.where[here]


def _coefficients(work: Work, table: Table | None, weight: Tensor | None, of_row: Rows) -> Tensor:
    """c_i = dLoss/dl_i [T] of the whole table under `weight`."""
    assert table is not None, "coefficients are asked for by methods with a table"
    return coefficients(table, work.shares.main, work.config, weight, of_row)


@torch.no_grad()
def _columns(state: TrainState, work: Work) -> tuple[Tensor, Tensor, Tensor]:
    """l, H, N of all tokens [T] at the current parameters, gathered."""
    seen = work.plain.new_zeros((3, work.plain.numel()))
    for micro in work.micros:
        _, columns = state.model(micro)
        seen[:, micro.tokens] = torch.stack(columns)
        shard.rest(state.model)
    logp, H, N = work.comm.gather(seen)
    return logp, H, N


def _apply(state: TrainState, config: LearnerConfig, lr: float) -> float:
    """One move of the optimiser; returns the gradient's norm before clipping."""
    state.fetch_gradients()
    clipped = torch.nn.utils.clip_grad_norm_(state.masters.values(), config.grad_clip)
    norm = float(shard.whole(clipped))
    if not math.isfinite(norm):
        raise DataError(
            f"step {state.t}: the gradient's norm is {norm}; lower learner.lr or look for broken "
            "log-probs in the batch"
        )
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    state.publish_masters()
    state.forget_gradients()
    return norm


# ---- afterwards --------------------------------------------------------------------------------


def _realised(state: TrainState, work: Work, before: Table, forecast: Metrics) -> Metrics:
    """The entropy change on the same tokens, by one more pass at the new parameters."""
    began = time.perf_counter()
    _, H, _ = _columns(state, work)
    found = entropy_change(before, H)
    predicted, change = forecast["entropy_predicted"], found["entropy_realised"]
    assert isinstance(predicted, float)
    assert isinstance(change, float)
    state.law.add(predicted, change)
    return found | {"entropy_measure_s": time.perf_counter() - began}


def _mean_entropy(table: Table) -> float:
    on = table.mask & ~table.aux
    return float(table.H[on].double().sum()) / max(1, int(on.sum()))


def _tell_methods(
    state: TrainState, config: LearnerConfig, methods: Methods, metrics: Metrics
) -> Ask | None:
    """The methods' next states, and what they ask for. Times are left out: they never repeat."""
    facts = constants(state.model, config) | {"t": float(state.t)}
    for key, value in metrics.items():
        if key.endswith("_s"):
            continue
        nested: Mapping[str, float] = value if isinstance(value, dict) else {"": value}
        facts |= {f"{key}/{k}" if k else key: v for k, v in nested.items()}
    state.methods_state = methods.observe(state.methods_state, facts)
    state.ask = methods.ask(facts, state.methods_state)
    return state.ask
