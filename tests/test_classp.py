"""CLASSP, variant A, to its golden numbers and invariants."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from learner.classp import Classp
from learner.tuning import ClasspConfig

GRADIENTS = ([0.6, -0.1], [0.3, 0.9], [-0.8, 0.5])


def walk(
    config: ClasspConfig, lr: float = 0.1, gradients: tuple[list[float], ...] = GRADIENTS
) -> tuple[list[list[float]], list[float]]:
    """Weights after each step, from [1, -1], and the sums at the end."""
    weight = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    optimizer, path = Classp([weight], lr, config), []
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        path.append(weight.tolist())
    return path, optimizer.state[weight]["sum"].tolist()


def test_three_steps_are_the_golden_ones() -> None:
    path, sums = walk(ClasspConfig(relative="absolute", threshold=0.25))
    golden = [[0.900001, -1], [0.900001, -1.099999], [0.980001, -1.099999]]
    assert path == [pytest.approx(step, abs=1e-6) for step in golden]
    assert sums == pytest.approx([1.00, 0.81], abs=1e-9)


def test_without_a_threshold_it_is_adagrad() -> None:
    path, sums = walk(ClasspConfig(relative="absolute", threshold=0.0))
    golden = [[0.900001, -0.900050], [0.855281, -0.999438], [0.931906, -1.047774]]
    assert path == [pytest.approx(step, abs=1e-6) for step in golden]
    assert sums == pytest.approx([1.09, 1.07], abs=1e-9)


def test_an_infinite_threshold_moves_nothing() -> None:
    path, sums = walk(ClasspConfig(relative="absolute", threshold=math.inf))
    assert path == [[1.0, -1.0]] * 3
    assert sums == [0.0, 0.0]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.sampled_from([0.0, *(s * x for s in (1, -1) for x in (0.01, 0.3, 0.9))]),
        min_size=2,
        max_size=2,
    ),
    st.sampled_from(["mean", "quantile", "absolute"]),
    st.floats(0, 1),
    st.sampled_from([1.0, 2.0]),
)
def test_a_coordinate_below_the_threshold_keeps_weight_and_sum(
    gradient: list[float], relative: str, threshold: float, p: float
) -> None:
    config = ClasspConfig(relative=relative, threshold=threshold, p=p)  # type: ignore[arg-type]
    (after,), sums = walk(config, gradients=(gradient,))
    for old, new, g, total in zip([1.0, -1.0], after, gradient, sums, strict=True):
        moved = total > 0
        assert moved == (new != old) or abs(g) < 1e-8
        if moved:
            assert math.copysign(1, old - new) == math.copysign(1, g)
            assert abs(new - old) <= 0.1 * (1 + 1e-9)  # at most the learning rate


def test_relative_thresholds_do_not_see_the_scale_of_the_gradient() -> None:
    for relative, threshold in (("mean", 1.0), ("quantile", 0.5)):
        config = ClasspConfig(relative=relative, threshold=threshold, eps=1e-12)  # type: ignore[arg-type]
        large, _ = walk(config, gradients=([0.6, -0.1],))
        small, _ = walk(config, gradients=([6e-4, -1e-4],))
        assert small[0] == pytest.approx(large[0], abs=1e-3)
        assert small[0][1] == -1.0  # the smaller of the two stays


def test_scaling_off_takes_plain_steps_and_still_sums_up() -> None:
    path, sums = walk(ClasspConfig(relative="absolute", threshold=0.25, scaling=False))
    assert path[0] == pytest.approx([1 - 0.06, -1])
    assert sums == pytest.approx([1.0, 0.81])


def test_a_quantile_above_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantile"):
        ClasspConfig(relative="quantile", threshold=1.5).check()
