"""The end of a run in numbers: the learner's summary.json, and what only the outside can know."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import DataError
from common.live import clock, number, percent

FILE = "summary.json"

ENDED = {  # early, and why
    "solved": "early: what is sampled is right, there is nothing left to learn",
    "stuck": "early: what is sampled is not right and teaches nothing; logs/learner.log says why",
}


def complete(folder: Path, facts: Mapping[str, Any], plots: bool = True) -> dict[str, Any]:
    """The summary with `facts`, the auditor's verdict and the plots; written back."""
    from common.audit import audit
    from common.figures import draw

    summary = {
        **read(folder),
        "conserved": audit(folder).holds,
        **facts,
        "run": str(folder),
        "plots": [str(plot) for plot in (draw(folder) if plots else ())],
    }
    aside = folder / f"{FILE}.tmp"
    aside.write_text(json.dumps(summary, indent=1) + "\n")
    aside.replace(folder / FILE)
    return summary


def read(folder: Path) -> dict[str, Any]:
    """Empty when the learner did not come to its end. Raises DataError when it is damaged."""
    try:
        summary = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{folder / FILE} is damaged ({error}); remove it and go on") from None
    return summary if isinstance(summary, dict) else {}


def show(summary: Mapping[str, Any], console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in rows(summary):
        table.add_row(Text(name, "dim"), Text(value))
    console.print()
    console.print(table)


def rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a person wants to know first, in that order; only what is known."""
    found = [*_learned(summary)] if "steps" in summary else []
    restarts = ", ".join(f"{name} {n}" for name, n in (summary.get("restarts") or {}).items() if n)
    plots = summary.get("plots") or [""]
    found.insert(0, ("ended", ENDED.get(str(summary.get("ending")), "")))
    found += [("conserved", _verdict(summary)), ("restarts", restarts), ("picture", plots[0])]
    return [(name, value) for name, value in found if value]


def _learned(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the learner said at its end."""
    groups = summary.get("groups") or {}
    dropped = ", ".join(f"{n} {reason}" for reason, n in (groups.get("dropped") or {}).items() if n)
    yield "held-out", _change(summary, "heldout", ("before", "after"), 3)
    yield "length", _change(summary, "length", ("before", "after"), 1) + " tokens"
    yield "entropy", _change(summary, "entropy", ("first", "last"), 3) + " nats per token"
    yield "steps", f"{summary['steps']} in {clock(summary.get('seconds'))}"
    yield "groups", f"{groups.get('issued', 0)} issued, {groups.get('trained', 0)} trained on"
    yield "dropped", dropped or "none"
    lags = number(summary.get("lag_mean"), 2), summary.get("lag_max"), summary.get("max_lag")
    yield "lag", "mean {}, largest {} of {} allowed".format(*lags)
    idle = (percent(summary.get(f"{side}_idle") or 0) for side in ("learner", "actor"))
    yield "idle", "learner {}, actors {}".format(*idle)
    yield "trained", f"{summary.get('tokens_trained_per_s') or 0:,.0f} tokens/s"


def _change(summary: Mapping[str, Any], key: str, ends: tuple[str, str], digits: int) -> str:
    """The two numbers; of a run that was stopped the first alone may be there."""
    values = [summary.get(f"{key}_{end}") for end in ends]
    return " → ".join(number(value, digits) for value in values if value is not None) or "–"


def _verdict(summary: Mapping[str, Any]) -> str:
    if summary.get("conserved"):
        return "yes, by the journal"
    return f"NO; see: isentrope audit {summary.get('run')}"
