"""What to ask next, and whether there is room for it.

    evaluations ─▶ aux tickets ─▶ main tickets: prompts of stale groups first, then the stream

Room is what the lag bound leaves: tickets out plus usable groups buffered stay below
(max_lag + 1) × groups_per_step, so that what is asked now is fresh enough when it is used. Groups
that teach nothing do not count: they make room at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from common import wire
from common.records import Issue
from learner.config import LearnerConfig
from learner.inbox import Usable
from learner.ledger import Ledger
from learner.methods.base import Ask
from learner.prompts.stream import Draft, Prompts

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
        write: Callable[[Issue], None],
    ) -> None:
        self.ask = NOTHING  # of aux tickets from now on
        self._config, self._ledger, self._prompts, self._write = config, ledger, prompts, write
        self._evaluations: deque[tuple[str, Draft, int]] = deque()  # label, problem, min_version
        self._usable = {kind: Usable(kind) for kind in ("main", "aux")}

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
        return bool(self._evaluations) or room.main > 0 or room.aux > 0

    def next(self, room: Room) -> tuple[int | None, Room]:
        """The id of a ticket issued just now (None: there is no room), and the room then left.

        Aux before main: an aux group is trained on beside the main groups that come in after it.
        """
        if self._evaluations:
            return self._evaluation(*self._evaluations.popleft()), room
        if room.aux > 0:
            return self._training("aux", room), room._replace(aux=room.aux - 1)
        if room.main > 0:
            left = room._replace(main=room.main - 1, ahead=room.ahead + 1)
            return self._training("main", room), left
        return None, room

    def _evaluation(self, label: str, draft: Draft, min_version: int) -> int:
        evaluation = self._config.eval
        return self._ticket(
            draft,
            "eval",
            n=evaluation.samples,
            temperature=evaluation.temperature,
            label=label,
            min_version=min_version,
        )

    def _training(self, kind: wire.Kind, room: Room) -> int:
        """A ticket for the step that will use it if all goes well, no older than that allows."""
        config, ledger = self._config, self._ledger
        needed_at = ledger.t + room.ahead // config.groups_per_step
        min_version = max(0, min(needed_at, config.steps - 1) - config.max_lag)
        if kind == "main" and ledger.again:
            old = ledger.again[0]
            draft = Draft(old.problem, old.prompt, old.grading, old.template, old.source, -1)
            parent: int | None = old.id
        else:
            draft, parent = self._prompts.draw(ledger.cursor), None
        return self._ticket(
            draft,
            kind,
            n=config.group_size,
            temperature=config.temperature if kind == "main" else self.ask.temperature,
            min_version=min_version,
            parent=parent,
        )

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
    ) -> int:
        id_ = self._ledger.next_id
        sampling = self._prompts.sampling(id_, temperature, self._config.max_tokens)
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
        )
        self._write(Issue(ticket=ticket))
        return id_
