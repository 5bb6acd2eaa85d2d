"""Labels found wrong end synthesis; nothing that hangs on them is trained on, wherever it is."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest

from common.proposals import is_made
from common.records import AnyRecord, Drop, Halt, Issue, Proposal, Step
from learner.inbox import SUSPECT, Usable, select
from learner.synthesis.pool import Pool
from tests.builders import make_ticket
from tests.synthesis_world import World, eval_sum
from tests.test_ledger import Book, admit, issue


@pytest.fixture(scope="module")
def history() -> list[AnyRecord]:
    """Problems of the pool are buffered and in flight at its end, and proposers are ready."""
    world = World().until(6)
    while True:
        world.ask()
        flying = [entry.ticket for entry in world.ledger.in_flight()]
        mixed = [ticket for ticket in flying if ticket.kind == "main" and is_made(ticket.problem)]
        if len(mixed) > 1:
            for ticket in flying:
                if ticket is not mixed[-1]:
                    world.answer(ticket)
            return world.records
        world.turn()


@pytest.fixture
def at_work(history: list[AnyRecord]) -> World:
    return World(records=history)


def made_and_open(world: World) -> set[int]:
    """Tickets that wait to be trained on, of the pool's problems and of proposers."""
    kinds = ("main", "propose")
    found = [entry.ticket for entry in world.ledger.open.values() if entry.ticket.kind in kinds]
    return {ticket.id for ticket in found if is_made(ticket.problem)}


def fates(records: list[AnyRecord]) -> dict[int, str]:
    found = {}
    for record in records:
        if isinstance(record, Step):
            found |= dict.fromkeys(record.consumed, "trained") | dict(record.dropped)
        elif isinstance(record, Drop):
            found[record.ticket] = record.reason
    return found


def test_what_is_buffered_in_flight_or_comes_later_is_dropped_by_a_name_of_its_own(
    at_work: World, tmp_path: Path
) -> None:
    world = at_work
    suspect = made_and_open(world)
    at = len(world.records)
    world.write(Halt(reason="labels are wrong", t=world.ledger.t))
    world.until(world.ledger.t + 4)
    ended = fates(world.records[at:])
    assert {ended[id_] for id_ in suspect} == {SUSPECT}
    assert {ended[id_] for id_ in ended.keys() - suspect} <= {"trained", "zero_variance"}
    sums = world.ledger.sums()
    assert all(line.holds for line in sums.values())
    assert sums["main"].dropped[SUSPECT] + sums["propose"].dropped.get(SUSPECT, 0) == len(suspect)
    found = world.audited(tmp_path / "run")
    assert found.violations == []
    assert found.sums["main"].dropped == sums["main"].dropped


def test_the_auditor_finds_a_step_that_trained_on_a_suspect_label(
    at_work: World, tmp_path: Path
) -> None:
    world = at_work
    world.until(world.ledger.t + 2)
    made = {t.id for t in world.tickets("main") if is_made(t.problem)}
    steps = [r for r in world.records if isinstance(r, Step) and made & set(r.consumed)]
    step = steps[-1]
    world.records.insert(world.records.index(step), Halt(reason="labels are wrong", t=step.t))
    found = world.audited(tmp_path / "run")
    assert [line for line in found.violations if line.startswith(f"step {step.t} trained on")]


@pytest.mark.parametrize("t", [0, 99])
def test_the_auditor_finds_a_halt_that_holds_from_another_step_on(tmp_path: Path, t: int) -> None:
    world = World().until(3)
    world.write(Halt(reason="labels are wrong", t=t))
    found = world.audited(tmp_path / "run").violations
    assert [line for line in found if line.startswith(f"a halt holds from step {t} on")]


def test_the_auditor_finds_what_was_dropped_as_suspect_and_is_not(tmp_path: Path) -> None:
    world = World().until(3)
    world.ask()
    ticket = next(e.ticket for e in world.ledger.in_flight() if not is_made(e.ticket.problem))
    world.write(Drop(ticket=ticket.id, reason=SUSPECT))
    found = world.audited(tmp_path / "run").violations
    assert [line for line in found if "as suspect, and no halt made it so" in line]


def test_a_step_that_had_begun_is_trained_as_it_was_determined(at_work: World) -> None:
    """Its batch left the desk before anybody knew; a replay has to find the same one."""
    world = at_work
    before = select(world.ledger, world.config)
    assert before is not None
    assert made_and_open(world) & set(before.consumed)
    world.write(Halt(reason="labels are wrong", t=world.ledger.t + 1))
    after = select(world.ledger, world.config)
    assert after is not None
    assert (after.consumed, after.dropped) == (before.consumed, before.dropped)


