"""Attention over packed sequences: each sequence of a micro-batch sees itself only.

transformers calls one registered function, `isentrope_packed`, with the `Packing` that the forward
pass was given. On a GPU in half precision the sequences stay packed (variable-length flash
attention). Elsewhere they are unpacked around the attention call only: sequences of like length
become the rows of one padded batch, so that a causal kernel without a mask does the work. A mask
over the packed sequence would cost O(S²) instead of O(Σ length²). What stands in the padding never
reaches a result: causal queries do not see later keys, and padded queries are not read back.

Sequences of a group begin with the same prompt. Everything but attention is done once for it: the
tokens that a sequence takes from another's prompt are its *echoes*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from common.errors import DataError

NAME = "isentrope_packed"

# A bucket takes longer rows as long as that pads its shortest by at most a fifth plus a few tokens.
_SLACK, _FEW = 1.2, 4


class Bucket(NamedTuple):
    rows: int
    width: int  # tokens of its longest row


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a micro-batch lie, shortest first: S tokens, P padded places."""

    starts: Tensor  # int32 [R + 1]: cumulative lengths
    longest: int
    buckets: tuple[Bucket, ...]
    unpack: Tensor  # int64 [P]: packed token of each padded place (any packed token where padding)
    repack: Tensor  # int64 [S]: the padded place that belongs to each packed token
    echoes: Tensor  # int64 [2, E]: further padded places of a packed token, and that token
    straight: bool  # unpacking changes nothing

    @classmethod
    def of(
        cls, lengths: np.ndarray, token: np.ndarray, fed: np.ndarray, device: torch.device | str
    ) -> Packing:
        """Sequences of `lengths` int64 [R], rising, end to end.

        Of each of their tokens: the packed one that it is (`token` int64), and whether it is fed
        here or by another sequence (`fed` bool).
        """
        buckets, widths = _buckets(lengths)
        place = np.arange(token.size) + np.repeat(_starts(widths) - _starts(lengths), lengths)
        unpack = np.zeros(int(widths.sum()), np.int64)
        unpack[place] = token
        echoes = np.stack([place[~fed], token[~fed]])

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            starts=put(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
            longest=int(lengths.max(initial=0)),
            buckets=buckets,
            unpack=put(unpack),
            repack=put(place[fed]),
            echoes=put(echoes),
            straight=bool(fed.all()) and unpack.size == token.size,
        )


def _starts(counts: np.ndarray) -> np.ndarray:
    starts: np.ndarray = np.cumsum(counts) - counts
    return starts


def _buckets(lengths: np.ndarray) -> tuple[tuple[Bucket, ...], np.ndarray]:
    """Neighbours of like length together; and the width of every row's bucket, int64 [R]."""
    buckets: list[Bucket] = []
    widths = np.zeros(lengths.size, np.int64)
    first = 0
    while first < lengths.size:
        last = int(np.searchsorted(lengths, lengths[first] * _SLACK + _FEW, side="right"))
        buckets.append(Bucket(last - first, int(lengths[last - 1])))
        widths[first:last] = lengths[last - 1]
        first = last
    return tuple(buckets), widths


class _Unpack(torch.autograd.Function):
    """[S, …] → [P, …]. Padding receives no gradient: the way back is a gather and the echoes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unpack: Tensor, repack: Tensor, echoes: Tensor) -> Tensor:
        ctx.save_for_backward(repack, echoes)
        return x.index_select(0, unpack)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        repack, (places, tokens) = ctx.saved_tensors
        out = grad.index_select(0, repack)
        if places.numel():
            out.index_add_(0, tokens, grad.index_select(0, places))
        return out, None, None, None


class _Repack(torch.autograd.Function):
    """[P, …] → [S, …]; the gradient of padding is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, repack: Tensor) -> Tensor:
        ctx.save_for_backward(repack)
        ctx.places = x.shape[0]
        return x.index_select(0, repack)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_zeros((ctx.places, *grad.shape[1:]))
        return out.index_copy_(0, ctx.saved_tensors[0], grad), None


def _unpack(x: Tensor, packing: Packing) -> Tensor:
    out: Tensor = _Unpack.apply(  # type: ignore[no-untyped-call]
        x, packing.unpack, packing.repack, packing.echoes
    )
    return out


def _repack(x: Tensor, packing: Packing) -> Tensor:
    out: Tensor = _Repack.apply(x, packing.repack)  # type: ignore[no-untyped-call]
    return out


def attend(
    module: nn.Module,
    query: Tensor,  # [1, heads, S, D]
    key: Tensor,  # [1, key-value heads, S, D]
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sequence. Returns [1, S, heads, D]."""
    if packing is None:
        raise DataError(f"{type(module).__name__} did not pass the packing on to its attention")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [S, heads, D]
    window = sliding_window if sliding_window and sliding_window < packing.longest else None
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half and window is None and not packing.echoes.numel():
        return _flash(q, k, v, packing, scaling)[None], None
    return _bucketed(q, k, v, packing, scaling, window)[None], None


def _bucketed(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    if not packing.straight:
        q, k, v = (_unpack(x, packing) for x in (q, k, v))
    outs, first = [], 0
    for rows, width in packing.buckets:
        places = slice(first, first + rows * width)
        qb, kb, vb = (
            x[places].view(rows, width, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
        )  # [rows, heads, width, D]
        mask = None if window is None else _band(width, window, q.device)
        out = functional.scaled_dot_product_attention(
            qb,
            kb,
            vb,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outs.append(out.transpose(1, 2).reshape(rows * width, *q.shape[1:]))
        first = places.stop
    joined = outs[0] if len(outs) == 1 else torch.cat(outs)
    return joined if packing.straight else _repack(joined, packing)


def _band(width: int, window: int, device: torch.device) -> Tensor:
    """bool [width, width]: a token sees itself and the `window - 1` before it."""
    at = torch.arange(width, device=device)
    back = at[:, None] - at[None, :]
    return (back >= 0) & (back < window)


def _flash(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = packing.starts, packing.longest
    out = varlen_attn(
        q,
        k,
        v,
        starts,
        starts,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # everything before, nothing after
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor), "no auxiliary output was asked for"
    return out


AttentionInterface.register(NAME, attend)
