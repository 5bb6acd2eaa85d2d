"""The model behind the torch engine, over our KV cache.

Any architecture runs through transformers' own modules (`generic.py`), some by a shorter way
(`fused.py`). Either is compared with transformers' own attention when the model is loaded: a model
whose attention is not ordinary is refused, not sampled from wrongly.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from actor.engine import fused
from actor.engine.fused import Fused
from actor.engine.generic import Generic
from actor.engine.kvcache import KVCache
from common.errors import ConfigError, DataError

_NEEDED = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "vocab_size",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
        net = _load(folder, dtype, device)
        with torch.no_grad():
            self._forward = self._choose(net, fused_decode)
        self.fused_decode = isinstance(self._forward, Fused)
        self.parameters = dict[str, torch.Tensor](net.named_parameters(remove_duplicate=False))

    def _choose(self, net: Any, fused_decode: bool) -> Fused | Generic:
        """The fastest forward pass that agrees with transformers' own; raises DataError when none
        does."""
        tokens = (torch.arange(8, device=self.device) * 7919 % self.vocab_size)[: self.length]
        expected = net(tokens[None], use_cache=False).logits[0, -1].float()
        exact = self.cache.buffer.dtype == torch.float32
        tolerance = (1e-3 if exact else 5e-2) * max(1.0, float(expected.abs().max()))
        position = torch.tensor([len(tokens) - 1], device=self.device)
        generic = Generic(net, self.cache)
        choices: list[Fused | Generic] = [generic]
        if fused_decode and fused.knows(net):
            choices.insert(0, Fused(net, self.cache, self.length))
        for self._forward in choices:
            self.prefill([0], [tokens[:-1]])
            logits = self.decode(tokens[-1:], position, [(0, 1, len(tokens))])[0].float()
            if float((logits - expected).abs().max()) <= tolerance:
                return self._forward
        raise DataError(
            f"{type(net).__name__}: decoding with a KV cache disagrees with its forward"
        )

    def refresh(self) -> None:
        """To be called after `parameters` have changed."""
        self._forward.refresh()

    def prefill(self, rows: list[int], prefixes: list[torch.Tensor]) -> None:
        """Fill the cache of `rows` with the keys and values of `prefixes` (int64 [P] each)."""
        width = max(len(prefix) for prefix in prefixes)
        if not width:
            return
        tokens = torch.nn.utils.rnn.pad_sequence(prefixes, batch_first=True).to(self.device)
        self.cache.place = self.cache.place_prefill(torch.tensor(rows, device=self.device), width)
        position = torch.arange(width, device=self.device).repeat(len(rows))
        self._forward.prefill(tokens.flatten(), position)

    def decode(
        self, tokens: torch.Tensor, position: torch.Tensor, cuts: list[tuple[int, int, int]]
    ) -> torch.Tensor:
        """Logits [B, V] after `tokens` (int64 [B]) of rows 0 … B - 1 at `position` (int64 [B]).

        `cuts` are (first row, last row + 1, width), every position below its width.
        """
        self.cache.place = self.cache.place_decode(position, cuts)
        return self._forward.decode(tokens, position)


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    # Our own display owns the terminal.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
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
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    missing = [name for name in _NEEDED if not isinstance(getattr(config, name, None), int)]
    if kinds:
        why = f"layers of kind {', '.join(sorted(kinds))}"
        raise DataError(f"model {folder} has {why}: the torch engine needs ordinary attention")
    if missing:
        raise DataError(f"model {folder} has no {', '.join(missing)} in its config.json")
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
