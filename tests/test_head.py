import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from learner import head
from learner.head import Columns, Projection, Sums

GOLDEN = json.loads((Path(__file__).parent / "golden" / "entropy.json").read_text())
Z = torch.tensor([[2.0, 1, 0, -1]], dtype=torch.float64)


def direct(z: Tensor, target: Tensor) -> Columns:
    """The definitions, word for word."""
    log_p = torch.log_softmax(z, 1)
    p = log_p.exp()
    H = -(p * log_p).sum(1)
    N = (p.square() * (H[:, None] + log_p)).sum(1)
    return Columns(log_p.gather(1, target[:, None]).squeeze(1), H, N)


def streamed(z: Tensor, target: Tensor, block: int) -> Columns:
    sums = Sums.of(z[:, :block])
    for lo in range(block, z.shape[1], block):
        sums = sums.merge(Sums.of(z[:, lo : lo + block]))
    return sums.columns(z.gather(1, target[:, None]).squeeze(1))


def discriminators(z: Tensor) -> tuple[Tensor, Tensor]:
    """S of every word [T, V], N [T]"""
    words = [streamed(z, torch.full((len(z),), v), 3) for v in range(z.shape[1])]
    S = torch.stack([c.logp.exp() * (c.H + c.logp) for c in words], 1)
    return S, words[0].N


def close(found: Tensor, wanted: object, rtol: float = 1e-5) -> bool:
    return torch.allclose(found, torch.tensor(wanted, dtype=found.dtype), rtol=rtol, atol=1e-6)


# ---- golden numbers and first-order theory -----------------------------------------------------


def test_the_first_golden_vector_comes_out() -> None:
    c = streamed(Z, torch.tensor([0]), 1)
    S, N = discriminators(Z)
    assert close(c.logp.exp()[0], GOLDEN["GV1.p"][0])
    assert close(c.H[0], GOLDEN["GV1.H"])
    assert close(N[0], GOLDEN["GV1.N"])
    assert close(S[0], GOLDEN["GV1.S"])
    sums = Sums.of(Z[:, 2:]).merge(Sums.of(Z[:, :2]))
    assert close(torch.cat(list(sums)), GOLDEN["GV1.stream(m,Z,T1,Q,U)"])


@pytest.mark.parametrize("step", [0.01, 0.001])
def test_the_second_golden_vector_and_its_error_of_second_order(step: float) -> None:
    S, N = discriminators(Z)
    p = Z.softmax(1)
    zero = torch.tensor([0])
    for a in range(4):
        one = torch.zeros_like(Z)
        one[0, a] = 1.0
        for name, move, predicted in (
            ("one_logit", one, -step * S[0, a]),
            ("grpo", one - p, -step * (S - N)[0, a]),
        ):
            measured = direct(Z + step * move, zero).H - direct(Z, zero).H
            assert close(predicted, GOLDEN[f"GV2.{name}.pred.{step}"][a])
            assert close(measured[0], GOLDEN[f"GV2.{name}.meas.{step}"][a], rtol=1e-4)
            assert abs(measured[0] - predicted) < 0.2 * step**2


