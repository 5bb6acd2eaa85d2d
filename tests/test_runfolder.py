"""Who may write to a run, and which life of its learner this is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import JournalError
from common.run import prepare
from common.runfolder import RunFolder

CLAIMS = """
import sys
from pathlib import Path
from common.run import prepare
from common.runfolder import RunFolder
print(RunFolder.open(Path(sys.argv[1])).claim(), flush=True)
sys.stdin.read()
"""


def claiming(path: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CLAIMS, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_id_is_made_once_and_read_back(tmp_path: Path) -> None:
    made = RunFolder.create(tmp_path / "a" / "run")
    assert RunFolder.open(tmp_path / "a" / "run").run_id == made.run_id
    assert made.journal.is_dir()
    assert RunFolder.create(tmp_path / "b").run_id != made.run_id


def test_a_folder_with_a_run_is_not_made_into_another(tmp_path: Path) -> None:
    RunFolder.create(tmp_path)
    with pytest.raises(JournalError, match="--resume"):
        RunFolder.create(tmp_path)


def test_a_folder_without_a_run_or_with_a_damaged_one_is_refused_in_one_line(
    tmp_path: Path,
) -> None:
    with pytest.raises(JournalError, match="holds no run"):
        RunFolder.open(tmp_path)
    (tmp_path / "run.json").write_text('{"run"')
    with pytest.raises(JournalError, match="damaged"):
        RunFolder.open(tmp_path)


def test_a_second_learner_is_refused_with_the_pid_of_the_first_until_that_dies(
    tmp_path: Path,
) -> None:
    RunFolder.create(tmp_path)
    with claiming(tmp_path) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "1\n"
        with pytest.raises(JournalError, match=f"pid {first.pid}"):
            RunFolder.open(tmp_path).claim()
        first.kill()
        first.wait()
    second = RunFolder.open(tmp_path)
    assert second.claim() == 2
    second.release()


def test_every_claim_raises_the_incarnation_even_if_its_counter_is_lost(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    for expected in (1, 2, 3):
        assert folder.claim() == expected
        folder.release()
    (folder.journal / "000007-000000.journal").touch()
    (tmp_path / "incarnation").unlink()
    assert folder.claim() == 8
    folder.release()


def test_a_resume_of_a_run_that_goes_on_is_refused_before_anything_starts(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "r1")
    folder.recipe.write_text("[run]\n")
    folder.claim()
    with pytest.raises(JournalError, match=rf"already has a learner \(pid {os.getpid()}\)"):
        RunFolder.open(folder.path).check_free(patience_s=0.0)
    with pytest.raises(JournalError, match="already has a learner"):
        prepare(None, None, folder.path, ["learner.steps=7"])
    assert folder.recipe.read_text() == "[run]\n"
    folder.release()
    RunFolder.open(folder.path).check_free(patience_s=0.0)
    assert folder.claim() == 2
    folder.release()
