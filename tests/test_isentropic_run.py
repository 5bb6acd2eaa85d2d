"""The set-point in a whole run: what it remembers of passed-over groups is replayed and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.journal import read
from common.metrics import read as read_metrics
from common.records import Step
from common.runfolder import RunFolder
from tests import runs

METHODS = '[{type="isentropic",target=0.8,mode="hold"}]'


@pytest.mark.timeout(400)
def test_a_run_replays_and_resumes_to_the_same_bits_with_what_the_groups_passed_over_had_right(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    runs.run(folder, learner__methods=METHODS, learner__checkpoint_every="2")
    assert runs.end(runs.begin(folder, resume=True, learner__steps="8")) == 0, runs.said(folder)
    records = [record for _, record in read(RunFolder.open(folder).journal)]
    assert any(record.dropped for record in records if isinstance(record, Step))
    again = runs.replay(folder)
    assert (again["steps"], again["equal"]) == (8, 8)
    lines = [line for line in read_metrics(folder) if "methods/isentropic/rest" in line]
    assert len({line["methods/isentropic/rest"] for line in lines}) > 1
