"""Where a model lives: a Hugging Face folder, or one that ships with the project by name."""

from __future__ import annotations

from pathlib import Path

from common.errors import DataError

# Without any of these transformers makes up an empty tokenizer from the model's config.json.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model")
SHIPPED = Path(__file__).parent / "models"


def find(name: str) -> Path:
    """The folder of model `name`; raises DataError when there is none."""
    for folder in (Path(name).expanduser(), SHIPPED / name):
        if (folder / "config.json").is_file():
            return folder.resolve()
    shipped = ", ".join(sorted(p.parent.name for p in SHIPPED.glob("*/config.json")))
    raise DataError(
        f"no model at {name!r}: give a folder that holds a config.json, or one of: {shipped}"
    )


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)
