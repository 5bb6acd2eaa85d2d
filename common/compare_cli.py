"""`isentrope compare RUN RUN …`: one table, one picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.errors import DataError
from common.options import json_option

if TYPE_CHECKING:
    from common.compare import Accuracy, Facts, Run

FILE = "compare.png"


@click.command()
@click.argument(
    "run_folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN..."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="PNG",
    help=f"The picture; default plots/{FILE} of the first RUN.",
)
@json_option
def compare(run_folders: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Compare runs: reward and entropy by steps and by time, and what each came to.

    Runs are named by what differs between their recipes. One that has no finished step is left out
    and said to be; one without a summary is told by its metrics.
    """
    from common.compare import facts, labels
    from common.compare_figure import draw

    runs, notes = readable(run_folders)
    names = labels(runs)
    found = [facts(run, name) for run, name in zip(runs, names, strict=True)]
    notes += remarks(found)
    picture = draw(runs, names, out or runs[0].folder / "plots" / FILE)
    if as_json:
        click.echo(to_json(found, notes, picture))
        return
    show(found)
    for note in notes:
        click.echo(note)
    click.echo(f"picture    {picture}")


def readable(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs there are to compare, and a line for each that is left out. Raises ConfigError for a
    folder without a run, DataError when none is left.
    """
    from common.compare import read

    runs, notes = [], []
    for folder in dict.fromkeys(folders):
        try:
            runs.append(read(folder))
        except DataError as error:
            notes.append(f"left out: {error}")
    if not runs:
        raise DataError("; ".join(notes))
    return runs, notes


def remarks(found: Sequence[Facts]) -> list[str]:
    """What has to be known to read the table rightly."""
    notes = [
        f"{facts.label}: no summary (it goes on, or it was killed); its metrics to step "
        f"{facts.steps} are shown"
        for facts in found
        if not facts.ending
    ]
    notes += [
        f"{facts.label}: stopped at step {facts.steps}, not finished"
        for facts in found
        if facts.ending == "stopped"
    ]
    lengths = sorted({facts.steps for facts in found})
    if len(lengths) > 1:
        notes.append(f"runs of {', '.join(map(str, lengths))} steps: their ends are not alike")
    return notes


def to_json(found: Sequence[Facts], notes: Sequence[str], picture: Path) -> str:
    import msgspec

    rows = [msgspec.to_builtins(facts) for facts in found]
    return json.dumps({"runs": rows, "notes": notes, "plot": str(picture)})


# -- the table --------------------------------------------------------------------------------

Row = tuple[str, ...]

HEAD: Row = (
    *("run", "held-out before", "after (95 %)", "pass@k", "entropy", "target", "off"),
    *("nats/acc", "steps", "tokens", "s", "lag", "r(dH)"),
)


def row(facts: Facts) -> Row:
    """As many cells as HEAD."""
    from common.live import number

    solved = facts.after.pass_any if facts.after else None
    return (
        facts.label,
        number(facts.before.value if facts.before else None),
        _interval(facts.after),
        "–" if solved is None or facts.after is None else f"@{facts.after.samples} {solved:.3f}",
        f"{number(facts.entropy_first)} → {number(facts.entropy_last)}",
        number(facts.target),
        "–" if facts.tracking is None else f"{100 * facts.tracking:.0f} %",
        number(facts.nats_per_accuracy, 2),
        str(facts.steps),
        f"{facts.tokens / 1000:,.0f}k / {facts.sampled / 1000:,.0f}k",
        f"{facts.seconds:.0f}",
        number(facts.lag, 2),
        number(facts.correlation, 2),
    )


def _interval(found: Accuracy | None) -> str:
    return "–" if found is None else f"{found.value:.3f} ({found.low:.3f}–{found.high:.3f})"


def show(found: Sequence[Facts]) -> None:
    """On a terminal narrower than the table each run is a block of lines."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    rows = [row(facts) for facts in found]
    widths = [max(len(cells[i]) for cells in (HEAD, *rows)) for i in range(len(HEAD))]
    if sum(widths) + 2 * len(widths) > console.width:
        _show_blocks(rows)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for index, name in enumerate(HEAD):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for cells in rows:
        table.add_row(*map(Text, cells))
    console.print(table)
    click.echo(LEGEND)


def _show_blocks(rows: Sequence[Row]) -> None:
    for cells in rows:
        click.echo(cells[0])
        for name, cell in list(zip(HEAD, cells, strict=True))[1:]:
            if cell != "–":
                click.echo(f"  {name:<16} {cell}")
    click.echo(LEGEND)


LEGEND = (
    "off: mean |H - target| / target over the last half; nats/acc: entropy spent per accuracy "
    "gained;\ntokens: trained on / sampled; r(dH): correlation of predicted and realised entropy "
    "change"
)
