"""Synthesis from ticket to pool, with a policy made of hashes: a learner's ledger and issuer, and
actors that answer at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from common import wire
from common.audit import audit
from common.codec import Codec
from common.journal import Journal, Position
from common.models import find
from common.proposals import Proposals
from common.recipe import load_all
from common.records import Admit, AnyRecord, Issue, Open, Step
from learner.config import LearnerConfig
from learner.follow import followers
from learner.inbox import select
from learner.issuer import Issuer
from learner.ledger import Ledger
from learner.prompts.source import Arithmetic
from learner.prompts.stream import Prompts
from learner.synthesis.config import SynthesisConfig
from learner.synthesis.pool import Pool
from tests.builders import make_rollout

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


def fold_of(ledger: Ledger) -> bytes:
    return ledger.dump(Position("x", 0))


def eval_sum(question: str) -> int:
    return sum(map(int, question.rstrip("?").split("+")))
