"""What people see of a learner: a line of metrics a step, a live status, a summary at the end.
Nothing decides by it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from common.metrics import Metrics, Value
from common.runfolder import RunFolder
from common.status import Phase, StatusFile, encode
from common.versions import Registry
from learner import turns
from learner.agreement import Doubt
from learner.config import LearnerConfig
from learner.course import Course, step_of
from learner.evaluation import Evaluation
from learner.inbox import Selection
from learner.ledger import Ledger
from learner.origin import of_answers
from learner.picture import picture
from learner.prompts import curriculum
from learner.synthesis import facts as synthesis
from learner.tally import seen, tally

if TYPE_CHECKING:
    from learner.desk import Desk
    from learner.step import StepReport

log = logging.getLogger("isentrope.report")
T = TypeVar("T")


class Report:
    def __init__(
        self, folder: RunFolder, registry: Registry, config: LearnerConfig, ledger: Ledger, t: int
    ) -> None:
        self.phase: Phase = "starting"
        self.trouble = ""  # what keeps versions from the actors, in one line
        self._folder = folder
        self._registry = registry
        self._config = config
        self._metrics = Metrics(folder.path, config.tensorboard, t or None, config.wandb)
        self._file = StatusFile(folder.path)
        self._course = Course(folder, config, ledger)
        self._doubt = Doubt()
        self._spent: dict[str, float] = {}  # seconds of the step under way, by the metric's name

    def waiting(self, wait: Callable[[], T]) -> T:
        """Run `wait`, and count its time as the learner's idle time."""
        self.phase = "waiting"
        return self._course.waiting(wait)

    def timed(self, name: str, do: Callable[[], T]) -> T:
        """Run `do`; the line of the step under way says as `name` how long it took (s)."""
        began = time.monotonic()
        found = do()
        self._spent[name] = time.monotonic() - began
        return found

    def step(self, batch: Selection, report: StepReport, desk: Desk) -> None:
        """The line of the step that just ended."""
        t, course = batch.t + 1, self._course
        step_s, wait_s = course.lap()
        course.note_actors(desk)
        self._doubt.look(t, report.metrics)
        line = {**report.metrics, **self._facts(batch, desk)}
        for name, facts in of_answers(seen(batch), self._config).items():
            line[name] = facts | line.get(name, {})
        line |= {
            "seconds": course.seconds,
            "step_s": step_s,
            "wait_s": wait_s,
            **self._spent,
            "learner_idle": wait_s / step_s if step_s else 0.0,
            "tokens_per_s": line["tokens"] / step_s if step_s else 0.0,
            "actor_idle": 1.0 - course.busy[-1] if course.busy else None,
        }
        for label, point in desk.ledger.evaluations.items():
            if label not in course.points and point.is_complete(self._config.eval.problems):
                line |= self._note_point(label, point, step_of(label, self._config.steps))
        self._spent.clear()
        self._metrics.write(t, line)
        course.add(t, line)
        self.live(desk, t)

    def heldouts(self, points: Mapping[str, Evaluation], label: str, t: int) -> None:
        """Evaluation `label` was waited for at step `t`; those asked before it are in as well."""
        for name, point in points.items():
            if name == label or name not in self._course.points:
                self._heldout(name, point, t if name == label else step_of(name, t))

    def live(self, desk: Desk, t: int) -> None:
        """Twice a second at most: status.json, and the same in Redis."""
        if self._file.due():
            self._show(desk, t)

    def finish(self, ending: str, desk: Desk, t: int) -> None:
        self.phase = "stopped" if ending == "stopped" else "done"
        self._show(desk, t)
        summary = self._course.summary(ending, t, desk.look(desk.ledger.sums).get("main"))
        (self._folder.path / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    def close(self) -> None:
        self._metrics.close()

    def _show(self, desk: Desk, t: int) -> None:
        status = picture(self._course, desk, t, self.phase, self._doubt.words)
        status.warnings += [self.trouble] if self.trouble else []
        self._file.write(status, force=True)
        self._registry.live("learner", encode(status))

    def _facts(self, batch: Selection, desk: Desk) -> dict[str, Any]:
        """What the batch and the desk say, beside what the step measured."""
        facts: dict[str, Any] = {**tally(batch), **_pool(desk)}
        facts |= desk.look(lambda: synthesis.facts(desk.ledger.followers, batch))
        return facts | turns.facts(seen(batch), self._config.feedback, self._config.intervene)

    def _heldout(self, label: str, point: Evaluation, t: int) -> None:
        none: dict[str, Any] = {}
        lines = reversed(self._course.lines)
        before = next((line for line in lines if line["step"] == t), none)
        known = {k: v for k, v in before.items() if k not in ("step", "time")}
        self._metrics.write(t, known | self._note_point(label, point, t))
        log.info(
            "held-out %s: %.3f ± %.3f at version %d", label, point.accuracy, point.standard_error, t
        )

    def _note_point(self, label: str, point: Evaluation, t: int) -> dict[str, Value]:
        self._course.points[label] = (t, point)
        several = {"heldout_by_source": point.by_source} if self._config.prompts.sources else {}
        return several | {
            "heldout": point.accuracy,
            "heldout_length": point.length,
            "heldout_versions": {"oldest": point.oldest, "newest": point.newest},
            **({"heldout_turns": point.by_turn} if self._has_turns() else {}),
        }

    def _has_turns(self) -> bool:
        """Whether held-out problems get several turns."""
        return self._config.feedback is not None and self._config.feedback.evaluate


def _pool(desk: Desk) -> dict[str, Value]:
    sums = desk.look(desk.ledger.sums)
    actors = list(desk.actors.copy().values())
    wanted = curriculum.of(desk.ledger.followers)
    told: dict[str, Value] = {"curriculum": desk.look(wanted.facts)} if wanted else {}
    return told | {
        "issued": sums["main"].issued,
        "buffered": sums["main"].buffered,
        "in_flight": sums["main"].in_flight,
        "actors": len(actors),
        "sampled_tokens_per_s": sum(actor.stats.get("tokens_per_s", 0.0) for actor in actors),
    }
