"""The Click options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from common.errors import ConfigError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

recipe_argument: Decorator = click.argument("recipe")

overrides_option: Decorator = click.option(
    "-s",
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override one value of the recipe (TOML; bare strings allowed). May be repeated.",
)

json_option: Decorator = click.option(
    "--json", "as_json", is_flag=True, help="End with one JSON line."
)

run_folder_argument: Decorator = click.argument(
    "run_folder", type=click.Path(path_type=Path), metavar="RUN"
)


def existing_run(folder: Path) -> Path:
    """`folder` when a run has been there; raises ConfigError otherwise."""
    if not (folder / "recipe.toml").is_file():
        raise ConfigError(
            f"{folder}: no run here (it would hold a recipe.toml); runs are under runs/"
        )
    return folder
