import math
from typing import Any

import numpy as np
import pytest
import torch

from common import metrics
from common.config import RunConfig
from common.errors import DataError
from learner import model as models
from learner.batch import flatten
from learner.config import LearnerConfig
from learner.item import Item
from learner.methods.isentropic import Isentropic
from learner.model import Policy
from learner.state import TrainState, state_of
from learner.step import make_state, train_step
from tests.builders import make_group, make_rollout, make_segment, make_ticket, tiny_model


def a_batch(
    seed: int = 0, groups: int = 4, version: int = 0, logp: float | None = None
) -> list[Item]:
    """Groups of four rollouts with 1 to 12 random tokens each, half of them right."""
    rng = np.random.default_rng(seed)
    items = []
    for ticket in range(groups):
        rollouts = tuple(
            make_rollout(
                float(i % 2),
                tokens=rng.integers(3, 31, int(rng.integers(1, 13))).tolist(),
                logps=None,
                version=version,
            )
            for i in range(4)
        )
        prompt = rng.integers(3, 31, 5).tolist()
        group = make_group([0, 1, 0, 1], ticket=ticket, rollouts=rollouts)
        items.append(Item(make_ticket(ticket, prompt=prompt, n=4), group))
    return items


def a_state(
    config: LearnerConfig, run: RunConfig | None = None, family: str = "qwen2"
) -> TrainState:
    return state_of(Policy(tiny_model(family), config), run or RunConfig(), config)


def weights(state: TrainState) -> bytes:
    return b"".join(bytes(b.data) for b in models.snapshot(state.model, "fp32"))


def flat(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in models.trainable(state.model).values()])


def config(**fields: Any) -> LearnerConfig:
    return LearnerConfig(**{"warmup_steps": 0, "lr": 1e-3, "threads": 1, **fields})


# ---- the same bits, the right numbers ----------------------------------------------------------


def test_the_same_batch_gives_the_same_bits_in_whatever_order_it_arrives() -> None:
    settings = config(updates_per_batch=2, tokens_per_micro=60)
    first, second = a_state(settings), a_state(settings)
    for seed in range(3):
        items = a_batch(seed)
        train_step(first, items, settings)
        train_step(second, items[::-1], settings)
    assert first.t == second.t == 3
    assert weights(first) == weights(second)


def test_methods_are_told_what_was_right_of_all_that_was_looked_at() -> None:
    settings = config(methods=(Isentropic(target=1.0),))
    items = a_batch(0)
    answers = [rollout for item in items for rollout in item.group.rollouts]
    own = sum(rollout.correct for rollout in answers) / len(answers)
    for told, right in ((0.7, 0.7), (None, own)):
        state = a_state(settings)
        train_step(state, items, settings, correct=told)
        odds = state.methods_state["isentropic"]["fit"]["right"]
        assert odds == pytest.approx(math.log(right / (1 - right)))


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("loss", ["ppo", "decoupled_ppo", "reinforce"])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean", "constant"])
def test_a_step_is_what_a_padded_textbook_step_is(family: str, loss: Any, aggregation: Any) -> None:
    settings = config(loss=loss, aggregation=aggregation, tokens_per_micro=40, grad_clip=1e9)
    state = a_state(settings, family=family)
    net = tiny_model(family)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    items = a_batch()
    _textbook(net, items, settings).backward()
    optimizer.step()
    # SGD with step 1 shows the gradient itself; AdamW would hide its size
    state.optimizer = torch.optim.SGD(state.masters.values(), lr=1.0)
    train_step(
        state,
        items,
        config(loss=loss, aggregation=aggregation, tokens_per_micro=40, grad_clip=1e9, lr=1.0),
    )
    wanted = torch.cat([p.detach().reshape(-1) for _, p in sorted(net.named_parameters())])
    assert torch.allclose(flat(state), wanted, rtol=1e-3, atol=2e-4)


def _textbook(net: Any, items: list[Item], settings: LearnerConfig) -> torch.Tensor:
    """GRPO row by row, with whole logits."""
    total, tokens, rows = torch.zeros(()), 0, 0
    for item in items:
        rewards = torch.tensor([r.correct for r in item.group.rollouts])
        advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for a, rollout in zip(advantage, item.group.rollouts, strict=True):
            answer = torch.from_numpy(rollout.segments[0].tokens).long()
            prompt = torch.from_numpy(item.ticket.prompt).long()
            logits = net(torch.cat([prompt, answer])[None]).logits[0]
            logp = logits[len(prompt) - 1 : -1].log_softmax(-1)
            l = logp.gather(1, answer[:, None]).squeeze(1)  # noqa: E741
            old = torch.from_numpy(rollout.segments[0].logps.copy())
            r = (l - (l.detach() if settings.loss == "decoupled_ppo" else old)).exp()
            losses = torch.maximum(-a * r, -a * r.clamp(0.8, 1.28))
            if settings.loss == "reinforce":
                losses = -a * l
            mean = settings.aggregation == "seq_mean"
            total = total + (losses.mean() if mean else losses.sum())
            tokens, rows = tokens + len(answer), rows + 1
    count = {"token_mean": tokens, "seq_mean": rows, "constant": rows * settings.max_tokens}
    return total / count[settings.aggregation]


