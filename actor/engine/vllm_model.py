"""What a model's config.json allows, known before vLLM is started with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from common.errors import DataError

_BLOCK = 128  # tokens of a block of vLLM's KV cache on a CPU
_SPARE_BLOCKS = 8  # vLLM keeps one for itself


def limits(folder: Path, max_length: int) -> tuple[int, int]:
    """(words of the vocabulary, longest prefix + continuation). Raises DataError."""
    config = _read(folder)
    words, allowed = config.get("vocab_size"), config.get("max_position_embeddings") or max_length
    if not isinstance(words, int):
        raise DataError(f"model {folder} has no vocab_size in its config.json")
    if not allowed:
        raise DataError(f"model {folder} does not say how long a text may be: set actor.max_length")
    if max_length > allowed:
        raise DataError(f"actor.max_length = {max_length}, but the model has {allowed} positions")
    return words, max_length or int(allowed)


def kv_bytes(folder: Path, slots: int, length: int, itemsize: int) -> int:
    """What `slots` sequences of `length` tokens take in vLLM's KV cache on a CPU; 0 for a model
    whose attention is not the ordinary one."""
    config = _read(folder)
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    hidden, kinds = config.get("hidden_size"), set(config.get("layer_types") or ())
    if kinds - {"full_attention"} or not (layers and heads and hidden):
        return 0
    width = config.get("head_dim") or hidden // heads
    token = 2 * layers * (config.get("num_key_value_heads") or heads) * width * itemsize
    blocks = -(-length // _BLOCK) * slots + _SPARE_BLOCKS
    return int(blocks * _BLOCK * token)


def _read(folder: Path) -> dict[str, Any]:
    """config.json, of the part that writes text. Read without transformers, which takes seconds."""
    path = folder / "config.json"
    try:
        config = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError) as error:
        raise DataError(f"model folder {folder} has no usable config.json: {error}") from None
    inner: dict[str, Any] = config.get("text_config") or config
    return inner
