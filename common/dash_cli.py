"""`isentrope dash`: a run in a browser, and its numbers for Prometheus."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import NoReturn

import click

from common.errors import ConfigError


@click.command()
@click.argument("run_folder", required=False, metavar="[RUN]", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    default=0,
    type=click.IntRange(0, 65535),
    show_default=True,
    help="0: one that is free.",
)
@click.option(
    "--allow-remote", is_flag=True, help="Listen off loopback: whoever reaches it reads along."
)
@click.option("--redis", metavar="URL", help="Ask this Redis too: for actors that nobody hears.")
@click.option("--metrics-only", is_flag=True, help="/metrics and /healthz, no page.")
def dash(
    run_folder: Path | None,
    host: str,
    port: int,
    allow_remote: bool,
    redis: str | None,
    metrics_only: bool,
) -> None:
    """Show a run in the browser, live; RUN is its folder, which need not be there yet, or one
    that holds several runs. Without RUN and --redis it is `runs`.

    There is no password: it listens on loopback only. From another machine:
    ssh -L 8080:127.0.0.1:PORT HOST.
    """
    from common.dash_runs import found
    from common.dash_server import Dashboard, is_loopback
    from common.dash_state import Watch

    if not (is_loopback(host) or allow_remote):
        raise ConfigError(
            f"--host {host}: the page has no password and shows what the model is asked and says, "
            "so it stays on loopback; reach it by ssh -L, or add --allow-remote"
        )
    folder = Path("runs") if run_folder is None and redis is None else run_folder
    if folder is not None and folder.is_file():
        raise ConfigError(
            f"{folder} is a file: give the folder of a run, or one that holds several"
        )
    several = folder is not None and (folder == Path("runs") or bool(found(folder)))
    if several and redis is not None:
        raise click.UsageError(f"{folder} holds several runs: --redis goes with one of them")
    what = folder if several and folder is not None else Watch(folder, redis)
    with Dashboard(what, host, port, metrics_only) as server:
        click.echo(f"{server.url}{'metrics' if metrics_only else ''}")
        signal.signal(signal.SIGTERM, _end)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _end(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
