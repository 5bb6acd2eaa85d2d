"""What a model's config.json allows, known before vLLM is started with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import DataError


def limits(folder: Path, max_length: int) -> tuple[int, int]:
    """(words of the vocabulary, longest prefix + continuation). Raises DataError."""
    config = _read(folder)
    words = getattr(config, "vocab_size", None)
    if not isinstance(words, int):
        raise DataError(f"model {folder} has no vocab_size in its config.json")
    allowed = int(getattr(config, "max_position_embeddings", 0) or max_length)
    if max_length > allowed:
        raise DataError(f"actor.max_length = {max_length}, but the model has {allowed} positions")
    if not allowed:
        raise DataError(f"model {folder} does not say how long a text may be: set actor.max_length")
    return words, max_length or allowed


def _read(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError) as error:
        line = (str(error).strip().splitlines() or ["unreadable"])[0]
        raise DataError(f"model folder {folder} has no usable config.json: {line}") from None
