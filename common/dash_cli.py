"""`isentrope dash`: a run in a browser, and its numbers for Prometheus."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import NoReturn

import click

from common.errors import ConfigError


@click.command()
@click.argument("run_folder", required=False, metavar="RUN", type=click.Path(path_type=Path))
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
    """Show a run in the browser, live; RUN is its folder, which need not be there yet.

    There is no password: it listens on loopback only. From another machine:
    ssh -L 8080:127.0.0.1:PORT HOST.
    """
    if run_folder is None and redis is None:
        raise click.UsageError("give RUN, or --redis URL, or both")
    from common.dash_server import Dashboard, is_loopback
    from common.dash_state import Watch

    if not (is_loopback(host) or allow_remote):
        raise ConfigError(
            f"--host {host}: the page has no password and shows what the model is asked and says, "
            "so it stays on loopback; reach it by ssh -L, or add --allow-remote"
        )
    with Dashboard(Watch(run_folder, redis), host, port, metrics_only) as server:
        click.echo(f"{server.url}{'metrics' if metrics_only else ''}")
        signal.signal(signal.SIGTERM, _end)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _end(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
