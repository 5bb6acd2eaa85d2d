"""AEPO: golden temperatures, the aux term, why there is no importance weight, and the whole loop
from the method's wish to tickets, journal, replay and resume.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common import recipe, wire
from common.codec import Codec
from common.config import RunConfig
from common.errors import ConfigError, DataError
from common.journal import read
from common.metrics import read as read_metrics
from common.records import Admit, Issue, Step
from common.runfolder import RunFolder
from learner import checkpoint
from learner.config import LearnerConfig
from learner.item import Item
from learner.methods.aepo import Aepo
from learner.methods.base import Ask
from learner.methods.compose import Methods
from learner.methods.steer import Steer
from learner.model import Policy
from learner.state import state_of
from learner.step import train_step
from tests import runs
from tests.builders import make_group, make_ticket, tiny_model
from tests.counter import Counter
from tests.tables import golden, make_table
from tests.test_methods import bits, train
from tests.test_step import a_batch

GV1 = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)

# ---- golden numbers ----------------------------------------------------------------------------


def test_the_golden_temperatures_come_out() -> None:
    scope, bang = Aepo(), Aepo(mode="bang_bang")
    golden([scope.temperature(h) for h in (0.5, 0.4, 0.6, 0.0, 5.0)], "GV11.T")  # type: ignore[arg-type]
    golden(scope.temperature(0.45), "GV11.T(.45)")
    golden([bang.temperature(h) for h in (0.5, 0.4, 0.6)], "GV11.bang")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_golden_aux_row_comes_out_and_equals_rows_with_weights(dtype: torch.dtype) -> None:
    r = torch.tensor([0.9, 1, 1.3, 1.1], dtype=torch.float64)
    t = make_table(r.log(), 1.0, lp=0.0, aux=True, row=0, dtype=dtype)
    row = -Aepo(alpha=1.0).extra_loss(t, None).mean()
    golden(row, "GV11.aux row", dtype)
    main, aux = torch.tensor([0.1, -0.2, 0.3, 0.05]), torch.tensor([1.02, 0.0])
    weights = torch.tensor([6 / 4] * 4 + [0.25 * 6 / 2] * 2)
    golden(weights[[0, -1]], "GV11.rows")
    both = [(weights * torch.cat([main, aux])).mean(), main.mean() + 0.25 * aux.mean()]
    golden(torch.stack(both), "GV11.J", torch.float32)


def test_the_first_versions_pull_by_the_reward_without_a_clip_and_jump_between_temperatures() -> (
    None
):
    """GV11's row, and two that the default leaves out: moved too far, and half right."""
    first, default = Aepo(preset="v1_v4", alpha=0.5), Aepo(alpha=0.5)
    assert [first.temperature(h) for h in (0.4, 0.6)] == [1.2, 0.8]
    assert first.ask({"n_aux": 4.0}, {"entropy": 0.6}).groups == 2
    assert Aepo(preset="v1_v4", mode="scope").temperature(0.45) == pytest.approx(1.05)

    def slopes(method: Aepo, ratio: float, reward: float) -> list[float]:
        logp = torch.tensor([-0.3, -1.0]).double().requires_grad_()
        t = make_table(logp, reward, lp=logp.detach() - math.log(ratio), aux=True, row=0)
        loss = method.extra_loss(t, None)
        return torch.autograd.grad(loss.sum(), logp)[0].tolist()

    assert slopes(first, 1.0, 1.0) == pytest.approx(slopes(default, 1.0, 1.0))
    assert slopes(first, 1.3, 1.0) == pytest.approx([-0.5, -0.5])
    assert slopes(default, 1.3, 1.0) == [0.0, 0.0]
    assert slopes(first, 1.0, 0.5) == pytest.approx([-0.25, -0.25])
    assert slopes(default, 1.0, 0.5) == [0.0, 0.0]
    assert slopes(first, 1.0, 0.0) == [0.0, 0.0]


