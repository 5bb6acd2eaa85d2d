"""How many actors a learner needs: idle shares and lag, predicted by playing a run in a model.

The model plays what the learner and its actors do, group by group: the issue rule (tickets out and
usable groups buffered stay below (max_lag + 1) × groups_per_step), credits, sequences that share an
actor's speed, groups that teach nothing, the batch rule with its lag limit, a training time, a
version that reaches actors a moment later. Nothing is computed and nothing is sent, so a run of
hours takes seconds.

Speeds: an actor with k sequences makes min(k × `sequence_tokens_per_s`, `tokens_per_s`) tokens a
second. Lengths are log-normal, cut at `max_tokens`.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is like, apart from how many actors it has. Times in seconds."""

    groups_per_step: int
    group_size: int
    max_lag: int
    max_tokens: int
    slots: int  # sequences side by side on an actor
    prefetch: int  # tickets held beyond those
    length_mean: float  # of an answer, tokens
    length_sigma: float  # standard deviation of its logarithm
    tokens_per_s: float  # of an actor whose slots are full
    sequence_tokens_per_s: float  # of one sequence alone
    useful: float = 1.0  # share of the groups that a step can use
    train_s: float  # a step, with all that comes after it before the next
    swap_s: float = 0.0  # from a version's publication until actors sample from it
    grade_s: float = 0.0  # from a group's last token until the learner has it


class Predicted(NamedTuple):
    actors: int
    step_s: float
    learner_idle: float  # share of the time that it waits for groups
    actor_idle: float  # share of the time that an actor has nothing to decode
    lag_mean: float  # of the rollouts trained on, steps
    lag_max: int
    stale: float  # share of the groups dropped for their lag


@dataclass(slots=True)
class _Ticket:
    oldest: int  # the version that its first token is from
    left: int  # sequences not done
    actor: int
    least: int  # the version that it waits for


@dataclass(slots=True)
class _Actor:
    """Sequences that share one speed: `progress` is how many tokens each has made since ever."""

    running: list[tuple[float, int]] = field(default_factory=list)  # (progress at its end, ticket)
    waiting: deque[tuple[float, int]] = field(default_factory=deque)  # (length, ticket)
    held: int = 0
    version: int = 0
    progress: float = 0.0
    since: float = 0.0  # when `progress` was so
    busy: float = 0.0
    turn: int = 0  # of its next event; older ones are void


