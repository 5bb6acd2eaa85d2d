"""Isentropic holds what it is told to, where theory is exact: a bandit."""

from __future__ import annotations

from typing import Any

import pytest

from learner.methods.isentropic import Isentropic
from tests.toy import Bandit


def miss(bandit: Bandit, share: float, last: int = 30) -> float:
    """Mean |H - target| / target over the last steps."""
    target = share * bandit.entropy[0]
    return sum(abs(h - target) / target for h in bandit.entropy[-last:]) / last


@pytest.mark.parametrize("mode", ["floor", "hold"])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_it_holds_a_share_of_the_starting_entropy_on_the_bandit(mode: Any, share: float) -> None:
    """Measured: at most 0.006."""
    held = Bandit([Isentropic(target=share, mode=mode)], realised=False).run(110)
    assert miss(held, share) < 0.01
    assert held.success > 0.5


def test_grpo_on_the_same_bandit_does_not_and_opefo_only_stays_where_it_is() -> None:
    assert Bandit().run(76).entropy[75] < 0.25
    stays = Bandit([Isentropic(preset="opefo")]).run(76).entropy
    assert stays[75] == pytest.approx(stays[0], rel=0.05)


def test_a_target_that_changes_mid_run_is_followed() -> None:
    method = Isentropic(target=1.0, mode="hold", changes=((40, 0.6),))
    bandit = Bandit([method], realised=False).run(40)
    assert miss(bandit, 1.0, last=15) < 0.01
    assert miss(bandit.run(60), 0.6, last=20) < 0.01
