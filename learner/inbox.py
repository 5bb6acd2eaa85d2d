"""The batch rule: which admitted groups step t trains on. A pure function of the admission order.

The main part of step t is the first `groups_per_step` usable main groups in admission order. Groups
on the way to them that are not usable are dropped, each by its reason. When `refill_limit` ×
`groups_per_step` main groups since the last step were not enough, the step trains on those usable
among them; with none, the run is over: the task is solved, or the run is stuck.

Beside them come aux groups and then proposers' groups, so many a step at most, that came in before
the last of the main ones: a proposer's group comes in when its scores do (its `ready` record). Each
kind has a lag limit of its own. Once the labels of proposed problems were found wrong (`halt`), no
step that had not begun uses anything that hangs on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from common.episodes import PLAIN
from common.proposals import is_made
from common.wire import Group
from learner.advantage import informative
from learner.config import LearnerConfig
from learner.item import Item
from learner.ledger import Entry, Ledger

SUSPECT = "suspect_label"


class Selection(NamedTuple):
    """`items` in batch order (main, aux, propose); empty items: there is nothing to train on."""

    t: int
    items: tuple[Item, ...]
    dropped: tuple[tuple[int, str], ...]
    refused: tuple[Group, ...]  # the groups of `dropped`, in its order

    @property
    def consumed(self) -> tuple[int, ...]:
        return tuple(item.ticket.id for item in self.items)

    @property
    def right(self) -> float:
        """Share of the refused groups' answers that were graded and are right, 0…1; what a suspect
        label says is right is none of them.
        """
        pairs = zip(self.refused, self.dropped, strict=True)
        groups = [group for group, (_, reason) in pairs if reason != SUSPECT]
        answers = [rollout for group in groups for rollout in group.rollouts]
        right = sum(not answer.error and answer.correct >= 1.0 for answer in answers)
        return right / max(1, len(answers))


def defect(group: Group, config: LearnerConfig, gamma: float = 1.0) -> str:
    """Why no step can use this group, "" when one can. Depends on nothing but the group."""
    if group.kind != "propose" and any(rollout.error for rollout in group.rollouts):
        return "verifier_error"
    if config.drop_truncated and all(rollout.finish == "length" for rollout in group.rollouts):
        return "truncated"
    if group.kind == "main" and not informative(group, config.advantage, gamma):
        return "zero_variance"
    return ""


def fate(entry: Entry, t: int, config: LearnerConfig, halted: int | None = None) -> str:
    """Why step t cannot use this admitted group, "" when it can.

    Lag is that of its oldest token: trained version (= t) − token version; negative counts as 0.
    From step `halted` on what was proposed is of no use, nor what proposed it.
    """
    if halted is not None and t >= halted and is_made(entry.ticket.problem):
        return SUSPECT
    if entry.verdict is None or entry.verdict[0] is not config:
        gamma = (entry.ticket.episode or PLAIN).gamma
        entry.verdict = config, defect(entry.item.group, config, gamma)
    limit = lag_limit(entry.ticket.kind, config)
    return entry.verdict[1] or ("stale" if t - entry.oldest > limit else "")


def lag_limit(kind: str, config: LearnerConfig) -> int:
    if kind == "propose" and config.synthesis is not None:
        return config.synthesis.lag_limit(config.max_lag)
    return config.max_lag


class Usable:
    """How many admitted groups of one kind the coming step can use, counted as they come in."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._seen = self._count = 0
        self._of: tuple[int, int | None, LearnerConfig] | None = None  # step, halt, configuration

    def count(self, ledger: Ledger, config: LearnerConfig) -> int:
        """Looks only at those it has not seen, unless what the rule goes by is new."""
        t, halted = ledger.t, ledger.halted
        if self._of is None or self._of[:2] != (t, halted) or self._of[2] is not config:
            self._of, self._seen, self._count = (t, halted, config), 0, 0
        new = ledger.buffered(self._kind, self._seen)
        self._count += sum(not fate(entry, t, config, halted) for entry in new)
        self._seen += len(new)
        return self._count


def select(ledger: Ledger, config: LearnerConfig, usable: int | None = None) -> Selection | None:
    """The batch of step `ledger.t`, or None while it is not determined yet. Who knows how many main
    groups are `usable` has the None sooner.
    """
    t = ledger.t
    limit = max(1, round(config.refill_limit * config.groups_per_step))
    admitted = len(ledger.main)
    if (admitted if usable is None else usable) < config.groups_per_step and admitted < limit:
        return None

    def reason(entry: Entry) -> str:
        return fate(entry, t, config, ledger.halted)

    mains = ledger.buffered("main")[:limit]
    main, dropped, seen = _first_usable(mains, config.groups_per_step, reason)
    if len(main) < config.groups_per_step and seen < limit:
        return None
    last = max((entry.order for entry in main), default=-1)
    for kind, most in (("aux", config.n_aux), ("propose", proposers(config))):
        before = [entry for entry in ledger.buffered(kind) if entry.order < last]
        more, stale, _ = _first_usable(before, most, reason)
        main, dropped = main + more, dropped + stale
    refused = tuple(ledger.open[id_].item.group for id_, _ in dropped)
    return Selection(t, tuple(entry.item for entry in main), tuple(dropped), refused)


def proposers(config: LearnerConfig) -> int:
    """Proposer groups of one step at most."""
    return config.synthesis.proposers if config.synthesis else 0


def _first_usable(
    entries: list[Entry], count: int, reason_of: Callable[[Entry], str]
) -> tuple[list[Entry], list[tuple[int, str]], int]:
    """(the first `count` usable, the unusable before the last of them, how many were looked at)."""
    usable: list[Entry] = []
    dropped: list[tuple[int, str]] = []
    for seen, entry in enumerate(entries):
        if len(usable) == count:
            return usable, dropped, seen
        reason = reason_of(entry)
        if reason:
            dropped.append((entry.ticket.id, reason))
        else:
            usable.append(entry)
    return usable, dropped, len(entries)
