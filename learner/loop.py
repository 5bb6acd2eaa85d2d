"""The learner's day.

        ┌────────────────────────────── desk (its own thread) ──────────────────────────────┐
        │  ROUTER ◀═▶ actors     journal     ledger     prompts ─▶ tickets                  │
        └──────┬──────────────────────────────────────────────────────────▲─────────────────┘
            take() a batch                                             record(), announce()
               ▼                                                          │
          train_step() ──▶ snapshot ──▶ step record ──▶ checkpoint ──▶ publish ──▶ version v + 1

Of many ranks (learner/ranks.py) this is rank 0's day; the others do what it says.

What it waits for, and who ends the wait: `take` for enough usable groups (actors; a stop signal);
`_evaluate` for the answers to eval tickets (actors; a stop signal); `offer` for Redis (a moment:
the version is then left to `ensure`). With no actor it waits for one.
"""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import ExitStack

from common import models
from common.config import RunConfig
from common.journal import NO_SPACE
from common.records import Finish, Step
from common.runfolder import RunFolder
from common.versions import digest
from learner import checkpoint, interventions, model
from learner.comm import Comm
from learner.config import LearnerConfig
from learner.history import checkpoints
from learner.inbox import Selection
from learner.issuer import NOTHING
from learner.ledger import Ledger
from learner.step import train_step
from learner.tally import correct, seen
from learner.wiring import Learner, wire

log = logging.getLogger("isentrope.learner")


def learn(run: RunConfig, config: LearnerConfig, folder: RunFolder, comm: Comm) -> str:
    """Train until the steps are done, the task is solved, nothing can be learned any more, or a
    signal says stop; returns which. Of many ranks rank 0 learns, the others follow.
    """
    with ExitStack() as stack:
        it = wire(run, config, folder, comm, stack)
        it.desk.want(it.state.ask or NOTHING)
        it.report.live(it.desk, it.state.t)  # what an earlier life said last is no longer so
        _publish(it)
        _evaluate(it, "before", it.config.eval.first and it.state.t == 0)
        ending = "" if it.state.t < it.config.steps else "done"
        while not ending and not it.stop.is_set():
            batch = it.report.waiting(lambda: it.desk.take(it.idle))
            if batch is not None:
                ending = _step(it, batch) if batch.items else _over(batch)
        _evaluate(it, "after", it.config.eval.last and bool(ending))
        return _end(it, "" if it.stop.is_set() else ending)


def _step(it: Learner, batch: Selection) -> str:
    """One batch, one version: durable as a record first, then as a checkpoint, then for the
    actors.
    """
    it.report.phase = "training"
    report = train_step(it.state, batch.items, it.config, correct=correct(seen(batch)))
    it.fail("after_step")
    tensors = model.snapshot(it.state.model, it.run.weights_dtype)
    record = Step(
        t=batch.t,
        version=batch.t + 1,
        digest=digest(tensors),
        consumed=batch.consumed,
        dropped=batch.dropped,
    )
    it.desk.want(report.ask or NOTHING)
    it.desk.record(record)
    it.fail("after_step_record")
    t = it.state.t
    if t % it.config.checkpoint_every == 0 or t == it.config.steps:
        it.report.timed("checkpoint_s", lambda: _checkpoint(it))
    it.report.timed("publish_s", lambda: it.publisher.offer(t, t, tensors, record.digest))
    it.report.trouble = it.publisher.trouble
    it.desk.announce(t)  # before `ensure` publishes what Redis was away for
    it.report.step(batch, report, it.desk)
    if it.config.eval.every and t % it.config.eval.every == 0 and t < it.config.steps:
        _ask_evaluation(it, f"step-{t}")
    return "done" if t >= it.config.steps else ""


def _over(batch: Selection) -> str:
    """Why no group of many can be trained on: they are all right, or something is wrong."""
    if batch.right >= 0.5:
        return "solved"
    reasons = dict(Counter(reason for _, reason in batch.dropped))
    log.error(
        "stuck at step %d: none of %d groups can be trained on (%s) and %.0f %% of their answers "
        "are right: look at the grader, and at how hard the task is",
        *(batch.t, len(batch.dropped), reasons, 100 * batch.right),
    )
    return "stuck"


def _publish(it: Learner) -> None:
    """What this process starts from, under its own incarnation."""
    tensors = model.snapshot(it.state.model, it.run.weights_dtype)
    it.publisher.offer(it.state.t, it.state.t, tensors, digest(tensors))
    it.desk.announce(it.state.t)


def _evaluate(it: Learner, label: str, wanted: bool) -> None:
    """Wait for an evaluation at exactly the current version: nothing is trained meanwhile."""
    if not wanted or it.stop.is_set():
        return
    it.report.phase = "evaluating"
    problems = _ask_evaluation(it, label)

    def complete() -> bool | None:
        points = it.desk.ledger.evaluations
        asked = label in points and points[label].is_complete(problems)
        return True if asked and all(point.is_answered for point in points.values()) else None

    if it.desk.wait(complete, it.idle):
        it.report.heldouts(it.desk.ledger.evaluations, label, it.state.t)


def _ask_evaluation(it: Learner, label: str) -> int:
    """How many problems there are to it."""
    drafts = it.prompts.heldout(it.config.eval.problems)
    it.desk.evaluate(label, drafts, it.state.t)
    return len(drafts)


def _end(it: Learner, ending: str) -> str:
    it.report.phase = "draining"
    it.desk.drain(final=bool(ending))
    if ending:
        it.desk.record(Finish(t=it.state.t, reason=ending))
    _checkpoint(it)
    model.export(it.state.model, it.run, it.folder.path / "model")
    if it.config.intervene is not None:
        _write_interventions(it)
    it.report.finish(ending or "stopped", it.desk, it.state.t)
    return ending or "stopped"


def _write_interventions(it: Learner) -> None:
    try:
        path, lines = interventions.write(it.folder, models.find(it.run.model))
    except OSError as error:
        say = "interventions.jsonl is not written (%s): `isentrope interventions %s` does it"
        log.warning(say, error.strerror, it.folder.path)
    else:
        log.info("%s: %d conversations", path, lines)


def _checkpoint(it: Learner) -> None:
    """None while the disk is full: the journal has every step, and the next one may have room."""
    path = it.folder.checkpoints / f"step-{it.state.t:08d}"
    try:
        checkpoint.save(path, it.state, it.desk.snapshot())
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        log.error("no space for %s: going on without it", path.name)
        return
    it.fail("after_checkpoint")
    for old in checkpoints(it.folder)[it.config.keep_checkpoints :]:
        checkpoint.remove(old)
    if not it.config.keep_journal:
        it.desk.prune(Ledger.peek(checkpoint.fold(checkpoints(it.folder)[-1])).oldest)
