"""Rollouts to look at: coloured text in a terminal, and a page to open in a browser.

Both are made of the same `Shown`: a prompt, and what was said with a number for every token.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import RenderableType

STRONGEST = 2.0  # nats that get the strongest colour; more looks the same
_PICTURES = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)  # the other controls
_VERDICTS = {True: ("✓ ", "bold green"), False: ("✗ ", "bold red"), None: ("? ", "bold yellow")}
_LEVELS = ("", "on #3b3420", "on #5c4a17", "on #80600f", "on #a86f0a", "on #d06a10")


class Token(NamedTuple):
    """One token of a response. `value` colours it (nats), None: it was not sampled."""

    text: str
    value: float | None
    note: str


class Turn(NamedTuple):
    """A run of tokens with one author."""

    role: str
    tokens: tuple[Token, ...]


class Shown(NamedTuple):
    title: str  # who, when, under which weights
    facts: tuple[tuple[str, str], ...]
    prompt: str
    turns: tuple[Turn, ...]
    right: bool | None = None  # None: there is no verdict


def text(shown: Sequence[Shown], colour: str) -> RenderableType:
    """For a terminal."""
    from rich.console import Group
    from rich.rule import Rule
    from rich.text import Text

    parts: list[RenderableType] = []
    for one in shown:
        title = Text.assemble(_VERDICTS[one.right], (visible(one.title), "bold"))
        parts.append(Rule(title, align="left", style="dim"))
        parts.append(Text(visible("  ".join(f"{k} {v}" for k, v in one.facts)), style="dim"))
        parts.append(Text(visible(one.prompt), style="dim cyan"))
        parts.append(_said(one.turns))
    if colour:
        parts.append(_scale(colour))
    return Group(*parts)


def _said(turns: Sequence[Turn]) -> RenderableType:
    from rich.text import Text

    whole = Text()
    for turn in turns:
        if turn.role != "policy":
            said = visible("".join(token.text for token in turn.tokens))
            whole.append(said, style="italic magenta")
            continue
        for token in turn.tokens:
            whole.append(visible(token.text), style=_LEVELS[level(token.value)])
    return whole


def visible(text: str) -> str:
    """Control characters, which a terminal would obey, as pictures of themselves."""
    return text.translate(_PICTURES)


def _scale(colour: str) -> RenderableType:
    from rich.text import Text

    line = Text(f"{colour} (nats): ", style="dim")
    for number, style in enumerate(_LEVELS):
        line.append(f" {number * STRONGEST / (len(_LEVELS) - 1):.1f} ", style=style)
    return line.append(" and more", style="dim")


def level(value: float | None) -> int:
    """Which of the colours, 0: none."""
    if value is None:
        return 0
    share = min(max(value / STRONGEST, 0.0), 1.0)
    return round(share * (len(_LEVELS) - 1))


def page(shown: Sequence[Shown], title: str, colour: str, note: str) -> str:
    """One HTML file that needs nothing else. Whatever the policy said is text in it, never code."""
    cards = "\n".join(map(_card, shown))
    scale = "".join(f'<i style="--a:{i / 5:.1f}">{i / 5 * STRONGEST:.1f}</i>' for i in range(6))
    legend = f'<p class="scale">{html.escape(colour)}, nats a token: {scale} and more</p>'
    return _PAGE.format(
        title=html.escape(title),
        note=html.escape(note),
        legend=legend if colour else "",
        count=len(shown),
        cards=cards,
    )


_CLASSES = {True: "right", False: "wrong", None: "none"}


def _card(one: Shown) -> str:
    facts = "".join(
        f"<div><dt>{html.escape(name)}</dt> <dd>{html.escape(value)}</dd></div>"
        for name, value in one.facts
    )
    said = "".join(map(_turn, one.turns))
    return (
        f'<article class="{_CLASSES[one.right]}"><h2>{html.escape(one.title)}</h2><dl>{facts}</dl>'
        f'<pre class="prompt">{html.escape(one.prompt)}</pre><pre>{said}</pre></article>'
    )


def _turn(turn: Turn) -> str:
    return f'<span class="{html.escape(turn.role)}">{"".join(map(_token, turn.tokens))}</span>'


def _token(token: Token) -> str:
    share = 0.0 if token.value is None else min(max(token.value / STRONGEST, 0.0), 1.0)
    text, note = html.escape(token.text), html.escape(token.note)
    return f'<b style="--a:{share:.2f}" title="{note}">{text}</b>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1d2430; --soft: #66707f; --paper: #f6f7f9; --card: #fff;
  --line: #dfe3e9; --heat: 224 122 20; --prompt: #33658a; --other: #8a3f8f; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e8ee; --soft: #97a1b0; --paper: #14181f;
  --card: #1c222b; --line: #2c343f; --heat: 232 136 30; --prompt: #7fb5dc; --other: #cf8fd4; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.3rem; margin: 0; }} p {{ color: var(--soft); margin: .3rem 0; }}
article {{ background: var(--card); border: 1px solid var(--line); border-left: 4px solid #c8700d;
  border-radius: 8px; margin-top: 1rem; padding: .8rem 1rem; }}
.right {{ border-left-color: #2f9a58; }} .wrong {{ border-left-color: #d0524a; }}
h2 {{ font-size: .95rem; margin: 0; }}
dl {{ display: flex; flex-wrap: wrap; gap: 0 1rem; margin: .2rem 0 .6rem; font-size: .82rem; }}
dt, dd {{ display: inline; margin: 0; }} dt {{ color: var(--soft); }}
pre {{ margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.7 ui-monospace, monospace; }}
.prompt {{ color: var(--prompt); border-left: 3px solid var(--line); padding-left: .7rem;
  margin-bottom: .5rem; }}
b, i {{ font-weight: inherit; font-style: inherit; border-radius: 2px;
  background: rgb(var(--heat) / calc(var(--a) * .8)); }}
b:hover {{ outline: 1px solid var(--soft); }}
.scale i {{ padding: 0 .5rem; color: var(--ink); }}
.feedback, .hint, .tool {{ color: var(--other); }}
</style></head>
<body><h1>{title}</h1><p>{count} rollouts. {note}</p>{legend}
{cards}
</body></html>
"""
