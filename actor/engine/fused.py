"""Few operations for the plain Llama block: RMSNorm, rotary attention, gated SiLU.

The generic pass spends a good part of its time between the operations. Here query, key and value
are one matrix product, gate and up another, and rotation works on queries and keys at once. The
packed matrices *are* the model's parameters: each original becomes a view of its part, so
transformers' modules and weight updates see one storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from actor.engine.kvcache import KVCache
from actor.engine.linear import MAX_PACKED_BYTES, Linear, packable

_FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # angles depend on the position only


class _Block(NamedTuple):
    before_attention: nn.Parameter
    qkv: Linear  # hidden → (H + 2 Hk)·D
    out: Linear
    before_mlp: nn.Parameter
    gate_up: Linear  # hidden → 2 × inner
    down: Linear


def knows(net: Any) -> bool:
    rope = (getattr(net.config, "rope_parameters", None) or {}).get("rope_type", "default")
    silu = net.config.hidden_act == "silu" if hasattr(net.config, "hidden_act") else False
    return type(net).__name__ in _FAMILIES and silu and rope in _STATIC_ROPE


class Fused:
    """`net`, which `knows` says yes to, over `cache`."""

    def __init__(self, net: Any, cache: KVCache, length: int) -> None:
        self._net, self._cache = net, cache
        self._size, self._eps = (net.config.hidden_size,), net.config.rms_norm_eps
        self._scale = cache.head_size**-0.5
        weight = net.lm_head.weight
        size_bytes = sum(p.nbytes for p in net.parameters())
        packed = packable(weight) and size_bytes <= MAX_PACKED_BYTES
        self._blocks = [_pack(layer, packed) for layer in net.model.layers]
        self._head = Linear(weight, None, packed)
        self._cos, self._sin = _angles(net, length)

    def decode(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] after `tokens` (int64 [B])."""
        x = self._run(tokens, position, self._blocks)
        return self._head(F.rms_norm(x, self._size, self._net.model.norm.weight, self._eps))

    def refresh(self) -> None:
        """The parameters have changed."""
        self._head.refresh()
        for block in self._blocks:
            for linear in (block.qkv, block.out, block.gate_up, block.down):
                linear.refresh()

    def prefill(self, tokens: torch.Tensor, position: torch.Tensor) -> None:
        """Keys and values of `tokens` (int64 [N]); the last block ends with them."""
        *blocks, last = self._blocks
        x = self._run(tokens, position, blocks)
        _, kv = self._rotated(x, last, self._cos[position], self._sin[position])
        self._cache.keep(len(blocks), kv)

    def _run(
        self, tokens: torch.Tensor, position: torch.Tensor, blocks: list[_Block]
    ) -> torch.Tensor:
        cos, sin = self._cos[position], self._sin[position]
        x = F.embedding(tokens, self._net.model.embed_tokens.weight)
        for layer, block in enumerate(blocks):
            q, kv = self._rotated(x, block, cos, sin)
            x = block.out.added_to(x, self._cache.attend(layer, q, kv, self._scale))
            normed = F.rms_norm(x, self._size, block.before_mlp, self._eps)
            gate, up = block.gate_up(normed).chunk(2, -1)
            x = block.down.added_to(x, F.silu(gate).mul_(up))
        return x

    def _rotated(
        self, x: torch.Tensor, block: _Block, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [N, H, D] and keys beside values [N, 2·Hk·D] of `x` [N, hidden]."""
        cache, D = self._cache, self._cache.head_size
        turned = cache.heads + cache.key_heads
        normed = F.rms_norm(x, self._size, block.before_attention, self._eps)
        qkv = block.qkv(normed)
        qk = qkv[:, : turned * D].view(-1, turned, D)
        qk.copy_((qk * cos).addcmul_(qk.roll(D // 2, -1), sin))
        return qk[:, : cache.heads], qkv[:, cache.heads * D :]


def _pack(layer: Any, packed: bool) -> _Block:
    attention, mlp = layer.self_attn, layer.mlp
    return _Block(
        layer.input_layernorm.weight,
        _joined([attention.q_proj, attention.k_proj, attention.v_proj], packed),
        Linear(attention.o_proj.weight, attention.o_proj.bias, packed),
        layer.post_attention_layernorm.weight,
        _joined([mlp.gate_proj, mlp.up_proj], packed),
        Linear(mlp.down_proj.weight, mlp.down_proj.bias, packed),
    )


def _joined(parts: list[nn.Linear], packed: bool) -> Linear:
    biases = [part.bias for part in parts if part.bias is not None]
    weight = _share([part.weight for part in parts])
    return Linear(weight, _share(biases) if biases else None, packed)


def _share(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One matrix of all `parts`, which become views of it."""
    whole = torch.cat([part.detach() for part in parts])
    start = 0
    for part in parts:
        part.data = whole[start : start + len(part)]
        start += len(part)
    return whole


def _angles(net: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin [length, 1, D]: a roll by half a head then rotates without negating."""
    weight = net.model.embed_tokens.weight
    cos, sin = net.model.rotary_emb(weight, torch.arange(length, device=weight.device)[:, None])
    half = cos.shape[-1] // 2
    return cos, torch.cat((-sin[..., :half], sin[..., half:]), -1)
