"""Coverage-guided fuzzing, for a bounded time: nothing is found, and something would be."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris")
FUZZ = Path(__file__).resolve().parent.parent / "scripts" / "fuzz"


def fuzz(where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FUZZ), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=where)


def test_no_bytes_of_a_stranger_are_more_than_refused(tmp_path: Path) -> None:
    done = fuzz(tmp_path, "--seconds", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"^(\w+) +(\d+) inputs, (\d+) places reached$", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in counts] == ["wire", "group", "record"]
    assert all(int(inputs) > 1000 and int(places) > 30 for _, inputs, places in counts)


def test_a_planted_mistake_is_found_and_its_input_kept(tmp_path: Path) -> None:
    done = fuzz(tmp_path, "--only", "planted", "--seconds", "60")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FOUND SOMETHING" in done.stdout
    (kept,) = tmp_path.glob("crash-*")
    assert kept.read_bytes().startswith(b"ISEN")
    assert fuzz(tmp_path, "--only", "planted", str(kept)).returncode == 1
