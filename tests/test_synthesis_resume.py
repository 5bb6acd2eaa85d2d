"""Synthesis is a fold over the journal: whoever dies whenever, it goes on where it was."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from common import wire
from common.journal import Position
from common.records import Drop, Halt, Issue, Proposal, Ready
from learner.follow import followers
from learner.ledger import Ledger
from learner.synthesis.pool import Made, is_fresh
from tests.synthesis_world import (
    CODEC_OF_RECORDS,
    SEGMENT,
    World,
    chance,
    fold_of,
    words,
)


@pytest.fixture(scope="module")
def world() -> World:
    return World().until(16)


def test_a_restart_at_any_moment_changes_nothing(world: World) -> None:
    again = World()
    stops = 0
    while again.ledger.t < world.ledger.t:
        again.turn()
        if chance("restart", len(again.records)) < 0.7:
            stops += 1
            end = Position(SEGMENT, len(again.records))
            fold = Ledger.peek(again.ledger.dump(end))
            pairs = [(Position(SEGMENT, i), r) for i, r in enumerate(again.records)]
            old = fold_of(again.ledger)
            again.ledger = Ledger.restore(fold, pairs[fold.oldest[1] :], followers(again.config, 0))
            assert fold_of(again.ledger) == old
            again.begin()
    assert stops > 3
    assert list(map(CODEC_OF_RECORDS.encode, again.records)) == list(
        map(CODEC_OF_RECORDS.encode, world.records)
    )


def test_a_restart_does_not_change_which_parent_is_drawn_where_some_are_of_no_use() -> None:
    odd: dict[str, Any] = {"stem": r"^(.*[02468]\+)\d+\?$", "seeds": 12}  # of some no prompt
    world, again = World(**odd).until(4), World(**odd)
    while again.ledger.t < world.ledger.t:
        again.turn()
        again.begin()
    asked = [[ticket.problem for ticket in w.tickets("propose")] for w in (world, again)]
    assert len(asked[0]) > 1
    assert asked[0] == asked[1]


def test_a_learner_that_died_between_two_records_goes_on_where_it_was(world: World) -> None:
    _goes_on_wherever_it_died(world)


@pytest.mark.parametrize(
    "settings",
    [
        {"label": "consensus", "labeller": "", "answer": r"#(\d+)$", "accept": (0.5, 1.0)},
        {"label": "inherited", "labeller": "", "auditor": "arithmetic", "audited": 1.0},
    ],
)
def test_so_it_does_whoever_made_the_label(settings: dict[str, Any]) -> None:
    _goes_on_wherever_it_died(World(**settings).until(4))


def _goes_on_wherever_it_died(world: World) -> None:
    """Whatever the desk writes by itself it writes again, from the record on that was lost."""
    ours, seen = Proposal | Ready | Halt, set()
    settings = wire.msgspec.to_builtins(world.config.synthesis)
    for cut in range(1, len(world.records)):
        before, lost = world.records[cut - 1 : cut + 1]
        if not (isinstance(before, ours) and isinstance(lost, ours)):
            continue
        way = tuple(getattr(r, name, "") for r in (before, lost) for name in ("state", "reason"))
        if way in seen:
            continue
        seen.add(way)
        again = World(records=world.records[:cut], **settings)
        again.issuer.turn()
        again.issuer.turn()
        assert lost in again.records[cut:], way
    assert len(seen) > 3


def test_a_proposal_that_does_not_fit_the_settings_of_a_resume_is_rejected_with_a_reason() -> None:
    world = World(scoring=1)
    while not any(m.state == "labelled" and m.score < 0 for m in world.pool.state.made.values()):
        world.turn()
    waiting = [m for m in world.pool.state.made.values() if m.state == "labelled" and m.score < 0]
    longest = max(len(prompt) for prompt in map(prompt_of, waiting))
    world.begin(max_prompt=longest - 1)
    world.issuer.turn()
    found = world.proposals().made
    fate = {made.id: (found[made.id].state, found[made.id].reason) for made in waiting}
    assert ("rejected", "too long") in fate.values()
    assert world.issuer.next(world.issuer.room())[0] is not None


@pytest.mark.parametrize(
    ("before", "after"),
    [("consensus", "program_verified"), ("program_verified", "inherited")],
)
def test_labels_of_two_stages_are_never_in_one_pool(
    before: str, after: str, tmp_path: Path
) -> None:
    """Whoever resumes with another `label` begins with an empty pool, and the journal says why."""
    stages: dict[str, Any] = {
        "consensus": {"labeller": "", "answer": r"#(\d+)$", "accept": (0.5, 1.0), "uses": 1000},
        "program_verified": {"uses": 1000},
        "inherited": {"labeller": "", "ratio": 0.25},
    }
    world = World(label=before, **stages[before]).until(5)
    assert world.pool.active()
    resumed = World(records=world.records, label=after, **stages[after])
    at = len(resumed.records)
    resumed.until(9)
    found = resumed.proposals()
    ended = {reason for made, state, reason in found.moves if state in ("expired", "rejected")}
    assert "labelled by another stage" in ended
    assert all(made.origin == after for made in resumed.pool.active())
    asked = [r.ticket for r in resumed.records[at:] if isinstance(r, Issue)]
    mixed = [t for t in asked if t.source == "synthesis" and t.kind == "main" and is_fresh(t)]
    assert mixed or after == "inherited"
    assert all(found.made[ticket.problem].origin == after for ticket in mixed)
    assert resumed.audited(tmp_path / "run").violations == []


def test_a_proposal_asked_for_before_synthesis_was_off_is_dropped_with_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()
    flying: list[Any] = []
    while not flying:
        world.turn()
        world.ask()
        flying = [e for e in world.ledger.in_flight() if e.ticket.kind == "propose"]
    for name, found in followers(world.config, 0).items():  # as after a checkpoint without it
        world.ledger.followers[name] = found
    world.begin()
    with caplog.at_level(logging.WARNING):
        world.answer(flying[0].ticket)
        world.issuer.turn()
    ends = [r for r in world.records if isinstance(r, Drop) and r.ticket == flying[0].ticket.id]
    assert [end.reason for end in ends] == ["surplus"]
    assert caplog.text.count("was issued before synthesis was off") == 1
    before = world.ledger.t
    assert world.until(before + 4).pool.state.proposals > 0


def prompt_of(made: Made) -> list[int]:
    return list(words().encode(made.text, add_special_tokens=False))
