"""`isentrope rollouts`: look at what the policy said."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from common.errors import DataError
from common.options import existing_run, run_folder_argument

if TYPE_CHECKING:
    from common.rollouts import Said

SORTS = ("newest", "oldest", "reward", "length", "surprisal")


class Filter(NamedTuple):
    """What to look at; None and empty: everything."""

    kind: str
    fate: str
    step: int | None
    lag: int | None
    source: str
    template: str
    problem: str
    least: float | None
    most: float | None

    def passes(self, said: Said, reward: float) -> bool:
        ticket = said.ticket
        words = (
            (self.kind, ticket.kind),
            (self.fate, said.fate),
            (self.source, ticket.source),
            (self.template, ticket.template),
            (self.problem, ticket.problem),
        )
        numbers = ((self.step, said.step), (self.lag, said.lag))
        return (
            all(not wanted or wanted == there for wanted, there in words)
            and all(wanted is None or wanted == there for wanted, there in numbers)
            and (self.least is None or reward >= self.least)
            and (self.most is None or reward <= self.most)
        )


@click.command()
@run_folder_argument
@click.option(
    "-n",
    "count",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Rollouts at most.",
)
@click.option("--kind", default="", help="main, aux, eval, propose or score.")
@click.option("--fate", default="", help="trained, evaluated, buffered, or a reason for dropping.")
@click.option("--step", type=int, help="Those that this step trained on or dropped.")
@click.option("--lag", type=int, help="Steps between its oldest token and its training.")
@click.option("--source", default="", help="The name of the source of the problem.")
@click.option("--template", default="", help="The name of the prompt's template.")
@click.option("--problem", default="", help="The id of the problem.")
@click.option("--min-reward", "least", type=float, help="That much or more.")
@click.option("--max-reward", "most", type=float, help="That much or less.")
@click.option("--sort", type=click.Choice(SORTS), default="newest", show_default=True)
@click.option(
    "--colour",
    type=click.Choice(("surprisal", "entropy", "none")),
    default="surprisal",
    show_default=True,
    help="surprisal: −log p of each token when it was sampled; entropy: of the policy there, under "
    "the newest weights of the run (loads the model).",
)
@click.option(
    "--html", "page", type=click.Path(path_type=Path, dir_okay=False), help="Write a page."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON line a rollout.")
def rollouts(
    run_folder: Path,
    count: int,
    sort: str,
    colour: str,
    page: Path | None,
    as_json: bool,
    **wanted: Any,
) -> None:
    """Look at what the policy said, out of the journal of RUN."""
    from learner import rollouts_look

    existing_run(run_folder)
    found = chosen(run_folder, Filter(**wanted), count, sort)
    if not found:
        raise DataError(f"{run_folder}: no rollout is like that; {_there(run_folder)}")
    if as_json:
        decode = rollouts_look.decoder(run_folder)
        for said, reward in found:
            click.echo(json.dumps(rollouts_look.facts(said, reward, decode), ensure_ascii=False))
        return
    shown, note = rollouts_look.look(run_folder, found, colour)
    from common import rollouts_show

    label = "" if colour == "none" else colour
    if page is not None:
        title = f"{run_folder.resolve().name}: what the policy said"
        page.write_text(rollouts_show.page(shown, title, label, note), encoding="utf-8")
        click.echo(f"page       {page}")
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(rollouts_show.text(shown, label))
    if note:
        console.print(note, style="dim")


def chosen(folder: Path, wanted: Filter, count: int, sort: str) -> list[tuple[Said, float]]:
    """At most `count` rollouts with their rewards, in the order to show them."""
    found = _matching(folder, wanted)
    if sort == "newest":
        return list(reversed(deque(found, maxlen=count)))
    if sort == "oldest":
        return [pair for pair, _ in zip(found, range(count), strict=False)]
    key: dict[str, Callable[[tuple[Said, float]], float]] = {
        "reward": lambda pair: pair[1],
        "length": lambda pair: pair[0].rollout.length,
        "surprisal": lambda pair: _surprisal(pair[0]),
    }
    import heapq

    return heapq.nlargest(count, found, key[sort])


def _matching(folder: Path, wanted: Filter) -> Iterator[tuple[Said, float]]:
    from common.rollouts import read
    from common.runfolder import RunFolder
    from learner.reward import reward

    for said in read(RunFolder.open(folder).journal):
        value = reward(said.rollout, said.ticket.grading)
        if wanted.passes(said, value):
            yield said, value


def _there(folder: Path) -> str:
    """What there is to choose from."""
    from common.rollouts import read
    from common.runfolder import RunFolder

    every = list(read(RunFolder.open(folder).journal))
    if not every:
        return "its journal has none at all yet"
    steps = [said.step for said in every if said.step is not None]
    names: dict[str, set[str]] = {
        "kinds": {str(said.ticket.kind) for said in every},
        "fates": {said.fate for said in every},
        "sources": {said.ticket.source for said in every},
        "templates": {said.ticket.template for said in every},
    }
    told = [
        f"{what} {', '.join(sorted(filter(None, of)))}" for what, of in names.items() if any(of)
    ]
    told += [f"steps {min(steps)} to {max(steps)}"] if steps else []
    return f"there are: {'; '.join(told)}"


def _surprisal(said: Said) -> float:
    """Mean −log p of its sampled tokens (nats)."""
    logps = [segment.logps for segment in said.rollout.segments if segment.role == "policy"]
    return -float(sum(part.sum() for part in logps)) / max(1, sum(part.size for part in logps))
