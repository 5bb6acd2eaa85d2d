"""The vocabulary, in chunks: log-prob of a token, entropy H and N = Σ p² (H + ln p), in float32.

The block of logits [T, V] is never whole: at most `chunk` of its lines exist at once, and they are
walked through block by block of the vocabulary while it is in the cache, with sums

    m = max z    Z = Σ e    T1 = Σ e x    Q = Σ e²    U = Σ e² x      with x = z - m, e = exp(x)

from which l = z_a - m - ln Z,  H = ln Z - T1 / Z,  N = (Q (H - ln Z) + U) / Z².  The gradients are

    dl/dz = δ_a - p        dH/dz = -p (ln p + H)        N is never differentiated.

Two ways to train. `columns` is an ordinary differentiable function; its backward pass computes the
logits a second time (four products of the size T·V·d). `fused` is told in advance how the loss
depends on l and H of each token (`Objective`), so it makes the gradients while the logits are there
(three products, as many as with the whole block).

Letters: T tokens, d width, V words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Words of the vocabulary at once: with 256 tokens a block of floats is 4 MB.
BLOCK = 4096
# No chunk holds more logits than this (128 MB of floats), whatever `chunk` says.
_MAX_LOGITS = 1 << 25


class Columns(NamedTuple):
    """All float32 [T]."""

    logp: Tensor
    H: Tensor
    N: Tensor


class Projection(NamedTuple):
    """Hidden states into logits: z = (hidden @ weightᵀ + bias) / temperature."""

    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    target: Tensor  # int64 [T]: the word whose log-prob is wanted
    temperature: Tensor  # float32 [T]
    dtype: torch.dtype  # of the product; what follows is float32

    def rows(self, lo: int, hi: int) -> Projection:
        return self._replace(target=self.target[lo:hi], temperature=self.temperature[lo:hi])


# (logp, H, N, lo, hi) of the tokens lo … hi → (dLoss/dlogp, dLoss/dH or None), each [hi - lo]
Objective = Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor | None]]


class Sums(NamedTuple):
    """The running sums over the vocabulary, float32 [T] each."""

    m: Tensor
    Z: Tensor
    T1: Tensor
    Q: Tensor
    U: Tensor

    @classmethod
    def of(cls, z: Tensor) -> Sums:
        """Over the words of one block of logits [T, v]."""
        m = z.amax(1)
        x = z - m[:, None]
        e = x.exp()
        ex = x.mul_(e)
        T1, Z = ex.sum(1), e.sum(1)
        U, Q = ex.mul_(e).sum(1), e.square_().sum(1)
        return cls(m, Z, T1, Q, U)

    def rebased(self, m: Tensor) -> Sums:
        """The same sums about another maximum, m ≥ self.m."""
        d = self.m - m
        f = d.exp()
        return Sums(
            m,
            f * self.Z,
            f * (self.T1 + self.Z * d),
            f * f * self.Q,
            f * f * (self.U + self.Q * d),
        )

    def merge(self, other: Sums) -> Sums:
        """Over the words of both."""
        m = torch.maximum(self.m, other.m)
        a, b = self.rebased(m), other.rebased(m)
        return Sums(m, *(x + y for x, y in zip(a[1:], b[1:], strict=True)))

    def columns(self, z_target: Tensor) -> Columns:
        log_z = self.Z.log()
        H = log_z - self.T1 / self.Z
        N = (self.Q * (H - log_z) + self.U) / self.Z.square()
        return Columns(z_target - self.m - log_z, H, N)


def columns(hidden: Tensor, projection: Projection, chunk: int) -> Columns:
    """Log-prob, H and N of every token of `hidden` [T, d]; logp and H are differentiable."""
    p = projection
    out = _Columns.apply(  # type: ignore[no-untyped-call]
        hidden, p.weight, p.bias, p.target, p.temperature, p.dtype, chunk
    )
    return Columns(*out)


def fused(
    hidden: Tensor, projection: Projection, chunk: int, objective: Objective
) -> tuple[Tensor, Columns]:
    """A scalar to call `backward` on, and the columns (without gradient).

    The scalar's value means nothing; its gradient is that of the loss whose derivatives `objective`
    returns. `objective` is called once a chunk, in order.
    """
    p = projection
    out = _Fused.apply(  # type: ignore[no-untyped-call]
        hidden, p.weight, p.bias, p.target, p.temperature, p.dtype, chunk, objective
    )
    return out[0], Columns(*out[1:])


def _spans(tokens: int, words: int, chunk: int) -> list[tuple[int, int]]:
    """Chunks of tokens. With a small vocabulary all that fits the bound goes at once."""
    fits = max(1, _MAX_LOGITS // words)
    step = fits if tokens <= fits and words <= BLOCK else min(chunk, fits)
    return [(lo, min(lo + step, tokens)) for lo in range(0, max(1, tokens), step)]


def _blocks(words: int) -> list[slice]:
    return [slice(lo, min(lo + BLOCK, words)) for lo in range(0, words, BLOCK)]


def _logits(hidden: Tensor, p: Projection, block: slice, out: Tensor | None = None) -> Tensor:
    """float32 [T, v] of one block of words; `hidden` already in p.dtype."""
    weight = p.weight[block].to(p.dtype)
    if out is not None and p.dtype == torch.float32:
        z = torch.mm(hidden, weight.t(), out=out)
    else:
        z = torch.mm(hidden, weight.t()).float()
    if p.bias is not None:
        z += p.bias[block]
    z /= p.temperature[:, None]
    if out is not None and out is not z:
        return out.copy_(z)
    return z


def _scan(hidden: Tensor, p: Projection, keep: Tensor | None) -> tuple[Columns, Tensor]:
    """Columns and ln Σ exp z of one chunk; fills `keep` [T, V] with its logits where wanted."""
    hidden = hidden.to(p.dtype)
    sums: Sums | None = None
    z_target = torch.zeros_like(p.temperature)
    for block in _blocks(p.weight.shape[0]):
        z = _logits(hidden, p, block, None if keep is None else keep[:, block])
        part = Sums.of(z)
        sums = part if sums is None else sums.merge(part)
        inside = (p.target >= block.start) & (p.target < block.stop)
        at = (p.target - block.start).clamp(0, z.shape[1] - 1)
        z_target = torch.where(inside, z.gather(1, at[:, None]).squeeze(1), z_target)
    assert sums is not None, "a vocabulary has words"
    return sums.columns(z_target), sums.m + sums.Z.log()


class _Gradients(NamedTuple):
    hidden: Tensor  # [T, d]
    weight: Tensor | None  # [V, d]
    bias: Tensor | None

    @classmethod
    def empty(cls, hidden: Tensor, p: Projection, weight: bool) -> _Gradients:
        return cls(
            torch.zeros_like(hidden, dtype=torch.float32),
            torch.zeros_like(p.weight, dtype=torch.float32) if weight else None,
            None if p.bias is None else torch.zeros_like(p.bias),
        )


def _accumulate(
    into: _Gradients,
    lo: int,
    hidden: Tensor,  # of the chunk
    p: Projection,
    z: Tensor,  # [T, V] logits of the chunk; overwritten
    log_z: Tensor,
    H: Tensor,
    g_logp: Tensor,
    g_H: Tensor | None,
) -> None:
    """Adds the chunk's gradients for the upstream gradients of logp and H."""
    g_logp = g_logp / p.temperature
    g_H = None if g_H is None else g_H / p.temperature
    hidden = hidden.to(p.dtype)
    d_hidden = into.hidden[lo : lo + len(hidden)]
    for block in _blocks(p.weight.shape[0]):
        g = _logit_gradient(z[:, block], block, p.target, log_z, H, g_logp, g_H)
        half = g.to(p.dtype)
        _add_product(d_hidden, half, p.weight[block].to(p.dtype))
        if into.weight is not None:
            _add_product(into.weight[block], half.t(), hidden)
        if into.bias is not None:
            into.bias[block] += g.sum(0)


