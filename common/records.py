"""What the journal holds: the only truth of a run. Everything else (ledger, cursor, curriculum)
folds over these.

open      a learner process began to write: who it is, with what configuration, on what torch
issue     a ticket exists (durable before it is sent)
admit     a group as it was received, byte for byte (durable before the acknowledgement)
proposal  a proposed problem moved on: extracted, labelled, scored, active | rejected, expired
ready     the proposer's rewards are known: its group may be trained on
halt      nothing is proposed any more, why, and from which step on nothing of it is trained on
step      step t consumed these tickets and dropped those, and made this version
drop      a ticket ends for a reason that no batch decided (failed, surplus)
config    from step t on these overrides hold
finish    the run is over
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from common.wire import Ticket


class Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    pass


class Open(Record, frozen=True, kw_only=True, tag="open"):
    """`sealed` is (segment name, length in bytes) of the predecessor: whatever it wrote later does
    not exist.
    """

    run: str
    incarnation: int
    config: dict[str, Any]
    torch: str = ""
    threads: int = 0
    world_size: int = 1
    sealed: tuple[str, int] | None = None
    at: float = 0.0  # seconds since the epoch, for people


class Issue(Record, frozen=True, kw_only=True, tag="issue"):
    ticket: Ticket


class Admit(Record, frozen=True, kw_only=True, tag="admit"):
    """`frame` is the group's message as received (codec.Codec decodes it)."""

    ticket: int
    frame: bytes
    at: float = 0.0


class Proposal(Record, frozen=True, kw_only=True, tag="proposal"):
    """What rollout `rollout` of propose ticket `ticket` proposed is `state` from here on.

    A state comes with what it found out: `text` and `parent` with extracted; `gold`, `origin` (who
    says that it is right) and `audit` (a second opinion on it, "" for those not drawn) with
    labelled; `p` (share of right answers to it) with scored.
    """

    ticket: int
    rollout: int
    state: Literal["extracted", "labelled", "scored", "active", "rejected", "expired"]
    reason: str = ""
    text: str = ""
    parent: str = ""  # the problem that it was made from
    gold: str = ""
    origin: str = ""
    audit: Literal["", "right", "wrong"] = ""
    p: float | None = None


class Ready(Record, frozen=True, kw_only=True, tag="ready"):
    """`scores`: the reward of every rollout of propose ticket `ticket`."""

    ticket: int
    scores: tuple[float, ...] = ()


class Halt(Record, frozen=True, kw_only=True, tag="halt"):
    """From step `t` on no step trains on a group of a proposed problem, nor on a proposer's: the
    first that had not begun. None: they are trained on.
    """

    reason: str
    t: int | None = None


class Step(Record, frozen=True, kw_only=True, tag="step"):
    """Step `t` trained parameters of version `t` on `consumed` (in batch order) and made `version`
    = t + 1.
    """

    t: int
    version: int
    digest: str
    consumed: tuple[int, ...]
    dropped: tuple[tuple[int, str], ...] = ()


class Drop(Record, frozen=True, kw_only=True, tag="drop"):
    ticket: int
    reason: str


class ConfigChange(Record, frozen=True, kw_only=True, tag="config"):
    t: int
    overrides: dict[str, Any]


class Finish(Record, frozen=True, kw_only=True, tag="finish"):
    t: int
    reason: str


AnyRecord = Open | Issue | Admit | Proposal | Ready | Halt | Step | Drop | ConfigChange | Finish
