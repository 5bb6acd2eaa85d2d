"""`isentrope synth RUN`: the problems that the policy proposed, and what became of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.options import existing_run, json_option, run_folder_argument

if TYPE_CHECKING:
    from rich.table import Table

    from common.proposals import Made, Proposals

SHOWN = 40  # characters of a problem
AUDIT = {"": "", "right": "✓", "wrong": "✗"}


@click.command()
@run_folder_argument
@click.option(
    "--state",
    default="",
    help="Only those in this state: active, expired, rejected, scored, labelled, extracted.",
)
@click.option("--limit", default=40, show_default=True, help="Problems shown, the newest; 0: all.")
@json_option
def synth(run_folder: Path, state: str, limit: int, as_json: bool) -> None:
    """List proposed problems: parents, labels, p′, uses, fate; and why how many came how far.

    A problem is named by the ticket and the rollout that proposed it. ✓ and ✗: what a second
    opinion said of its label.
    """
    import msgspec
    from rich.console import Console

    found = _read(existing_run(run_folder))
    chosen = [made for made in found.made.values() if made.state == state or not state]
    chosen = chosen[-limit:] if limit else chosen
    if as_json:
        click.echo(msgspec.json.encode(_facts(found, chosen)))
        return
    console = Console()
    if not found.made:
        click.echo("no problem was proposed: this run has no [learner.synthesis], or no parent yet")
        return
    console.print(_list(chosen))
    console.print(_moves(found))
    click.echo(_verdict(found))


def _read(run_folder: Path) -> Proposals:
    from common.journal import read
    from common.proposals import Proposals

    found = Proposals()
    for _, record in read(run_folder / "journal"):
        found.take(record)
    return found


def _list(chosen: list[Made]) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("problem", "text", "made from", "label", "p′", "uses", "fate"):
        right = name in ("p′", "uses")
        table.add_column(name, justify="right" if right else "left", no_wrap=name == "problem")
    for made in chosen:
        label = f"{made.gold} {made.origin} {AUDIT[made.audit]}".strip()
        ended = made.state in ("rejected", "expired")
        fate = f"{made.state}: {made.reason}" if ended else made.state
        p = "" if made.p is None else f"{made.p:.3f}"
        text = " ".join(made.text.split())
        text = text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
        id_ = made.id.removeprefix("synthesis/")
        table.add_row(id_, text, made.parent, label, p, str(made.uses), fate)
    return table


def _moves(found: Proposals) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("from", "to", "why", "problems"):
        table.add_column(name, justify="right" if name == "problems" else "left")
    for (before, after, reason), count in sorted(found.moves.items()):
        table.add_row(before, after, reason or "–", str(count))
    return table


def _verdict(found: Proposals) -> str:
    states = Counter(made.state for made in found.made.values())
    taken = states["active"] + states["expired"]
    error = found.label_error()
    audited = sum(bool(made.audit) for made in found.made.values())
    said = (
        f"{len(found.made)} proposals, {taken} taken into the pool, {states['active']} there at "
        f"the end, asked {sum(made.uses for made in found.made.values())} times; "
    )
    said += (
        "no label audited"
        if error is None
        else (f"label error {100 * error:.1f} % of {audited} audited")
    )
    return said + (f"; off: {found.halted}" if found.halted else "")


def _facts(found: Proposals, chosen: list[Made]) -> dict[str, Any]:
    moves = [
        {"from": before, "to": after, "reason": reason, "problems": count}
        for (before, after, reason), count in sorted(found.moves.items())
    ]
    return {
        "proposals": len(found.made),
        "states": Counter(made.state for made in found.made.values()),
        "label_error": found.label_error(),
        "audited": sum(bool(made.audit) for made in found.made.values()),
        "halted": found.halted,
        "moves": moves,
        "problems": chosen,
    }
