"""The verdict of a chaos run sees what it is there to see: violations written into a journal."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.test_audit import Run

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

from chaos_parts.verdict import examine, noticed, told


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "run.json").write_text("{}")
    return Run(tmp_path)


def test_a_run_that_kept_its_promises_has_no_violations(run: Run) -> None:
    run.got(0, 1).issued(2).stepped(0, [0, 1]).close()
    numbers, wrong = examine(run.path, {0, 1})
    assert wrong == []
    assert (numbers["issued"], numbers["trained"], numbers["steps"]) == (3, 2, 1)
    assert (numbers["lost"], numbers["duplicates_trained"], numbers["acknowledged"]) == (0, 0, 2)


def test_a_result_that_was_acknowledged_and_is_not_there_is_lost(run: Run) -> None:
    run.got(0, 1).issued(2).stepped(0, [0, 1]).close()
    numbers, wrong = examine(run.path, {0, 1, 2})
    assert numbers["lost"] == 1
    assert any("acknowledged" in each for each in wrong)


def test_a_group_trained_on_twice_is_counted_and_a_violation(run: Run) -> None:
    run.got(0, 1, 2).stepped(0, [0, 1]).stepped(1, [1, 2]).close()
    numbers, wrong = examine(run.path, {0})
    assert numbers["duplicates_trained"] == 1
    assert any("twice" in each for each in wrong)
    assert any(each.startswith("audit: ") for each in wrong), "the product's own audit says it too"


def test_a_damaged_journal_is_a_violation_and_not_the_end_of_the_verdict(run: Run) -> None:
    run.got(0, 1).stepped(0, [0, 1]).close()
    path = next((run.path / "journal").glob("*.journal"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert examine(run.path, set())[1]


def test_a_run_that_trained_nothing_passes_nothing(run: Run) -> None:
    run.issued(0).close()
    assert "nothing was trained on" in examine(run.path, set())[1]


def test_a_password_that_others_may_read_is_a_violation(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("redis://me:pa55@host")
    (tmp_path / "keys.json").write_text("pa55")
    (tmp_path / "keys.json").chmod(0o600)
    assert told([b"pa55"], tmp_path) == [f"{tmp_path / 'log'} shows a password or a key to others"]
    assert told([b"another"], tmp_path) == []


def test_what_the_logs_say_of_faults_is_counted(tmp_path: Path) -> None:
    (tmp_path / "learner.log").write_text("W a stranger sent a message that is malformed\n" * 3)
    (tmp_path / "actor.log").write_text("W x; version 3 goes on being served (failure 1 in a row)")
    found = noticed(tmp_path)
    assert (found["messages_refused"], found["versions_refused"], found["disk_full"]) == (3, 1, 0)
