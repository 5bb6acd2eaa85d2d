"""The model behind the torch engine: transformers' own modules over our KV cache.

Prefixes always run through transformers' modules. A decode step does too, unless the architecture is one that
`fused.py` knows. Either way the result is compared with transformers' own attention when the model is loaded:
a model whose attention is not ordinary is refused, not sampled from wrongly.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from actor.engine import fused, kvcache
from actor.engine.kvcache import KVCache
from common.errors import ConfigError, DataError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Decode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (tokens, position) → logits
_ATTENTION = "isentrope_kv"
_WIDTH_STEP = 16  # attended width is rounded up to this many positions


def device_named(name: str) -> torch.device:
    """The device `name` means here; "auto" takes a GPU when there is one. Raises ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"actor.device = {name!r}: {_one_line(error)}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f'actor.device = {name!r}, but torch finds no GPU here: use device = "cpu"'
        )
    return device


class Model:
    """A causal language model whose rows live in a KV cache of `rows` × `length` positions."""

    def __init__(
        self,
        folder: Path,
        *,
        rows: int,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
        fused_decode: bool = True,
    ) -> None:
        config = _read_config(folder)
        self.vocab_size = int(config.vocab_size)
        self.length = _length(config, length)
        self.device = device
        self.cache = _make_cache(rows, self.length, config, dtype, device)
        self._net = _load(folder, dtype, device)
        for module in self._net.modules():
            if hasattr(module, "layer_idx"):
                module.kv_cache = self.cache
        with torch.no_grad():
            self._decode = self._choose_decode(fused_decode)
        self.fused_decode = self._decode != self._decode_modules
        self.parameters: dict[str, torch.Tensor] = dict(
            self._net.named_parameters(remove_duplicate=False)
        )

    def _choose_decode(self, fused_decode: bool) -> Decode:
        """The fastest decode step that agrees with transformers' own forward; raises DataError
        when none does."""
        tokens = (torch.arange(8, device=self.device) * 7919 % self.vocab_size)[: self.length]
        expected = self._net(tokens[None], use_cache=False).logits[0, -1].float()
        self._net.set_attn_implementation(_ATTENTION)
        exact = self.cache.buffer.dtype == torch.float32
        tolerance = (1e-3 if exact else 5e-2) * max(1.0, float(expected.abs().max()))
        position = torch.tensor([len(tokens) - 1], device=self.device)
        step = fused.decode_step(self._net, self.cache, self.length) if fused_decode else None
        for self._decode in filter(None, (step, self._decode_modules)):
            self.prefill([0], [tokens[:-1]])
            logits = self.decode(tokens[-1:], position, len(tokens))[0].float()
            if float((logits - expected).abs().max()) <= tolerance:
                return self._decode
        name = type(self._net).__name__
        raise DataError(f"{name} in {self._net.name_or_path} decodes differently from its forward")

    def prefill(self, rows: list[int], prefixes: list[torch.Tensor]) -> None:
        """Fill the cache of `rows` with the keys and values of `prefixes` (int64 [P] each, on any device)."""
        if not any(len(prefix) for prefix in prefixes):
            return
        tokens = torch.nn.utils.rnn.pad_sequence(prefixes, batch_first=True).to(self.device)
        width = tokens.shape[1]
        self.cache.place = self.cache.place_prefill(torch.tensor(rows, device=self.device), width)
        positions = torch.arange(width, device=self.device).expand(len(rows), -1)
        self._net.base_model(input_ids=tokens, position_ids=positions, use_cache=False)

    def decode(self, tokens: torch.Tensor, position: torch.Tensor, width: int) -> torch.Tensor:
        """Logits [B, V] after `tokens` (int64 [B]) of rows 0 … B - 1 at `position` (int64 [B]),
        all of which are below `width`."""
        width = min(-(-width // _WIDTH_STEP) * _WIDTH_STEP, self.length)
        self.cache.place = self.cache.place_decode(position, width)
        return self._decode(tokens, position)

    def _decode_modules(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        hidden = self._net.base_model(
            input_ids=tokens[:, None], position_ids=position[:, None], use_cache=False
        )
        logits = self._net.get_output_embeddings()(hidden.last_hidden_state[:, 0])
        return torch.as_tensor(logits)


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    AttentionInterface.register(_ATTENTION, kvcache.attention)
    transformers_logging.disable_progress_bar()  # our own display owns the terminal
    try:
        net: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"model folder {folder} cannot be loaded: {_one_line(error)}") from None
    return net.requires_grad_(False).eval().to(device)


def _read_config(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise DataError(
            f"model folder {folder} has no usable config.json: {_one_line(error)}"
        ) from None
    kinds = {
        kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"
    }
    needed = (
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "vocab_size",
    )
    missing = [name for name in needed if not isinstance(getattr(config, name, None), int)]
    if kinds or missing:
        why = (
            f"layers of kind {', '.join(sorted(kinds))}"
            if kinds
            else f"no {', '.join(missing)} in its config.json"
        )
        raise DataError(
            f"model {folder}: {why}; the torch engine needs ordinary attention in every layer"
        )
    return config


def _length(config: Any, asked: int) -> int:
    allowed = int(getattr(config, "max_position_embeddings", 0) or asked)
    if asked > allowed:
        raise DataError(f"actor.max_length = {asked}, but the model has {allowed} positions")
    return asked or allowed


def _make_cache(
    rows: int, length: int, config: Any, dtype: torch.dtype, device: torch.device
) -> KVCache:
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    token_bytes = (
        config.num_hidden_layers * 2 * config.num_key_value_heads * head_size * dtype.itemsize
    )
    needed = rows * length * token_bytes
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.9 * free:
        raise DataError(
            f"a KV cache of {rows} rows × {length} positions takes {needed / 2**30:.1f} GiB of "
            f"{free / 2**30:.1f} GiB: lower actor.slots or actor.max_length"
        )
    return KVCache(rows, length, config, dtype, device)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
