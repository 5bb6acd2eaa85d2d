"""Logging, set up once by the command that starts a process, never at import.

Lines go to stderr, which `isentrope run` collects under the run folder: time, who, what.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent


def setup(name: str, level: int = logging.INFO) -> None:
    """Log to stderr as process `name`, and say which code this is: a stale copy shows in the first
    line."""
    logging.basicConfig(
        level=level,
        stream=sys.stderr,
        format=f"%(asctime)s {name} %(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    logging.getLogger(__name__).info("code: %s %s", TOP, revision())


def revision() -> str:
    """The commit of a checkout, "+" when files differ from it; "installed" outside of one."""
    if not (TOP / ".git").exists():
        return "installed"
    try:
        said = subprocess.run(
            ["git", "-C", str(TOP), "describe", "--always", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.stdout.strip()
