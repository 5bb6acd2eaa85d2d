"""Synthesis from ticket to pool, with a policy made of hashes: what is asked, what is kept, what is
trained on, and that all of it is a fold over the journal.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import wire
from common.audit import audit
from common.codec import Codec
from common.journal import Journal, Position
from common.models import find
from common.proposals import Proposals
from common.recipe import load_all
from common.records import Admit, AnyRecord, Drop, Halt, Issue, Open, Proposal, Ready, Step
from learner.config import LearnerConfig
from learner.follow import followers
from learner.inbox import select
from learner.issuer import Issuer
from learner.ledger import Ledger
from learner.prompts.config import PromptsConfig
from learner.prompts.source import Arithmetic
from learner.prompts.stream import Prompts
from learner.synthesis.config import SynthesisConfig
from learner.synthesis.pool import Asked, Made, Pool, Seed
from learner.synthesis.texts import LONGEST, Texts
from tests import chat_model
from tests.builders import make_group, make_rollout, make_segment, make_ticket

CODEC = Codec(wire.FromActor)
CODEC_OF_RECORDS = Codec(AnyRecord)
SEGMENT = "000001-000000"
SUMS: dict[str, Any] = {
    "prompt": "{stem}",
    "stem": r"^(.*\+)\d+\?$",
    "extract": r"^(\d{1,3})",
    "statement": "{stem}{proposal}?",
    "label": "program_verified",
    "labeller": "arithmetic",
    "parents": (0.25, 0.75),
    "accept": (0.25, 0.75),
    "proposals": 4,
    "rollouts": 4,
    "ratio": 0.5,
}


@cache
def words() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(find("tiny"))


def chance(*which: object) -> float:
    digest = hashlib.blake2b(repr(which).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def digits(ticket: wire.Ticket, rollout: int) -> str:
    """A proposer that writes a number, or now and then nothing of use."""
    drawn = chance("proposal", ticket.id, rollout)
    return "=" if drawn < 0.1 else f"{int(90 * drawn)}="


class World:
    """A learner's ledger and issuer, and actors that answer at once."""

    def __init__(
        self,
        proposer: Callable[[wire.Ticket, int], str] = digits,
        records: list[AnyRecord] | None = None,
        **synthesis: Any,
    ) -> None:
        self.proposer = proposer
        self.config = LearnerConfig(
            steps=100,
            groups_per_step=4,
            group_size=4,
            max_lag=1,
            max_tokens=12,
            prompts=load_all("tiny")["learner"].prompts,
            synthesis=SynthesisConfig(**SUMS | synthesis),
        )
        self.records: list[AnyRecord] = []
        self.ledger = Ledger(followers=followers(self.config, 0))
        for record in records or []:
            self.write(record)
        self.begin()

    def begin(self, max_prompt: int = 100) -> None:
        """A learner process starts: nothing is known but what the ledger holds."""
        prompts = Prompts(Arithmetic(0), self.config.prompts, words(), (2,), 0, max_prompt)
        self.issuer = Issuer(self.config, self.ledger, prompts, self.write)

    def write(self, record: AnyRecord) -> None:
        self.ledger.apply(record, Position(SEGMENT, len(self.records)))
        self.records.append(record)

    @property
    def pool(self) -> Pool:
        pool = self.ledger.followers["synthesis"]
        assert isinstance(pool, Pool)
        return pool

    def turn(self) -> None:
        """Everything that has room is asked and answered; then a step, where there is a batch."""
        self.ask()
        for entry in list(self.ledger.in_flight()):
            self.answer(entry.ticket)
            self.issuer.turn()
        batch = select(self.ledger, self.config)
        if batch is not None:
            t = self.ledger.t
            ended = {"consumed": batch.consumed, "dropped": batch.dropped}
            self.write(Step(t=t, version=t + 1, digest="", **ended))

    def ask(self) -> None:
        self.issuer.turn()
        room = self.issuer.room()
        for _ in range(40):
            id_, room = self.issuer.next(room)
            if id_ is None:
                break

    def answer(self, ticket: wire.Ticket) -> None:
        rollouts = tuple(self.rollout(ticket, i) for i in range(ticket.n))
        group = wire.Group(
            ticket=ticket.id, attempt=0, kind=ticket.kind, problem=ticket.problem, rollouts=rollouts
        )
        self.write(Admit(ticket=ticket.id, frame=bytes(CODEC.encode(group))))

    def rollout(self, ticket: wire.Ticket, i: int) -> wire.Rollout:
        if ticket.kind == "propose":
            said, right = self.proposer(ticket, i), False
        else:
            right = chance(ticket.problem, ticket.id, i) < 0.5
            said = f"#{ticket.grading.gold if right else 1}"
        tokens = words().encode(said, add_special_tokens=False)
        return make_rollout(float(right), tokens, version=self.ledger.t)

    def until(self, t: int) -> World:
        for _ in range(40 * t):
            if self.ledger.t >= t:
                return self
            self.turn()
        raise AssertionError(f"only {self.ledger.t} steps of {t}")

    def tickets(self, kind: str) -> list[wire.Ticket]:
        issued = [record.ticket for record in self.records if isinstance(record, Issue)]
        return [ticket for ticket in issued if ticket.kind == kind]

    def proposals(self) -> Proposals:
        found = Proposals()
        for record in self.records:
            assert found.take(record) == []
        return found

    def audited(self, folder: Path) -> Any:
        (folder / "journal").mkdir(parents=True)
        journal = Journal(folder / "journal", 1)
        settings = wire.msgspec.to_builtins(self.config)
        journal.append(Open(run="r", incarnation=1, config={"run": {}, "learner": settings}))
        for record in self.records:
            journal.append(record)
        journal.close()
        return audit(folder)


