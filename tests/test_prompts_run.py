"""Templates, a curriculum and shaped rewards through a whole run: what was asked, what was told of
it, and the same bits when it is resumed."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common import journal
from common.config import RunConfig
from common.journal import Position
from common.metrics import read as read_metrics
from common.records import Issue
from learner import checkpoint
from learner.config import LearnerConfig
from learner.follow import followers
from learner.ledger import Ledger
from learner.prompts import curriculum
from learner.prompts.templates import Templates
from tests import runs

pytestmark = pytest.mark.timeout(400)

SETTINGS = {
    "learner__prompts__templates": '{file = "tiny"}',
    "learner__prompts__curriculum": "{pool = 40, candidates = 8}",
    "learner__overlong": "{buffer = 30, mask = true}",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts") / "run"
    runs.run(folder, **SETTINGS)
    return folder


def tickets(folder: Path) -> list[Any]:
    records = journal.read(folder / "journal")
    return [record.ticket for _, record in records if isinstance(record, Issue)]


def config(folder: Path) -> LearnerConfig:
    from common import recipe

    found = recipe.load(str(folder / "recipe.toml"), {"run": RunConfig, "learner": LearnerConfig})
    assert isinstance(found["learner"], LearnerConfig)
    return found["learner"]


def test_a_group_has_the_one_template_that_its_draw_says(finished: Path) -> None:
    given = config(finished).prompts.templates
    assert given is not None
    templates = Templates(given, 0)
    of_ticket = {ticket.id: ticket for ticket in tickets(finished)}
    drawn = [t for t in of_ticket.values() if t.kind == "main" and t.cursor >= 0]
    for number, ticket in enumerate(drawn):
        assert ticket.template == templates.pick(number // 40, ticket.problem)
        assert ticket.cursor < 40
        assert [part.name for part in ticket.grading.parts] == ["correct", "format"]
    assert len({ticket.template for ticket in drawn}) > 3
    again = [t for t in of_ticket.values() if t.parent is not None]
    assert all(t.template == of_ticket[t.parent].template for t in again)
    assert {t.template for t in of_ticket.values() if t.kind == "eval"} == {"bare"}


def test_the_metrics_tell_of_every_template(finished: Path) -> None:
    told: dict[str, set[str]] = defaultdict(set)
    for line in read_metrics(finished):
        for name, value in line.items():
            if name.startswith("templates/"):
                told[name] |= set(value)
                assert 0 <= value["correct"] <= 1
    assert set(told) >= {"templates/bare", "templates/begun"}
    assert told["templates/bare"] == {"groups", "correct", "length", "entropy", "format"}
    last = read_metrics(finished)[-1]
    assert set(last["overlong"]) == {"penalty", "masked"}
    assert last["curriculum"]["problems"] > 4
    assert "sources/arithmetic" not in last


def test_what_the_curriculum_knows_is_the_same_from_a_checkpoint_and_from_the_journal(
    finished: Path,
) -> None:
    settings = config(finished)
    found = max((finished / "checkpoints").glob("step-*"))
    fold = Ledger.peek(checkpoint.fold(found))
    ledger = Ledger(followers=followers(settings, 0))
    for at, record in journal.read(finished / "journal"):
        if at >= Position(*fold.end):
            break
        ledger.apply(record, at)
    wanted = curriculum.of(ledger.followers)
    assert wanted is not None
    assert msgspec.msgpack.decode(wanted.dump()) == msgspec.msgpack.decode(
        fold.followers[curriculum.NAME]
    )


def test_resumed_it_goes_on_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    process = runs.begin(copy, resume=True, learner__steps="6")
    assert runs.end(process) == 0, runs.said(copy)[-2000:]
    again = runs.replay(copy)
    assert (again["steps"], again["equal"]) == (6, 6)
    assert runs.promises_kept(copy)
    drawn = [t for t in tickets(copy) if t.kind == "main" and t.cursor >= 0]
    given = config(finished).prompts.templates
    assert given is not None
    templates = Templates(given, 0)
    for number, ticket in enumerate(drawn):
        assert ticket.template == templates.pick(number // 40, ticket.problem)
