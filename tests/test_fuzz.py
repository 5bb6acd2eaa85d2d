"""Coverage-guided fuzzing, for a bounded time: nothing is found, and something would be."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("atheris")
FUZZ = Path(__file__).resolve().parent.parent / "scripts" / "fuzz"


def fuzz(where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FUZZ), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=where)


def test_no_bytes_of_a_stranger_are_more_than_refused(tmp_path: Path) -> None:
    done = fuzz(tmp_path, "--seconds", "2", "--corpus", str(tmp_path / "corpus"))
    assert done.returncode == 0, done.stdout + done.stderr
    said = r"^(\w+) +(\d+) inputs, (\d+) places reached, (\d+) kept$"
    counts = re.findall(said, done.stdout, re.MULTILINE)
    targets = {"wire", "learner", "group", "record", "patch", "manifest"}
    assert {name for name, *_ in counts} == targets, "each says so as it ends"
    for name, inputs, places, kept in counts:
        assert int(inputs) > 300
        assert int(places) > 5, name
        found = list((tmp_path / "corpus" / name).iterdir())
        assert len(found) == int(kept) >= len(shipped()[name]), "it starts from the one in git"


def shipped() -> dict[str, list[bytes]]:
    golden = Path(__file__).resolve().parent / "golden" / "fuzz.msgpack"
    return msgspec.msgpack.decode(golden.read_bytes(), type=dict[str, list[bytes]])


def test_a_planted_mistake_is_found_and_its_input_kept(tmp_path: Path) -> None:
    planted = ("--only", "planted", "--corpus", str(tmp_path / "corpus"))
    done = fuzz(tmp_path, *planted, "--seconds", "60")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FOUND SOMETHING" in done.stdout
    (kept,) = tmp_path.glob("crash-*")
    assert kept.read_bytes().startswith(b"ISEN")
    assert base64.b64encode(kept.read_bytes()).decode() in done.stdout, "where files are lost, too"
    assert f"scripts/fuzz --only planted {kept.name}" in done.stdout
    assert fuzz(tmp_path, *planted, str(kept)).returncode == 1
    assert list((tmp_path / "corpus" / "planted").iterdir()), "the next run goes on from there"
