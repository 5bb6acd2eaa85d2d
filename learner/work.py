"""What all updates of a step share: made by rank 0, handed out to the others.

    items ──▶ flatten ──▶ advantages ──▶ columns of the whole table ──▶ broadcast
                    └──▶ split, pack ──▶ every rank's micro-batches ──▶ scattered

The columns are 1-D and small, so every rank has all of them and computes the methods' factors
itself, from the same numbers to the same numbers. Micro-batches are balanced by Σ length²; every
rank gets as many, since sharded forward passes meet: where there is nothing to train on, one token
that no line of the table knows is fed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from learner.advantage import advantages
from learner.attention import Bucket, Packing
from learner.batch import Batch, Micro, flatten, pack, split
from learner.comm import Comm, Order
from learner.config import LearnerConfig
from learner.item import Item
from learner.loss import scale
from learner.methods.compose import Methods
from learner.overlong import is_masked
from learner.reward import scorer
from learner.slopes import Shares
from learner.state import TrainState
from learner.table import Static


@dataclass(frozen=True)
class Work:
    """Columns are [T], on the training device."""

    config: LearnerConfig
    comm: Comm
    methods: Methods
    static: Static  # advantages filled in
    plain: Tensor  # advantages before the methods' group factors
    of_groups: Mapping[str, Tensor]  # these factors, by method
    shares: Shares
    lr: float
    micros: tuple[Micro, ...]  # of this rank


class Task(msgspec.Struct):
    """What the others must know of a step beside tensors."""

    config: LearnerConfig
    t: int
    lr: float
    methods_state: dict[str, dict[str, Any]]
    of_groups: list[str]  # names, in the order of their columns


class Prepared(NamedTuple):
    work: Work
    batch: Batch
    of_groups: Mapping[str, np.ndarray]  # float64 [main groups]: the methods' factors


def prepare(
    state: TrainState, items: Sequence[Item], config: LearnerConfig, comm: Comm
) -> Prepared:
    """Rank 0's part; where there are others they are told to take the step too."""
    assert items, "a step needs a batch"
    methods = Methods(config.methods)
    batch = flatten(items, state.t, scorer(config))
    row = batch.static.row
    of_groups = methods.scale_groups([item.group for item in batch.items[: batch.main_groups]])
    by_row = {name: _by_row(factor, batch) for name, factor in of_groups.items()}
    plain = _advantages(batch, config)
    advantage = plain * math.prod(by_row.values(), start=np.ones(batch.rows))
    mask = batch.static.mask & ~torch.from_numpy(_cut(batch, config))[row]
    static = replace(
        batch.static,
        advantage=torch.from_numpy(advantage).float()[row],
        mask=mask,
        # what is not trained on may have come with anything
        lb=batch.static.lb.masked_fill(~mask, 0.0),
    )
    main, aux = static.mask & ~static.aux, static.mask & static.aux
    share = scale(main, static.row, config.aggregation, config.max_tokens)
    aux_share = scale(aux, static.row, "seq_mean", config.max_tokens)
    work = Work(
        config=config,
        comm=comm,
        methods=methods,
        static=static,
        plain=torch.from_numpy(plain).float()[row],
        of_groups={k: torch.from_numpy(f).float()[row] for k, f in by_row.items()},
        shares=Shares(share, share + aux_share),
        lr=config.lr * min(1.0, (state.t + 1) / max(1, config.warmup_steps)),
        micros=(),
    )
    where = state.model.device
    work = replace(work, micros=_hand_out(state, work, batch, where))
    return Prepared(_on(work, where), batch, of_groups)


def receive(state: TrainState, facts: bytes, comm: Comm) -> Work:
    """Any other rank's part: the step that rank 0 prepared."""
    task = msgspec.msgpack.decode(facts, type=Task)
    state.t, state.methods_state = task.t, task.methods_state
    columns = iter(comm.broadcast())
    work = Work(
        config=task.config,
        comm=comm,
        methods=Methods(task.config.methods),
        static=Static(*(next(columns) for _ in fields(Static))),
        plain=next(columns),
        of_groups={name: next(columns) for name in task.of_groups},
        shares=Shares(next(columns), next(columns)),
        lr=task.lr,
        micros=_micros(comm.scatter(), state.model.device),
    )
    return _on(work, state.model.device)


