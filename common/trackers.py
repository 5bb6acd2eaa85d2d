"""Weights & Biases beside metrics.jsonl: `-s learner.wandb.mode=offline` (extra `wandb`).

Nobody waits for it and nothing decides by it: what it cannot take is said once, and the run goes
on. Its secret is WANDB_API_KEY, which only its own library reads; offline it needs none, and
`wandb sync RUN/wandb/offline-run-…` sends the run later.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from common.config import Section, need
from common.errors import ConfigError

log = logging.getLogger("isentrope.wandb")

START_S = 60.0  # for the library's own process


class WandbConfig(Section, frozen=True, kw_only=True):
    project: str = "isentrope"
    entity: str = ""  # whose project; "": the key's owner
    mode: Literal["offline", "online"] = "offline"

    def check(self) -> None:
        need(self.project != "", "project is empty: name one")


class Wandb:
    """One life of a run over there. A resumed run goes on under the same id.

    Raises ConfigError: the package is not there, or it does not let us begin.
    """

    def __init__(self, folder: Path, config: WandbConfig) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                'learner.wandb: the package wandb is not installed; pip install -e ".[wandb]"'
            ) from None
        settings = wandb.Settings(
            console="off",
            disable_git=True,
            disable_code=True,
            silent=True,
            init_timeout=START_S,
            root_dir=str(folder),
            x_disable_stats=True,
        )
        try:
            self._run: Any = wandb.init(
                project=config.project,
                entity=config.entity or None,
                name=folder.resolve().name,
                id=_run_id(folder),
                resume="allow" if config.mode == "online" else None,
                dir=str(folder),
                mode=config.mode,
                config=_recipe(folder),
                settings=settings,
            )
        except Exception as error:  # noqa: BLE001  whatever their library raises is one line for us
            said = " ".join(str(error).split())
            raise ConfigError(f"learner.wandb: {type(error).__name__}: {said}") from None
        # A resumed run does steps again, and theirs must rise: ours is a number like the others.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Flat names, as TensorBoard has them."""
        if self._run is None:
            return
        numbers = {name: value for name, value in values.items() if value is not None}
        try:
            self._run.log({"step": step, **numbers})
        except Exception as error:  # noqa: BLE001  a picture is not worth stopping for
            log.warning("wandb takes no more numbers: %s", " ".join(str(error).split()))
            self._run = None

    def close(self) -> None:
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:  # noqa: BLE001  the run is over and its numbers are on disk
                log.warning("wandb did not end in order: %s", " ".join(str(error).split()))
            self._run = None


def _run_id(folder: Path) -> str | None:
    """The run's own; None where there is no run, and the library makes one."""
    from common.errors import JournalError
    from common.runfolder import RunFolder

    try:
        return RunFolder.open(folder).run_id
    except JournalError:
        return None


def _recipe(folder: Path) -> dict[str, Any]:
    """Every value in force but the places, which may say who we are."""
    import tomllib

    from common.config import LOCAL

    try:
        recipe = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    run = {key: value for key, value in recipe.get("run", {}).items() if key not in LOCAL}
    return {**recipe, "run": run}
