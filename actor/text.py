"""Tokens to text: the model folder's tokenizer. Nothing is ever tokenised here.

A folder with a tokenizer.json is read by `tokenizers` alone (15 ms); `transformers` (3 s, and torch
with it) is asked only for what that file cannot say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import DataError
from common.models import TOKENIZER_FILES, has_tokenizer

Decode = Callable[[Sequence[int]], str]


def load(folder: Path, vocab_size: int) -> Decode:
    """Decodes without special tokens. Raises DataError: no tokenizer, or not one of this model."""
    fast = folder / "tokenizer.json"
    decode, size = _fast(fast) if fast.is_file() and not _cleans_up(folder) else _slow(folder)
    if size > vocab_size:
        raise DataError(
            f"{folder}: the tokenizer has {size} tokens and the model {vocab_size}: they do not "
            "belong together; copy the tokenizer files of the model that this one was made from"
        )
    return decode


def _fast(path: Path) -> tuple[Decode, int]:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  the library raises bare Exception for a bad file
        raise DataError(f"{path}: not a tokenizer: {error}") from None
    return lambda tokens: str(tokenizer.decode(list(tokens))), int(tokenizer.get_vocab_size())


def _slow(folder: Path) -> tuple[Decode, int]:
    if not has_tokenizer(folder):
        raise DataError(f"{folder}: no tokenizer (none of {', '.join(TOKENIZER_FILES)})")

    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no tokenizer that can be loaded: {error}") from None
    return lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True)), len(
        tokenizer
    )


def _cleans_up(folder: Path) -> bool:
    """Some older tokenizers drop spaces before punctuation when they decode, which only
    transformers knows."""
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return False
    return bool(json.loads(config.read_text()).get("clean_up_tokenization_spaces", False))