@pytest.fixture(scope="module")
def world() -> World:
    return World().until(16)


def fold_of(ledger: Ledger) -> bytes:
    return ledger.dump(Position("x", 0))


def test_problems_are_proposed_labelled_scored_pooled_and_asked(world: World) -> None:
    found = world.proposals()
    states = {made.state for made in found.made.values()}
    assert {"rejected", "expired"} <= states
    asked = [ticket for ticket in world.tickets("main") if ticket.source == "synthesis"]
    assert asked
    assert all(ticket.grading.gold == str(eval_sum(ticket.question)) for ticket in asked)
    assert {"no problem in it", "duplicate"} <= {reason for _, _, reason in found.moves}


def eval_sum(question: str) -> int:
    return sum(map(int, question.rstrip("?").split("+")))


def test_every_kind_conserves_its_tickets_and_the_auditor_agrees(
    world: World, tmp_path: Path
) -> None:
    sums = world.ledger.sums()
    assert {"main", "propose", "score"} <= set(sums)
    assert all(line.holds for line in sums.values())
    assert sums["score"].scored > 0
    assert sums["propose"].trained > 0
    found = world.audited(tmp_path / "run")
    assert found.violations == []
    for kind, line in sums.items():
        assert (found.sums[kind].trained, found.sums[kind].dropped) == (line.trained, line.dropped)


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


def test_any_run_of_main_prompts_has_its_share_of_the_pool_within_one(world: World) -> None:
    """From when the pool is never empty; prompts asked again keep their places out of it."""
    config = SUMS | {"uses": 1000, "life": 1000}
    for ratio in (0.5, 0.25, 0.3):
        w = World(**config | {"ratio": ratio}).until(10)
        fresh = [t for t in w.tickets("main") if t.cursor >= 0 or t.source == "synthesis"]
        first = next(i for i, t in enumerate(fresh) if t.source == "synthesis")
        mixed = np.cumsum([0] + [t.source == "synthesis" for t in fresh[first:]])
        for length in (4, 8):
            share = mixed[length:] - mixed[:-length]
            assert np.abs(share - ratio * length).max() < 1.0


def test_nothing_rejected_worn_or_old_is_asked_and_none_more_often_than_allowed() -> None:
    world = World(uses=1, life=3, ratio=0.5).until(12)
    found = world.proposals()
    assert max(made.uses for made in found.made.values()) == 1
    assert {reason for _, after, reason in found.moves if after == "expired"} == {"used", "old"}


