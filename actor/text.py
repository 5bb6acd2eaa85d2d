"""Tokens to text and back: the model folder's tokenizer. What a policy reads is never text: prompts
come as tokens, and only the words of somebody outside (feedback, hints) are made tokens here, once.

A folder with a tokenizer.json is read by `tokenizers` alone (15 ms); `transformers` (3 s, and torch
with it) is asked only for what that file cannot say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.models import TOKENIZER_FILES, has_tokenizer

Decode = Callable[[Sequence[int]], str]


class Text:
    """One tokenizer, both ways; called, it decodes, without special tokens."""

    def __init__(self, decode: Decode, encode: Callable[[str], Sequence[int]], size: int) -> None:
        self._decode, self._encode, self.size = decode, encode, size

    def __call__(self, tokens: Sequence[int]) -> str:
        return self._decode(tokens)

    def encode(self, words: str) -> np.ndarray:
        """int32 [T]. What looks like a special token is text: strangers cannot end a turn."""
        return np.asarray(self._encode(words), np.int32)


def load(folder: Path, vocab_size: int) -> Text:
    """Raises DataError: no tokenizer, or not one of this model."""
    fast = folder / "tokenizer.json"
    text = _fast(fast) if fast.is_file() and not _cleans_up(folder) else _slow(folder)
    if text.size > vocab_size:
        raise DataError(
            f"{folder}: the tokenizer has {text.size} tokens and the model {vocab_size}: they do "
            "not belong together; copy the tokenizer files of the model that this one was made from"
        )
    return text


def _fast(path: Path) -> Text:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  the library raises bare Exception for a bad file
        raise DataError(f"{path}: not a tokenizer: {error}") from None
    tokenizer.encode_special_tokens = True  # as text; decoding does not look at it

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens)))

    def encode(words: str) -> Sequence[int]:
        ids: list[int] = tokenizer.encode(words, add_special_tokens=False).ids
        return ids

    return Text(decode, encode, int(tokenizer.get_vocab_size()))


def _slow(folder: Path) -> Text:
    if not has_tokenizer(folder):
        raise DataError(f"{folder}: no tokenizer (none of {', '.join(TOKENIZER_FILES)})")

    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no tokenizer that can be loaded: {error}") from None

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    def encode(words: str) -> Sequence[int]:
        found = tokenizer(words, add_special_tokens=False, split_special_tokens=True)
        ids: list[int] = found["input_ids"]
        return ids

    return Text(decode, encode, len(tokenizer))


def _cleans_up(folder: Path) -> bool:
    """Some older tokenizers drop spaces before punctuation when they decode, which only
    transformers knows."""
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return False
    return bool(json.loads(config.read_text()).get("clean_up_tokenization_spaces", False))
