"""A run with two turns, as a user starts it: ended, resumed, trained again to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.metrics import read
from tests import runs

SMALL = {"learner__eval__problems": "8", "learner__threads": "1"}


@pytest.mark.timeout(400)
def test_a_run_with_feedback_resumes_and_replays_to_the_same_bits(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs.run(folder, recipe="feedback", learner__steps="2", **SMALL)
    summary = runs.run(folder, resume=True, learner__steps="3")
    assert (summary["steps"], summary["conserved"]) == (3, True)
    assert runs.promises_kept(folder)
    replayed = runs.replay(folder)
    assert (replayed["steps"], replayed["equal"]) == (3, 3)
    for line in read(folder)[1:]:
        assert 0 < line["turn_correct"]["0"] <= line["turn_correct"]["1"]
        assert line["turns"]["1"] > 0
        assert line["correct"] == pytest.approx(line["turn_correct"]["1"])
