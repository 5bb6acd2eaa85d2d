"""A grid of runs: recipes × overrides × seeds, each cell a run in a folder of its own.

    recipe = "tiny"                     # of every cell that names none
    seeds = [0]                         # the same

    [set]                               # overrides of every cell
    "learner.eval.samples" = 8

    [[cell]]
    name = "steer-released"
    recipe = "steer"
    seeds = [0, 1, 2]
    set = { "learner.methods.0.form" = "released" }

A cell is done when its run came to its end under the recipe that it resolves to today; a run under
another recipe is never taken for it, nor written over.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import msgspec

from common import recipe, summary
from common.config import NaturalInt, Positive, Section, need
from common.errors import ConfigError

State = Literal["new", "interrupted", "done"]
ENDINGS = ("done", "solved", "stuck")  # of a run that came to its end; "stopped" did not

Seeds = Annotated[tuple[NaturalInt, ...], msgspec.Meta(min_length=1)]
Overrides = dict[str, Any]


class CellConfig(Section, frozen=True, kw_only=True):
    name: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
    recipe: str = ""  # "": the grid's
    seeds: Seeds | None = None  # None: the grid's
    set: Overrides = {}
    about: str = ""  # for the table


class GridConfig(Section, frozen=True, kw_only=True):
    recipe: str = "tiny"
    seeds: Seeds = (0,)
    patience_s: Positive = 900.0  # a cell that takes longer has failed
    about: str = ""  # for the table
    set: Overrides = {}
    cell: Annotated[tuple[CellConfig, ...], msgspec.Meta(min_length=1)]

    def check(self) -> None:
        names = [cell.name for cell in self.cell]
        twice = sorted({name for name in names if names.count(name) > 1})
        need(not twice, f"cell: {', '.join(twice)}: one name, two cells")


class Cell(NamedTuple):
    """One run of the grid."""

    name: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]
    folder: Path
    frozen: str  # every value in force, as the run folder will keep it

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.frozen.encode()).hexdigest()[:12]


def read(path: Path) -> GridConfig:
    """Raises ConfigError."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None
    return cast("GridConfig", recipe.decode(str(path), GridConfig, tables))


def cells(grid: GridConfig, out: Path, only: Sequence[str] = ()) -> list[Cell]:
    """The first seed of every cell, then the second of those that have one, and so on: whenever it
    is stopped there is a table to look at.

    Every recipe is resolved here: a mistake in the last cell is told before the first one starts.
    Raises ConfigError.
    """
    unknown = sorted(set(only) - {cell.name for cell in grid.cell})
    if unknown:
        names = ", ".join(cell.name for cell in grid.cell)
        raise ConfigError(f"no cell {', '.join(unknown)}; there is: {names}")
    chosen = [cell for cell in grid.cell if not only or cell.name in only]
    rounds = max(len(cell.seeds or grid.seeds) for cell in chosen)
    return [
        _cell(grid, cell, seeds[turn], out)
        for turn in range(rounds)
        for cell in chosen
        if turn < len(seeds := cell.seeds or grid.seeds)
    ]


def _cell(grid: GridConfig, cell: CellConfig, seed: int, out: Path) -> Cell:
    values = {**grid.set, **cell.set, "run.seed": seed}
    overrides = tuple(f"{key}={recipe.inline(value)}" for key, value in values.items())
    source = cell.recipe or grid.recipe
    try:
        frozen = recipe.freeze(source, overrides)
    except ConfigError as error:
        raise ConfigError(f"cell {cell.name}: {error}") from None
    return Cell(cell.name, seed, source, overrides, out / f"{cell.name}-s{seed}", frozen)


def state(cell: Cell) -> State:
    """Raises ConfigError when its folder holds a run of another recipe."""
    kept = cell.folder / "recipe.toml"
    if not kept.exists():
        return "new"
    differing = _differing(recipe.freeze(str(kept)), cell.frozen)
    if differing:
        raise ConfigError(
            f"{cell.folder} holds a run of another recipe ({differing}); move it away, or choose "
            "another --out"
        )
    ended = summary.read(cell.folder)
    finished = ended.get("ending") in ENDINGS and "conserved" in ended
    return "done" if finished else "interrupted"


def _differing(one: str, other: str) -> str:
    """The first values in which two frozen recipes differ, as `lr = 1.0, not 2.0`."""
    pairs = zip(one.splitlines(), other.splitlines(), strict=False)
    found = [f"{a}, not {b.rpartition(' = ')[2]}" for a, b in pairs if a != b]
    if not found and len(one.splitlines()) != len(other.splitlines()):
        found = ["more or fewer values"]
    return "; ".join(found[:2])