def test_a_halt_says_from_which_step_on_and_a_step_that_never_ended_begins_again_without(
    at_work: World,
) -> None:
    world = at_work
    t = world.ledger.t
    world.issuer.begin(t)
    found_wrong(world)
    world.issuer.turn()
    assert [record.t for record in halts(world)] == [t + 1]
    world.issuer.turn()
    assert len(halts(world)) == 1
    world.begin()  # the learner died in that step
    world.issuer.turn()
    assert [record.t for record in halts(world)] == [t + 1, t]
    at, suspect = len(world.records), made_and_open(world)
    world.until(t + 3)
    ended = fates(world.records[at:])
    assert {ended[id_] for id_ in suspect} == {SUSPECT}


def found_wrong(world: World) -> None:
    """Eight second opinions that labels are wrong."""
    made = next(iter(world.pool.state.made.values()))
    for _ in range(8):
        world.write(
            Proposal(ticket=made.ticket, rollout=made.rollout, state="labelled", audit="wrong")
        )


def halts(world: World) -> list[Halt]:
    return [record for record in world.records if isinstance(record, Halt)]


def test_a_halt_is_kept_by_checkpoints_and_makes_room_for_others_at_once() -> None:
    book = Book()
    book.tell(*(issue(i) for i in range(2)), made_of_two(2))
    book.tell(*(admit(i) for i in range(3)))
    config, usable = World().config, Usable("main")
    assert usable.count(book.ledger, config) == 3
    book.tell(Halt(reason="labels are wrong", t=0))
    assert usable.count(book.ledger, config) == 2
    assert book.restored().halted == 0


def made_of_two(id_: int) -> Issue:
    return Issue(ticket=make_ticket(id=id_, problem="synthesis/9/0", n=2))


def test_labels_found_wrong_end_synthesis_in_one_line_and_the_originals_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        world = World(label="inherited", labeller="", auditor="arithmetic", audited=1.0).until(10)
    assert len(halts(world)) == 1
    assert "audited labels are wrong" in halts(world)[0].reason
    assert caplog.text.count("synthesis is off from here on") == 1
    at = world.records.index(halts(world)[0])
    later = [r.ticket for r in world.records[at:] if isinstance(r, Issue)]
    assert {ticket.kind for ticket in later} == {"main"}
    assert all(ticket.source == "arithmetic" for ticket in later)
    trained = [t for t in world.tickets("main") if t.source == "synthesis"]
    assert all(t.grading.gold == str(eval_sum(t.question)) for t in trained)
    assert not world.pool.active()


def test_a_problem_of_a_pool_with_wrong_labels_is_not_asked_again_when_its_group_was_stale() -> (
    None
):
    world = World().until(8)
    made = next(t for t in world.tickets("main") if t.source == "synthesis")
    given = next(t for t in world.tickets("main") if t.source != "synthesis")
    world.ledger.again = [made, given]
    world.write(Halt(reason="labels are wrong", t=world.ledger.t))
    before = len(world.records)
    for _ in range(4):
        world.turn()
    later = [r.ticket for r in world.records[before:] if isinstance(r, Issue)]
    assert later[0].parent == given.id
    assert not [ticket for ticket in later if ticket.source == "synthesis"]


def test_a_run_that_was_halted_before_halts_said_from_when_on_trains_on_no_more_of_it(
    at_work: World,
) -> None:
    world = at_work
    suspect = made_and_open(world)
    world.write(Halt(reason="labels are wrong"))
    world.begin()
    at = len(world.records)
    world.until(world.ledger.t + 4)
    ended = fates(world.records[at:])
    assert {ended[id_] for id_ in suspect} == {SUSPECT}


def test_what_was_ended_for_wrong_labels_stays_off_with_a_pool_begun_anew(
    at_work: World, tmp_path: Path
) -> None:
    """Synthesis off, a checkpoint, synthesis on: else it would propose what no step may use."""
    world = at_work
    world.write(Halt(reason="labels are wrong", t=world.ledger.t))
    world.issuer.turn()
    world.ledger.followers["synthesis"] = Pool(world.pool.config)
    world.begin()
    at = len(world.records)
    world.until(world.ledger.t + 6)
    later = [record.ticket for record in world.records[at:] if isinstance(record, Issue)]
    assert {ticket.kind for ticket in later} == {"main"}
    assert not [ticket for ticket in later if is_made(ticket.problem)]
    assert world.audited(tmp_path / "run").violations == []


def test_without_synthesis_no_stale_problem_with_a_wrong_label_is_asked_again() -> None:
    world = World().until(8)
    made = next(t for t in world.tickets("main") if t.source == "synthesis")
    world.write(Halt(reason="labels are wrong", t=world.ledger.t))
    world.issuer.turn()
    world.ledger.again = [made]
    world.config = msgspec.structs.replace(world.config, synthesis=None)
    del world.ledger.followers["synthesis"]
    world.begin()
    at = len(world.records)
    world.ask()
    later = [record.ticket for record in world.records[at:] if isinstance(record, Issue)]
    assert later
    assert not [ticket for ticket in later if is_made(ticket.problem)]


def test_inherited_labels_that_nobody_audits_are_said_to_be_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        World(label="inherited", labeller="")
        World()
    assert caplog.text.count("learner.synthesis.auditor names nobody") == 1