def _logit_gradient(
    z: Tensor,
    block: slice,
    target: Tensor,
    log_z: Tensor,
    H: Tensor,
    g_logp: Tensor,
    g_H: Tensor | None,
) -> Tensor:
    """g_l (δ_a - p) - g_H p (ln p + H), in place of `z`."""
    log_p = z.sub_(log_z[:, None])
    if g_H is None:
        g = log_p.exp_().mul_(-g_logp[:, None])
    else:
        p = log_p.exp()
        g = log_p.add_(H[:, None]).mul_(-g_H[:, None]).sub_(g_logp[:, None]).mul_(p)
    inside = (target >= block.start) & (target < block.stop)
    at = (target - block.start).clamp(0, z.shape[1] - 1)
    return g.scatter_add_(1, at[:, None], torch.where(inside, g_logp, 0.0)[:, None])


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a @ b, accumulating in float32."""
    if a.dtype == into.dtype:
        into.addmm_(a, b)
    else:
        into += torch.mm(a, b)


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        temperature: Tensor,
        dtype: torch.dtype,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        p = Projection(weight, bias, target, temperature, dtype)
        spans = _spans(len(hidden), len(weight), chunk)
        made = [_scan(hidden[lo:hi], p.rows(lo, hi), None) for lo, hi in spans]
        logp, H, N, log_z = _concatenate([(*c, log_z) for c, log_z in made])
        ctx.projection, ctx.spans = (dtype,), spans
        ctx.save_for_backward(hidden, weight, bias, target, temperature, log_z, H)
        ctx.mark_non_differentiable(N)
        return logp, H, N

    @staticmethod
    def backward(ctx: Any, g_logp: Tensor, g_H: Tensor, g_N: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, target, temperature, log_z, H = ctx.saved_tensors
        p = Projection(weight, bias, target, temperature, *ctx.projection)
        into = _Gradients.empty(hidden, p, ctx.needs_input_grad[1])
        buffer = _buffer(ctx.spans, p)
        upstream_H = g_H if bool(g_H.any()) else None
        for lo, hi in ctx.spans:
            rows, h, z = p.rows(lo, hi), hidden[lo:hi], buffer[: hi - lo]
            for block in _blocks(len(weight)):
                _logits(h.to(p.dtype), rows, block, z[:, block])
            g = None if upstream_H is None else upstream_H[lo:hi]
            _accumulate(into, lo, h, rows, z, log_z[lo:hi], H[lo:hi], g_logp[lo:hi], g)
        return into.hidden.to(hidden.dtype), into.weight, into.bias, None, None, None, None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        temperature: Tensor,
        dtype: torch.dtype,
        chunk: int,
        objective: Objective,
    ) -> tuple[Tensor, ...]:
        p = Projection(weight, bias, target, temperature, dtype)
        spans = _spans(len(hidden), len(weight), chunk)
        into = _Gradients.empty(hidden, p, ctx.needs_input_grad[1])
        buffer, made = _buffer(spans, p), []
        for lo, hi in spans:
            rows, h, z = p.rows(lo, hi), hidden[lo:hi], buffer[: hi - lo]
            c, log_z = _scan(h, rows, z)
            g_logp, g_H = objective(*c, lo, hi)
            _accumulate(into, lo, h, rows, z, log_z, c.H, g_logp, g_H)
            made.append(tuple(c))
        out = _concatenate(made)
        ctx.gradients, ctx.dtype = into, hidden.dtype
        ctx.mark_non_differentiable(*out)
        return temperature.new_zeros(()), *out

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Any, ...]:
        into: _Gradients = ctx.gradients
        del ctx.gradients
        for gradient in into:
            if gradient is not None:
                gradient.mul_(g)
        hidden = into.hidden.to(ctx.dtype)
        return hidden, into.weight, into.bias, None, None, None, None, None


def _buffer(spans: list[tuple[int, int]], p: Projection) -> Tensor:
    longest = max((hi - lo for lo, hi in spans), default=0)
    return p.temperature.new_empty((longest, len(p.weight)))


def _concatenate(chunks: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))