def test_tempered_samples_drift_as_foretold_and_an_importance_weight_would_undo_it() -> None:
    """GV4: the entropy change per unit step of equally rewarded samples drawn at T."""
    log_p = GV1.log_softmax(0)
    p, H = log_p.exp(), -(log_p.exp() * log_p).sum()
    S = p * (H + log_p)
    N = (p * S).sum()
    for temperature in (0.8, 1.0, 1.2):
        drawn = (GV1 / temperature).softmax(0)
        drift = -(drawn * (S - N)).sum()
        entropy = -(drawn * drawn.log()).sum()
        variance = (drawn * GV1**2).sum() - (drawn * GV1).sum() ** 2
        found = torch.stack([entropy, variance / temperature**3, drift])
        golden(found, f"GV4.T{temperature}[H,dHdT,posdrift]")
        assert float((drawn * (p / drawn) * (S - N)).sum()) == pytest.approx(0, abs=1e-12)


# ---- the aux term ------------------------------------------------------------------------------


def test_only_right_aux_answers_pull_and_above_the_clip_they_do_not() -> None:
    r = torch.tensor([0.5, 1.0, 1.1, 1.3, 1.0, 1.0], dtype=torch.float64)
    t = make_table(
        r.log(), [1, 1, 1, 1, 0.5, 1], lp=0.0, aux=[True] * 5 + [False], row=[0] * 5 + [1]
    )
    logp = t.logp.clone().requires_grad_()
    from dataclasses import replace

    loss = Aepo(alpha=0.5).extra_loss(replace(t, logp=logp), None)
    (slope,) = torch.autograd.grad(loss.sum(), logp)
    assert torch.allclose(slope, -0.5 * torch.tensor([0.5, 1.0, 1.1, 0, 0, 0]).double())


def with_aux(rewards: tuple[float, ...], lp: float = -1.0, ticket: int = 100) -> Any:
    def items(seed: int) -> Any:
        group = make_group(rewards, ticket=ticket, kind="aux")
        hot = make_ticket(ticket, kind="aux", n=len(rewards))
        return [*a_batch(seed), Item(hot, group)]

    return items


def test_a_reward_that_is_no_number_is_refused_with_its_token_and_not_taken_for_a_failure() -> None:
    for preset in (None, "v1_v4"):
        for aux, mask in ((True, True), (False, True), (True, False)):
            t = make_table([-1.0, -2.0], [1.0, math.nan], aux=aux, mask=mask, row=0)
            methods = Methods([Aepo(preset=preset)])  # type: ignore[arg-type]
            if aux and mask:
                where = "R: nan at position 1 of rollout 1 of ticket 0"
                with pytest.raises(DataError, match=f"'aepo', {where}"):
                    methods.extra_loss(t, {})
            else:
                assert methods.extra_loss(t, {}).tolist() == [0.0, 0.0]  # type: ignore[union-attr]


def test_failures_count_in_the_denominator() -> None:
    def aux_loss(rewards: tuple[float, ...]) -> float:
        own = {"loss": "decoupled_ppo", "items": with_aux(rewards)}
        losses = [train(m, steps=1, **own)[1].metrics["loss"] for m in ([Aepo(alpha=1.0)], [])]
        assert isinstance(losses[0], float)
        assert isinstance(losses[1], float)
        return losses[0] - losses[1]

    # r = 1 on the first update: every right row gives its share, 1 / rows
    assert aux_loss((1, 1, 1, 1)) == pytest.approx(-1.0, rel=1e-5)
    assert aux_loss((1, 0, 0, 0)) == pytest.approx(-0.25, rel=1e-5)
    assert aux_loss((0, 0, 0, 0)) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("correction", ["none", "truncate", "mask"])
