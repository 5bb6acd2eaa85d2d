"""A forward pass through transformers' own modules, whatever the architecture."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from actor.engine import kvcache
from actor.engine.kvcache import KVCache

_ATTENTION = "isentrope_kv"


class Generic:
    """`net`, whose attention layers from now on work over `cache`."""

    def __init__(self, net: Any, cache: KVCache) -> None:
        self._net, self._cache = net, cache
        AttentionInterface.register(_ATTENTION, kvcache.attention)
        net.set_attn_implementation(_ATTENTION)
        for module in net.modules():
            if hasattr(module, "layer_idx"):
                module.kv_cache = cache

    def decode(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] after `tokens` (int64 [B])."""
        hidden = self._run(tokens[:, None], position[:, None])
        logits: torch.Tensor = self._net.get_output_embeddings()(hidden[:, 0])
        return logits

    def prefill(self, tokens: torch.Tensor, position: torch.Tensor) -> None:
        """Keys and values of `tokens` (int64 [N])."""
        width = self._cache.place.prefix
        self._run(tokens.view(-1, width), position.view(-1, width))

    def refresh(self) -> None:
        """The parameters have changed: its modules read them at every pass."""

    def _run(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        out = self._net.base_model(input_ids=tokens, position_ids=position, use_cache=False)
        hidden: torch.Tensor = out.last_hidden_state
        return hidden
