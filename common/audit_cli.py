"""`isentrope audit RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.options import existing_run, json_option, run_folder_argument

if TYPE_CHECKING:
    from rich.table import Table

    from common.audit_found import Audit


@click.command()
@run_folder_argument
@json_option
def audit(run_folder: Path, as_json: bool) -> None:
    """Check from journal and checkpoints alone that a run kept its promises."""
    import msgspec
    from rich.console import Console

    from common.audit import audit as check

    found = check(existing_run(run_folder))
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        Console().print(_table(found))
        for violation in found.violations:
            click.echo(f"violation: {violation}")
        click.echo(_verdict(found))
    raise SystemExit(0 if found.ok else 1)


def _table(found: Audit) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("tickets", "issued", "trained", "evaluated", "buffered", "in flight"):
        table.add_column(name, justify="left" if name == "tickets" else "right")
    table.add_column("dropped", no_wrap=True)
    for kind, line in sorted(found.sums.items()):
        dropped = "\n".join(f"{n} {reason}" for reason, n in sorted(line.dropped.items()))
        ended = line.evaluated + line.scored
        counts = (line.issued, line.trained, ended, line.buffered, line.in_flight)
        table.add_row(kind, *map(str, counts), dropped or "–")
    return table


def _verdict(found: Audit) -> str:
    if not found.incarnations and found.ok:
        return "nothing to check yet: no learner has written to its journal"
    facts = (
        f"{found.steps} steps, learner started {found.incarnations}×, "
        f"lag at most {found.lag_max} of {found.max_lag} (mean {found.lag_mean:.2f}), "
        f"{found.checkpoints} checkpoints as recorded"
    )
    part = "" if found.complete else "; the journal's beginning was pruned, the rest was checked"
    wrong = "every promise kept" if found.ok else f"{len(found.violations)} violations"
    return f"{wrong}: {facts}{part}"