class Play:
    """One run of `shape` with `actors` actors."""

    def __init__(self, shape: Shape, actors: int, seed: int = 0) -> None:
        self.shape = shape
        self.actors = [_Actor() for _ in range(actors)]
        self.chance = random.Random(seed)
        self.now = 0.0
        self.t = 0
        self.tickets: dict[int, _Ticket] = {}
        self.buffer: deque[int] = deque()  # oldest versions of usable groups, in admission order
        self.flying = 0
        self.events: list[tuple[float, int, str, int, int]] = []
        self.lags: list[int] = []
        self.stale = self.used = self.number = 0
        self.idle = 0.0
        self.waiting_since: float | None = 0.0

    def run(self, steps: int, warm_up: int) -> Predicted:
        """`steps` steps, the first `warm_up` of which are not counted."""
        began, busy = 0.0, 0.0
        self.issue()
        while self.t < steps:
            self.now, _, what, who, turn = heapq.heappop(self.events)
            if what == "tokens" and self.actors[who].turn == turn:
                self.tokens(who)
            elif what == "arrives":
                self.arrives(who)
            elif what == "trained":
                self.trained()
                if self.t == warm_up:
                    self.lags, self.stale, self.used = [], 0, 0
                    self.idle, began = 0.0, self.now
                    busy = sum(actor.busy for actor in self.actors)
            elif what == "version":
                self.actors[who].version = turn
                self.start(who)
            self.train()
            self.issue()
        seconds, count = self.now - began, len(self.actors)
        worked = (sum(actor.busy for actor in self.actors) - busy) / (count * seconds)
        return Predicted(
            actors=count,
            step_s=seconds / (steps - warm_up),
            learner_idle=self.idle / seconds,
            actor_idle=max(0.0, 1 - worked),
            lag_mean=sum(self.lags) / max(1, len(self.lags)),
            lag_max=max(self.lags, default=0),
            stale=self.stale / max(1, self.stale + self.used),
        )

    # ---- the learner -----------------------------------------------------------------------------

    def issue(self) -> None:
        """Tickets to whoever has most room, while there is room for them."""
        shape = self.shape
        most = -(-shape.slots // shape.group_size) + shape.prefetch
        kept = shape.groups_per_step if self.waiting_since is None else 0  # those in training
        usable = sum(self.t - version <= shape.max_lag for version in self.buffer)
        ahead = self.flying + usable + kept
        room = (shape.max_lag + 1) * shape.groups_per_step - ahead
        ready = [(actor.held, i) for i, actor in enumerate(self.actors) if actor.held < most]
        heapq.heapify(ready)
        touched = set[int]()
        while room > 0 and ready:
            held, i = heapq.heappop(ready)
            self.grant(i, self.t + ahead // shape.groups_per_step - shape.max_lag)
            touched.add(i)
            room, ahead = room - 1, ahead + 1
            if held + 1 < most:
                heapq.heappush(ready, (held + 1, i))
        for i in touched:
            self.start(i)

    def train(self) -> None:
        """Begin a step when there are enough groups that are fresh enough."""
        shape = self.shape
        if self.waiting_since is None:
            return
        fresh = [v for v in self.buffer if self.t - v <= shape.max_lag]
        if len(fresh) < shape.groups_per_step:
            return
        self.idle += self.now - self.waiting_since
        self.waiting_since = None
        taken = 0
        while taken < shape.groups_per_step:
            version = self.buffer.popleft()
            if self.t - version > shape.max_lag:
                self.stale += 1
                continue
            taken += 1
            self.lags.append(self.t - version)
        self.used += taken
        self.later(shape.train_s, "trained")

    def trained(self) -> None:
        self.t += 1
        self.waiting_since = self.now
        for i in range(len(self.actors)):
            self.later(self.shape.swap_s, "version", i, self.t)

    def arrives(self, ticket: int) -> None:
        one = self.tickets.pop(ticket)
        self.flying -= 1
        if self.chance.random() < self.shape.useful:
            self.buffer.append(one.oldest)

    # ---- an actor --------------------------------------------------------------------------------

    def grant(self, i: int, least: int) -> None:
        actor, shape = self.actors[i], self.shape
        self.number += 1
        self.tickets[self.number] = _Ticket(-1, shape.group_size, i, least)
        mean = math.log(shape.length_mean) - shape.length_sigma**2 / 2
        for _ in range(shape.group_size):
            length = self.chance.lognormvariate(mean, shape.length_sigma)
            actor.waiting.append((min(max(1.0, length), float(shape.max_tokens)), self.number))
        actor.held += 1
        self.flying += 1

    def start(self, i: int) -> None:
        """Fill the slots, and say when the next sequence ends."""
        actor = self.actors[i]
        self.advance(actor)
        while actor.waiting and len(actor.running) < self.shape.slots:
            length, ticket = actor.waiting[0]
            one = self.tickets[ticket]
            if actor.version < one.least:
                break
            actor.waiting.popleft()
            one.oldest = actor.version if one.oldest < 0 else one.oldest
            heapq.heappush(actor.running, (actor.progress + length, ticket))
        actor.turn += 1
        if actor.running:
            left = actor.running[0][0] - actor.progress
            self.later(left / self.speed(actor), "tokens", i, actor.turn)

    def tokens(self, i: int) -> None:
        """One sequence, or several of one length, have ended."""
        actor = self.actors[i]
        self.advance(actor)
        while actor.running and actor.running[0][0] <= actor.progress + 1e-9:
            _, ticket = heapq.heappop(actor.running)
            one = self.tickets[ticket]
            one.left -= 1
            if one.left == 0:
                actor.held -= 1
                self.later(self.shape.grade_s, "arrives", ticket)
        self.start(i)

    def advance(self, actor: _Actor) -> None:
        if actor.running:
            passed = self.now - actor.since
            actor.busy += passed
            actor.progress += passed * self.speed(actor)
        actor.since = self.now

    def speed(self, actor: _Actor) -> float:
        """Tokens a second of each of its sequences."""
        shape = self.shape
        return min(shape.sequence_tokens_per_s, shape.tokens_per_s / len(actor.running))

    def later(self, after_s: float, what: str, who: int = 0, turn: int = 0) -> None:
        self.number += 1
        heapq.heappush(self.events, (self.now + after_s, self.number, what, who, turn))


def predict(shape: Shape, actors: int, steps: int = 40, warm_up: int = 8) -> Predicted:
    return Play(shape, actors).run(steps, warm_up)


def needed(shape: Shape, idle: float = 0.05) -> Predicted:
    """With the fewest actors that leave the learner at most `idle` of its time without work. When
    no number does, not even one for every ticket that there can be: with the fewest that leave it
    so little that more would change nothing (a hundredth).
    """
    low, high, most = 0, 1, (shape.max_lag + 1) * shape.groups_per_step
    while (found := predict(shape, high)).learner_idle > idle and high < most:
        low, high = high, min(2 * high, most)
    if found.learner_idle > idle:
        low, idle = 0, found.learner_idle + 0.01
    while high - low > 1:
        middle = (low + high) // 2
        tried = predict(shape, middle)
        if tried.learner_idle <= idle:
            high, found = middle, tried
        else:
            low = middle
    return found


def around(shape: Shape, actors: int) -> Sequence[Predicted]:
    """For half, as many, and twice as many actors, and their neighbours in between."""
    counts = sorted({max(1, round(actors * factor)) for factor in (0.25, 0.5, 0.75, 1, 1.5, 2, 4)})
    return [predict(shape, count) for count in counts]
