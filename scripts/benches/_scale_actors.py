"""Many scripted actors in one process: a DEALER each, one thread, one poller.

An actor says Hello, takes what it is granted, answers each ticket after a time that its length
model says, beats once a second, keeps what is not acknowledged, and leaves when it is told to. What
it says is decided by (seed, actor, ticket) alone.
"""

from __future__ import annotations

import heapq
import random
import sys
import time
from typing import Any

import numpy as np
import zmq

from common import channel, wire
from common.codec import Codec

LENGTH_MEAN, LENGTH_SIGMA, TOKENS_PER_S = 24.0, 0.4, 120.0
BEAT_S = 1.0
MADE = 64  # different groups; which one it is does not matter to the learner


class Actor:
    def __init__(self, swarm: Swarm, number: int, capacity: int) -> None:
        self.name, self.capacity = f"scripted-{number}", capacity
        self.socket = channel.connect_dealer(swarm.context, swarm.endpoint)
        self.chance = random.Random(number)
        self.held: dict[int, wire.Grant] = {}
        self.owed: dict[int, bytes] = {}
        self.run, self.incarnation = "", 0
        hello = wire.Hello(protocol=wire.PROTOCOL, digest="", actor=self.name, capacity=capacity)
        self.socket.send(swarm.ours.encode(hello))


class Swarm:
    def __init__(self, endpoint: str, first: int, count: int, capacity: int, rollouts: int) -> None:
        self.endpoint, self.rollouts = endpoint, rollouts
        self.context: zmq.Context[Any] = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, 2 * count + 16)
        self.ours, self.theirs = Codec(wire.FromActor), Codec(wire.FromLearner)
        self.made = [answers(number, rollouts) for number in range(MADE)]
        self.due: list[tuple[float, int, int]] = []  # (when, actor, ticket or -1: a beat)
        self.actors = [Actor(self, first + i, capacity) for i in range(count)]
        self.poller = zmq.Poller()
        self.of = {actor.socket: i for i, actor in enumerate(self.actors)}
        for i, actor in enumerate(self.actors):
            self.poller.register(actor.socket, zmq.POLLIN)
            heapq.heappush(self.due, (time.monotonic() + BEAT_S * actor.chance.random(), i, -1))

    def live(self) -> None:
        """Until every actor has been sent away."""
        while self.of:
            wait_s = self.due[0][0] - time.monotonic() if self.due else BEAT_S
            for socket, _ in self.poller.poll(max(0, round(1e3 * wait_s))):
                self.hear(self.of[socket])
            now = time.monotonic()
            while self.due and self.due[0][0] <= now:
                _, i, ticket = heapq.heappop(self.due)
                self.act(self.actors[i], i, ticket, now)

    def hear(self, i: int) -> None:
        actor = self.actors[i]
        while True:
            try:
                message = self.theirs.decode(actor.socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            match message:
                case wire.Welcome():
                    actor.run, actor.incarnation = message.run, message.incarnation
                case wire.Grant():
                    self.take(actor, i, message)
                case wire.Answer(ticket=first, also=also):
                    for ticket in (first, *also):
                        actor.owed.pop(ticket, None)
                case wire.Drain():
                    bye = wire.Bye(
                        run=actor.run, incarnation=actor.incarnation, held=tuple(actor.held)
                    )
                    actor.socket.send(self.ours.encode(bye))
                    self.poller.unregister(actor.socket)
                    del self.of[actor.socket]
                    actor.socket.close(linger=1000)
                    return

    def take(self, actor: Actor, i: int, grant: wire.Grant) -> None:
        length = LENGTH_MEAN * actor.chance.lognormvariate(-(LENGTH_SIGMA**2) / 2, LENGTH_SIGMA)
        actor.held[grant.ticket.id] = grant
        ready = time.monotonic() + length / TOKENS_PER_S
        heapq.heappush(self.due, (ready, i, grant.ticket.id))

    def act(self, actor: Actor, i: int, ticket: int, now: float) -> None:
        if actor.socket not in self.of:
            return
        if ticket < 0:
            beat = wire.Heartbeat(
                run=actor.run,
                incarnation=actor.incarnation,
                capacity=actor.capacity,
                held=tuple(actor.held),
                version=0,
                stats={"tokens_per_s": TOKENS_PER_S},
            )
            actor.socket.send(self.ours.encode(beat))
            heapq.heappush(self.due, (now + BEAT_S, i, -1))
            return
        grant = actor.held.pop(ticket)
        actor.owed[ticket] = frame = bytes(self.ours.encode(self.result(actor, grant)))
        actor.socket.send(frame)

    def result(self, actor: Actor, grant: wire.Grant) -> wire.Group:
        return wire.Group(
            run=actor.run,
            incarnation=actor.incarnation,
            ticket=grant.ticket.id,
            attempt=grant.attempt,
            kind=grant.ticket.kind,
            problem=grant.ticket.problem,
            rollouts=self.made[grant.ticket.id % MADE],
            actor=actor.name,
        )


def answers(number: int, rollouts: int) -> tuple[wire.Rollout, ...]:
    """A group's rollouts, half of them right."""
    rng = np.random.default_rng(number)
    found = []
    for i in range(rollouts):
        length = max(1, round(float(rng.lognormal(np.log(LENGTH_MEAN), LENGTH_SIGMA))))
        segment = wire.Segment(
            role="policy",
            tokens=rng.integers(0, 32, min(length, 48), np.int32),
            logps=-rng.random(min(length, 48), np.float32),
            spans=((0, 0),),
        )
        right = float(i % 2)
        found.append(
            wire.Rollout(
                segments=(segment,), finish="stop", correct=right, parts=({"correct": right},)
            )
        )
    return tuple(found)


if __name__ == "__main__":
    place, first, count, capacity, rollouts = sys.argv[1], *map(int, sys.argv[2:6])
    Swarm(place, first, count, capacity, rollouts).live()
