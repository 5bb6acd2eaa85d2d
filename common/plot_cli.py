"""`isentrope plot RUN`."""

from __future__ import annotations

from pathlib import Path

import click

from common.options import existing_run, run_folder_argument


@click.command()
@run_folder_argument
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the PNGs; default RUN/plots."
)
def plot(run_folder: Path, out: Path | None) -> None:
    """Draw a run: reward, entropy, lag, throughput, as PNGs."""
    from common.figures import drawn

    for path in drawn(existing_run(run_folder), out):
        click.echo(path)