def test_micro_batches_change_nothing_but_rounding() -> None:
    ends = []
    for budget in (16, 50, 10_000):
        state = a_state(config())
        report = train_step(state, a_batch(), config(tokens_per_micro=budget))
        ends.append((flat(state), report.metrics["entropy"], report.metrics["entropy_predicted"]))
    for end, entropy, predicted in ends[1:]:
        assert torch.allclose(end, ends[0][0], atol=1e-5)
        assert entropy == pytest.approx(ends[0][1], rel=1e-5)
        assert predicted == pytest.approx(ends[0][2], rel=1e-3)


def test_training_on_what_was_right_makes_it_likelier() -> None:
    settings = config(lr=3e-3)
    state = a_state(settings)
    items = a_batch()
    for _ in range(12):
        train_step(state, items, settings)
    before, after = (_logp_by_advantage(s, items) for s in (a_state(settings), state))
    assert after[True] > before[True] + 0.3
    assert after[False] < before[False]


def _logp_by_advantage(state: TrainState, items: list[Item]) -> dict[bool, float]:
    from learner.batch import pack

    batch = flatten(items, 0)
    micro = pack(batch, np.arange(batch.rows))
    with torch.no_grad():
        logp = state.model(micro)[1].logp
    good = torch.from_numpy(batch.reward)[batch.static.row][micro.tokens] > 0
    return {True: float(logp[good].mean()), False: float(logp[~good].mean())}


# ---- updates, warm-up, precision ---------------------------------------------------------------


def test_later_updates_keep_the_proximal_policy_of_the_first() -> None:
    """With ratio to the start of the step, the second update differs from a fresh step's first."""
    twice = config(loss="decoupled_ppo", updates_per_batch=2, clip_low=1e-6, clip_high=1e-6)
    state = a_state(twice)
    report = train_step(state, a_batch(), twice)
    clipped = report.metrics["clipped"]
    assert isinstance(clipped, dict)
    assert clipped["0"] > 0.3  # the first update moved them; a ratio of 1 is never clipped
    assert state.t == 1
    once = a_state(twice)
    fresh = config(loss="decoupled_ppo", clip_low=1e-6, clip_high=1e-6)
    assert train_step(once, a_batch(), fresh).metrics["clipped"] == {"0": 0.0}


