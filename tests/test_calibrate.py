"""What a predicted entropy change is worth, fitted as a run goes."""

from __future__ import annotations

import pytest
import torch

from learner.methods.calibrate import REACH, Gain


def test_gain_and_drift_are_found_from_what_happened() -> None:
    gain = Gain()
    rng = torch.Generator().manual_seed(0)
    for x in torch.randn(200, generator=rng).tolist():
        gain.add(x, 3 * REACH * x - 0.5)
    assert gain.slope == pytest.approx(3 * REACH, rel=0.35)
    assert gain.drift == pytest.approx(-0.5, rel=0.2)


def test_the_gain_stays_positive_and_moves_only_when_predictions_vary() -> None:
    gain = Gain()
    for _ in range(50):
        gain.add(1.0, -5.0)
    assert gain.slope == REACH
    assert gain.drift < -4
    for x in (1.0, -1.0) * 50:
        gain.add(x, -5.0 * x)
    assert gain.slope == REACH / 2
