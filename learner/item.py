"""A group and the ticket that asked for it: all that a batch is made of."""

from __future__ import annotations

from typing import NamedTuple

from common.wire import Group, Ticket


class Item(NamedTuple):
    ticket: Ticket
    group: Group
    scores: tuple[float, ...] = ()  # of a propose group: the rewards, known later than the group
