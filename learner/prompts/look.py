"""`python -m learner.prompts.look RECIPE`: are there problems to ask? One line for each source,
without the model; what is left out of a file, and signs that the tokenizer does not know, are said
on standard error. The doctor asks.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

import click

from common.options import overrides_option, recipe_argument

SAMPLE = 64  # questions of a source whose signs are looked at


@click.command()
@recipe_argument
@overrides_option
def look(recipe: str, overrides: tuple[str, ...]) -> None:
    """Open the sources of RECIPE."""
    from common import models
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
        sample = min(SAMPLE, leaf.rows or SAMPLE)
        if signs := lost(models.find(run.model), (leaf.train(i).text for i in range(sample))):
            click.echo(
                f"{leaf.name}: the model's tokenizer knows nothing of {signs} and leaves it out of "
                "the questions; `isentrope prompts` shows what is asked",
                err=True,
            )


def lost(model: Path, texts: Iterable[str]) -> str:
    """Signs of `texts` that do not come back from the tokenizer, case and width apart; "" where
    all do, or where there is no tokenizer.json to ask.
    """
    if not (model / "tokenizer.json").is_file():
        return ""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    signs: dict[str, None] = {}
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        back = set(_plain(tokenizer.decode(ids, skip_special_tokens=False)))
        signs |= dict.fromkeys(sign for sign in _plain(text) if sign not in back)
    return "".join(sign for sign in sorted(signs) if not sign.isspace())


def _plain(text: str) -> str:
    """Without what a tokenizer may well make alike: case, width, accents."""
    apart = unicodedata.normalize("NFKD", text).casefold()
    return "".join(sign for sign in apart if not unicodedata.combining(sign))


def main() -> None:
    from common.cli import standalone

    standalone(look, "prompts")


if __name__ == "__main__":
    main()
