"""Which problem is asked next, by how well the policy did on it before.

    target         the one whose difficulty is nearest to T; T follows the accuracy
                   (AdaRFT, arXiv 2504.05520)
    prioritised    with probability ∝ 1 - s       (Kimi k1.5, arXiv 2501.12599)
    learnability   with probability ∝ s (1 - s)

s is the tracked success of a problem: Beta counts, prior 1/1, that shrink by `decay` at every new
group, and by `fade` for every version that the policy has moved on since the evidence came.

A draw looks at `candidates` problems of the source whose turn it is, and is pure in (seed, number
of the draw, journal so far): this is a fold over the journal (learner/follow.py), so that a restart
changes nothing. Every group counts once, when it is admitted, whatever becomes of it. No problem is
asked twice between two steps while there are others.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from common.errors import DataError, JournalError
from common.records import Admit, AnyRecord, Drop, Issue, Step
from learner.prompts.config import CurriculumConfig
from learner.prompts.mixture import Mixture
from learner.prompts.source import Problem, Source

if TYPE_CHECKING:
    from learner.ledger import Entry

log = logging.getLogger("isentrope.prompts")

NAME = "curriculum"
MOST_VAIN = 100  # looks at a source in a row that find no row with a difficulty
HARDEST = 100.0  # difficulties are from 0 to this

Place = tuple[str, int]  # source, position in it


class Track(msgspec.Struct, frozen=True, array_like=True):
    """What is known of one problem: Beta counts, and the version that the evidence is from."""

    right: float = 1.0
    wrong: float = 1.0
    version: int = 0

    def seen(self, right: float, of: int, version: int, decay: float) -> Track:
        """After a group of `of` answers, `right` of them right."""
        return Track(
            decay * self.right + right,
            decay * self.wrong + of - right,
            max(version, self.version),
        )

    def success(self, t: int, fade: float) -> float:
        """Expected success under version `t`: old evidence counts for less."""
        kept = fade ** max(0, t - self.version)
        right, wrong = 1 + kept * (self.right - 1), 1 + kept * (self.wrong - 1)
        return right / (right + wrong)


class _State(msgspec.Struct):
    draws: int = 0  # tickets taken from the stream
    t: int = 0  # steps done
    target: float = 0.0
    right: float = 0.0  # since the last step: sum of the groups' accuracies …
    groups: int = 0  # … and how many groups
    tracks: list[tuple[str, int, Track]] = []
    open: list[tuple[int, str, int]] = []
    recent: list[Place] = []


def weights(success: np.ndarray, rule: str, epsilon: float) -> np.ndarray:
    """float64 [n], not normalised."""
    weight = 1 - success if rule == "prioritised" else success * (1 - success)
    return weight + epsilon


def moved(target: float, accuracy: float, config: CurriculumConfig) -> float:
    """T after a step of this accuracy."""
    change = config.step * math.tanh(config.sensitivity * (accuracy - config.aim))
    return min(HARDEST, max(0.0, target + change))


class Curriculum:
    """A learner.follow.Follower."""

    def __init__(self, config: CurriculumConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._state = _State(target=config.start)
        self._tracks: dict[Place, Track] = {}
        self._open: dict[int, Place] = {}  # of main tickets that may still bring evidence
        self._recent: set[Place] = set()  # asked since the last step
        self._unrated: set[Place] = set()  # rows without a difficulty, passed over

    # ---- drawing ---------------------------------------------------------------------------------

    def choose(self, source: Source) -> Iterator[tuple[Problem, int]]:
        """(problem, its position in its source), best first: the draw whose turn it is. Endless."""
        draw = self._state.draws
        leaf, number = source.place(draw) if isinstance(source, Mixture) else (0, draw)
        base = source.leaves[leaf] if isinstance(source, Mixture) else source
        name = source.names[leaf] if isinstance(source, Mixture) else source.name
        rows = base.rows or self._config.pool

        def problem(position: int) -> Problem:
            found = base.train(position)._replace(epoch=number // rows)
            return source.marked(leaf, found) if isinstance(source, Mixture) else found

        vain = 0
        for attempt in count():
            random = np.random.Generator(np.random.PCG64([self._seed, draw, attempt]))
            candidates, problems = self._looked_at(random, rows), {}
            if self._config.rule == "target" and self._config.difficulty:
                problems = self._rated(name, {at: problem(at) for at in candidates})
                vain = 0 if problems else vain + 1
                if vain == MOST_VAIN:
                    raise DataError(f"source {name!r}: {self._wanted()}; no row looked at has one")
                candidates = list(problems)
            candidates = [at for at in candidates if (name, at) not in self._recent] or candidates
            for position in self._ranked(random, name, candidates, problems):
                yield problems.get(position) or problem(position), position

    def _looked_at(self, random: np.random.Generator, rows: int) -> list[int]:
        if rows <= self._config.candidates:
            return list(range(rows))
        found: list[int] = random.choice(rows, self._config.candidates, replace=False).tolist()
        return found

    def _rated(self, name: str, problems: dict[int, Problem]) -> dict[int, Problem]:
        """Those with a difficulty; the others are counted, and said of the first and thousands."""
        found = {}
        for position, problem in problems.items():
            if _difficulty(problem, self._config) is not None:
                found[position] = problem
            elif (name, position) not in self._unrated:
                self._unrated.add((name, position))
                if len(self._unrated) % 1_000 == 1:
                    message = "problem %s passed over, its difficulty is %r (%d so far); %s"
                    value = problem.columns.get(self._config.difficulty)
                    log.warning(message, problem.id, value, len(self._unrated), self._wanted())
        return found

    def _wanted(self) -> str:
        return (
            "learner.prompts.curriculum.difficulty wants a number from 0 to 100 in column "
            f"{self._config.difficulty!r}"
        )

    def _ranked(
        self,
        random: np.random.Generator,
        name: str,
        candidates: Sequence[int],
        problems: Mapping[int, Problem],
    ) -> list[int]:
        """The first of them is drawn by the rule; the others follow as they would be."""
        config, chance = self._config, random.random(len(candidates))
        success = np.array([self.success(name, position) for position in candidates])
        if config.rule == "target":
            given = [_difficulty(problems[at], config) for at in candidates if at in problems]
            difficulty = np.array(given, np.float64) if given else HARDEST * (1 - success)
            order = np.lexsort((chance, np.abs(difficulty - self._state.target)))
        else:  # a race of exponential clocks: the first to ring is drawn ∝ its rate
            rate = weights(success, config.rule, config.epsilon)
            order = np.argsort(-np.log1p(-chance) / rate, kind="stable")
        return [candidates[int(place)] for place in order]

    def success(self, source: str, position: int) -> float:
        """Tracked success of a problem: 1/2 when nothing is known of it."""
        track = self._tracks.get((source, position), Track())
        return track.success(self._state.t, self._config.fade)

    def facts(self) -> dict[str, float]:
        """For the metrics."""
        known = [track.success(self._state.t, self._config.fade) for track in self._tracks.values()]
        found = {"problems": float(len(known)), "success": sum(known) / max(1, len(known))}
        return found | ({"target": self._state.target} if self._config.rule == "target" else {})

    # ---- the fold --------------------------------------------------------------------------------

    def follow(self, record: AnyRecord, entry: Entry | None) -> None:
        match record:
            case Issue(ticket=ticket) if ticket.cursor >= 0 and ticket.kind in ("main", "aux"):
                place = (ticket.source, ticket.cursor)
                self._state.draws += 1
                self._recent.add(place)
                if ticket.kind == "main":
                    self._open[ticket.id] = place
            case Issue(ticket=ticket) if ticket.kind == "main" and ticket.parent in self._open:
                if self._open[ticket.parent][0] == ticket.source:  # asked again
                    self._open[ticket.id] = self._open.pop(ticket.parent)
            case Admit(ticket=id_) if entry is not None and id_ in self._open:
                self._learn(self._open[id_], entry)
            case Step(t=t, consumed=consumed, dropped=dropped):
                for id_ in (*consumed, *(i for i, reason in dropped if reason != "stale")):
                    self._open.pop(id_, None)
                self._step(t)
            case Drop(ticket=id_):
                self._open.pop(id_, None)

    def _learn(self, place: Place, entry: Entry) -> None:
        graded = [r for r in entry.item.group.rollouts if not r.error]
        if not graded:
            return
        # a user's grader may find an answer worse than wrong: no more counts are taken than given
        right = math.fsum(min(1.0, max(0.0, r.correct)) for r in graded)
        of = len(graded)
        track = self._tracks.get(place, Track())
        self._tracks[place] = track.seen(right, of, entry.oldest, self._config.decay)
        self._state.right += right / of
        self._state.groups += 1

    def _step(self, t: int) -> None:
        state = self._state
        if state.groups:
            state.target = moved(state.target, state.right / state.groups, self._config)
        state.right, state.groups, state.t = 0.0, 0, t + 1
        self._recent.clear()

    def dump(self) -> bytes:
        state = msgspec.structs.replace(
            self._state,
            tracks=[(*place, track) for place, track in self._tracks.items()],
            open=[(id_, *place) for id_, place in self._open.items()],
            recent=sorted(self._recent),
        )
        return msgspec.msgpack.encode(state)

    def restore(self, data: bytes) -> None:
        try:
            state = msgspec.msgpack.decode(data, type=_State)
        except msgspec.MsgspecError as error:
            raise JournalError(f"the checkpoint's curriculum is damaged: {error}") from None
        self._tracks = {(source, at): track for source, at, track in state.tracks}
        self._open = {id_: (source, at) for id_, source, at in state.open}
        self._recent = set(state.recent)
        self._state = msgspec.structs.replace(state, tracks=[], open=[], recent=[])


def of(followers: Mapping[str, object]) -> Curriculum | None:
    """The one among those that follow a ledger."""
    found = followers.get(NAME)
    assert found is None or isinstance(found, Curriculum)
    return found


def _difficulty(problem: Problem, config: CurriculumConfig) -> float | None:
    """None: the row's column is no number from 0 to 100."""
    value = problem.columns.get(config.difficulty)
    if not isinstance(value, int | float) or not 0 <= value <= HARDEST:
        return None
    return float(value)
