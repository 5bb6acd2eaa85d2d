"""One preallocated key/value cache for all sequences, and attention over it.

A row is a sequence; position p of row r in layer l is one stretch of memory that holds all key heads, then all value
heads: a decode step writes it with one `index_copy_`, a shared prefix is copied from row to row with one `copy_`.
Rows beyond the engine's slots keep prefixes that were computed ahead for sequences without a slot.

Legend: L layers, R rows, M positions, B rows of this step, W attended positions, H query heads, Hk key heads, D head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from common.errors import DataError

_MANY_HEADS = 8  # with more key heads, the block-diagonal products cost more than they save


class Place(NamedTuple):
    """Where one forward pass writes and what it may attend to."""

    index: torch.Tensor  # int64 [B × T]: position p of row r is number r × M + p
    width: int  # W
    bias: torch.Tensor | None  # [B, 1, 1, W]: 0 or -inf; None: a prefix, causal within itself


class KVCache:
    """`place` is set before each forward pass of the model; its attention layers read it."""

    place: Place

    def __init__(
        self, rows: int, length: int, config: Any, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.length = length
        layers, wide = config.num_hidden_layers, 2 * self.key_heads * self.head_size
        # Zeros, not empty: masked positions are multiplied by 0, and 0 × NaN would be NaN.
        self.buffer = torch.zeros(layers, rows, length, wide, dtype=dtype, device=device)
        self._flat = [self.buffer[layer].view(rows * length, wide) for layer in range(layers)]
        self._positions = torch.arange(length, device=device)
        self._starts = torch.arange(rows, device=device) * length
        self._own_keys = _own_keys(self.heads, self.key_heads).to(device, dtype)
        self._block_diagonal = device.type == "cpu" and self.key_heads <= _MANY_HEADS

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self.buffer[:, target, :length].copy_(self.buffer[:, source, :length])

    def place_decode(self, position: torch.Tensor, width: int) -> Place:
        """The next token of rows 0 … B - 1 stands at `position` (int64 [B]); all fit in `width`."""
        seen = self._positions[:width] <= position[:, None]
        bias = torch.where(seen, 0.0, -torch.inf).to(self.buffer.dtype)
        return Place(self._starts[: len(position)] + position, width, bias[:, None, None])

    def place_prefill(self, rows: torch.Tensor, width: int) -> Place:
        """Prefixes of `rows` (int64 [B]), each padded on the right to `width`: pads are overwritten before use."""
        return Place((self._starts[rows, None] + self._positions[:width]).flatten(), width, None)

    def attend(self, layer: int, q: torch.Tensor, kv: torch.Tensor, scale: float) -> torch.Tensor:
        """Write `kv` [B, 2·Hk·D] of this step's tokens, attend with `q` [B, H, D]; returns [B, H, D]."""
        place = self.place
        self._flat[layer].index_copy_(0, place.index, kv)
        seen = self.buffer[layer, : len(q), : place.width]
        if self._block_diagonal:
            return self._attend_rows(q, seen, place, scale)
        keys, values = self._split(seen)
        grouped = self.heads != self.key_heads
        mixed = F.scaled_dot_product_attention(
            q[:, :, None], keys, values, place.bias, scale=scale, enable_gqa=grouped
        )
        return mixed[:, :, 0]

    def _attend_rows(
        self, q: torch.Tensor, seen: torch.Tensor, place: Place, scale: float
    ) -> torch.Tensor:
        """One matrix product a row in place of one a head: queries are laid out block-diagonally.

        On a CPU small products cost by their number: 1.5 times faster than scaled_dot_product_attention
        at 128 rows of 4 heads, for Hk times the arithmetic.
        """
        assert place.bias is not None
        B, H, D = q.shape
        half = self.key_heads * D
        queries = (q[:, :, None] * self._own_keys).view(B, H, half)
        scores = torch.baddbmm(
            place.bias[:, 0], queries, seen[:, :, :half].transpose(1, 2), alpha=scale
        )
        mixed = torch.bmm(torch.softmax(scores, -1), seen[:, :, half:])
        own = mixed.view(B, self.key_heads, H // self.key_heads, self.key_heads, D)
        return own.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(B, H, D)

    def prefill(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Causal attention of whole prefixes, q [B, H, T, D], k and v [B, Hk, T, D]; keeps k and v."""
        kv = torch.cat((k, v), 1).transpose(1, 2).reshape(len(self.place.index), -1)
        self._flat[layer].index_copy_(0, self.place.index, kv)
        grouped = self.heads != self.key_heads
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )

    def _split(self, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [B, Hk, W, D] of the keys and the values in [B, W, 2·Hk·D]."""
        both = seen.unflatten(-1, (2, self.key_heads, self.head_size)).permute(2, 0, 3, 1, 4)
        return both[0], both[1]


def _own_keys(heads: int, key_heads: int) -> torch.Tensor:
    """[1, H, Hk, 1]: 1 where key head belongs to query head."""
    return torch.eye(key_heads).repeat_interleave(heads // key_heads, 0)[None, :, :, None]


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention layers call (its AttentionInterface); q [B, H, T, D]; returns [B, T, H, D].

    The layer finds the cache in its attribute `kv_cache`. Raises DataError for attention that is not ordinary.
    """
    if sliding_window is not None or softcap is not None or s_aux is not None:
        raise DataError(
            "the torch engine needs ordinary attention: no sliding window, soft cap or sinks"
        )
    cache, layer = module.kv_cache, module.layer_idx
    assert isinstance(cache, KVCache) and isinstance(layer, int)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if cache.place.bias is None:
        return cache.prefill(layer, query, key, value, scale).transpose(1, 2), None
    kv = torch.cat((key, value), 1).view(len(query), -1)
    return cache.attend(layer, query[:, :, 0], kv, scale)[:, None], None
