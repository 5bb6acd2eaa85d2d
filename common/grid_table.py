"""The table of a grid: a row a cell, over its seeds; as Markdown for people and as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import msgspec

from common import compare, grid
from common.compare import Facts, Run
from common.errors import ConfigError, DataError
from common.grid import Cell, GridConfig


class Row(NamedTuple):
    """One cell of the grid over the seeds that are done."""

    name: str
    about: str
    cells: list[Cell]
    runs: list[Run]
    facts: list[Facts]

    def values(self, name: str) -> list[float]:
        """A number of each run that has it; those of the last evaluation as accuracy, pass_any."""
        found = [_number(facts, name) for facts in self.facts]
        return [value for value in found if value is not None]

    def mean(self, name: str) -> float | None:
        values = self.values(name)
        return fmean(values) if values else None


def rows(config: GridConfig, cells: Sequence[Cell], done: Sequence[Cell]) -> list[Row]:
    """In the order of the grid; a row without a finished run is there, and empty."""
    found = []
    for cell in config.cell:
        runs = [compare.read(c.folder) for c in done if c.name == cell.name]
        mine = [c for c in cells if c.name == cell.name]
        if mine:
            facts = [compare.facts(run, cell.name) for run in runs]
            found.append(Row(cell.name, cell.about, mine, runs, facts))
    return found


def _number(facts: Facts, name: str) -> float | None:
    if name == "accuracy":
        return facts.after.value if facts.after else None
    if name == "pass_any":
        return facts.after.pass_any if facts.after else None
    value: float | None = getattr(facts, name)
    return value


# -- Markdown ---------------------------------------------------------------------------------


def markdown(
    title: str, config: GridConfig, table: Sequence[Row], failed: Mapping[str, str]
) -> str:
    samples = next((f.after.samples for row in table for f in row.facts if f.after), 1)
    head = (
        *("cell", "seeds", "held-out", f"pass@{samples}", "entropy, last half", "last", "target"),
        *("off target", "tokens (k)", "sampled (k)", "s", "lag", "what it is"),
    )
    lines = [f"# {title}", "", *([config.about, ""] if config.about else [])]
    lines += [_line(head), _line("---" if i in (0, 12) else "---:" for i in range(len(head)))]
    lines += [_line(_markdown_row(row)) for row in table]
    lines += ["", LEGEND]
    if failed:
        lines += ["", "Failed:", "", *(f"* {name}: {why}" for name, why in failed.items())]
    return "\n".join(lines) + "\n"


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown_row(row: Row) -> list[str]:
    broken = [run for run in row.runs if run.summary.get("conserved") is False]
    return [
        row.name + (" (NOT CONSERVED)" if broken else ""),
        f"{len(row.runs)} of {len(row.cells)}",
        spread(row.values("accuracy")),
        spread(row.values("pass_any")),
        spread(row.values("entropy_late")),
        spread(row.values("entropy_last")),
        spread(row.values("target")),
        _percent(row.mean("tracking")),
        _thousands(row.mean("tokens")),
        _thousands(row.mean("sampled")),
        _digits(row.mean("seconds"), 0),
        _digits(row.mean("lag"), 2),
        row.about,
    ]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """`0.951 ± 0.010`: mean and standard deviation; the value alone when there is one."""
    if not values:
        return "–"
    middle = f"{fmean(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ± {stdev(values):.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _thousands(value: float | None) -> str:
    return "–" if value is None else f"{value / 1000:,.0f}"


def _digits(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


LEGEND = (
    "Mean ± standard deviation over seeds. Held-out: share of right answers of the last "
    "evaluation; pass@k: share of its problems that one of k answers solved. Entropy in nats per "
    "token; off target: mean of |H − target| / target over the last half of the steps. Tokens: "
    "trained on, and sampled for groups that a step looked at. s: training time."
)


# -- JSON -------------------------------------------------------------------------------------


def tree(
    title: str, config: GridConfig, table: Sequence[Row], failed: Mapping[str, str]
) -> dict[str, Any]:
    left = sum(len(row.cells) - len(row.runs) for row in table)
    return {
        "grid": title,
        "about": config.about,
        "at": round(time.time()),
        "left": left,
        "failed": dict(failed),
        "cells": [_json_row(row) for row in table],
    }


MEANS = (
    *("accuracy", "pass_any", "entropy_first", "entropy_late", "entropy_last", "target"),
    *("tracking", "tokens", "sampled", "seconds", "lag", "correlation", "nats_per_accuracy"),
)


def _json_row(row: Row) -> dict[str, Any]:
    done = {facts.run: facts for facts in row.facts}
    return {
        "name": row.name,
        "about": row.about,
        "mean": {name: row.mean(name) for name in MEANS},
        "sd": {name: stdev(values) for name in MEANS if len(values := row.values(name)) > 1},
        "runs": [
            {
                "seed": cell.seed,
                "recipe": cell.recipe,
                "overrides": list(cell.overrides),
                "digest": cell.digest,
                "folder": str(cell.folder),
                "facts": msgspec.to_builtins(done.get(str(cell.folder))),
            }
            for cell in row.cells
        ],
    }


# -- files ------------------------------------------------------------------------------------


def write(
    out: Path, config: GridConfig, cells: Sequence[Cell], failed: Mapping[str, str]
) -> list[Row]:
    """table.md, table.json and the pictures, each replaced as a whole, from what is done so far."""
    table = rows(config, cells, [cell for cell in cells if is_done(cell)])
    title = out.resolve().name
    out.mkdir(parents=True, exist_ok=True)
    _replace(out / "table.md", markdown(title, config, table, failed))
    _replace(out / "table.json", json.dumps(tree(title, config, table, failed), indent=1) + "\n")
    if any(row.runs for row in table):
        from common.grid_figure import draw

        draw(table, out)
    return table


def is_done(cell: Cell) -> bool:
    """Of the same recipe, at its end, and readable."""
    try:
        return grid.state(cell) == "done" and bool(compare.read(cell.folder).steps)
    except (ConfigError, DataError):
        return False  # said where the cell is run


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
