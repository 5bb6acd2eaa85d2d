"""The command `isentrope actor`, and `python -m actor`."""

from __future__ import annotations

import click

from common.options import overrides_option, recipe_argument


@click.command()
@recipe_argument
@overrides_option
@click.option("--learner", metavar="URL", help="Where the learner listens, as tcp://host:port.")
@click.option("--redis", metavar="URL", help="The registry of versions, as redis://host:port/0.")
@click.option("--name", metavar="NAME", help="What the learner calls this actor; unique in a run.")
def actor(
    recipe: str,
    overrides: tuple[str, ...],
    learner: str | None,
    redis: str | None,
    name: str | None,
) -> None:
    """Generate and grade rollouts for a learner, until it or SIGTERM says stop.

    Any number of actors may join, leave or crash at any time.
    """
    import os
    import platform

    from actor.config import ActorConfig
    from common.config import RunConfig
    from common.recipe import load

    places = {"learner": learner, "redis": redis}
    given = [f'run.{key}="{url}"' for key, url in places.items() if url is not None]
    sections = load(recipe, {"run": RunConfig, "actor": ActorConfig}, [*overrides, *given])
    run, config = sections["run"], sections["actor"]
    assert isinstance(run, RunConfig)
    assert isinstance(config, ActorConfig)
    name = name or f"{platform.node()}-{os.getpid()}"

    import asyncio

    from actor import loop
    from common import log

    log.setup(name)
    asyncio.run(loop.run(run, config, name))
