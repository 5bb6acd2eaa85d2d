"""Groups become rows, rows become packed micro-batches. Pure, vectorised, no padding.

    items ── flatten ──▶ Batch     every rollout one row (prompt + segments), in canonical order:
                                   main, propose, aux rows, then ticket, then rollout
    lengths ── split ──▶ micros    row numbers of each micro-batch, under a token budget,
                                   balanced by Σ length²
    Batch, rows ── pack ──▶ Micro  sequences laid end to end, positions restart, attention sees
                                   each alone, a group's prompt is fed once

A *token* of the batch is one that the table has a line for: every sampled (policy) token and every
token with a loss mask. Its log-prob comes from the hidden state one position earlier; what follows
the last of these hidden states is not fed to the model at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from common import wire
from learner.attention import Packing
from learner.item import Item
from learner.reward import Score, scores
from learner.table import Static

_RANK = {"main": 0, "eval": 0, "score": 0, "propose": 1, "aux": 2}  # order within a batch


@dataclass(frozen=True)
class Batch:
    """All rows of a step. R rows, S fed tokens, T table tokens; every array in canonical order."""

    items: tuple[Item, ...]  # main, propose, aux, by ticket id; group g of the table is items[g]
    main_groups: int
    compared_groups: int  # main and propose: their rewards are compared, within each group
    ids: np.ndarray  # int64 [S]: what the model is fed
    lengths: np.ndarray  # int64 [R]: fed tokens of each row
    starts: np.ndarray  # int64 [R]: where a row begins in `ids`
    row_group: np.ndarray  # int64 [R]
    reward: np.ndarray  # float64 [R]
    correct: np.ndarray  # float64 [R]: raw correctness
    row_lag: np.ndarray  # int64 [R]: lag of the row's oldest token
    row_prompt: np.ndarray  # int64 [R]: tokens of its prompt
    row_tokens: np.ndarray  # int64 [R]: table tokens of each row
    row_trained: np.ndarray  # int64 [R]: those of them with a loss mask
    token_starts: np.ndarray  # int64 [R]: where a row's tokens begin in the table
    at: np.ndarray  # int64 [T]: position in its row of the hidden state that predicts the token
    target: np.ndarray  # int64 [T]: the token itself
    static: Static  # what is known of the T tokens before any forward pass (advantage still 0)

    @property
    def rows(self) -> int:
        return self.lengths.size

    @property
    def main_rows(self) -> int:
        return int((self.row_group < self.main_groups).sum())


@dataclass(frozen=True)
class Micro:
    """One packed micro-batch, as tensors on the training device."""

    ids: torch.Tensor  # int64 [1, S]
    positions: torch.Tensor  # int64 [1, S]
    packing: Packing
    at: torch.Tensor  # int64 [T]: index into S of the predicting hidden state
    target: torch.Tensor  # int64 [T]
    temperature: torch.Tensor  # float32 [T]
    tokens: torch.Tensor  # int64 [T]: the tokens' lines in the table


def flatten(items: Sequence[Item], version: int, score: Score = scores) -> Batch:
    """The batch of `items` for training parameters of `version`, in whatever order they come;
    `score` says what each rollout of a group is worth.
    """
    order = tuple(sorted(items, key=lambda item: (_RANK[item.ticket.kind], item.ticket.id)))
    rows = [(g, i) for g, item in enumerate(order) for i in range(len(item.group.rollouts))]
    rollouts = [order[g].group.rollouts[i] for g, i in rows]
    parts = _parts(order, rows)
    counts = np.array([p.ids.size for p in parts], np.int64)
    flat_ids = _join([p.ids for p in parts], np.int64)
    flat_keep = _join([p.keep for p in parts], bool)
    flat_mask = _join([p.mask for p in parts], bool)
    begins = _starts(counts)
    row_of = np.repeat(np.arange(len(rows)), counts)
    kept = np.flatnonzero(flat_keep)
    row = row_of[kept]
    position = kept - begins[row]
    fed = np.zeros(len(rows), np.int64)  # a row ends with the hidden state of its last table token
    np.maximum.at(fed, row, position)
    row_tokens = np.bincount(row, minlength=len(rows))
    groups = np.array([g for g, _ in rows], np.int64)
    versions = _join([p.versions for p in parts], np.int64)
    return Batch(
        items=order,
        main_groups=sum(item.ticket.kind not in ("aux", "propose") for item in order),
        compared_groups=sum(item.ticket.kind != "aux" for item in order),
        ids=flat_ids[np.arange(flat_ids.size) - begins[row_of] < fed[row_of]],
        lengths=fed,
        starts=_starts(fed),
        row_group=groups,
        # proposals are not graded: their scores came later, with the ticket's `ready` record
        reward=np.array([r for item in order for r in item.scores or score(item)], np.float64),
        correct=np.array([r.correct for r in rollouts], np.float64),
        row_lag=np.array([max(0, version - r.oldest_version) for r in rollouts], np.int64),
        row_prompt=np.array([order[g].ticket.prompt.size for g, _ in rows], np.int64),
        row_tokens=row_tokens,
        row_trained=np.bincount(row[flat_mask[kept]], minlength=len(rows)),
        token_starts=_starts(row_tokens),
        at=position - 1,
        target=flat_ids[kept],
        static=_static(
            order, rows, parts, flat_ids, kept, row, position, np.maximum(0, version - versions)
        ),
    )


class _Row(NamedTuple):
    """A row's sequence, prompt included. Prompt tokens carry zeros."""

    ids: np.ndarray
    keep: np.ndarray  # bool: the table has a line for it
    mask: np.ndarray  # bool: trained on
    logps: np.ndarray
    temperature: np.ndarray
    versions: np.ndarray