def test_an_inherited_label_is_exactly_the_parents_and_what_is_made_is_never_the_parent() -> None:
    world = World(label="inherited", labeller="", ratio=0.25).until(6)
    golds = {ticket.problem: ticket.grading.gold for ticket in world.tickets("main")}
    texts = {ticket.problem: ticket.question for ticket in world.tickets("main")}
    labelled = [made for made in world.proposals().made.values() if made.gold]
    assert labelled
    for made in labelled:
        assert made.gold == golds[made.parent]
        assert made.text != texts[made.parent]


def test_labels_found_wrong_end_synthesis_in_one_line_and_the_originals_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        world = World(label="inherited", labeller="", auditor="arithmetic", audited=1.0).until(10)
    halts = [record for record in world.records if isinstance(record, Halt)]
    assert len(halts) == 1
    assert "audited labels are wrong" in halts[0].reason
    assert caplog.text.count("synthesis is off from here on") == 1
    at = world.records.index(halts[0])
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
    world.write(Halt(reason="labels are wrong"))
    before = len(world.records)
    for _ in range(4):
        world.turn()
    later = [r.ticket for r in world.records[before:] if isinstance(r, Issue)]
    assert later[0].parent == given.id
    assert not [ticket for ticket in later if ticket.source == "synthesis"]


