"""KappaTune: condition numbers to their golden values, and what selecting by them means."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import RunConfig
from common.errors import ConfigError
from common.models import FOLDER_VARIABLE
from learner import kappa as kappas
from learner import model as models
from learner.config import LearnerConfig
from learner.kappa import candidates, freeze, kappa, select
from learner.tuning import KappaConfig

GOLDEN = {
    "diag": ([[2.0, 0], [0, 1]], 2.0),
    "square": ([[1.0, 2], [3, 4]], 14.933034),
    "identity": ([[1.0, 0, 0], [0, 1, 0]], 1.0),
    "close": ([[1.0, 0.5], [0.5, 1]], 3.0),
    "far": ([[3.0, 0], [0, 0.5]], 6.0),
    "wide": ([[1.0, 2, 3], [4, 5, 6]], 12.302246),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "models"))


@pytest.mark.parametrize("name", GOLDEN)
def test_condition_numbers_are_the_golden_ones(name: str) -> None:
    matrix, value = GOLDEN[name]
    assert kappa(torch.tensor(matrix, dtype=torch.float64)) == pytest.approx(value, abs=1e-5)
    assert kappa(torch.tensor(matrix)) == pytest.approx(value, rel=1e-4)
    assert kappa(torch.tensor(matrix).T) == pytest.approx(value, rel=1e-4)


def test_a_singular_matrix_is_infinite_and_not_a_matter_of_round_off() -> None:
    singular = torch.tensor([[1.0, 2], [2, 4]], dtype=torch.float64)
    assert kappa(singular) == kappa(singular.float()) == kappa(singular.half()) == math.inf
    assert kappa(torch.zeros(3, 3)) == math.inf


def test_the_lowest_come_first_and_ties_go_by_name() -> None:
    known = {name: value for name, (_, value) in GOLDEN.items()} | {"also": 2.0, "dead": math.inf}
    assert select(known, KappaConfig(tensors=2)) == ["identity", "also"]
    assert select(known, KappaConfig(tensors=99)) == [
        *("identity", "also", "diag", "close", "far", "wide", "square")
    ]
    assert select(known, KappaConfig(below=2.0)) == ["identity"]
    assert select(known, KappaConfig(share=0.5)) == ["identity", "also", "diag"]
    assert select(known, KappaConfig(share=0.01)) == ["identity"]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.integers(1, 6), st.integers(1, 6))
def test_scale_rotation_and_transpose_change_nothing(
    seed: int, scale: float, m: int, n: int
) -> None:
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=made, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(m, m, generator=made, dtype=torch.float64)).Q
    value = kappa(weight)
    assert value >= 1
    for other in (weight * scale, weight.T, turn @ weight):
        assert kappa(other) == pytest.approx(value, rel=1e-6)


def test_stacked_experts_count_by_their_mean() -> None:
    stack = torch.stack([torch.diag(torch.tensor([2.0, 1])), torch.diag(torch.tensor([4.0, 1]))])
    assert kappa(stack) == pytest.approx(3.0)


def tiny() -> models.Policy:
    policy, _ = models.load(RunConfig(), LearnerConfig())
    return policy


def test_all_but_the_chosen_is_frozen_and_only_the_chosen_is_published() -> None:
    policy = tiny()
    chosen = freeze(policy, KappaConfig(tensors=3))
    assert len(chosen) == 3
    assert sorted(chosen) == [blob.name for blob in models.snapshot(policy, "fp32")]
    assert sorted(chosen) == list(models.trainable(policy))


def test_embeddings_and_large_tensors_are_left_out_unless_asked_for() -> None:
    policy = tiny()
    inner = candidates(policy, KappaConfig(tensors=1))
    assert not [name for name in inner if "embed" in name or "lm_head" in name]
    assert all(p.ndim == 2 for p in inner.values())
    with_ends = candidates(policy, KappaConfig(tensors=1, embeddings=True))
    assert len([name for name in with_ends if "embed" in name or "lm_head" in name]) == 1  # tied
    largest = max(max(p.shape) for p in inner.values())
    smaller = candidates(policy, KappaConfig(tensors=1, max_dim=largest - 1))
    assert 0 < len(smaller) < len(inner)


def test_the_cache_gives_what_computing_gives_and_a_damaged_one_is_made_again(
    tmp_path: Path,
) -> None:
    first = freeze(tiny(), KappaConfig(tensors=5))
    (cache,) = (tmp_path / "kappa").glob("*.json")
    kept = cache.read_bytes()
    assert freeze(tiny(), KappaConfig(tensors=5)) == first
    cache.write_bytes(kept[: len(kept) // 2])
    assert freeze(tiny(), KappaConfig(tensors=5)) == first
    assert cache.read_bytes() == kept


def test_a_bound_below_all_tensors_is_refused() -> None:
    with pytest.raises(ConfigError, match="no tensor of"):
        freeze(tiny(), KappaConfig(below=1e-3))
    with pytest.raises(ConfigError, match="exactly one"):
        KappaConfig(tensors=1, share=0.5).check()


def test_nothing_is_selected_by_default() -> None:
    assert LearnerConfig().kappa_tune is None
    assert kappas.__doc__ is not None
