"""Rotary attention over short packed sequences on a CPU, in float32.

torch's kernel there is made for long sequences: at forty tokens it takes longer than batched
products with a softmax between them, backwards half as long again. The weights between tokens are
kept for the backward pass, `WIDEST` of them a token and head at most. Rotation is done where each
row of a bucket is one sequence: one table of angles serves all.

Letters: S packed tokens, P padded places, R rows of a bucket, W tokens of a row, H query heads, Hk
key heads, N = H + 2 Hk heads side by side (queries, keys, values), D their size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from learner.attention import Packing

WIDEST = 96  # tokens of the longest sequence for which this is the quicker way


def attend(
    qkv: Tensor,  # [S, N·D]
    angles: tuple[Tensor, Tensor],  # cos, sin [S, D]
    packing: Packing,
    heads: int,
    scale: float,
) -> Tensor:
    """Causal attention of rotated queries over rotated keys, inside each sequence: [S, H·D]."""
    longest = packing.unpack[-packing.longest :]  # its tokens; it is the last
    cos, sin = (x.index_select(0, longest) for x in angles)
    out: Tensor = _Short.apply(  # type: ignore[no-untyped-call]
        qkv, cos, sin, packing, heads, scale
    )
    return out


def _buckets(packing: Packing) -> Iterator[tuple[slice, int]]:
    """Places of each bucket, and tokens of its rows."""
    first = 0
    for rows, width in packing.buckets:
        yield slice(first, first + rows * width), width
        first += rows * width


def _apart(x: Tensor, size: int) -> Tensor:
    """[R·W, n·D] → [n, R·W, D], a copy: any run of heads is n·R matrices [W, D] then."""
    return x.view(len(x), -1, size).transpose(0, 1).contiguous()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [n, R·W, D] rotated; with -sin it is turned back."""
    width, size = cos.shape
    x = x.view(-1, width, size)
    y, half = x * cos, size // 2
    y[..., :half].addcmul_(x[..., half:], sin[:, :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[:, half:])
    return y


def _repeated(x: Tensor, groups: int, width: int) -> Tensor:
    """Keys or values [Hk, R·W, D] for every query head: [H·R, W, D]."""
    x = x if groups == 1 else x.repeat_interleave(groups, 0)
    return x.reshape(-1, width, x.shape[-1])


def _summed(x: Tensor, groups: int, heads: int) -> Tensor:
    """[H·R, W, D] over the query heads of a key head: [Hk·R, W, D]."""
    if groups == 1:
        return x
    return x.view(heads // groups, groups, -1, *x.shape[1:]).sum(1).flatten(0, 1)


class _Short(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        packing: Packing,
        heads: int,
        scale: float,
    ) -> Tensor:
        size = cos.shape[1]
        key_heads = (qkv.shape[1] // size - heads) // 2
        groups, turned = heads // key_heads, heads + key_heads
        places = qkv.index_select(0, packing.unpack)
        out, kept = places.new_empty((len(places), heads * size)), []
        for part, width in _buckets(packing):
            x = _apart(places[part], size)
            qk = _turned(x[:turned], cos[:width], sin[:width]).view(turned, -1, size)
            k, v = (_repeated(y, groups, width) for y in (qk[heads:], x[turned:]))
            q = qk[:heads].view(-1, width, size)
            later = qkv.new_full((width, width), -torch.inf).triu_(1)
            p = torch.softmax(torch.baddbmm(later, q, k.mT, alpha=scale), -1)
            seen = torch.bmm(p, v).view(heads, -1, size)
            out[part].view(-1, heads, size).copy_(seen.transpose(0, 1))
            kept += [q, k, v, p]
        ctx.save_for_backward(cos, sin, *kept)
        ctx.packing, ctx.heads, ctx.scale, ctx.groups = packing, heads, scale, groups
        return out.index_select(0, packing.repack)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (cos, sin, *kept), packing, heads = ctx.saved_tensors, ctx.packing, ctx.heads
        size, groups = cos.shape[1], ctx.groups
        turned = heads + heads // groups
        asked = g.new_zeros((packing.unpack.numel(), g.shape[1])).index_copy_(0, packing.repack, g)
        wanted = g.new_empty((len(asked), (2 * turned - heads) * size))
        for n, (part, width) in enumerate(_buckets(packing)):
            q, k, v, p = kept[4 * n : 4 * n + 4]
            go = _apart(asked[part], size).view(-1, width, size)
            s = torch.bmm(go, v.mT)
            s = torch.ops.aten._softmax_backward_data(s, p, -1, p.dtype).mul_(ctx.scale)
            into = wanted[part].view(-1, 2 * turned - heads, size).transpose(0, 1)
            of_q, of_k = torch.bmm(s, k), _summed(torch.bmm(s.mT, q), groups, heads)
            of_v = _summed(torch.bmm(p.mT, go), groups, heads)
            back = cos[:width], -sin[:width]
            into[:heads] = _turned(of_q, *back).view(heads, -1, size)
            into[heads:turned] = _turned(of_k, *back).view(turned - heads, -1, size)
            into[turned:] = of_v.view(turned - heads, -1, size)
        return _home(wanted, packing), None, None, None, None, None


def _home(grad: Tensor, packing: Packing) -> Tensor:
    """[P, …] → [S, …]: a token's own place and its echoes, which are asked by others."""
    out = grad.index_select(0, packing.repack)
    places, tokens = packing.echoes
    return out.index_add_(0, tokens, grad.index_select(0, places)) if places.numel() else out