def test_the_learning_rate_warms_up_linearly() -> None:
    settings = config(warmup_steps=4, lr=1.0e-3)
    state = a_state(settings)
    rates = [train_step(state, a_batch(s), settings).metrics["lr"] for s in range(6)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_with_bf16_weights_the_model_computes_with_what_it_publishes_over_fp32_masters() -> None:
    settings = config(lr=1e-5)
    state = a_state(settings, RunConfig(weights_dtype="bf16"))
    start = {n: m.clone() for n, m in state.masters.items()}
    for seed in range(3):
        train_step(state, a_batch(seed), settings)
    for name, parameter in models.trainable(state.model).items():
        master = state.masters[name]
        assert torch.equal(parameter, master.bfloat16().float())
        assert not torch.equal(master, start[name])
        assert not torch.equal(master, parameter)


def test_bf16_autocast_trains() -> None:
    settings = config(dtype="bf16")
    state = a_state(settings)
    before = flat(state)
    train_step(state, a_batch(), settings)
    assert not torch.equal(flat(state), before)


def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing() -> None:
    settings = config()
    state = a_state(settings)
    with torch.no_grad():
        state.model.net.model.norm.weight[0] = float("nan")
    before = state.masters["model.embed_tokens.weight"].clone()
    with pytest.raises(DataError, match="the gradient's norm is nan"):
        train_step(state, a_batch(), settings)
    assert torch.equal(state.masters["model.embed_tokens.weight"], before)
    assert state.t == 0


def test_a_batch_without_a_token_to_train_on_changes_nothing() -> None:
    masked = (make_rollout(0.0, segments=(make_segment([5, 6], mask=[0, 0]),)),) * 2
    item = Item(make_ticket(), make_group([0, 0], rollouts=masked))
    for aggregation in ("token_mean", "seq_mean", "constant"):
        settings = config(aggregation=aggregation, weight_decay=0.0)
        state = a_state(settings)
        before = weights(state)
        report = train_step(state, [item], settings)
        assert (report.metrics["loss"], report.metrics["grad_norm"]) == (0.0, 0.0)
        assert weights(state) == before


def test_a_huge_gradient_is_clipped_to_its_norm() -> None:
    settings = config(grad_clip=1e-3, lr=1.0)
    state = a_state(settings)
    state.optimizer = torch.optim.SGD(state.masters.values(), lr=1.0)
    before = flat(state)
    report = train_step(state, a_batch(), settings)
    assert report.metrics["grad_norm"] > 1e-3
    assert float((flat(state) - before).norm()) == pytest.approx(1e-3, rel=1e-2)


# ---- what the step says ------------------------------------------------------------------------


def test_every_metric_has_a_meaning_in_the_glossary() -> None:
    settings = config(realised_every=1)
    state = a_state(settings)
    for seed in range(4):
        report = train_step(state, a_batch(seed), settings)
    assert [name for name in report.metrics if not metrics.known(name)] == []
    assert {"entropy_correlation", "entropy_slope", "ess_share"} <= set(report.metrics)


def test_importance_is_told_by_lag() -> None:
    state = a_state(config())
    state.t = 5
    items = [
        *a_batch(0, version=5),
        *(i._replace(ticket=_renumber(i)) for i in a_batch(1, version=3)),
    ]
    report = train_step(state, items, config())
    for name in ("ratio", "clipped", "ess", "kl", "reward_by_lag", "length_by_lag"):
        found = report.metrics[name]
        assert isinstance(found, dict)
        assert set(found) == {"0", "2"}, name
    assert report.metrics["reward"] == 0.5


def _renumber(item: Item) -> Any:
    return make_ticket(item.ticket.id + 100, prompt=item.ticket.prompt.tolist(), n=4)


def test_the_forecast_adds_up_and_the_realised_change_is_measured_when_due() -> None:
    settings = config(realised_every=2)
    state = a_state(settings)
    reports = [train_step(state, a_batch(s), settings).metrics for s in range(4)]
    assert ["entropy_realised" in m for m in reports] == [True, False, True, False]
    assert reports[0]["entropy_measure_s"] > 0
    assert state.law.sums["n"] == 2
    for m in reports:
        quadrants = m["entropy_quadrants"]
        assert isinstance(quadrants, dict)
        whole = pytest.approx(m["entropy_predicted"], rel=1e-4, abs=1e-12)
        assert m["entropy_predicted_up"] + m["entropy_predicted_down"] == whole
        assert sum(quadrants.values()) == whole
        assert quadrants["A+ likely"] <= 0
        assert quadrants["A- likely"] >= 0


def test_the_forecast_is_right_to_first_order_for_logits_that_are_their_own() -> None:
    """Every token with logits of its own: plain gradient descent moves H as foretold."""
    from learner.measure import entropy_forecast
    from learner.table import Table
    from tests.test_table import table

    base = table()
    n, eta = len(base.logp), 1e-3
    torch.manual_seed(0)
    z = torch.randn(n, 6, dtype=torch.float64, requires_grad=True)
    advantage = torch.randn(n)

    def look() -> Table:
        log_p = z.log_softmax(1)
        H = -(log_p.exp() * log_p).sum(1)
        N = (log_p.exp().square() * (H[:, None] + log_p)).sum(1)
        logp = log_p[:, 0]
        return Table.join(base, logp, logp, H, N)

    before = look()
    loss = -(advantage * before.logp).sum() / n
    c = -advantage / n
    (slope,) = torch.autograd.grad(loss, z)
    with torch.no_grad():
        forecast = entropy_forecast(before, c, eta)
        z -= eta * slope
        change = float((look().H - before.H).sum())
    assert forecast["entropy_predicted"] == pytest.approx(change, rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_on_a_gpu_comes_near_the_step_on_a_cpu(dtype: Any) -> None:
    ends = []
    for device in ("cpu", "cuda"):
        settings = config(dtype=dtype, device=device)
        state = state_of(Policy(tiny_model(), settings).to(device), RunConfig(), settings)
        report = train_step(state, a_batch(), settings)
        ends.append(report.metrics["entropy"])
    assert ends[1] == pytest.approx(ends[0], rel=1e-3 if dtype == "fp32" else 0.05)


def test_the_shipped_model_makes_a_state_and_steps() -> None:
    settings = config()
    state = make_state(RunConfig(model="tiny"), settings)
    train_step(state, a_batch(), settings)
    assert state.t == 1