def _hand_out(
    state: TrainState, work: Work, batch: Batch, where: torch.device
) -> tuple[Micro, ...]:
    """This rank's micro-batches; the others' are on their way."""
    config, comm = work.config, work.comm
    shares = split(batch.lengths, config.tokens_per_micro, comm.world_size, batch.row_group)
    if comm.world_size == 1:
        return tuple(pack(batch, rows, where) for rows in shares[0] if rows.size)
    task = Task(config, state.t, work.lr, state.methods_state, list(work.of_groups))
    comm.say(Order.STEP, msgspec.msgpack.encode(task))
    columns = [getattr(work.static, f.name) for f in fields(Static)]
    columns += [work.plain, *work.of_groups.values(), work.shares.main, work.shares.extra]
    comm.broadcast(columns)
    packed = [[pack(batch, r) if r.size else _idle() for r in share] for share in shares]
    mine = comm.scatter([[t for micro in share for t in _tensors(micro)] for share in packed])
    return _micros(mine, where)


def _on(work: Work, where: torch.device) -> Work:
    return replace(
        work,
        static=work.static.to(where),
        plain=work.plain.to(where),
        of_groups={name: column.to(where) for name, column in work.of_groups.items()},
        shares=Shares(work.shares.main.to(where), work.shares.extra.to(where)),
    )


# ---- micro-batches as tensors -------------------------------------------------------------------

_PER_MICRO = 12


def _tensors(micro: Micro) -> list[Tensor]:
    p = micro.packing
    return [
        *(micro.ids, micro.positions, micro.at, micro.target, micro.temperature, micro.tokens),
        *(p.starts, p.unpack, p.repack, p.echoes),
        torch.tensor(p.buckets).reshape(-1, 2),
        torch.tensor([p.longest, p.straight], dtype=torch.int64),
    ]


def _micros(tensors: Sequence[Tensor], where: torch.device) -> tuple[Micro, ...]:
    parts = (tensors[i : i + _PER_MICRO] for i in range(0, len(tensors), _PER_MICRO))
    return tuple(_micro(*(tensor.to(where) for tensor in part)) for part in parts)


def _micro(
    ids: Tensor,
    positions: Tensor,
    at: Tensor,
    target: Tensor,
    temperature: Tensor,
    tokens: Tensor,
    starts: Tensor,
    unpack: Tensor,
    repack: Tensor,
    echoes: Tensor,
    buckets: Tensor,
    numbers: Tensor,
) -> Micro:
    longest, straight = numbers.tolist()
    known = tuple(Bucket(*bucket) for bucket in buckets.tolist())
    packing = Packing(starts, longest, known, unpack, repack, echoes, bool(straight))
    return Micro(ids, positions, packing, at, target, temperature, tokens)


def _idle() -> Micro:
    """A sequence of one token, and no line of the table."""
    one, none = np.ones(1, np.int64), torch.zeros(0, dtype=torch.int64)
    packing = Packing.of(one, np.zeros(1, np.int64), np.ones(1, bool), "cpu")
    word = torch.zeros((1, 1), dtype=torch.int64)
    return Micro(word, word, packing, none, none, torch.zeros(0), none)


# ---- rewards and advantages ---------------------------------------------------------------------


def _advantages(batch: Batch, config: LearnerConfig) -> np.ndarray:
    """float64 [R]. Proposals are compared with those of the same ticket; aux rows have no group to
    compare with: theirs is the reward itself.
    """
    main = batch.row_group < batch.main_groups
    value = batch.reward.copy()
    proposed = ~main & (batch.row_group < batch.compared_groups)
    estimator = "grpo" if config.advantage == "psr_nsr" else config.advantage
    value[proposed] = advantages(batch.reward[proposed], batch.row_group[proposed], estimator)
    score = batch.correct if config.advantage == "psr_nsr" else batch.reward
    value[main] = advantages(
        score[main], batch.row_group[main], config.advantage, config.psr_weight
    )
    return value


def _cut(batch: Batch, config: LearnerConfig) -> np.ndarray:
    """bool [R]: main rows that only count in their group's mean."""
    rows = ((i.ticket.kind == "main", r) for i in batch.items for r in i.group.rollouts)
    return np.array([main and is_masked(r, config.overlong) for main, r in rows], bool)


def _by_row(factor: np.ndarray, batch: Batch) -> np.ndarray:
    """float64 [R] of factors [main groups]; 1 for aux rows."""
    padded: np.ndarray = np.ones(len(batch.items))
    padded[: batch.main_groups] = factor
    by_row: np.ndarray = padded[batch.row_group]
    return by_row