def test_aux_rows_are_never_importance_corrected(correction: Any) -> None:
    """Their made-up behaviour log-probs may be anything."""
    ends = []
    for behaviour in (-1.0, -7.0):

        def items(seed: int, behaviour: float = behaviour) -> Any:
            *main, aux = with_aux((1, 0, 1, 1))(seed)
            for rollout in aux.group.rollouts:
                for segment in rollout.segments:
                    segment.logps[:] = behaviour
            return [*main, aux]

        ends.append(
            bits(train([Aepo()], items=items, loss="decoupled_ppo", correction=correction)[0])
        )
    assert ends[0] == ends[1]


def test_aux_rows_enter_no_group_statistic_and_no_metric_of_the_main_rows() -> None:
    _, alone = train([], steps=1)
    _, beside = train([Aepo(), Steer()], steps=1, items=with_aux((1, 0, 1, 1)))
    for name in ("entropy", "tokens", "reward", "ess_share"):
        assert beside.metrics[name] == pytest.approx(alone.metrics[name], rel=1e-5), name
    assert beside.metrics["methods/aepo/target"] == 0.5
    assert beside.metrics["aux_rollouts"] == 4
    assert beside.metrics["aux_reward"] == 0.75
    assert beside.metrics["aux_temperature"] == 1.0


def test_without_weight_or_right_answers_it_is_the_empty_list_bit_for_bit() -> None:
    plain = bits(train([])[0])
    assert bits(train([Aepo(alpha=0.0)])[0]) == plain
    assert bits(train([Aepo()])[0]) == plain  # nobody came
    empty, failed = (bits(train(m, items=with_aux((0, 0)))[0]) for m in ([], [Aepo()]))
    assert empty == failed


def test_alpha_rises_from_nothing_when_it_is_warmed_up() -> None:
    from dataclasses import replace

    t = make_table([-1.0], 1.0, aux=True)
    found = [
        float(Aepo(alpha=1.0, warmup=4).extra_loss(replace(t, when=(0, step, 0)), None))
        for step in (0, 1, 3, 9)
    ]
    assert found == pytest.approx([-0.25, -0.5, -1.0, -1.0])


# ---- what it asks for --------------------------------------------------------------------------


def test_the_first_step_asks_for_temperature_one_and_later_ones_follow_the_entropy() -> None:
    config = LearnerConfig(methods=(Aepo(target=1.0, smoothing=0.5),), n_aux=3, warmup_steps=0)
    state = state_of(Policy(tiny_model(), config), RunConfig(), config)
    assert state.ask == Ask(groups=3, temperature=1.0)
    report = train_step(state, a_batch(), config)
    entropy = report.metrics["entropy"]
    assert isinstance(entropy, float)
    assert report.ask == state.ask == Ask(groups=3, temperature=0.8)
    assert state.methods_state["aepo"] == {"entropy": entropy}
    train_step(state, a_batch(1), config)
    assert state.methods_state["aepo"]["entropy"] != entropy


def test_the_temperature_falls_with_the_entropy_and_is_one_at_the_target() -> None:
    found = [Aepo(target=0.4).temperature(h / 20) for h in range(21)]
    assert found == sorted(found, reverse=True)
    assert Aepo(target=0.4).temperature(0.4) == 1.0


def test_the_released_rule_asks_for_half_the_groups_above_the_target() -> None:
    method, stats = Aepo(mode="bang_bang"), {"n_aux": 6.0}
    assert method.ask(stats, {"entropy": 0.6}) == Ask(groups=3, temperature=0.8)
    assert method.ask(stats, {"entropy": 0.5}) == Ask(groups=6, temperature=1.2)


def test_room_for_no_aux_group_and_impossible_targets_are_refused() -> None:
    with pytest.raises(ConfigError, match="n_aux = 0: 'aepo' asks for aux groups"):
        LearnerConfig(methods=(Aepo(),), n_aux=0).check()
    LearnerConfig(methods=(Aepo(alpha=0.0),), n_aux=0).check()
    with pytest.raises(ConfigError, match="1 must lie between them"):
        Aepo(low=1.1).check()
    config = LearnerConfig(methods=(Aepo(target=4.0),))
    with pytest.raises(ConfigError, match="'aepo': target = 4 nats is above the largest entropy"):
        state_of(Policy(tiny_model(), config), RunConfig(), config)


