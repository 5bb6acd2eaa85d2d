"""Whole runs as a user starts them: `isentrope run`, its processes, its folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from common.audit import audit

ISENTROPE = str(Path(sys.executable).parent / "isentrope")
SMALL = {
    "learner.steps": "4",
    "learner.groups_per_step": "4",
    "learner.checkpoint_every": "2",
    "learner.eval.problems": "16",
    "actor.count": "1",
}


def begin(
    folder: Path, recipe: str = "tiny", resume: bool = False, **values: str
) -> subprocess.Popen[bytes]:
    """`isentrope run`, small, in a session of its own; keys of `values` have `__` for a dot."""
    chosen = ({} if resume else SMALL) | {key.replace("__", "."): v for key, v in values.items()}
    settings = [part for key, value in chosen.items() for part in ("-s", f"{key}={value}")]
    where = ["--resume", str(folder)] if resume else [recipe, "--out", str(folder)]
    command = [ISENTROPE, "run", *where, "--plain", "--no-plots", "--json", *settings]
    out = (folder.parent / f"{folder.name}.out").open("wb")
    with out:
        return subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def end(process: subprocess.Popen[bytes], timeout_s: float = 600.0) -> int:
    """Its exit code; what still runs after `timeout_s`, or at the test's deadline, is killed."""
    try:
        return process.wait(timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def said(folder: Path) -> str:
    return (folder.parent / f"{folder.name}.out").read_text()


def summary(folder: Path) -> dict[str, Any]:
    """The JSON line that the run ended with."""
    line: dict[str, Any] = json.loads(said(folder).splitlines()[-1])
    return line


def run(folder: Path, **options: Any) -> dict[str, Any]:
    """A whole run; its summary."""
    code = end(begin(folder, **options))
    assert code == 0, f"exit {code}: {said(folder)[-2000:]}"
    return summary(folder)


def replay(folder: Path) -> dict[str, Any]:
    """`isentrope replay`: trained again from the journal's step 0."""
    from learner.cli import replay as command  # in this process, which has imported torch

    done = CliRunner().invoke(command, [str(folder), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def promises_kept(folder: Path) -> bool:
    verdict = audit(folder)
    assert verdict.ok, verdict.violations
    return True