def test_a_proposer_that_emits_nothing_usable_is_said_once_and_asked_ever_more_seldom(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        world = World(lambda ticket, i: "=?", patience=3).until(40)
    assert caplog.text.count("brings nothing usable") == 1
    steps, proposed = [], 0
    for record in world.records:
        if isinstance(record, Issue) and record.ticket.kind == "propose":
            proposed += 1
        if isinstance(record, Step):
            steps.append(proposed)
    assert steps[-1] < 15
    assert steps[-1] - steps[-9] <= 1
    assert all(ticket.source == "arithmetic" for ticket in world.tickets("main"))


def test_a_consensus_is_made_of_the_answers_and_says_so() -> None:
    world = World(
        label="consensus", labeller="", answer=r"#(\d+)$", accept=(0.5, 1.0), ratio=0.25
    ).until(6)
    found = [made for made in world.proposals().made.values() if made.gold]
    assert found
    assert {made.origin for made in found} == {"consensus"}
    assert {"no majority"} <= {reason for _, _, reason in world.proposals().moves}


def test_r_zero_pays_for_doubt_also_where_it_is_too_great_for_a_label() -> None:
    """min(s, 1 − s) is largest at one half, where no answer has the majority."""
    world = World(
        label="consensus", labeller="", answer=r"#(\d+)$", accept=(0.5, 1.0), reward="r_zero"
    ).until(4)
    made, doubted, useless = world.proposals().made, [], []
    for record in world.records:
        if isinstance(record, Ready):
            for rollout, score in enumerate(record.scores):
                reason = made[f"synthesis/{record.ticket}/{rollout}"].reason
                doubted += [score] * (reason == "no majority")
                useless += [score] * (reason == "no problem in it")
    assert max(doubted) > 0
    assert min(doubted) >= -1 > max(useless)


def test_queues_are_bounded_whatever_the_policy_does() -> None:
    world = World(seeds=3, proposing=1, scoring=2, size=4, uses=1000, life=1000)
    for _ in range(60):
        world.turn()
        state = world.pool.state
        assert len(state.seeds) <= 3
        assert len(state.asked) <= 1
        assert len(state.made) <= 4 + 2 * world.config.synthesis.proposals  # type: ignore[union-attr]


def test_problems_made_from_made_ones_stop_at_the_depth_allowed() -> None:
    flat, deep = World(seeds=6).until(12), World(seeds=6, depth=2).until(12)
    for world, deepest in ((flat, 1), (deep, 2)):
        parents = [made.parent for made in world.proposals().made.values() if made.parent]
        made = [parent for parent in parents if parent.startswith("synthesis/")]
        assert bool(made) == (deepest == 2)


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


def test_after_feedback_a_parents_response_is_that_of_the_last_turn() -> None:
    pool = Pool(SynthesisConfig(parents=(0.5, 0.5)))
    turns = [make_segment(tokens, turn=turn) for turn, tokens in enumerate(([5, 6], [7, 8, 9]))]
    right = make_rollout(1.0, segments=tuple(turns))
    group = make_group(rollouts=(right, make_rollout(0.0)), problem="p", kind="main")
    pool._consider(make_ticket(n=2, problem="p", question="1+1?"), group)
    (seed,) = pool.state.seeds
    assert (seed.response, seed.p) == ([7, 8, 9], 0.5)


def prompt_of(made: Made) -> list[int]:
    return list(words().encode(made.text, add_special_tokens=False))


def test_without_the_table_nothing_of_it_is_in_the_journal() -> None:
    plain = LearnerConfig(groups_per_step=4, prompts=load_all("tiny")["learner"].prompts)
    assert followers(plain, 0) == {}
    written: list[AnyRecord] = []
    ledger = Ledger()
    prompts = Prompts(Arithmetic(0), plain.prompts, words(), (2,), 0, 100)

    def write(record: AnyRecord) -> None:
        ledger.apply(record, Position(SEGMENT, len(written)))
        written.append(record)

    issuer, count = Issuer(plain, ledger, prompts, write), 0
    room = issuer.room()
    while count < 20:
        issuer.turn()
        _, room = issuer.next(room)
        count += 1
    assert all(isinstance(r, Issue) and not r.ticket.question for r in written)
    assert [r.ticket.cursor for r in written if isinstance(r, Issue)] == list(range(12))


def fenced(**prompts: Any) -> tuple[Texts, Any]:
    """The default formulation, with a tokenizer that knows all letters and a chat template."""
    letters = chat_model.tokenizer()
    config = LearnerConfig(prompts=PromptsConfig(**prompts), synthesis=SynthesisConfig())
    made = Prompts(Arithmetic(0), config.prompts, letters, (256,), 0, 2000)
    return Texts(config, made), letters


def test_by_default_the_policy_is_shown_a_right_response_and_not_the_problem() -> None:
    texts, letters = fenced(instruction="Think.", prefill="Well")
    said = letters.encode("3 + 4 = 7, so 7.", add_special_tokens=False)
    seed = Seed(
        ticket=1, problem="p", text="Add {3} & 4", gold="7", source="", p=0.5, response=said
    )
    ids = texts.prompt(seed)
    assert ids is not None
    asked = letters.decode(ids)
    assert "3 + 4 = 7, so 7." in asked
    assert "Add {3}" not in asked
    assert "Think." not in asked
    assert asked.endswith("assistant\n")


def test_a_response_without_a_problem_has_none_whatever_others_had() -> None:
    texts, letters = fenced()
    asked = Asked(n=2, parent="p", text="3 + 4?", gold="7", source="", depth=1)

    def said(text: str) -> tuple[str, str]:
        tokens = letters.encode(text, add_special_tokens=False)
        return texts.statement(make_rollout(0, tokens), asked)

    assert said("Here:\n```text\nTom has 3.\nHow many?\n```\nDone.")[0] == "Tom has 3.\nHow many?"
    assert said("```a``` or ```b```")[0] == "a"
    assert said("I cannot.") == ("", "no problem in it")
    assert said("``` ```") == ("", "no problem in it")


def test_a_regex_of_the_recipe_is_given_no_more_than_so_many_characters() -> None:
    texts, letters = fenced()
    asked = Asked(n=2, parent="p", text="3 + 4?", gold="7", source="", depth=1)
    for before, found in ((LONGEST - 7, "a"), (LONGEST - 6, "")):
        tokens = letters.encode("x" * before + "```a```", add_special_tokens=False)
        assert texts.statement(make_rollout(0, tokens), asked)[0] == found
    for after, answer in ((LONGEST - 2, "42"), (LONGEST, None)):
        tokens = letters.encode("It is 42" + "x" * after, add_special_tokens=False)
        assert texts.answer(tokens) == answer