def test_its_state_and_its_wish_are_in_the_checkpoint(tmp_path: Path) -> None:
    config = LearnerConfig(methods=(Aepo(target=1.0),), n_aux=2)
    state = state_of(Policy(tiny_model(), config), RunConfig(), config)
    train_step(state, a_batch(), config)
    checkpoint.save(tmp_path / "c", state, b"")
    fresh = state_of(Policy(tiny_model(seed=1), config), RunConfig(), config)
    checkpoint.load(tmp_path / "c", fresh)
    assert fresh.ask == state.ask == Ask(groups=2, temperature=0.8)
    assert fresh.methods_state == state.methods_state


# ---- tickets -----------------------------------------------------------------------------------


@pytest.fixture
def counter(tmp_path: Path) -> Iterator[Counter]:
    config = LearnerConfig(
        groups_per_step=2, group_size=2, max_lag=1, heartbeat_s=0.05, lease_s=5.0, steps=10, n_aux=2
    )
    it = Counter(tmp_path, config)
    yield it
    it.close()


def test_aux_tickets_are_as_many_and_as_warm_as_was_asked_and_main_tickets_never_change(
    counter: Counter,
) -> None:
    counter.desk.want(Ask(groups=1, temperature=1.15))
    actor = counter.actor(capacity=16)
    counter.desk.announce(0)
    tickets = [grant.ticket for grant in actor.grants(6)]
    assert [t.kind for t in tickets] == ["aux"] * 2 + ["main"] * 4  # lag 1: for two steps
    assert {t.kind: t.sampling.temperature for t in tickets} == {"aux": 1.15, "main": 1.0}
    counter.desk.want(Ask(groups=9, temperature=0.9))  # never more than n_aux
    tickets = [grant.ticket for grant in actor.grants(2)]
    assert [(t.kind, t.sampling.temperature) for t in tickets] == [("aux", 0.9)] * 2


# ---- whole runs --------------------------------------------------------------------------------

METHODS = '[{type="aepo",target=0.2}]'


@pytest.mark.timeout(400)
def test_a_run_replays_and_resumes_to_the_same_bits_with_its_aux_groups(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs.run(folder, learner__methods=METHODS, learner__n_aux="2")
    assert runs.end(runs.begin(folder, resume=True, learner__steps="6")) == 0, runs.said(folder)
    assert runs.promises_kept(folder)
    again = runs.replay(folder)
    assert (again["steps"], again["equal"]) == (6, 6)
    records = [record for _, record in read(RunFolder.open(folder).journal)]
    issued = {r.ticket.id: r.ticket for r in records if isinstance(r, Issue)}
    aux = {i for i, ticket in issued.items() if ticket.kind == "aux"}
    trained = {i for r in records if isinstance(r, Step) for i in r.consumed}
    assert trained & aux
    assert {t.sampling.temperature for i, t in issued.items() if i not in aux} == {1.0}
    warm = {issued[i].sampling.temperature for i in aux}
    assert 1.0 in warm
    assert len(warm) > 1
    for record in records:
        if isinstance(record, Admit) and record.ticket in aux:
            group = Codec(wire.FromActor).decode(record.frame)
            told = {s.temperature for r in group.rollouts for s in r.segments}
            assert told == {issued[record.ticket].sampling.temperature}
    lines = read_metrics(folder)
    assert any(line.get("aux_rollouts") for line in lines)
    assert json.dumps(lines)


def test_its_recipe_has_room_for_what_it_asks() -> None:
    config = recipe.load_all("aepo")["learner"]
    assert isinstance(config, LearnerConfig)
    assert isinstance(config.methods[0], Aepo)
    assert config.n_aux >= 1
