"""The live view of a run in a terminal, and the same in plain lines where there is none.

Both read the run folder (status.json, metrics.jsonl) and nothing else, so any terminal can watch
any run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from common import live_actors, metrics, status
from common.status import Status, actor_idle

BLOCKS = " ▁▂▃▄▅▆▇█"
NOTES = 4  # the last ones are shown
SILENT_S = 4.0  # a learner writes twice a second
FATES_LAST = ("buffered", "in_flight")
NUMBERS = (  # of metrics.jsonl
    *("correct", "reward", "entropy", "length", "lag"),
    *("learner_idle", "actor_idle", "tokens_per_s"),
)


# -- pieces -----------------------------------------------------------------------------------


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values as a row of blocks; where there are more than fit, means of neighbours."""
    if not values or width <= 0:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 2) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[1 + round((mean - low) * scale)] for mean in means)


def bar(share: float, width: int) -> str:
    """A bar of eighths of a character, `width` characters at 1."""
    share = min(1.0, max(0.0, share))
    eighths = round(share * width * 8)
    tail = "" if eighths % 8 == 0 else " ▏▎▍▌▋▊▉"[eighths % 8]
    return ("█" * (eighths // 8) + tail).ljust(width)


def clock(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def series(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if isinstance(line.get(name), int | float)]


# -- the picture ------------------------------------------------------------------------------


def render(
    now: Status | None,
    lines: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
    width: int = 80,
    title: str = "",
    height: int = 0,
) -> RenderableType:
    """The whole view for a terminal `width` columns wide. Of many actors as many are shown as fit
    into `height` lines; 0: all.
    """
    if now is None:
        starting = Text(f"{title or 'run'}: the processes start …", style="dim")
        return Group(starting, *_notes(None, notes))
    parts: list[RenderableType] = [
        _head(now, title),
        _progress(now, width),
        _curves(now, lines, width),
        _shares(now, width),
        _groups(now),
    ]
    few = height // 8 if height else None
    said = [*live_actors.remarks(now.actors, few), *_notes(now, notes)]
    room = height - len(Console(width=width).render_lines(Group(*parts, *said)))
    return Group(*parts, *live_actors.rows(now.actors, width, room if height else None), *said)


def _head(now: Status, title: str) -> RenderableType:
    silent_s = time.time() - now.at
    phase: tuple[str, str] = (now.phase, "bold green")
    if not now.over and silent_s > SILENT_S:  # it starts, catches up, or is gone
        phase = (f"{now.phase}, no word of the learner for {silent_s:.0f} s", "bold yellow")
    said = Text.assemble(("isentrope ", "bold"), (title or now.run, "cyan"), "  ", phase)
    return Rule(said, align="left", style="dim")


def _progress(now: Status, width: int) -> RenderableType:
    """Steps done, or, while training waits for an evaluation, the answers that came."""
    share = now.step / now.steps if now.steps else 0.0
    tail = f" {now.step}/{now.steps} steps  {clock(now.seconds)}"
    if now.phase == "evaluating" and now.heldout:
        point = now.heldout[-1]
        share = point.done / point.of if point.of else 0.0
        tail = f" {point.done}/{point.of} held-out answers"
    elif not now.over:
        tail += f", {clock(now.eta_s)} to go"
    drawn = bar(share, max(10, width - len(tail) - 1))
    return Text.assemble(
        (drawn.rstrip(), "green"),
        ("╌" * (len(drawn) - len(drawn.rstrip())), "dim"),
        tail,
        no_wrap=True,
    )


def _curves(now: Status, lines: Sequence[Mapping[str, Any]], width: int) -> RenderableType:
    """Correct (every group), reward (those trained on), entropy and its target, length; the
    held-out points.
    """
    aim = now.entropy_target
    room = max(8, width - (36 if aim is None else 49))
    table = Table.grid(padding=(0, 1))
    for name, value, style in (
        ("correct", next(iter(series(lines, "correct")[-1:]), None), "green"),
        ("reward", now.reward, "yellow"),
        ("entropy", now.entropy, "magenta"),
        ("length", now.length, "blue"),
    ):
        history = series(lines, name)
        span = f"{history[0]:.3g} → {history[-1]:.3g}" if len(history) > 1 else ""
        if name == "entropy" and aim is not None:
            span += f", target {aim:.3g}" if span else f"target {aim:.3g}"
        table.add_row(
            Text(name, "dim"),
            Text(number(value, 1 if name == "length" else 3), "bold"),
            Text(sparkline(history, room), style),
            Text(span, "dim"),
        )
    return Group(table, _heldout(now))


def _heldout(now: Status) -> Text:
    text = Text.assemble(("held-out  ", "dim"))
    if not now.heldout:
        return text.append("–")
    for index, point in enumerate(sorted(now.heldout, key=lambda point: point.step)):
        text.append(" → " if index else "")
        text.append(f"{point.accuracy:.3f}", "bold")
        done = "" if point.done >= point.of else f", the first {point.done} of {point.of}"
        low, high = point.versions
        seen = f"v{low}" if low == high else f"v{low}–{high}"
        text.append(f" ({seen}, {point.length:.0f} tokens{done})", "dim")
    return text


def _shares(now: Status, width: int) -> RenderableType:
    """The lag histogram on the left, who waits on the right."""
    total = sum(now.lags.values())
    size = 16 if width < 100 else 26
    left = Table.grid(padding=(0, 1))
    for lag in range(max([now.max_lag, *now.lags]) + 1):
        share = now.lags.get(lag, 0) / total if total else 0.0
        left.add_row(Text(f"lag {lag}", "dim"), Text(bar(share, size), "cyan"), percent(share))
    right = Table.grid(padding=(0, 1))
    idle = {
        "learner idle": now.learner_idle,
        "actors idle": actor_idle(now) if now.actors else None,
    }
    for name, waited in idle.items():
        said = "–" if waited is None else percent(waited)
        right.add_row(Text(name, "dim"), Text(bar(waited or 0.0, size), "red"), said)
    right.add_row(Text("trained", "dim"), Text(f"{now.tokens_per_s:,.0f} tokens/s", "bold"), "")
    both = Table.grid(padding=(0, 3))
    both.add_row(left, right)
    return both


def _groups(now: Status) -> RenderableType:
    """One line a kind: where its tickets went. What was issued is the sum of the rest."""
    table = Table.grid(padding=(0, 2))
    for kind, fates in now.groups.items():
        if fates.get("issued"):
            order = [fate for fate in fates if fate not in ("issued", *FATES_LAST)]
            shown = [fate for fate in (*order, *FATES_LAST) if fates.get(fate)]
            sums = " + ".join(f"{fates[fate]:,} {fate.replace('_', ' ')}" for fate in shown)
            table.add_row(Text(kind, "dim"), f"{fates['issued']:,} issued = {sums}")
    verdict = ("✓ conserved", "green") if now.conserved else ("✗ NOT CONSERVED", "bold red")
    if table.row_count:
        table.add_row(Text("sums", "dim"), Text.assemble(verdict))
    return table


def _notes(now: Status | None, notes: Sequence[str]) -> list[RenderableType]:
    warnings = now.warnings if now is not None and not now.over else []
    return [
        *(Text(f"! {warning}", "bold yellow") for warning in warnings),
        *(Text(f"· {note}", "dim") for note in notes[-NOTES:]),
    ]


# -- the two views ----------------------------------------------------------------------------


class LiveView:
    """Redraws the picture in place."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self._metrics = metrics.Reader(folder, NUMBERS)
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._live.start()

    def refresh(self) -> None:
        picture = render(
            status.read(self.folder),
            self._metrics.lines(),
            self.notes,
            self._console.width,
            self.folder.name,
            self._console.height,
        )
        self._live.update(picture, refresh=True)

    def note(self, text: str) -> None:
        self.notes.append(f"{time.strftime('%H:%M:%S')} {text}")

    def close(self) -> None:
        self._live.stop()


class PlainView:
    """A line a step, and one for every change of phase and every note; not for what was there when
    the view began: a run that is resumed has said it.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder = folder
        self._console = console
        self._metrics = metrics.Reader(folder, NUMBERS)
        before = status.read(folder)
        self._shown: set[int] = {line["step"] for line in self._metrics.lines()}
        self._phase = before.phase if before else ""
        self._evaluated = {p.label for p in before.heldout if p.done >= p.of} if before else set()
        self._remarked: set[str] = set()

    def refresh(self) -> None:
        now = status.read(self.folder)
        if now is None:
            return
        for line in self._metrics.lines():
            if line["step"] not in self._shown and "reward" in line:
                self._say(step_line(line, now.steps))
                self._shown.add(line["step"])
        for point in now.heldout:
            if point.done >= point.of and point.label not in self._evaluated:
                facts = f"({point.of} answers, mean length {point.length:.1f} tokens)"
                self._say(f"held-out {point.label}: {point.accuracy:.3f} {facts}")
                self._evaluated.add(point.label)
        for name, actor in now.actors.items():
            for remark in actor.remarks():
                if (text := f"{name}: {remark}") not in self._remarked:
                    self._say(f"note: {text}")
                    self._remarked.add(text)
        if now.phase in ("evaluating", "draining", "stopped", "done") and now.phase != self._phase:
            self._say(now.phase)
        self._phase = now.phase

    def note(self, text: str) -> None:
        self._say(f"note: {text}")

    def close(self) -> None:
        self.refresh()

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def step_line(line: Mapping[str, Any], steps: int) -> str:
    """One step in one line."""
    lags = " ".join(f"{lag}:{count}" for lag, count in (line.get("lag") or {}).items())
    parts = [
        f"step {line['step']:>{len(str(steps))}}/{steps}",
        f"reward {number(line.get('reward'))}",
        f"entropy {number(line.get('entropy'))}",
        f"length {number(line.get('length'), 1)}",
        f"lag {lags or '–'}",
        f"idle {percent(line.get('learner_idle') or 0)}/{percent(line.get('actor_idle') or 0)}",
        f"{line.get('tokens_per_s') or 0:,.0f} tokens/s",
    ]
    return "  ".join(parts)


def open_view(folder: Path, console: Console, plain: bool) -> LiveView | PlainView:
    live = console.is_terminal and not plain
    return LiveView(folder, console) if live else PlainView(folder, console)
