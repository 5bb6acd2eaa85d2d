"""`isentrope status`: a look at a run from another terminal, or over Redis from another machine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from common.errors import ConfigError, DataError, DeadlineError
from common.options import existing_run

if TYPE_CHECKING:
    from rich.console import RenderableType

    from common.status import Status

WATCH_S = 1.0
ALIVE_S = 600.0  # a learner says something after every step, and while it waits


@click.command()
@click.argument("run_folder", required=False, metavar="[RUN]", type=click.Path(path_type=Path))
@click.option("--redis", "redis_url", metavar="URL", help="Ask this Redis instead of a run folder.")
@click.option("--watch", is_flag=True, help="Once a second, until Ctrl-C or the end of the run.")
@click.option("--json", "as_json", is_flag=True, help="The status as one JSON line.")
@click.option(
    "--alive",
    metavar="NAME",
    help='Only whether "learner" (also by RUN) or "actor:…" lives: exit code 0, else 1.',
)
def status(
    run_folder: Path | None, redis_url: str | None, watch: bool, as_json: bool, alive: str | None
) -> None:
    """Show what a run is doing: RUN is its folder."""
    if (run_folder is None) == (redis_url is None):
        raise click.UsageError("give either RUN or --redis URL")
    if alive is not None:
        click.echo(_alive(alive, run_folder, redis_url))
        return
    if run_folder is not None:
        existing_run(run_folder)
    if as_json:
        click.echo(_json(run_folder, redis_url))
        return
    from rich.console import Console
    from rich.live import Live

    console, look = Console(), _looks(run_folder, redis_url)
    if not watch:
        console.print(look(console.width, 0)[0])
        return
    with Live(console=console, auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        done = False
        while not done:
            picture, done = look(console.width, console.height)
            live.update(picture, refresh=True)
            time.sleep(0 if done else WATCH_S)


def _json(run_folder: Path | None, redis_url: str | None) -> str:
    from common.status import encode

    found = _look(run_folder, redis_url)
    if found is None:
        raise DataError(f"{run_folder}: the learner has not said anything yet")
    return encode(found).decode()


def _alive(name: str, run_folder: Path | None, redis_url: str | None) -> str:
    """A line that says so; raises DeadlineError when it does not. For health checks."""
    from common import status as pictures

    if run_folder is not None:
        if name != "learner":
            raise ConfigError(f"--alive {name}: RUN knows of its learner only; give --redis URL")
        last = pictures.read(run_folder)
        silent_s = time.time() - last.at if last is not None else ALIVE_S
        if silent_s >= ALIVE_S:
            raise DeadlineError(f"{run_folder}: no word of the learner for {ALIVE_S:.0f} s or more")
        if last is not None and is_over(last, run_folder):
            raise DeadlineError(f"{run_folder}: the learner has ended, the run is {last.phase}")
        return f"{name} lives"
    from common.softstate import SoftState

    soft = SoftState(str(redis_url), "*", timeout_s=5.0)
    try:
        with soft.asking(f"look for {name}"):
            found = next(iter(soft.client.scan_iter(soft.key(f"live:{name}"), count=1000)), None)
    finally:
        soft.close()
    if found is None:
        raise DeadlineError(f"{name} has said nothing in Redis lately")
    return f"{name} lives"


def _looks(
    run_folder: Path | None, redis_url: str | None
) -> Callable[[int, int], tuple[RenderableType, bool]]:
    """From width and height (0: any) to what to show, and whether it is the last; ever again."""
    from common import metrics
    from common.live import NUMBERS, render

    reader = metrics.Reader(run_folder, NUMBERS) if run_folder is not None else None
    title = run_folder.resolve().name if run_folder is not None else ""

    def look(width: int, height: int) -> tuple[RenderableType, bool]:
        now = _look(run_folder, redis_url)
        lines = reader.lines() if reader is not None else []
        shown = render(now, lines, (), width, title, height)
        return shown, now is not None and is_over(now, run_folder)

    return look


def is_over(last: Status, run_folder: Path | None) -> bool:
    """A run that is resumed holds its folder long before its learner says a word."""
    from common.runfolder import RunFolder

    return last.over and (run_folder is None or not RunFolder(run_folder, "").has_holder())


def _look(run_folder: Path | None, redis_url: str | None) -> Status | None:
    from common import status as pictures

    if run_folder is not None:
        return pictures.read(run_folder)
    assert redis_url is not None
    return _asked(redis_url)


def _asked(url: str) -> Status:
    """The run on this Redis; raises ConfigError when there is none, or more than one."""
    from common import status as pictures
    from common.versions import Registry

    registry = Registry(url, "*")
    try:
        with registry.asking("look for runs"):
            keys = [key.decode() for key in registry.client.scan_iter(registry.key("live:learner"))]
            raw = cast("list[bytes | None]", [registry.client.get(key) for key in keys])
    finally:
        registry.close()
    runs = [found for found in (pictures.decode(said) for said in raw if said) if found is not None]
    if len(runs) != 1:
        names = ", ".join(sorted(found.run for found in runs)) or "none"
        raise ConfigError(f"{url}: expected one live run, found {len(runs)} ({names})")
    return runs[0]
