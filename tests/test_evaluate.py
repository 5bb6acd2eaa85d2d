"""`isentrope eval` from the outside."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from common import models, recipe
from tests.conftest import Start


def test_an_evaluation_that_is_stopped_says_so_without_a_traceback(
    tmp_path: Path, processes: Start
) -> None:
    (tmp_path / "recipe.toml").write_text(recipe.freeze("scripted"))
    (tmp_path / "model").symlink_to(models.SHIPPED / "tiny")
    slow = ("-s", "actor.scripted.tokens_per_s=0.5")  # it is stopped before the first answer
    main = "from common.cli import main; main()"
    command = (sys.executable, "-c", main, "eval", str(tmp_path), *slow)
    process = processes(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    while process.stdout.readline() != "evaluating\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=200)[0]
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in rest
