"""A desk on a real socket, and actors by hand at the other end of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from common import channel, wire
from common import keys as key_files
from common.codec import Codec
from common.failpoints import Failpoint
from common.journal import Journal, read
from common.records import AnyRecord, Open, Step
from learner.config import LearnerConfig
from learner.desk import Desk
from learner.follow import followers
from learner.inbox import Selection
from learner.ledger import Ledger
from learner.prompts.source import Arithmetic
from learner.prompts.stream import Prompts
from tests.builders import make_group

RUN, DIGEST = "run-1", "digest"
CONFIG = LearnerConfig(
    groups_per_step=2,
    group_size=2,
    max_lag=1,
    lease_s=5.0,
    heartbeat_s=0.05,
    steps=10,
    infra_budget=3,
    quarantine_after=2,
)


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [4 + ord(letter) % 20 for letter in text]}

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(ord("a") + token) for token in tokens)


class Counter:
    """A desk on a real socket, and what is needed to look behind it."""

    def __init__(
        self,
        folder: Path,
        config: LearnerConfig = CONFIG,
        incarnation: int = 1,
        keys: str = "",
        meanwhile: Callable[[], None] = lambda: None,
        digest: str = DIGEST,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.context: zmq.Context[Any] = zmq.Context()
        socket, self.endpoint = channel.bind_router(
            self.context, "tcp://127.0.0.1:0", key_files.read(keys)
        )
        self.journal = Journal(folder, incarnation)
        self.ledger = Ledger(followers=followers(config, 0))
        opened = Open(run=RUN, incarnation=incarnation, config={"learner": {}})
        self.ledger.apply(opened, self.journal.append(opened))
        self.prompts = Prompts(Arithmetic(0), config.prompts, Letters(), (2,), 0, 64)  # type: ignore[arg-type]
        self.desk = Desk(
            socket,
            run_id=RUN,
            incarnation=incarnation,
            digest=digest,
            vocab_size=32,
            config=config,
            journal=self.journal,
            ledger=self.ledger,
            prompts=self.prompts,
            failpoint=Failpoint.parse(""),
            meanwhile=meanwhile,
        )
        self.actors: list[Actor] = []

    def actor(self, capacity: int = 8, **fields: Any) -> Actor:
        actor = Actor(self.context, self.endpoint, **fields)
        self.actors.append(actor)
        actor.hello(capacity)
        return actor

    def records(self) -> list[AnyRecord]:
        return [record for _, record in read(self.folder)]

    def close(self) -> None:
        self.desk.close()
        for actor in self.actors:
            actor.socket.close(0)
        self.journal.close()
        self.context.term()


class Actor:
    """The other end, by hand."""

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        name: str = "a",
        pid: int = 1,
        keys: channel.Keys | None = None,
    ) -> None:
        self.socket = channel.connect_dealer(context, endpoint, keys)
        self.socket.setsockopt(zmq.RCVTIMEO, 5000)
        self.name, self.pid = name, pid
        self.codec = Codec(wire.FromLearner)
        self.put_by: list[Any] = []

    def say(self, message: wire.Message) -> None:
        self.socket.send(self.codec.encode(message))

    def hello(
        self, capacity: int, digest: str = DIGEST, protocol: int = wire.PROTOCOL, **fields: Any
    ) -> None:
        self.say(
            wire.Hello(
                protocol=protocol,
                digest=digest,
                actor=self.name,
                pid=self.pid,
                capacity=capacity,
                **fields,
            )
        )

    def hear(self, kind: type, timeout_s: float = 30.0) -> Any:
        """The next message of this kind; others but pulses are put by for later."""
        for message in self.put_by:
            if isinstance(message, kind):
                self.put_by.remove(message)
                return message
        until = time.monotonic() + timeout_s
        while self.socket.poll(max(0, int(1000 * (until - time.monotonic())))):
            message = self.codec.decode(self.socket.recv())
            if isinstance(message, kind):
                return message
            if not isinstance(message, wire.Pulse):
                self.put_by.append(message)
        raise AssertionError(f"no {kind.__name__} within {timeout_s} s; put by: {self.put_by}")

    def grants(self, count: int) -> list[wire.Grant]:
        return [self.hear(wire.Grant) for _ in range(count)]

    def answer(self, grant: wire.Grant, rewards: tuple[float, ...] = (1, 0), **fields: Any) -> str:
        self.say(result(grant.ticket, rewards, **fields))
        return str(self.hear(wire.Answer).verdict)

    def hears_nothing_but_pulses(self, pulses: int = 4) -> bool:
        for _ in range(pulses):
            self.hear(wire.Pulse)
        return not [m for m in self.put_by if isinstance(m, wire.Grant)]


def result(ticket: wire.Ticket, rewards: tuple[float, ...] = (1, 0), **fields: Any) -> wire.Group:
    fields = {"run": RUN, "incarnation": 1, **fields}
    return make_group(rewards, ticket=ticket.id, kind=ticket.kind, problem=ticket.problem, **fields)


def take(counter: Counter) -> Selection:
    until = time.monotonic() + 30
    selection = counter.desk.take(lambda: time.monotonic() > until)
    assert selection is not None, "no batch within 30 s"
    return selection


def train(counter: Counter, selection: Selection) -> None:
    t = selection.t
    counter.desk.record(
        Step(t=t, version=t + 1, digest="", consumed=selection.consumed, dropped=selection.dropped)
    )
    counter.desk.announce(t + 1)
