"""Golden numbers of the theory that all methods share; and that each of them all has a test."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from learner.methods.clip_v import ClipV
from learner.methods.steer import Steer
from tests.tables import GOLDEN, golden, random_table
from tests.test_method_clip_v import LOGITS, paper

DTYPES = [torch.float64, torch.float32]
Z = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)


def entropy(z: Tensor) -> Tensor:
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def discriminators(z: Tensor) -> Tensor:
    """S of every word."""
    log_p = z.log_softmax(-1)
    return log_p.exp() * (entropy(z)[..., None] + log_p)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_discriminator_and_its_expectation(dtype: torch.dtype) -> None:
    S, p = discriminators(Z.to(dtype)), Z.to(dtype).softmax(0)
    golden(S, "GV1.S", dtype)
    golden((p * S).sum(), "GV1.N", dtype)
    golden(S - (p * S).sum(), "GV1.S-N", dtype)
    centred = p.log() - (p * p.log()).sum()
    golden((p * centred * S).sum(), "GV4.cov(logp,S)", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_covariance_theorem_of_both_gradients(dtype: torch.dtype) -> None:
    """GV3, arXiv 2505.22617, theorems 1 and 2: -η Cov(ln p, p A) and -η Cov(ln p, A)."""
    z, eta = Z.to(dtype), 1e-3
    p = z.softmax(0)
    A = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=dtype)
    A = A - (p * A).sum()
    for name, move in (("PG", p * A), ("NPG", A)):
        centred = p.log() - (p * p.log()).sum()
        predicted = -eta * (p * centred * (move - (p * move).sum())).sum()
        step = Z.double() + eta * move.double()
        measured = entropy(step) - entropy(Z.double())
        golden(torch.stack([predicted.double(), measured]), f"GV3.{name}", dtype)


def test_what_a_few_words_and_samples_say_of_the_entropy() -> None:
    """Kept words and the mass of the rest bound it; samples of another temperature misjudge it."""
    p, H = Z.softmax(0), entropy(Z)
    top, tail = p[:2], p[2:].sum()
    low = -(top * top.log()).sum() - tail * tail.log()
    high = low + tail * math.log(2)
    golden(torch.stack([low, high]), "GV1.topK2[lower,upper]")
    assert low <= H <= high
    for temperature in (0.8, 1.2):
        drawn = (Z / temperature).softmax(0)
        golden(-(drawn * p.log()).sum(), f"GV1.crossH T{temperature}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_predictions_of_the_released_clips_beside_what_happens(dtype: torch.dtype) -> None:
    t, eta = paper(dtype), 1e-3
    golden(-eta * t.advantage * (t.S - t.N), "GV9.dH", dtype)
    z = torch.tensor(LOGITS, dtype=torch.float64)
    arm = torch.nn.functional.one_hot(torch.tensor([3, 1, 0, 1, 3, 3]), 4)
    moved = z + eta * t.advantage[:, None].double() * (arm - z.softmax(-1))
    measured = entropy(moved) - entropy(z)
    wanted = torch.tensor(GOLDEN["GV9.dH measured"], dtype=torch.float64)
    assert torch.allclose(measured, wanted, rtol=1e-5, atol=1e-13)
    golden((~ClipV(mu=2.0, max_frac=1.0).drop(t)).double(), "GV9.clipV mu2 nocap", dtype)


def test_the_bounds_of_the_discriminator_and_of_two_outcomes() -> None:
    p = torch.linspace(1e-4, 1 - 1e-4, 20_001, dtype=torch.float64)
    z = torch.stack([p.log(), (1 - p).log()], -1)
    S = discriminators(z)[:, 0]
    golden(S.min(), "GV1.S_lower_bound")
    assert float(p[S.argmin()]) == pytest.approx(0.17604, abs=1e-4)
    N = (z.exp() * discriminators(z)).sum(-1)
    assert float((N - S).max()) == pytest.approx(0.376162, rel=1e-4)
    gap = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    two = torch.stack([gap, torch.zeros_like(gap)], -1)
    (slope,) = torch.autograd.grad(entropy(two).sum(), gap)
    q = two.softmax(-1)[:, 0]
    assert torch.allclose(slope, -gap * q * (1 - q))


@pytest.mark.parametrize("words", [2, 5, 50, 1000])
@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
def test_no_distribution_is_outside_the_bounds_and_the_forecast_is_right_to_first_order(
    words: int, spread: float
) -> None:
    torch.manual_seed(words)
    z = torch.randn(64, words, dtype=torch.float64) * spread
    S, H, p = discriminators(z), entropy(z), z.softmax(-1)
    N = (p * S).sum(-1, keepdim=True)
    assert (GOLDEN["GV1.S_lower_bound"] - 1e-9 <= S).all()
    assert (H >= 0).all()
    assert (math.log(words) + 1e-12 >= H).all()
    assert torch.allclose(S.sum(-1), torch.zeros(64).double(), atol=1e-12)
    assert torch.allclose((p * (S - N)).sum(-1), torch.zeros(64).double(), atol=1e-12)
    arm = torch.multinomial(p, 1).squeeze(1)
    one = torch.nn.functional.one_hot(arm, words).double()
    for move, first_order in ((one, S), (one - p, S - N)):
        errors = [
            (entropy(z + al * move) - H + al * first_order.gather(1, arm[:, None])[:, 0]).abs()
            for al in (1e-2, 5e-3, 1e-3)
        ]
        assert (errors[0] < 0.2 * 1e-4 * max(1.0, math.log(words))).all()
        assert (errors[2] < 0.2 * 1e-6 * max(1.0, math.log(words))).all()
        clear = errors[0] > 1e-9  # halving the step quarters the error
        ratio = errors[0][clear] / errors[1][clear]
        assert ratio.median() == pytest.approx(4, abs=0.1) if bool(clear.any()) else True


def test_what_methods_predict_agrees_with_the_exact_change_in_sign_and_rank() -> None:
    """8.8 of the literature notes: weak in size, strong in sign, even where theory is exact."""
    t = random_table(size=4000, vocabulary=200, scale=8.0, mask=True)
    exact = Steer(form="centred").omega(t)
    moving = exact != 0
    for form in ("theorem", "released"):
        omega = Steer(form=form).omega(t)  # type: ignore[arg-type]
        same = (omega.sign() == exact.sign())[moving].double().mean()
        assert same > 0.93
        ranks = torch.stack([x[moving].argsort().argsort().double() for x in (omega, exact)])
        assert torch.corrcoef(ranks)[0, 1] > 0.88


# ---- every golden number has a test ------------------------------------------------------------


def _named() -> Iterator[str]:
    """Patterns of the golden numbers that tests name, f-strings included."""
    for file in Path(__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.escape(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts = [v.value if isinstance(v, ast.Constant) else None for v in node.values]
                if str(texts[0]).startswith("GV"):
                    yield "".join(".+" if x is None else re.escape(str(x)) for x in texts)


def test_every_golden_number_is_named_by_a_test() -> None:
    patterns = {p for p in _named() if p.startswith("GV")}
    missing = [k for k in GOLDEN if not any(re.fullmatch(p, k) for p in patterns)]
    assert missing == []
