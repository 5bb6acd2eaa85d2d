"""`isentrope prompts`: what would be asked, rendered, without training and without the model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from common.options import json_option, overrides_option, recipe_argument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from common.config import RunConfig
    from learner.config import LearnerConfig
    from learner.prompts.stream import Draft, Prompts


@click.command()
@recipe_argument
@click.option(
    "-n", "count", type=click.IntRange(min=1), default=8, show_default=True, help="Prompts."
)
@click.option("--template", metavar="NAME", help="All of them in this template.")
@click.option("--heldout", is_flag=True, help="What evaluations ask.")
@overrides_option
@json_option
def prompts(
    recipe: str,
    count: int,
    template: str | None,
    heldout: bool,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show what RECIPE would ask, word for word: its first prompts, in order."""
    from common import recipe as recipes
    from common.config import RunConfig
    from learner.config import LearnerConfig

    if template is not None:
        overrides = (*overrides, *_only(recipe, overrides, template))
    found = recipes.load(recipe, {"run": RunConfig, "learner": LearnerConfig}, overrides)
    run, config = found["run"], found["learner"]
    assert isinstance(run, RunConfig)
    assert isinstance(config, LearnerConfig)
    words = _tokenizer(run)
    stream = _stream(run, config, words)
    drafts = stream.heldout(count)[:count] if heldout else _first(stream, run, config, count)
    shown = [_facts(draft, words) for draft in drafts]
    for number, facts in enumerate(shown, 1):
        _show(number, facts, apart=as_json)
    if as_json:
        click.echo(json.dumps({"prompts": shown}, ensure_ascii=False))


def _only(recipe: str, overrides: tuple[str, ...], template: str) -> tuple[str, ...]:
    """Overrides by which templates are on, and this is the only one."""
    from common import recipe as recipes

    given = recipes.read(recipe, overrides).get("learner", {}).get("prompts", {}).get("templates")
    table = {**(given if isinstance(given, dict) else {}), "use": [template], "evaluation": ""}
    return (f"learner.prompts.templates={recipes.inline(table)}",)


def _tokenizer(run: RunConfig) -> PreTrainedTokenizerFast:
    """Raises DataError: no such folder, no tokenizer in it."""
    from transformers import AutoTokenizer

    from common import models
    from common.errors import DataError

    folder = models.find(run.model)
    try:
        found: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no tokenizer that can be loaded: {error}") from None
    return found  # type: ignore[no-any-return]


def _stream(run: RunConfig, config: LearnerConfig, words: PreTrainedTokenizerFast) -> Prompts:
    from common import models
    from learner.prompts.source import open_source
    from learner.prompts.stream import Prompts, room_for_prompts

    shape = json.loads((models.find(run.model) / "config.json").read_text(encoding="utf-8"))
    context = shape.get("max_position_embeddings", 1 << 20)
    source = open_source(config.prompts, run.seed)
    room = room_for_prompts(context, config.max_tokens)
    return Prompts(source, config.prompts, words, (), run.seed, room)


def _first(stream: Prompts, run: RunConfig, config: LearnerConfig, count: int) -> list[Draft]:
    """The first draws of a run that knows nothing yet."""
    from common import wire
    from common.journal import Position
    from common.records import Issue
    from learner.follow import followers
    from learner.ledger import Ledger
    from learner.prompts import curriculum

    ledger = Ledger(followers=followers(config, run.seed))
    drafts = []
    for id_ in range(count):
        draft = stream.draw(ledger.cursor, curriculum.of(ledger.followers))
        ticket = wire.Ticket(
            id=id_,
            kind="main",
            problem=draft.problem,
            prompt=draft.prompt,
            n=config.group_size,
            sampling=stream.sampling(id_, config.temperature, config.max_tokens),
            grading=draft.grading,
            source=draft.source,
            cursor=draft.cursor,
        )
        ledger.apply(Issue(ticket=ticket), Position("", id_))
        drafts.append(draft)
    return drafts


def _facts(draft: Draft, words: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "problem": draft.problem,
        "source": draft.source,
        "template": draft.template,
        "tokens": int(draft.prompt.size),
        "gold": draft.grading.gold,
        "grading": [f"{p.weight:g} × {p.name} ({p.grader})" for p in draft.grading.parts],
        "text": words.decode(draft.prompt.tolist()),
    }


def _show(number: int, facts: dict[str, Any], apart: bool) -> None:
    """`apart`: on standard error, the other belongs to the JSON line."""
    head = f"{number}  {facts['problem']}"
    rest = (
        f"  source {facts['source']}  template {facts['template']}  {facts['tokens']} tokens  "
        f"gold {facts['gold']}  reward {' + '.join(facts['grading'])}"
    )
    click.echo(click.style(head, bold=True) + click.style(rest, dim=True), err=apart)
    click.echo(facts["text"], err=apart)
    click.echo("", err=apart)
