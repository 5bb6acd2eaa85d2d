"""GSPO, CISPO, SAPO, importance weights of whole rollouts, the guessed proximal policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common import recipe
from common.errors import ConfigError
from learner.config import LearnerConfig
from learner.loss import Rows, clipped, proximal, rows, rows_wanted, surrogate
from tests.tables import golden
from tests.test_loss import LB, LP, A, L, close
from tests.test_methods import bits, train

ONE = torch.zeros(4, dtype=torch.long)  # the four tokens are one rollout
ALL = torch.ones(4, dtype=torch.bool)


def config(loss: Any, **fields: Any) -> LearnerConfig:
    return LearnerConfig(loss=loss, **{"clip_low": 0.2, "clip_high": 0.28, **fields})


def slope(settings: LearnerConfig, of_row: Rows, logp: Tensor = L) -> Tensor:
    leaf = logp.clone().requires_grad_()
    loss = surrogate(leaf, LP, LB, A, settings, of_row).sum()
    found: Tensor = torch.autograd.grad(loss, leaf)[0]
    return found


def test_the_golden_sequence_ratio_comes_out() -> None:
    settings = config("gspo", aggregation="seq_mean")
    found = rows(L, LP, LB, ALL, ONE, settings)
    assert found.ratio is not None
    golden(found.ratio[0], "GV14.gspo s")
    assert found.w is None


def test_gspo_has_one_ratio_a_rollout_and_each_token_its_gradient() -> None:
    settings = config("gspo", aggregation="seq_mean", clip_low=3e-4, clip_high=4e-4)
    wide = config("gspo", aggregation="seq_mean", clip_low=0.5, clip_high=0.5)
    of_row = rows(L, LP, LB, ALL, ONE, wide)
    assert of_row.ratio is not None
    s = of_row.ratio
    assert torch.allclose(surrogate(L, LP, LB, A, wide, of_row), -A * s)
    assert torch.allclose(slope(wide, of_row), -A * s)
    # s = 0.9876 is below 1 - 3e-4: bad tokens are stopped, good ones go on
    assert torch.allclose(slope(settings, of_row), -A * s * (A > 0))
    assert clipped(s, A, settings).tolist() == [False, False, True, True]


def test_the_sequence_ratio_counts_trained_tokens_of_its_own_rollout_only() -> None:
    settings = config("gspo", aggregation="seq_mean")
    row, mask = torch.tensor([0, 0, 1, 1]), torch.tensor([True, False, True, True])
    found = rows(L, LP, LB, mask, row, settings).ratio
    wanted = torch.tensor([0.1, 0.1, -0.075, -0.075], dtype=torch.float64).exp()
    assert found is not None
    assert torch.allclose(found, wanted)


def test_before_the_first_update_all_ratios_are_one_and_no_rows_are_wanted() -> None:
    settings = config("gspo", aggregation="seq_mean", updates_per_batch=2)
    assert not rows_wanted(settings, first=True)
    assert rows_wanted(settings, first=False)
    assert torch.equal(slope(settings, Rows()), -A)
    by_row = config("decoupled_ppo", correction="truncate", correction_level="sequence")
    assert rows_wanted(by_row, first=True)
    assert not rows_wanted(by_row, first=False)


def test_cispo_weighs_by_the_clipped_ratio_and_stops_no_gradient() -> None:
    r = (L - LP).exp()
    assert torch.allclose(
        slope(config("cispo", clip_low=0.1, clip_high=0.05), Rows()), -A * r.clamp(0.9, 1.05)
    )
    upper = config("cispo", clip_low=None, clip_high=0.05)
    assert torch.allclose(slope(upper, Rows()), -A * r.clamp(max=1.05))
    assert not clipped(r, A, upper).any()


def test_sapo_is_the_policy_gradient_where_nothing_moved_and_fades_softly() -> None:
    settings = config("sapo", sapo_tau=(2.0, 3.0))
    assert torch.allclose(slope(settings, Rows(), logp=LP), -A)
    r = (L - LP).exp()
    tau = torch.where(A > 0, 2.0, 3.0).double()
    gate = torch.sigmoid(tau * (r - 1))
    assert torch.allclose(surrogate(L, LP, LB, A, settings), -A * 4 / tau * gate)
    assert torch.allclose(slope(settings, Rows()), -A * 4 * gate * (1 - gate) * r)


@pytest.mark.parametrize("loss", ["decoupled_ppo", "gspo", "cispo", "sapo", "reinforce"])
@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_a_sequence_weight_is_the_product_over_the_rollout(loss: Any, correction: Any) -> None:
    own = {"correction": correction, "correction_level": "sequence", "aggregation": "seq_mean"}
    settings = config(loss, **own)
    row = torch.tensor([0, 0, 1, 1])
    of_row = rows(L, LP, LB, ALL, row, settings)
    product = torch.tensor([0.8, 0.8, -0.1, -0.1], dtype=torch.float64).exp()  # sums of lp - lb
    wanted = product.clamp(max=2.0) if correction == "truncate" else product * (product <= 2.0)
    assert of_row.w is not None
    assert torch.allclose(of_row.w, wanted)
    plain = surrogate(L, LP, LB, A, config(loss, aggregation="seq_mean"), Rows(of_row.ratio))
    assert torch.allclose(surrogate(L, LP, LB, A, settings, of_row), wanted * plain)


def test_the_guessed_proximal_policy_lies_on_the_line_to_now_one_version_back() -> None:
    settings = config("decoupled_ppo", proximal="log_linear")
    lag = torch.tensor([0, 1, 2, 4])
    found = proximal(L, LP, LB, lag, settings)
    share = torch.tensor([0, 0, 1 / 2, 3 / 4], dtype=torch.float64)
    assert torch.allclose(found, LB + share * (L - LB))
    assert not proximal(L.clone().requires_grad_(), LP, LB, lag, settings).requires_grad
    assert torch.equal(proximal(L, LP, LB, lag, config("decoupled_ppo")), LP)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"loss": "gspo"}, 'aggregation = "token_mean": gspo counts sequences'),
        ({"loss": "cispo", "dual_clip": 3.0}, "dual_clip: cispo stops no gradient by a clip"),
        ({"loss": "ppo", "proximal": "log_linear"}, 'proximal = "log_linear": a guess for'),
        (
            {
                "loss": "decoupled_ppo",
                "proximal": "log_linear",
                "correction": "mask",
                "correction_level": "sequence",
            },
            'proximal = "log_linear"',
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        LearnerConfig(**fields).check()


@pytest.mark.parametrize(
    "fields",
    [
        {"loss": "gspo", "aggregation": "seq_mean", "updates_per_batch": 2},
        {"loss": "cispo", "updates_per_batch": 2},
        {"loss": "sapo", "updates_per_batch": 2},
        {"loss": "reinforce", "correction": "truncate", "correction_level": "sequence"},
        {"loss": "decoupled_ppo", "proximal": "log_linear", "correction": "truncate"},
    ],
    ids=lambda f: f["loss"],
)
def test_every_variant_trains_alike_in_any_micro_batches(fields: dict[str, Any]) -> None:
    ends = [train([], steps=1, tokens_per_micro=n, **fields)[1].metrics for n in (16, 10_000)]
    for name in ("loss", "grad_norm", "entropy_predicted"):
        assert ends[0][name] == pytest.approx(ends[1][name], rel=1e-3, abs=1e-9), name
    plain = bits(
        train([], loss="decoupled_ppo", updates_per_batch=fields.get("updates_per_batch", 1))[0]
    )
    assert bits(train([], **fields)[0]) != plain


def test_the_recipes_are_those_losses() -> None:
    for name in ("gspo", "cispo", "sapo"):
        found = recipe.load_all(name)["learner"]
        assert isinstance(found, LearnerConfig)
        assert found.loss == name
        assert close(torch.tensor(float(found.updates_per_batch)), 2.0)
