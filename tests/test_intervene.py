"""Hinted siblings: beside a group and never in it, within a budget, kept only when right and
clean."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from actor import episode
from actor.config import ScriptedConfig
from actor.engine.scripted import ScriptedEngine
from actor.engine.torch_engine import TorchEngine
from actor.grade.pool import Pool
from actor.intervene import place
from actor.stage import LATER, Budget
from actor.triggers import first_flaw, repeated
from common import wire
from common.codec import Codec
from common.config import RunConfig
from common.episodes import HINT_SHARE, Episode, Intervene
from common.errors import WireError
from common.group_check import check_group
from common.wire import Grading, Rollout
from learner.advantage import advantages
from learner.batch import flatten, pack
from learner.config import LearnerConfig
from learner.item import Item
from learner.reward import scores
from learner.state import make_state
from learner.turns import hints, is_kept
from tests.builders import make_group, make_rollout, make_segment
from tests.talking import EXACT, TINY, WORDS, Speaker, asks, stage, tokens_of

HINT = tuple(tokens_of("?"))


def hinted(**fields: Any) -> Episode:
    chosen = {"triggers": ("wrong",), "hint": HINT, "share": 1.0} | fields
    return Episode(intervene=Intervene(**chosen))


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    pool = Pool(1, 1.0)
    yield pool
    await pool.close()


async def test_a_hint_stands_behind_the_wrong_answer_and_the_policy_goes_on(pool: Pool) -> None:
    engine = Speaker({0: ["#18<eos>", "#19<eos>"], 1: ["#19<eos>"]})
    ticket = asks(2, hinted())
    played = await episode.play(ticket, stage(engine, pool))
    assert [r.correct for r in played.rollouts] == [0.0, 1.0]
    (sibling,) = played.hinted
    assert [s.role for s in sibling.segments] == ["policy", "hint", "policy"]
    before, hint, after = sibling.segments
    original = played.rollouts[0].segments[0]
    assert before.tokens.tolist() == original.tokens[:-1].tolist()  # but the token that stopped it
    assert before.logps.tobytes() == original.logps[:-1].tobytes()
    assert engine.calls[1].prefix == [*ticket.prompt, *before.tokens, *hint.tokens]
    assert (hint.tokens.tolist(), hint.loss_mask.any(), hint.logps.any()) == ([*HINT], False, False)
    assert after.tokens.tolist() == tokens_of("#19<eos>")
    assert (sibling.correct, sibling.flaws, sibling.clean) == (1.0, ("wrong",), True)
    assert is_kept(sibling)


async def test_removing_the_hinted_leaves_the_group_as_it_was_to_the_bit(pool: Pool) -> None:
    def engine() -> ScriptedEngine:
        return ScriptedEngine(ScriptedConfig(vocab_size=20), slots=8)

    plain = await episode.play(asks(4, None), stage(engine(), pool))
    ticket = asks(4, hinted())
    mixed = await episode.play(ticket, stage(engine(), pool))
    assert len(mixed.hinted) == 4
    groups = [make_group(ticket=5, rollouts=p.rollouts, hinted=p.hinted) for p in (plain, mixed)]
    rewards = [scores(Item(ticket, group)) for group in groups]
    assert rewards[0] == rewards[1]
    batches = [flatten([Item(ticket, group)], 0) for group in groups]
    for one, other in zip(
        vars(batches[0].static).values(), vars(batches[1].static).values(), strict=True
    ):
        assert one.tolist() == other.tolist()
    zeros = np.zeros(4, np.int64)
    found = [advantages(np.array([1.0, 0, 0, 1]), zeros, "grpo") for _ in groups]
    assert found[0].tobytes() == found[1].tobytes()


async def test_tokens_behind_a_hint_have_the_log_probs_of_the_context_with_it(pool: Pool) -> None:
    engine = TorchEngine(TINY, slots=8, max_length=120, threads=1)
    never = Grading(gold="none", parts=EXACT.parts)
    ticket = asks(2, hinted(rounds=1), never, max_tokens=40)
    played = await episode.play(ticket, stage(engine, pool))
    await engine.close()
    assert len(played.hinted) == 2
    state = make_state(RunConfig(model="tiny"), LearnerConfig(threads=1))
    plain = msgspec.structs.replace(ticket, episode=None)
    batch = flatten([Item(plain, make_group(ticket=5, rollouts=played.hinted))], 0)
    micro = pack(batch, np.arange(batch.rows))
    with torch.no_grad():
        logp = state.model(micro)[1].logp
    found = torch.zeros(batch.target.size).index_copy(0, micro.tokens, logp)
    sampled = batch.static.mask > 0
    assert int(sampled.sum()) == sum(r.length for r in played.hinted)
    assert float((found - batch.static.lb)[sampled].abs().max()) < 1e-4


async def test_nothing_found_is_the_identity(pool: Pool) -> None:
    engine = Speaker({0: ["#19<eos>"]})
    played = await episode.play(asks(1, hinted()), stage(engine, pool))
    assert played.hinted == ()
    assert played.rollouts[0].events == {}
    assert len(engine.calls) == 1


async def test_rounds_are_limited_and_what_is_still_wrong_is_not_kept(pool: Pool) -> None:
    engine = Speaker({0: ["#18<eos>"] * 4})
    played = await episode.play(asks(1, hinted(rounds=3)), stage(engine, pool))
    (sibling,) = played.hinted
    assert [s.role for s in sibling.segments] == ["policy", "hint"] * 3 + ["policy"]
    assert [call.first for call in engine.calls] == [
        k * LATER for k in range(4)
    ]  # noise of its own every time
    assert (sibling.flaws, sibling.clean, is_kept(sibling)) == (("wrong",) * 3, False, False)


async def test_hints_stay_within_their_share_of_what_was_sampled(pool: Pool) -> None:
    engine = ScriptedEngine(ScriptedConfig(vocab_size=20, length_mean=18), slots=16)
    here = stage(engine, pool)
    for number in range(6):
        ticket = asks(8, hinted(share=HINT_SHARE), seed=number)
        played = await episode.play(ticket, here)
        assert here.budget.hints <= HINT_SHARE * here.budget.sampled
    assert here.budget.hints > 0
    assert sum(r.events.get("no_budget", 0) for r in played.rollouts) > 0


def test_the_budgets_share_is_the_papers() -> None:
    budget = Budget(sampled=8000)
    assert all(budget.take(60, HINT_SHARE) for _ in range(3))
    assert budget.share == pytest.approx(0.0225)
    assert not budget.take(60, HINT_SHARE)
    assert budget.hints == 180


def test_the_logged_share_is_that_of_the_groups_themselves() -> None:
    segments = (
        make_segment([5] * 100),
        make_segment([6] * 2, role="hint"),
        make_segment([7] * 20),
    )
    sibling = make_rollout(segments=segments, flaws=("wrong",))
    group = make_group([1, 0], tokens=[[5] * 60, [5] * 100], hinted=(sibling,))
    assert hints([group]) == {"rollouts": 1, "correct": 1, "kept": 1, "share": 2 / 180}


def test_the_mask_of_hints_and_tools_is_off() -> None:
    roles = (("policy", 4), ("hint", 2), ("policy", 3), ("tool", 2), ("policy", 1))
    segments = tuple(make_segment([5] * n, role=role) for role, n in roles)  # type: ignore[arg-type]
    mask = np.concatenate([s.loss_mask for s in segments])
    assert "".join(str(int(on)) for on in mask) == "111100111001"
    assert (int(mask.sum()), mask.size) == (8, 12)


@pytest.mark.parametrize("written", ["#18", "12+7=18,18"])
def test_triggers_name_the_earliest_place(written: str) -> None:
    tokens = np.array(tokens_of(written), np.int32)
    rule = Intervene(triggers=("wrong", "all_wrong", "repeat", "long"), ngram=2, times=2, long=2)
    flaw = first_flaw(tokens, right=False, any_right=False, rule=rule)
    assert flaw is not None
    assert (flaw.name, flaw.at) == ("long", 2)
    assert (
        first_flaw(tokens, right=True, any_right=True, rule=Intervene(triggers=("wrong",))) is None
    )
    only = Intervene(triggers=("all_wrong",))
    assert first_flaw(tokens, right=False, any_right=True, rule=only) is None


def test_a_repetition_is_found_where_it_comes_for_the_second_time() -> None:
    tokens = np.array([9, 1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3], np.int32)
    assert repeated(tokens, 3, 3) == 5
    assert repeated(tokens, 3, 4) == -1
    assert repeated(tokens[:2], 3, 2) == -1


def test_a_quote_becomes_a_place_among_the_tokens() -> None:
    tokens = np.array(tokens_of("12+7=18#18"), np.int32)
    text = "12+7=18#18"
    assert place(tokens, text, "=18", WORDS, cut=False) == 7
    assert place(tokens, text, "=18", WORDS, cut=True) == 4
    assert place(tokens, text, "nowhere", WORDS, cut=False) == tokens.size


async def test_what_an_intervention_makes_travels_and_is_accepted(pool: Pool) -> None:
    engine = Speaker({0: ["#18<eos>", "#19<eos>"], 1: ["#1<eos>", "#2<eos>"]})
    ticket = asks(2, hinted(rounds=1))
    played = await episode.play(ticket, stage(engine, pool))
    codec = Codec(wire.FromActor)
    group = make_group(ticket=5, rollouts=played.rollouts, hinted=played.hinted)
    received = codec.decode(codec.encode(group))
    check_group(received, ticket, vocab_size=20, clock_version=9)
    assert [said(r) for r in received.hinted] == [said(r) for r in played.hinted]
    assert [said(r) for r in received.rollouts] == [said(r) for r in played.rollouts]


def said(rollout: Rollout) -> list[list[int]]:
    return [segment.tokens.tolist() for segment in rollout.segments]


@pytest.mark.parametrize(
    "lie",
    [
        {"segments": (make_segment([5]),)},  # no hint in it
        {"segments": (make_segment([5]), make_segment([6] * 65, role="hint"))},
        {"segments": (make_segment([5]), *(make_segment([6], role="hint") for _ in range(4)))},
    ],
)
def test_hints_that_were_not_asked_for_are_refused(lie: dict[str, Any]) -> None:
    group = make_group([1, 0], ticket=5, hinted=(make_rollout(**lie),))
    for asked in (hinted(), None):
        with pytest.raises(WireError, match="hints"):
            check_group(group, asks(2, asked), 32, 9)


def test_the_tests_speak_the_shipped_models_language() -> None:
    assert WORDS.encode("12<eos>").tolist() == tokens_of("12")  # what looks special is only text
    assert TINY.name == "tiny"
