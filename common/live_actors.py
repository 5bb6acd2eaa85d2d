"""The actors of a run in a terminal: a line each, and what there is to say about single ones."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from common.status import ActorStatus

Actors = Mapping[str, ActorStatus]

SILENT_S = 3.0
FEWEST = 2  # lines, however small the terminal is
HEADS = ("version", "tokens/s", "busy", "running", "waiting", "tickets", "KV", "pauses")


def rows(actors: Actors, width: int, room: int | None) -> list[RenderableType]:
    """Their table, in `room` lines (None: as many as it takes): then those in trouble come first,
    and how many are left out is said.
    """
    if not actors:
        return []
    names = sorted(actors)
    if room is not None and len(names) > (most := max(FEWEST, room - 1)):
        names = sorted(names, key=lambda name: not _ails(actors[name]))[: max(1, most - 1)]
    table = Table(
        box=None, pad_edge=False, padding=(0, 2 if width >= 100 else 1), header_style="dim"
    )
    table.add_column("actor")
    for head in HEADS:
        table.add_column(head, justify="right")
    for name in names:
        style = "red" if _ails(actors[name]) else ""
        table.add_row(name, *_cells(actors[name]), style=style)
    hidden = len(actors) - len(names)
    return [table, *([Text(f"… and {hidden} more actors", "dim")] if hidden else [])]


def _ails(actor: ActorStatus) -> bool:
    return actor.silent_s > SILENT_S or not actor.up


def _cells(actor: ActorStatus) -> tuple[str, ...]:
    last = f"{actor.pause_s:.2f} s" if actor.up else "no engine"
    return (
        str(actor.version),
        f"{actor.tokens_per_s:,.0f}",
        f"{100 * actor.busy:.0f} %",
        str(actor.running),
        str(actor.waiting),
        f"{actor.held}/{actor.capacity}",
        f"{100 * actor.kv_use:.0f} %",
        f"silent {actor.silent_s:.0f} s" if actor.silent_s > SILENT_S else last,
    )


def remarks(actors: Actors, most: int | None) -> list[RenderableType]:
    """What ails single actors, then whose window is not fully open; `most`: the first few."""
    ails, windows = list[RenderableType](), list[RenderableType]()
    for name, actor in sorted(actors.items()):
        style = "yellow" if actor.up else "bold yellow"
        ails += [Text(f"! {name}: {remark}", style) for remark in actor.remarks()]
        if actor.window < actor.ceiling:
            window = f"takes {actor.window} of {actor.ceiling} tickets, {actor.window_why}"
            windows.append(Text(f"· {name} {window}", "dim"))
    said = ails + windows
    if most is None or len(said) <= most:
        return said
    return [*said[:most], Text(f"… and {len(said) - most} more remarks on actors", "dim")]
