"""A forward pass of few operations for the plain Llama block: RMSNorm, rotary attention, gated SiLU.

The generic pass spends a good part of its time between the operations. Here query, key and value
are one matrix product, gate and up another, and rotation works on queries and keys at once. The
packed matrices *are* the model's parameters: each original becomes a view of its part, so
transformers' modules and weight updates see one storage.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from actor.engine.kvcache import KVCache

_FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # angles depend on the position only


class _Block(NamedTuple):
    before_attention: nn.Parameter
    qkv: torch.Tensor  # [(H + 2 Hk)·D, hidden]
    qkv_bias: torch.Tensor | None
    out: nn.Linear
    before_mlp: nn.Parameter
    gate_up: torch.Tensor  # [2 × inner, hidden]
    gate_up_bias: torch.Tensor | None
    down: nn.Linear


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
        self._blocks = [_pack(layer) for layer in net.model.layers]
        self._cos, self._sin = _angles(net, length)

    def decode(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] after `tokens` (int64 [B])."""
        x = self._run(tokens, position, self._blocks)
        for_head = F.rms_norm(x, self._size, self._net.model.norm.weight, self._eps)
        return F.linear(for_head, self._net.lm_head.weight)

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
            x = _add(x, self._cache.attend(layer, q, kv, self._scale), block.out)
            normed = F.rms_norm(x, self._size, block.before_mlp, self._eps)
            gate, up = F.linear(normed, block.gate_up, block.gate_up_bias).chunk(2, -1)
            x = _add(x, F.silu(gate).mul_(up), block.down)
        return x

    def _rotated(
        self, x: torch.Tensor, block: _Block, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [N, H, D] and keys beside values [N, 2·Hk·D] of `x` [N, hidden]."""
        cache, D = self._cache, self._cache.head_size
        turned = cache.heads + cache.key_heads
        normed = F.rms_norm(x, self._size, block.before_attention, self._eps)
        qkv = F.linear(normed, block.qkv, block.qkv_bias)
        qk = qkv[:, : turned * D].view(-1, turned, D)
        qk.copy_((qk * cos).addcmul_(qk.roll(D // 2, -1), sin))
        return qk[:, : cache.heads], qkv[:, cache.heads * D :]


def _pack(layer: Any) -> _Block:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up = (mlp.gate_proj, mlp.up_proj)
    return _Block(
        layer.input_layernorm.weight,
        _share([p.weight for p in qkv]),
        _share([p.bias for p in qkv]) if attention.q_proj.bias is not None else None,
        attention.o_proj,
        layer.post_attention_layernorm.weight,
        _share([p.weight for p in gate_up]),
        _share([p.bias for p in gate_up]) if mlp.gate_proj.bias is not None else None,
        mlp.down_proj,
    )


def _share(parts: list[nn.Parameter]) -> torch.Tensor:
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


def _add(x: torch.Tensor, y: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """x + linear(y), in one operation where there is no bias."""
    if linear.bias is not None:
        return x + linear(y)
    return torch.addmm(x, y, linear.weight.t())