@pytest.mark.parametrize("words", [2, 5, 50, 1000])
@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
def test_streaming_equals_the_definition_and_s_is_the_entropys_slope(
    words: int, spread: float
) -> None:
    torch.manual_seed(words)
    z = (torch.randn(6, words, dtype=torch.float64) * spread).requires_grad_()
    target = torch.randint(words, (6,))
    for found, wanted in zip(streamed(z, target, 7), direct(z, target), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
    (slope,) = torch.autograd.grad(direct(z, target).H.sum(), z)
    c = direct(z.detach(), target)
    S = c.logp.exp() * (c.H + c.logp)
    taken = -slope.gather(1, target[:, None]).squeeze(1)
    assert torch.allclose(taken, S, rtol=1e-6, atol=1e-12)
    p = z.detach().softmax(1)
    assert torch.allclose((p * -slope).sum(1), c.N, atol=1e-12)  # Σ p (S - N) = 0


def test_halving_the_step_quarters_the_error_of_the_sampled_step() -> None:
    torch.manual_seed(1)
    z = torch.randn(8, 20, dtype=torch.float64)
    target = torch.randint(20, (8,))
    c = direct(z, target)
    change = c.logp.exp() * (c.H + c.logp) - c.N
    move = torch.nn.functional.one_hot(target, 20) - z.softmax(1)

    def error(step: float) -> Tensor:
        return (direct(z + step * move, target).H - c.H + step * change).abs()

    ratio = error(2e-3) / error(1e-3)
    assert ((ratio - 4).abs() < 0.1).all()


# ---- values and gradients of the chunked head --------------------------------------------------


def case(
    T: int = 37, V: int = 9000, d: int = 8, bias: bool = False
) -> tuple[Tensor, Projection, Tensor]:
    torch.manual_seed(T + V)
    hidden = torch.randn(T, d, requires_grad=True)
    weight = torch.randn(V, d, requires_grad=True)
    b = torch.randn(V, requires_grad=True) if bias else None
    target = torch.randint(V, (T,))
    temperature = torch.linspace(0.5, 1.5, T)
    upstream = torch.randn(2, T)
    return hidden, Projection(weight, b, target, temperature, torch.float32), upstream


def naive(hidden: Tensor, p: Projection) -> Columns:
    z = hidden @ p.weight.t() + (0 if p.bias is None else p.bias)
    return direct(z / p.temperature[:, None], p.target)


def gradients(hidden: Tensor, p: Projection, scalar: Tensor) -> list[Tensor]:
    leaves = [hidden, p.weight, *([] if p.bias is None else [p.bias])]
    return list(torch.autograd.grad(scalar, leaves))


@pytest.mark.parametrize("words", [5, 4096, 9000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("way", ["columns", "fused", "fused without H"])
def test_the_chunked_head_equals_the_naive_way(words: int, bias: bool, way: str) -> None:
    hidden, p, (g_logp, g_H) = case(V=words, bias=bias)
    if way == "fused without H":
        g_H = torch.zeros_like(g_H)
    wanted = naive(hidden, p)
    slopes = gradients(hidden, p, (g_logp * wanted.logp + g_H * wanted.H).sum())
    if way == "columns":
        found = head.columns(hidden, p, chunk=16)
        scalar = (g_logp * found.logp + g_H * found.H).sum()
    else:
        scalar, found = head.fused(
            hidden,
            p,
            16,
            lambda logp, H, N, lo, hi: (g_logp[lo:hi], None if way != "fused" else g_H[lo:hi]),
        )
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients(hidden, p, scalar), slopes, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_chunks_do_not_change_a_bit_of_the_columns() -> None:
    hidden, p, _ = case()
    whole = head.columns(hidden, p, chunk=64)
    for a, b in zip(head.columns(hidden, p, chunk=64), whole, strict=True):
        assert torch.equal(a, b)


def test_the_fused_way_sees_exactly_the_columns_that_the_plain_way_gives() -> None:
    hidden, p, _ = case()
    seen: list[tuple[Tensor, ...]] = []

    def objective(logp: Tensor, H: Tensor, N: Tensor, lo: int, hi: int) -> tuple[Tensor, None]:
        seen.append((logp, H, N))
        return torch.zeros_like(logp), None

    _, found = head.fused(hidden, p, 16, objective)
    for a, b, parts in zip(
        head.columns(hidden, p, 16), found, zip(*seen, strict=True), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(torch.cat(parts), b)


def test_the_block_of_logits_never_exceeds_its_chunk() -> None:
    assert head._spans(4096, 151_936, 1024)[0] == (0, 220)  # 128 MB of floats
    assert head._spans(4096, 49_152, 256) == [(i, i + 256) for i in range(0, 4096, 256)]
    assert head._spans(7000, 32, 1024) == [(0, 7000)]  # a small vocabulary needs no chunks


def test_extreme_logits_stay_finite_and_the_columns_keep_their_bounds() -> None:
    z = torch.tensor([[1e4, 0, -1e4], [88.0, 88, 88], [-300.0, 300, 0]])
    c = streamed(z, torch.tensor([1, 0, 0]), 2)
    assert all(torch.isfinite(x).all() for x in c)
    assert (c.H >= 0).all()
    assert (math.log(3) + 1e-6 >= c.H).all()
    S = c.logp.exp() * (c.H + c.logp)
    assert (GOLDEN["GV1.S_lower_bound"] - 1e-6 <= S).all()


def test_no_token_is_no_error() -> None:
    hidden, p, _ = case(T=0)
    assert head.columns(hidden, p, 16).logp.shape == (0,)


def test_bf16_products_keep_float32_sums() -> None:
    hidden, p, (g_logp, _) = case()
    half = p._replace(dtype=torch.bfloat16)
    scalar, found = head.fused(hidden, half, 16, lambda logp, H, N, lo, hi: (g_logp[lo:hi], None))
    wanted = naive(hidden.bfloat16().float(), p._replace(weight=p.weight.bfloat16().float()))
    assert found.logp.dtype == torch.float32
    assert torch.allclose(found.H, wanted.H, atol=0.05)
    assert all(g.dtype == torch.float32 for g in gradients(hidden, half, scalar))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_head_on_a_gpu_equals_the_head_on_a_cpu() -> None:
    hidden, p, (g_logp, g_H) = case()
    cpu = head.columns(hidden, p, 16)
    moved = Projection(*(x.cuda() if isinstance(x, Tensor) else x for x in p))
    gpu = head.columns(hidden.cuda(), moved, 16)
    for a, b in zip(gpu, cpu, strict=True):
        assert torch.allclose(a.cpu(), b, rtol=1e-3, atol=1e-4)
    (gpu.logp @ g_logp.cuda() + gpu.H @ g_H.cuda()).backward()
