"""Long answers: the published penalties, number by number, and cut answers kept out of the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common import recipe
from common.config import RunConfig
from common.errors import ConfigError
from common.wire import Group
from learner.advantage import informative
from learner.config import LearnerConfig
from learner.item import Item
from learner.overlong import OverlongConfig, facts, length_penalty, penalties
from learner.reward import scorer
from learner.state import TrainState
from learner.step import make_state, train_step
from tests.builders import make_group, make_rollout, make_segment, make_ticket

LIMIT, BUFFER = 20480, 4096
GOLDEN = [  # length, the paper's, verl's
    (8192, 0.0, 0.0),
    (16384, 0.0, 0.0),
    (17408, -0.25, -0.25),
    (18432, -0.5, -0.5),
    (20480, -1.0, -1.0),
    (20481, -1.0, -1.000244),
    (24576, -1.0, -2.0),
]
TEN = OverlongConfig(buffer=4)  # of at most ten tokens


def group(*answers: tuple[float, int, str], ticket: int = 1) -> Group:
    """Of (correctness, length, finish)."""
    rollouts = tuple(
        make_rollout(right, [4 + i + j for j in range(length)], finish=finish)  # type: ignore[arg-type]
        for i, (right, length, finish) in enumerate(answers)
    )
    return make_group(rollouts=rollouts, ticket=ticket)


def item(*answers: tuple[float, int, str], ticket: int = 1) -> Item:
    return Item(make_ticket(id=ticket, n=len(answers)), group(*answers, ticket=ticket))


def config(overlong: OverlongConfig | None = None, **fields: object) -> LearnerConfig:
    chosen: dict[str, object] = {"max_tokens": 10, "threads": 1, "lr": 1e-3, **fields}
    return LearnerConfig(overlong=overlong, **chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize(("length", "paper", "verl"), GOLDEN)
def test_the_penalty_is_the_published_one(length: int, paper: float, verl: float) -> None:
    assert length_penalty(length, LIMIT, BUFFER) == paper
    assert length_penalty(length, LIMIT, BUFFER, "verl") == pytest.approx(verl, abs=1e-6)


def test_right_answers_of_hard_problems_are_spared_and_cut_ones_never() -> None:
    answers = group((1, 8, "stop"), (0, 8, "stop"), (1, 8, "length"), (0, 6, "stop"))
    plain = penalties(answers, TEN, 10)
    assert plain == [-0.5, -0.5, -1.0, 0.0]
    eased = OverlongConfig(buffer=4, difficulty=2.0, failure_scale=0.5)
    assert penalties(answers, eased, 10) == [-0.5 * 0.25, -0.25, -1.0, 0.0]
    assert penalties(answers, OverlongConfig(buffer=4, factor=2.0), 10) == [-1.0, -1.0, -2.0, 0.0]


def test_of_several_turns_the_last_one_is_measured() -> None:
    first, last = make_segment([5] * 9, turn=0), make_segment([6] * 7, turn=1)
    told = make_segment([7] * 3, role="feedback", turn=1)
    answers = make_group(rollouts=(make_rollout(1.0, segments=(first, told, last)),))
    assert penalties(answers, TEN, 10) == [-0.25]


def test_the_penalty_is_added_to_the_reward_of_main_groups_and_of_no_others() -> None:
    answers = ((1.0, 8, "stop"), (0.0, 10, "length"))
    assert scorer(config(TEN))(item(*answers)) == [0.5, -1.0]
    assert scorer(config())(item(*answers)) == [1.0, 0.0]
    aux = Item(make_ticket(kind="aux"), group(*answers))
    assert scorer(config(TEN))(aux) == [1.0, 0.0]


def test_four_wrong_answers_teach_nothing_however_long_one_of_them_is() -> None:
    answers = group((0, 5, "stop"), (0, 9, "stop"), (0, 10, "length"), (0, 5, "stop"))
    assert len(set(penalties(answers, TEN, 10))) > 1
    assert not informative(answers, "grpo")


def state() -> TrainState:
    return make_state(RunConfig(model="tiny"), config())


def batch() -> list[Item]:
    return [
        item((1, 4, "stop"), (0, 10, "length"), (0, 5, "stop"), ticket=1),
        item((0, 10, "length"), (1, 6, "stop"), (1, 5, "stop"), ticket=2),
    ]


def weights(trained: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trained.masters.values()])


def test_without_the_table_a_step_is_the_plain_one_bit_for_bit() -> None:
    plain, off = state(), state()
    train_step(plain, batch(), config())
    report = train_step(off, batch(), config(OverlongConfig(buffer=1, factor=1e-300)))
    assert "overlong" in report.metrics
    assert torch.equal(weights(plain), weights(off)), "a penalty of nothing changes nothing"


def test_cut_answers_count_in_the_mean_and_their_tokens_are_left_out_of_the_loss() -> None:
    masked, other = state(), state()
    report = train_step(masked, batch(), config(OverlongConfig(mask=True)))
    assert report.metrics["tokens"] == 4 + 5 + 6 + 5
    assert report.metrics["overlong"] == {"penalty": 0.0, "masked": pytest.approx(1 / 3)}
    changed = [  # other words in the cut answers, and the same outcome
        Item(i.ticket, _with_other_words(i.group)) for i in batch()
    ]
    train_step(other, changed, config(OverlongConfig(mask=True)))
    assert torch.equal(weights(masked), weights(other))
    plain = state()
    train_step(plain, batch(), config())
    assert not torch.equal(weights(plain), weights(masked))


def _with_other_words(group: Group) -> Group:
    rollouts = [
        make_rollout(r.correct, [7] * r.length, finish="length") if r.finish == "length" else r
        for r in group.rollouts
    ]
    return make_group(rollouts=tuple(rollouts), ticket=group.ticket)


def test_a_batch_of_nothing_but_cut_answers_moves_nothing() -> None:
    trained, before = state(), weights(state())
    all_cut = [item((1, 10, "length"), (0, 10, "length"))]
    report = train_step(trained, all_cut, config(OverlongConfig(mask=True)))
    assert report.metrics["tokens"] == 0
    assert np.isfinite(report.metrics["loss"])
    assert torch.equal(weights(trained), before)


def test_the_mean_penalty_is_told() -> None:
    assert facts([group((1, 8, "stop"), (0, 6, "stop"))], TEN, 10)["penalty"] == -0.25


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("{}", "learner.overlong.buffer: nothing is asked for"),
        ("{buffer = 99}", "learner.overlong.buffer = 99: more than max_tokens"),
        ('{buffer = 4, form = "darpo"}', "learner.overlong.form: unknown 'darpo'"),
    ],
)
def test_a_table_that_cannot_work_is_refused(table: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        recipe.load_all("tiny", [f"learner.overlong={table}"])
