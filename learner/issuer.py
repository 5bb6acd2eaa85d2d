"""What to ask next, and whether there is room for it.

    evaluations ─▶ aux ─▶ score, propose ─▶ main tickets: prompts of stale groups first, then the
                                            pool of proposed problems in its turn, then the stream

Room is what the lag bound leaves: tickets out plus usable groups buffered stay below
(max_lag + 1) × groups_per_step, so that what is asked now is fresh enough when it is used. Groups
that teach nothing do not count: they make room at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from common import wire
from common.episodes import Episode
from common.proposals import is_made
from common.records import AnyRecord, Issue
from learner.config import LearnerConfig
from learner.inbox import Usable
from learner.ledger import Ledger
from learner.methods.base import Ask
from learner.prompts import curriculum
from learner.prompts.stream import Draft, Prompts
from learner.synthesis.asking import Request
from learner.synthesis.pool import Pool
from learner.synthesis.server import Synthesis

NOTHING = Ask(groups=0, temperature=1.0)


class Room(NamedTuple):
    """How many new training tickets have room; `ahead`: main groups asked for and not used yet."""

    main: int
    aux: int
    ahead: int


class Issuer:
    """Belongs to the desk's thread. `write` journals a record and applies it to the ledger."""

    def __init__(
        self,
        config: LearnerConfig,
        ledger: Ledger,
        prompts: Prompts,
        write: Callable[[AnyRecord], None],
    ) -> None:
        self.ask = NOTHING  # of aux tickets from now on
        self._config, self._ledger, self._prompts, self._write = config, ledger, prompts, write
        self._evaluations: deque[tuple[str, Draft, int]] = deque()  # label, problem, min_version
        self._usable = {kind: Usable(kind) for kind in ("main", "aux")}
        pool = ledger.followers.get("synthesis")
        self._synthesis = (
            Synthesis(config, pool, ledger, prompts, write) if isinstance(pool, Pool) else None
        )

    def evaluate(self, label: str, problems: Sequence[Draft], min_version: int) -> None:
        """Those of `problems` that evaluation `label` has not asked yet come before all else."""
        known = self._ledger.evaluations.get(label)
        asked = set(known.issued) if known else set()
        self._evaluations.extend(
            (label, draft, min_version) for draft in problems if draft.problem not in asked
        )

    def forget_evaluations(self) -> None:
        self._evaluations.clear()

    def usable(self, kind: str = "main") -> int:
        """Admitted groups that the coming step can use."""
        return self._usable[kind].count(self._ledger, self._config)

    def room(self) -> Room:
        config, ledger = self._config, self._ledger
        main = self.usable("main") + ledger.flying["main"]
        aux = self.usable("aux") + ledger.flying["aux"]
        horizon = min(config.max_lag + 1, config.steps - ledger.t)
        return Room(
            main=horizon * config.groups_per_step - main,
            aux=horizon * self.ask.groups - aux,
            ahead=main,
        )

    def wants(self, room: Room) -> bool:
        made = self._synthesis is not None and self._synthesis.asking.wants()
        return bool(self._evaluations) or room.main > 0 or room.aux > 0 or made

    def next(self, room: Room) -> tuple[int | None, Room]:
        """The id of a ticket issued just now (None: there is no room), and the room then left.

        Aux before main: an aux group is trained on beside the main groups that come in after it.
        """
        if self._evaluations:
            return self._evaluation(*self._evaluations.popleft()), room
        if room.aux > 0:
            return self._training("aux", room), room._replace(aux=room.aux - 1)
        if self._synthesis is not None and (made := self._synthesis.asking.next()) is not None:
            return self._of(made), room
        if room.main > 0:
            left = room._replace(main=room.main - 1, ahead=room.ahead + 1)
            return self._training("main", room), left
        return None, room

    def turn(self) -> None:
        """Record what follows from what came in."""
        if self._synthesis is not None:
            self._synthesis.turn()

    def begin(self, t: int) -> None:
        """The batch of step `t` is handed over: what follows holds from the next one on."""
        if self._synthesis is not None:
            self._synthesis.begun = t

    def close(self) -> None:
        if self._synthesis is not None:
            self._synthesis.close()

    def _of(self, made: Request) -> int:
        return self._ticket(
            made.draft,
            made.kind,
            n=made.n,
            temperature=made.temperature,
            min_version=self._ledger.t,  # the latest weights
            parent=made.parent,
            max_tokens=made.max_tokens,
        )

    def _evaluation(self, label: str, draft: Draft, min_version: int) -> int:
        evaluation = self._config.eval
        return self._ticket(
            draft,
            "eval",
            n=evaluation.samples,
            temperature=evaluation.temperature,
            label=label,
            min_version=min_version,
            episode=self._prompts.episode("eval", draft),
        )

    def _training(self, kind: wire.Kind, room: Room) -> int:
        """A ticket for the step that will use it if all goes well, no older than that allows."""
        config, ledger = self._config, self._ledger
        needed_at = ledger.t + room.ahead // config.groups_per_step
        min_version = max(0, min(needed_at, config.steps - 1) - config.max_lag)
        if kind == "main" and (old := self._stale()) is not None:
            draft = Draft(
                old.problem, old.prompt, old.grading, old.template, old.source, -1, old.question
            )
            parent: int | None = old.id
            episode = old.episode
        else:
            draft, parent = self._fresh(kind)
            episode = self._prompts.episode(kind, draft)
        return self._ticket(
            draft,
            kind,
            n=config.group_size,
            temperature=config.temperature if kind == "main" else self.ask.temperature,
            min_version=min_version,
            parent=parent,
            episode=episode,
        )

    def _stale(self) -> wire.Ticket | None:
        """The first whose prompt is to be asked again; none of a pool whose labels were wrong."""
        halted = self._ledger.halted is not None
        found = (old for old in self._ledger.again if not (halted and is_made(old.problem)))
        return next(found, None)

    def _fresh(self, kind: wire.Kind) -> tuple[Draft, int | None]:
        """A problem that was not asked before, and the ticket that it was made from."""
        if self._synthesis is not None and kind == "main":
            made = self._synthesis.asking.mixed()
            if made is not None:
                return made
        wanted = curriculum.of(self._ledger.followers)
        return self._prompts.draw(self._ledger.cursor, wanted), None

    def _ticket(
        self,
        draft: Draft,
        kind: wire.Kind,
        *,
        n: int,
        temperature: float,
        min_version: int,
        label: str = "",
        parent: int | None = None,
        episode: Episode | None = None,
        max_tokens: int = 0,
    ) -> int:
        id_ = self._ledger.next_id
        most = max_tokens or self._config.max_tokens
        sampling = self._prompts.sampling(id_, temperature, most)
        ticket = wire.Ticket(
            id=id_,
            kind=kind,
            problem=draft.problem,
            prompt=draft.prompt,
            n=n,
            sampling=sampling,
            grading=draft.grading,
            template=draft.template,
            source=draft.source,
            parent=parent,
            label=label,
            min_version=min_version,
            cursor=draft.cursor,
            episode=episode,
            question=draft.text if self._synthesis is not None else "",
        )
        self._write(Issue(ticket=ticket))
        return id_
