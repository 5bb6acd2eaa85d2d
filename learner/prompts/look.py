"""`python -m learner.prompts.look RECIPE`: are there problems to ask? One line for each source,
without the model; what is left out of a file is said on standard error. The doctor asks.
"""

from __future__ import annotations

import click

from common.options import overrides_option, recipe_argument


@click.command()
@recipe_argument
@overrides_option
def look(recipe: str, overrides: tuple[str, ...]) -> None:
    """Open the sources of RECIPE."""
    from common import recipe as recipes
    from common.config import RunConfig
    from learner.config import LearnerConfig
    from learner.prompts.mixture import Mixture
    from learner.prompts.source import open_source

    found = recipes.load(recipe, {"run": RunConfig, "learner": LearnerConfig}, overrides)
    run, config = found["run"], found["learner"]
    assert isinstance(run, RunConfig)
    assert isinstance(config, LearnerConfig)
    source = open_source(config.prompts, run.seed)
    leaves = source.leaves if isinstance(source, Mixture) else (source,)
    for leaf in leaves:
        count = "as many as are wanted" if leaf.rows is None else f"{leaf.rows} to train on"
        click.echo(f"{leaf.name}: {count}; {leaf.train(0).id} is one")


def main() -> None:
    from common.cli import standalone

    standalone(look, "prompts")


if __name__ == "__main__":
    main()
