"""Turns after a wrong answer: exact tokens, masks, temperatures, tries, what ends an episode."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import numpy as np
import pytest
import torch

from actor import episode
from actor.config import ScriptedConfig
from actor.engine.scripted import ScriptedEngine
from actor.engine.torch_engine import TorchEngine
from actor.feedback import answer_key, novel
from actor.grade.pool import Pool
from actor.stage import LATER
from common.config import RunConfig
from common.episodes import Episode, Feedback, accuracy_by_turn, progressive
from common.errors import DataError, WireError
from common.group_check import check_group
from common.wire import GradePart, Grading, Rollout
from learner.batch import flatten, pack
from learner.config import LearnerConfig
from learner.item import Item
from learner.state import make_state
from tests.builders import make_group
from tests.talking import EOS, EXACT, TINY, Speaker, asks, stage, tokens_of

WRONG = tuple(tokens_of("12+7?"))


def turns(count: int = 3, **fields: object) -> Episode:
    return Episode(feedback=Feedback(turns=count, wrong=WRONG, **fields))  # type: ignore[arg-type]


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    pool = Pool(1, 1.0)
    yield pool
    await pool.close()


async def test_a_wrong_answer_is_told_so_and_answered_again_from_the_very_tokens(
    pool: Pool,
) -> None:
    engine = Speaker({0: ["#18<eos>", "#17<eos>", "#19<eos>"], 1: ["#19<eos>"]})
    ticket = asks(2, turns())
    rollouts, *_ = await episode.play(ticket, stage(engine, pool))
    first, second = rollouts
    assert [s.role for s in first.segments] == ["policy", "feedback"] * 2 + ["policy"]
    assert [s.turn for s in first.segments] == [0, 0, 1, 1, 2]
    said = [s.tokens.tolist() for s in first.segments]
    assert said[::2] == [tokens_of(a) for a in ("#18<eos>", "#17<eos>", "#19<eos>")]
    assert said[1::2] == [list(WRONG)] * 2
    assert engine.calls[2].prefix == [*ticket.prompt, *said[0], *said[1], *said[2], *said[3]]
    assert (first.correct, first.parts) == (1.0, ({"correct": 0.0},) * 2 + ({"correct": 1.0},))
    assert (first.turn, second.turn, len(second.segments)) == (2, 0, 1)
    check_group(make_group(ticket=5, rollouts=rollouts), ticket, vocab_size=20, clock_version=9)


async def test_what_is_solved_is_never_asked_again_and_the_last_turn_is_the_last(
    pool: Pool,
) -> None:
    engine = Speaker({0: ["#19<eos>"], 1: ["#1<eos>", "#19<eos>"], 2: ["#1<eos>"] * 3})
    rollouts, *_ = await episode.play(asks(3, turns()), stage(engine, pool))
    assert [(c.first, c.n) for c in engine.calls] == [
        (0, 3),
        (LATER + 1, 1),
        (LATER + 2, 1),
        (2 * LATER + 2, 1),
    ]
    assert [(r.turn, r.correct) for r in rollouts] == [(0, 1.0), (1, 1.0), (2, 0.0)]


async def test_the_loss_mask_is_on_the_policys_tokens_alone(pool: Pool) -> None:
    engine = ScriptedEngine(ScriptedConfig(vocab_size=20, length_mean=6), slots=8, max_length=90)
    ticket = asks(6, turns(4))
    rollouts, *_ = await episode.play(ticket, stage(engine, pool))
    for r in rollouts:
        sampled = sum(s.tokens.size for s in r.segments if s.role == "policy")
        assert r.length == sampled
        assert all(not s.loss_mask.any() and not s.logps.any() for s in r.segments[1::2])
    batch = flatten([Item(ticket, make_group(ticket=5, rollouts=rollouts))], 0)
    assert int(batch.static.mask.sum()) == sum(r.length for r in rollouts)
    assert max(r.turn for r in rollouts) == 3


async def test_one_turn_is_the_plain_episode_bit_for_bit(pool: Pool) -> None:
    engine = ScriptedEngine(ScriptedConfig(vocab_size=20), slots=8)
    plain = await episode.play(asks(3, None), stage(engine, pool))
    once = await episode.play(asks(3, turns(1)), stage(engine, pool))
    assert [facts(r) for r in plain.rollouts] == [facts(r) for r in once.rollouts]


def facts(rollout: Rollout) -> tuple[object, ...]:
    segments = [(s.role, s.tokens.tolist(), s.logps.tobytes(), s.spans) for s in rollout.segments]
    return segments, rollout.finish, rollout.correct, rollout.parts


async def test_noise_of_a_turn_depends_on_seed_rollout_and_position_alone(pool: Pool) -> None:
    async def said(n: int) -> list[list[int]]:
        engine = ScriptedEngine(ScriptedConfig(vocab_size=20, length_mean=6), slots=8)
        rollouts, *_ = await episode.play(asks(n, turns()), stage(engine, pool))
        return [[t for s in r.segments for t in s.tokens.tolist()] for r in rollouts]

    many = await said(4)
    assert await said(4) == many
    assert (await said(2)) == many[:2]  # whoever else is in the group
    assert many[0] != many[1]


async def test_a_cut_answer_gets_the_end_of_a_turn_before_the_feedback(pool: Pool) -> None:
    engine = Speaker({0: ["#18", "#17<eos>"]})
    (rollout,), *_ = await episode.play(asks(1, turns(2, end=(EOS,))), stage(engine, pool))
    assert rollout.segments[1].tokens.tolist() == [EOS, *WRONG]
    assert rollout.finish == "stop"


async def test_an_episode_ends_where_there_is_no_room_for_another_answer(pool: Pool) -> None:
    engine = Speaker({0: ["#18<eos>", "#17<eos>"]}, max_length=5 + 2 * (4 + 5) + 20 - 1)
    (rollout,), *_ = await episode.play(asks(1, turns(3)), stage(engine, pool))
    assert [s.role for s in rollout.segments] == ["policy", "feedback", "policy"]
    assert rollout.events == {"no_room": 1}


async def test_an_episode_out_of_time_is_the_datas_fault_and_has_no_reward(pool: Pool) -> None:
    for answers in (["aborted"], ["#18<eos>", "aborted"]):
        with pytest.raises(DataError, match="episode_abandoned: not over within 120 s"):
            await episode.play(asks(1, turns()), stage(Speaker({0: answers}), pool))


async def test_a_grader_that_fails_ends_its_episode_as_an_error(pool: Pool) -> None:
    grading = Grading(parts=(GradePart(name="x", grader="python:json:loads"),))
    engine = Speaker({0: ["#18<eos>"]})
    (rollout,), *_ = await episode.play(asks(1, turns(), grading), stage(engine, pool))
    assert rollout.error.startswith("verifier_error")
    assert len(rollout.segments) == 1


async def test_each_turn_has_its_temperature_and_says_so(pool: Pool) -> None:
    engine = Speaker({0: ["#18<eos>", "#17<eos>", "#16<eos>"]})
    warm = turns(3, temperatures=(0.3, 0.45, 0.6))
    (rollout,), *_ = await episode.play(asks(1, warm), stage(engine, pool))
    assert [c.sampling.temperature for c in engine.calls] == [0.3, 0.45, 0.6]
    assert [s.temperature for s in rollout.segments[::2]] == [0.3, 0.45, 0.6]


def test_progressive_temperatures_are_the_papers() -> None:
    expected = [0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05, 1.2, 1.35, 1.5, 1.5]
    assert [progressive(k) for k in range(12)] == pytest.approx(expected)
    assert [progressive(k, floor=0.3) for k in range(4)] == pytest.approx([0.3, 0.3, 0.3, 0.45])


# -- several tries ---------------------------------------------------------------------------------


async def test_of_several_tries_one_not_said_before_is_taken_and_not_trained_on(
    pool: Pool,
) -> None:
    said = {0: ["#18<eos>"] * 2, 1: ["12+7=17#17<eos>"], 2: ["1#18<eos>"]}
    engine = Speaker(said)
    ticket = asks(1, turns(2, tries=3))
    (rollout,), *_ = await episode.play(ticket, stage(engine, pool))
    last = rollout.segments[-1]
    assert (engine.calls[1].n, engine.calls[1].first) == (3, LATER)  # seeds of their own
    assert last.tokens.tolist() == tokens_of("12+7=17#17<eos>")
    assert not last.loss_mask.any()
    assert rollout.length == 4
    check_group(make_group(ticket=5, rollouts=(rollout,)), ticket, 20, 9)


async def test_tried_turns_are_trained_on_where_that_is_asked_for(pool: Pool) -> None:
    engine = Speaker({0: ["#18<eos>"] * 2, 1: ["#18<eos>"]})
    tried = turns(2, tries=2, train_tried=True)
    (rollout,), *_ = await episode.play(asks(1, tried), stage(engine, pool))
    assert rollout.segments[-1].loss_mask.all()


def test_a_tried_answer_is_never_taken_while_there_is_another() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        keys = [str(k) for k in rng.integers(0, 4, 5)]
        before = {str(k) for k in rng.integers(0, 4, 2)}
        taken = keys[novel(keys, before, rng.random())]
        assert taken not in before or before >= set(keys)


def test_tries_are_taken_with_the_specified_probabilities() -> None:
    """Novel answers b (.2) and c (.1), a tried mass of .7, 25 tries."""
    rng = np.random.default_rng(1)
    draws = rng.choice(["a", "b", "c"], (20_000, 25), p=[0.7, 0.2, 0.1]).tolist()
    at = rng.random(len(draws))
    taken = [d[novel(d, {"a"}, u)] for d, u in zip(draws, at, strict=True)]
    assert taken.count("b") / len(taken) == pytest.approx(0.666577, abs=0.014)
    found = (rng.random((20_000, 25)) < 0.1).any(1).mean()
    assert found == pytest.approx(0.928210, abs=0.008)


def test_answers_are_the_same_where_the_grader_would_look() -> None:
    assert answer_key("12+7=18#18", EXACT) == answer_key("# 1 8", EXACT) == "18"
    assert answer_key("18", EXACT) is None
    stranger = Grading(parts=(GradePart(name="x", grader="python:a:b"),))
    assert answer_key("An Answer", stranger) == "ananswer"


# -- what the learner makes of it ------------------------------------------------------------------


def test_accuracy_by_turn_is_cumulative() -> None:
    solved = [80, 24, 10, 4, 2, 0, 1, 0, 0, 0]
    at = [turn for turn, count in enumerate(solved) for _ in range(count)]
    found = accuracy_by_turn([*at, *[None] * (200 - len(at))], 10)
    expected = [0.4, 0.52, 0.57, 0.59, 0.6, 0.6, 0.605, 0.605, 0.605, 0.605]
    assert found == pytest.approx(expected)
    share = [(0.95 - a) / (0.95 - found[0]) for a in found]
    assert share[:4] == pytest.approx([1, 0.781818, 0.690909, 0.654545], abs=1e-6)
    assert found == sorted(found)


async def test_the_learner_gives_a_second_turns_tokens_the_engines_log_probs(pool: Pool) -> None:
    engine = TorchEngine(TINY, slots=8, max_length=120, threads=1)
    warm = turns(2, temperatures=(1.0, 0.6), end=(EOS,))
    never = Grading(gold="none", parts=EXACT.parts)
    ticket = asks(4, warm, never, max_tokens=40)
    rollouts, *_ = await episode.play(ticket, stage(engine, pool))
    await engine.close()
    assert {r.turn for r in rollouts} == {1}
    config = LearnerConfig(threads=1)
    state = make_state(RunConfig(model="tiny"), config)
    batch = flatten([Item(ticket, make_group(ticket=5, rollouts=rollouts))], 0)
    micro = pack(batch, np.arange(batch.rows))
    with torch.no_grad():
        logp = state.model(micro)[1].logp
    found = torch.zeros(batch.target.size).index_copy(0, micro.tokens, logp)
    assert set(batch.static.temperature.tolist()) == {1.0, np.float32(0.6)}
    assert float((found - batch.static.lb).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("turn", {"turn": 3}),
        ("turn", {"turn": -1}),
        ("mask", {"mask": np.ones(5, np.uint8), "role": "feedback", "turn": 1}),
        ("parts", {}),
    ],
)
async def test_a_group_that_claims_other_turns_than_were_asked_is_refused(
    pool: Pool, reason: str, change: dict[str, object]
) -> None:
    engine = Speaker({0: ["#18<eos>", "#171<eos>", "#17<eos>"]})
    ticket = asks(1, turns(3))
    (rollout,), *_ = await episode.play(ticket, stage(engine, pool))
    segments = list(rollout.segments)
    segments[2] = msgspec.structs.replace(segments[2], **change)
    parts = rollout.parts[:1] if reason == "parts" else rollout.parts
    lie = msgspec.structs.replace(rollout, segments=tuple(segments), parts=parts)
    with pytest.raises(WireError) as caught:
        check_group(make_group(ticket=5, rollouts=(lie,)), ticket, 20, 9)
    assert caught.value.reason == reason