def _parts(items: Sequence[Item], rows: Sequence[tuple[int, int]]) -> list[_Row]:
    return [_row(items[g].ticket.prompt, items[g].group.rollouts[i]) for g, i in rows]


def _row(prompt: np.ndarray, rollout: wire.Rollout) -> _Row:
    segments, size = rollout.segments, prompt.size
    masks = [s.loss_mask for s in segments]
    keeps = [
        m if s.role != "policy" else np.ones(m.size, bool)
        for s, m in zip(segments, masks, strict=True)
    ]
    none, zero = np.zeros(size, bool), np.zeros(size, np.float32)
    return _Row(
        ids=np.concatenate([prompt, *(s.tokens for s in segments)]),
        keep=np.concatenate([none, *keeps]),
        mask=np.concatenate([none, *masks]),
        logps=np.concatenate([zero, *(s.logps for s in segments)]),
        temperature=np.concatenate(
            [zero, *(np.full(s.tokens.size, s.temperature, np.float32) for s in segments)]
        ),
        versions=np.concatenate([np.zeros(size, np.int64), *map(_versions, segments)]),
    )


def _versions(segment: wire.Segment) -> np.ndarray:
    """int64 [tokens]: the weight version that sampled each."""
    firsts = [first for first, _ in segment.spans] + [segment.tokens.size]
    return np.repeat([version for _, version in segment.spans], np.diff(firsts))


def _static(
    items: Sequence[Item],
    rows: Sequence[tuple[int, int]],
    parts: Sequence[_Row],
    ids: np.ndarray,
    kept: np.ndarray,
    row: np.ndarray,
    position: np.ndarray,
    lag: np.ndarray,
) -> Static:
    group = np.array([g for g, _ in rows], np.int64)[row]
    aux = np.array([item.ticket.kind == "aux" for item in items], bool)[group]
    temperature = _join([p.temperature for p in parts], np.float32)[kept]
    return Static(
        lb=torch.from_numpy(_join([p.logps for p in parts], np.float32)[kept]),
        advantage=torch.zeros(kept.size),
        mask=torch.from_numpy(_join([p.mask for p in parts], bool)[kept]),
        row=torch.from_numpy(row),
        group=torch.from_numpy(group),
        lag=torch.from_numpy(lag[kept]),
        # aux rows teach the temperature-1 policy with samples drawn at another one, on purpose
        temperature=torch.from_numpy(np.where(aux, np.float32(1), temperature)),
        aux=torch.from_numpy(aux),
        ticket=torch.from_numpy(np.array([item.ticket.id for item in items], np.int64)[group]),
        rollout=torch.from_numpy(np.array([i for _, i in rows], np.int64)[row]),
        position=torch.from_numpy(position),
        token=torch.from_numpy(ids[kept]),
    )


