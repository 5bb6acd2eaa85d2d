"""Synthesis, and hints beside it, in a whole run: stopped, gone on with, then with labels that are
wrong, which end it; trained again from the journal to the bit.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from common.audit import audit
from common.codec import Codec
from common.journal import read
from common.metrics import read as read_metrics
from common.proposals import Proposals, is_made
from common.records import Admit, Halt, Issue, Ready, Step
from common.synth_cli import synth
from common.wire import FromActor
from learner.interventions import FILE
from learner.turns import is_kept
from tests import runs

pytestmark = pytest.mark.timeout(400)  # real runs, on a machine that may be busy
MISLABELLED = {
    "learner__synthesis__label": '"inherited"',  # another sum with its parent's answer
    "learner__synthesis__labeller": '""',
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "made"
    quiet = {"learner__eval__first": "false", "learner__eval__last": "false"}
    wide = {"learner__synthesis__parents": "[0.1, 0.9]", "learner__synthesis__accept": "[0.1, 0.9]"}
    small = {"learner__steps": "5", "learner__synthesis__rollouts": "4"}
    hints = {"learner__intervene": '{ triggers = ["wrong"], hint = "?" }'}
    runs.run(folder, recipe="synthesis", **quiet, **wide, **small, **hints)
    runs.run(folder, resume=True, learner__steps="8")
    runs.run(folder, resume=True, learner__steps="11", **MISLABELLED)
    return folder


def test_a_run_with_synthesis_keeps_every_promise_and_trains_its_proposer(finished: Path) -> None:
    assert runs.promises_kept(finished)
    records = [record for _, record in read(finished / "journal")]
    ready = {record.ticket for record in records if isinstance(record, Ready)}
    trained = {id_ for r in records if isinstance(r, Step) for id_ in r.consumed}
    assert ready & trained
    sums = audit(finished).sums
    assert sums["score"].scored
    assert sums["propose"].trained == len(ready & trained)
    last = read_metrics(finished)[-1]
    assert last["synthesis_proposals"] > 0
    assert read_metrics(finished)[7]["synthesis_label_error"] == 0.0


def test_every_label_of_a_worked_out_sum_is_right(finished: Path) -> None:
    found = Proposals()
    for _, record in read(finished / "journal"):
        assert found.take(record) == []
    labelled = [made for made in found.made.values() if made.origin == "program_verified"]
    assert labelled
    for made in labelled:
        assert sum(map(int, made.text.rstrip("?").split("+"))) == int(made.gold)
        assert made.audit == "right"


def test_wrong_labels_end_synthesis_and_none_of_them_is_trained_on(finished: Path) -> None:
    halts, asked, trained = [], {}, set()
    found = Proposals()
    for _, record in read(finished / "journal"):
        found.take(record)
        match record:
            case Halt():
                halts.append(record)
            case Issue(ticket=ticket):
                asked[ticket.id] = ticket
            case Step(t=t, consumed=consumed) if halts and t >= (halts[0].t or 0):
                trained |= set(consumed)
    assert "audited labels are wrong" in halts[0].reason
    assert trained
    assert not [id_ for id_ in trained if is_made(asked[id_].problem)]
    audits = Counter(made.audit for made in found.made.values() if made.origin == "inherited")
    assert audits["wrong"] > 0
    assert read_metrics(finished)[-1]["synthesis_label_error"] > 0.1


def test_hinted_answers_stand_beside_their_groups_and_each_kept_one_in_the_file_once(
    finished: Path,
) -> None:
    codec, hinted, kept = Codec(FromActor), 0, []
    for _, record in read(finished / "journal"):
        if isinstance(record, Admit):
            group = codec.decode(record.frame)
            hinted += len(group.hinted)
            kept += [(group.ticket, i) for i, r in enumerate(group.hinted) if is_kept(r)]
    assert hinted > 0
    lines = [json.loads(line) for line in (finished / FILE).read_text().splitlines()]
    assert [(line["ticket"], line["rollout"]) for line in lines] == kept
    assert sum(line["hints"]["rollouts"] for line in read_metrics(finished)) > 0


def test_isentrope_synth_lists_the_pool_and_every_way_with_its_reason(finished: Path) -> None:
    said = CliRunner().invoke(synth, [str(finished), "--limit", "0"], env={"COLUMNS": "160"})
    assert said.exit_code == 0, said.output
    shown = CliRunner().invoke(synth, [str(finished), "--json", "--limit", "0"])
    facts = json.loads(shown.output)
    assert f"{facts['proposals']} proposals" in said.output
    moves = {(move["from"], move["to"]): move["problems"] for move in facts["moves"]}
    assert moves["proposed", "extracted"] >= moves["extracted", "labelled"] > 0
    assert sum(facts["states"].values()) == facts["proposals"]
    one = next(problem for problem in facts["problems"] if problem["p"] is not None)
    assert one["text"] in said.output
    assert one["parent"].startswith("train/")
    few = CliRunner().invoke(synth, [str(finished), "--json", "--state", "rejected"])
    assert {problem["state"] for problem in json.loads(few.output)["problems"]} == {"rejected"}


def test_a_run_that_was_stopped_is_trained_again_from_its_journal_to_the_same_bits(
    finished: Path,
) -> None:
    again = runs.replay(finished)
    assert (again["steps"], again["equal"]) == (11, 11)
