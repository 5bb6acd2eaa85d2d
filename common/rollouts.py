"""What the policy said, out of the journal: every rollout with its ticket and its fate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common import journal
from common.codec import Codec
from common.records import Admit, Drop, Issue, Step
from common.wire import FromActor, Group, Rollout, Ticket

_AT_ONCE = {"eval": "evaluated", "score": "scored"}  # fates that come with the admission
_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what half of a character decodes to


class Said(NamedTuple):
    """One rollout. `step` is the one that ended its ticket (None: none has), counted from 1; `lag`
    is trained version − version of the oldest token, None where nothing was trained.
    """

    ticket: Ticket
    number: int  # in its group
    rollout: Rollout
    actor: str
    fate: str  # trained, evaluated, scored, a reason why it was dropped, or buffered
    step: int | None
    lag: int | None


def read(folder: Path) -> Iterator[Said]:
    """All rollouts of the journal in `folder`, in the order in which their tickets ended; those
    that wait to be used come last. Raises JournalError.
    """
    codec, tickets, groups = Codec(FromActor), dict[int, Ticket](), dict[int, Group]()
    for _, record in journal.read(folder):
        match record:
            case Issue(ticket=ticket):
                tickets[ticket.id] = ticket
            case Admit(ticket=id_, frame=frame):
                groups[id_] = codec.decode(frame)
                if (fate := _AT_ONCE.get(tickets[id_].kind)) is not None:
                    yield from _ended(tickets, groups, id_, fate, None)
            case Step(t=t, consumed=consumed, dropped=dropped):
                for id_, reason in dropped:
                    yield from _ended(tickets, groups, id_, reason, t)
                for id_ in consumed:
                    yield from _ended(tickets, groups, id_, "trained", t)
            case Drop(ticket=id_, reason=reason):
                yield from _ended(tickets, groups, id_, reason, None)
    for id_ in list(groups):
        yield from _ended(tickets, groups, id_, "buffered", None)


def _ended(
    tickets: dict[int, Ticket], groups: dict[int, Group], id_: int, fate: str, t: int | None
) -> Iterator[Said]:
    ticket, group = tickets.pop(id_, None), groups.pop(id_, None)
    if ticket is None or group is None:
        return
    for index, rollout in enumerate(group.rollouts):
        lag = None if t is None else max(0, t - rollout.oldest_version)
        step = None if t is None else t + 1
        yield Said(ticket, index, rollout, group.actor, fate, step, lag)


def pieces(decode: Callable[[Sequence[int]], str], tokens: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; "" where a character is not whole yet."""
    found, prefix, read_ = list[str](), 0, 0
    for end in range(1, len(tokens) + 1):
        before, text = decode(tokens[prefix:read_]), decode(tokens[prefix:end])
        if text.endswith(_BROKEN) and end < len(tokens):
            found.append("")
            continue
        found.append(text[len(before) :])
        prefix, read_ = read_, end
    return found