def split(
    lengths: np.ndarray, budget: int, ranks: int = 1, group: np.ndarray | None = None
) -> list[list[np.ndarray]]:
    """Row numbers of every micro-batch of every rank: `result[rank][micro]`.

    Longest first into the micro-batch with the smallest Σ length² that has room for it; every rank
    gets the same number of micro-batches (sharded forward passes meet), some possibly empty. A row
    longer than the budget travels alone. Empty rows travel nowhere. Rows of a small `group` [R]
    travel together, so that they can share their prompt.
    """
    units = _units(lengths, budget, ranks, group)
    tokens = np.array([lengths[rows].sum() for rows in units], np.int64)
    cost = np.array([(lengths[rows] ** 2).sum() for rows in units], np.float64)
    per_rank = max(1, math.ceil(int(np.minimum(tokens, budget).sum()) / budget / ranks))
    while (bins := _fill(tokens, cost, budget, per_rank * ranks)) is None:
        per_rank += 1
    shares: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    costs = [float(cost[b].sum()) for b in bins]
    for b in sorted(range(len(bins)), key=lambda b: (-costs[b], b)):
        rank = min((r for r in range(ranks) if len(shares[r]) < per_rank), key=load.__getitem__)
        shares[rank].append(_join([units[u] for u in bins[b]], np.int64))
        load[rank] += costs[b]
    return shares


def _units(
    lengths: np.ndarray, budget: int, ranks: int, group: np.ndarray | None
) -> list[np.ndarray]:
    """Rows that travel together: whole groups where they are small and many, else single rows."""
    rows = np.flatnonzero(lengths)
    single = np.split(rows, rows.size) if rows.size else []
    if group is None or not rows.size:
        return single
    numbers, start = np.unique(group[rows], return_index=True)  # rows of a group are neighbours
    groups = np.split(rows, start[1:])
    largest = max(int(lengths[g].sum()) for g in groups)
    return groups if largest <= budget // 4 and numbers.size >= 4 * ranks else single


def _fill(tokens: np.ndarray, cost: np.ndarray, budget: int, bins: int) -> list[np.ndarray] | None:
    """Numbers of the units in each bin; None when some unit finds no room."""
    held: list[list[int]] = [[] for _ in range(bins)]
    load, used = np.zeros(bins), np.zeros(bins, np.int64)
    for unit in np.argsort(-cost, kind="stable"):
        room = (used + tokens[unit] <= budget) | (used == 0)
        if not room.any():
            return None
        best = int(np.where(room, load, np.inf).argmin())
        held[best].append(int(unit))
        load[best] += cost[unit]
        used[best] += tokens[unit]
    return [np.array(chosen, np.int64) for chosen in held]


def pack(
    batch: Batch, rows: np.ndarray, device: torch.device | str = "cpu", share: bool = True
) -> Micro:
    """The micro-batch of `rows`, shortest first: those of like length share an attention call.

    With `share` the prompt of a group is fed once, by the first of its rows.
    """
    rows = rows[np.argsort(batch.lengths[rows], kind="stable")]
    lengths, tokens = batch.lengths[rows], batch.row_tokens[rows]
    first = _first_of_group(batch.row_group[rows])
    skip = np.where(share & (first != np.arange(rows.size)), batch.row_prompt[rows], 0)
    row = np.repeat(np.arange(rows.size), lengths)  # of every token of every sequence
    within = _ranges(np.zeros_like(lengths), lengths)
    starts = _starts(lengths - skip)
    fed = within >= skip[row]
    token = np.where(fed, starts[row] - skip[row] + within, starts[first[row]] + within)
    lines = _ranges(batch.token_starts[rows], tokens)

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    index = put(lines)
    return Micro(
        ids=put(batch.ids[_ranges(batch.starts[rows], lengths)][fed])[None],
        positions=put(within[fed])[None],
        packing=Packing.of(lengths, token, fed, device),
        at=put(token[batch.at[lines] + np.repeat(_starts(lengths), tokens)]),
        target=put(batch.target[lines]),
        temperature=batch.static.temperature.to(device)[index],
        tokens=index,
    )


def _first_of_group(group: np.ndarray) -> np.ndarray:
    """int64 [R]: for each row the first row of its group."""
    _, first, number = np.unique(group, return_index=True, return_inverse=True)
    found: np.ndarray = first[number]
    return found


def _starts(counts: np.ndarray) -> np.ndarray:
    starts: np.ndarray = np.cumsum(counts) - counts
    return starts


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[s, s + 1, … s + c - 1] for every (s, c), end to end."""
    within: np.ndarray = np.arange(int(counts.sum())) - np.repeat(_starts(counts), counts)
    ranges: np.ndarray = within + np.repeat(starts, counts)
    return ranges


def _join(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype)
