"""A folder of runs as a page: which there are and how each is, with a link to its own page."""

from __future__ import annotations

import html
import time
from pathlib import Path
from urllib.parse import quote

from common import status
from common.live import clock, number
from common.status import Status

MOST = 200  # runs on the page, the newest
HEADS = ("run", "phase", "steps", "reward", "held-out", "entropy", "last word")


def found(folder: Path) -> list[str]:
    """Names of the runs in `folder`, the newest first."""
    homes = [recipe.parent for recipe in folder.glob("[!.]*/recipe.toml")]
    return [home.name for home in sorted(homes, key=_changed, reverse=True)]


def _changed(home: Path) -> float:
    try:
        return max(p.stat().st_mtime for p in (home, home / status.FILE) if p.exists())
    except (OSError, ValueError):  # it was removed just now
        return 0.0


def page(folder: Path, style: str) -> bytes:
    """HTML without any code; names are escaped, for a folder may be called anything."""
    rows = "".join(_row(name, folder / name) for name in found(folder)[:MOST])
    heads = "".join(f"<th>{head}</th>" for head in HEADS)
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    none = f'<div class="none">no run in {html.escape(str(folder))} yet</div>'
    return (
        '<!doctype html><html lang="en" data-theme="auto"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="refresh" content="5"><title>isentrope</title><style>{style}</style>'
        '</head><body><header><div class="line"><span class="mark">isentrope</span>'
        f"<h1>{html.escape(folder.resolve().name)}</h1></div></header>"
        f'<main><section class="card"><div class="scroll">{table if rows else none}</div>'
        "</section></main></body></html>"
    ).encode()


def _row(name: str, home: Path) -> str:
    try:
        now = status.read(home)
    except OSError:
        now = None
    cells = _facts(now) if now is not None else ("not begun", "–", "–", "–", "–", "–")
    link = f'<a href="/{quote(name)}/">{html.escape(name)}</a>'
    return f"<tr><td>{link}</td>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"


def _facts(now: Status) -> tuple[str, ...]:
    points = sorted(now.heldout, key=lambda point: point.step)
    return (
        now.phase,
        f"{now.step}/{now.steps}",
        number(now.reward),
        " → ".join(number(point.accuracy) for point in (*points[:1], *points[1:][-1:])) or "–",
        number(now.entropy),
        f"{clock(max(0.0, time.time() - now.at))} ago",
    )
