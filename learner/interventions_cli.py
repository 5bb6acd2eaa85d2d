"""`isentrope interventions`: a run's hinted answers as supervised data."""

from __future__ import annotations

from pathlib import Path

import click

from common.options import existing_run, run_folder_argument


@click.command()
@run_folder_argument
def interventions(run_folder: Path) -> None:
    """Write interventions.jsonl: hinted answers that are right and clean, in the chat format.

    A run writes it when it ends; this makes it again from the journal, at any time.
    """
    from common.runfolder import RunFolder
    from learner.interventions import write
    from learner.rollouts_look import model_folder

    folder = existing_run(run_folder)
    path, lines = write(RunFolder.open(folder), model_folder(folder))
    why = "" if lines else ": no hint was given, or none led to an answer that is right and clean"
    click.echo(f"{path}: {lines} conversations{why}")
