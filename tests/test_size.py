"""`isentrope size`: what the model of a run predicts, where it can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from common import wire
from common.codec import Codec
from common.errors import DataError
from common.journal import Journal
from common.records import Admit, Issue, Open
from common.runfolder import RunFolder
from common.size import Shape, needed, predict
from common.size_cli import size
from tests.builders import make_group, make_ticket

CODEC = Codec(wire.FromActor)
# every answer 50 tokens, one wave of 4 groups on an actor takes 0.5 s, a step 1 s
PLAIN = Shape(
    groups_per_step=4,
    group_size=8,
    max_lag=0,
    max_tokens=100,
    slots=32,
    prefetch=0,
    length_mean=50.0,
    length_sigma=0.0,
    tokens_per_s=1e9,
    sequence_tokens_per_s=100.0,
    train_s=1.0,
)


def test_without_lag_generation_and_training_take_turns() -> None:
    found = predict(PLAIN, 1)
    assert found.step_s == pytest.approx(1.5)
    assert found.learner_idle == pytest.approx(0.5 / 1.5)
    assert found.actor_idle == pytest.approx(1.0 / 1.5)
    assert (found.lag_mean, found.lag_max, found.stale) == (0, 0, 0)


def test_one_step_of_lag_hides_generation_behind_training() -> None:
    found = predict(msgspec.structs.replace(PLAIN, max_lag=1), 1)
    assert found.step_s == pytest.approx(1.0)
    assert found.learner_idle == pytest.approx(0.0)
    assert found.actor_idle == pytest.approx(0.5)
    assert found.lag_mean == pytest.approx(1.0)


def test_slow_actors_are_busy_and_the_learner_waits_for_them() -> None:
    slow = msgspec.structs.replace(PLAIN, max_lag=1, sequence_tokens_per_s=25.0)  # a wave: 2 s
    found = predict(slow, 1)
    assert found.step_s == pytest.approx(2.0)
    assert found.learner_idle == pytest.approx(0.5)
    assert found.actor_idle == pytest.approx(0.0, abs=1e-6)
    assert needed(msgspec.structs.replace(slow, max_lag=3)).actors == 2


def test_where_answers_take_longer_than_the_lag_allows_no_number_of_actors_helps() -> None:
    long = msgspec.structs.replace(PLAIN, max_lag=1, sequence_tokens_per_s=25.0)
    found = needed(long)
    assert found.actors == 2  # they make in a wave whatever the lag allows to ask
    assert found.step_s == pytest.approx(1.5)  # two steps' groups every 2 s + 1 s
    assert found.learner_idle == pytest.approx(1 / 3)


def test_sequences_share_what_an_actor_can_make() -> None:
    shared = msgspec.structs.replace(PLAIN, max_lag=1, tokens_per_s=800.0)  # 32 × 50 / 800 = 2 s
    assert predict(shared, 1).step_s == pytest.approx(2.0)
    assert predict(shared, 2).step_s == pytest.approx(1.0)


def test_groups_that_teach_nothing_cost_generation() -> None:
    half = msgspec.structs.replace(PLAIN, max_lag=1, sequence_tokens_per_s=25.0, useful=0.5)
    assert predict(half, 1, steps=200).step_s == pytest.approx(4.0, rel=0.1)


shapes = st.builds(
    Shape,
    groups_per_step=st.integers(1, 8),
    group_size=st.integers(1, 8),
    max_lag=st.integers(0, 3),
    max_tokens=st.just(200),
    slots=st.integers(4, 32),
    prefetch=st.integers(0, 2),
    length_mean=st.floats(5, 80),
    length_sigma=st.floats(0, 0.8),
    tokens_per_s=st.floats(100, 1000),
    sequence_tokens_per_s=st.floats(10, 100),
    useful=st.floats(0.3, 1),
    train_s=st.floats(0.01, 2),
    swap_s=st.floats(0, 0.2),
    grade_s=st.floats(0, 0.2),
)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 6))
def test_shares_are_shares_and_no_lag_is_above_its_bound(shape: Shape, actors: int) -> None:
    found = predict(shape, actors, steps=16, warm_up=4)
    assert 0 <= found.learner_idle <= 1
    assert 0 <= found.actor_idle <= 1
    assert 0 <= found.lag_mean <= found.lag_max <= shape.max_lag
    assert found.step_s >= shape.train_s * (1 - 1e-9)
    again = predict(shape, actors, steps=16, warm_up=4)
    assert again == found


@settings(max_examples=15, deadline=None)
@given(shapes)
def test_more_actors_never_make_steps_much_slower(shape: Shape) -> None:
    few, many = predict(shape, 1), predict(shape, 8)
    assert many.step_s <= few.step_s * 1.15  # a version that they do not have yet costs a little


@pytest.fixture(name="run")
def _run(tmp_path: Path) -> Path:
    """Ten steps of 4 groups with one actor that made 200 tokens/s three quarters of the time."""
    folder = RunFolder.create(tmp_path / "run")
    folder.recipe.write_text(
        "[learner]\ngroups_per_step = 4\ngroup_size = 2\nmax_lag = 1\n[actor]\nslots = 8\n",
        encoding="utf-8",
    )
    journal = Journal(folder.journal, 1)
    journal.append(Open(run="r", incarnation=1, config={}))
    for i in range(6):
        group = make_group(ticket=i, timings={"generate_s": 0.1, "grade_s": 0.01})
        journal.append(Issue(ticket=make_ticket(id=i)))
        journal.append(Admit(ticket=i, frame=bytes(CODEC.encode(group))))
    journal.commit()
    journal.close()
    line = {
        "step_s": 2.0,
        "wait_s": 0.5,
        "train_s": 1.4,
        "actors": 1,
        "actor_idle": 0.25,
        "lag_mean": 0.5,
        "lag_max": 1,
        "groups": 4,
        "dropped": {"zero_variance": 4},
        "sampled_tokens_per_s": 150.0,
    }
    lines = (json.dumps({"step": step, **line}) for step in range(1, 11))
    folder.metrics.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder.path


def test_a_run_says_what_it_is_like(run: Path) -> None:
    done = CliRunner().invoke(size, [str(run), "--json", "--actors", "1", "--actors", "2"])
    found = json.loads(done.output)
    shape = found["shape"]
    assert shape["train_s"] == pytest.approx(1.5)  # all of a step but waiting
    assert shape["useful"] == pytest.approx(0.5)
    assert shape["tokens_per_s"] == pytest.approx(200.0)
    assert (shape["groups_per_step"], shape["group_size"], shape["max_lag"]) == (4, 2, 1)
    assert 3 <= shape["length_mean"] <= 5
    assert found["measured"]["learner_idle"] == pytest.approx(0.25)
    assert [row["actors"] for row in found["predicted"]] == [1, 2]


def test_what_actors_say_of_the_time_before_there_was_work_is_not_counted(run: Path) -> None:
    """Means over five seconds: in the first steps they say that actors had nothing to do."""
    metrics = run / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines[:3]:
        line |= {"actor_idle": 0.9, "sampled_tokens_per_s": 10.0}
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = json.loads(CliRunner().invoke(size, [str(run), "--json"]).output)
    assert found["measured"]["actor_idle"] == pytest.approx(0.25)
    assert found["shape"]["tokens_per_s"] == pytest.approx(200.0)


def test_what_the_run_has_not_got_can_be_given_and_people_get_a_table(run: Path) -> None:
    plain = CliRunner().invoke(size, [str(run)]).output
    assert "measured 1" in plain
    assert "needed" in plain
    longer = CliRunner().invoke(size, [str(run), "--length", "48", "--train-s", "0.2"]).output
    assert "answers of 48 tokens" in longer
    assert "measured" not in longer


def test_a_run_that_is_too_young_is_refused(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8")
    quick = lines.replace('"step_s": 2.0', '"step_s": 0.1')
    for text, why in (("", "0 steps are too few"), (quick, "6 s after its first step")):
        (run / "metrics.jsonl").write_text(text, encoding="utf-8")
        done = CliRunner().invoke(size, [str(run)])
        assert isinstance(done.exception, DataError)
        assert why in str(done.exception)
