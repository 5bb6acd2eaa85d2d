"""The learner's day.

        ┌────────────────────────────── desk (its own thread) ──────────────────────────────┐
        │  ROUTER ◀═▶ actors     journal     ledger     prompts ─▶ tickets                  │
        └──────┬──────────────────────────────────────────────────────────▲─────────────────┘
            take() a batch                                             record(), announce()
               ▼                                                          │
          train_step() ──▶ snapshot ──▶ step record ──▶ checkpoint ──▶ publish ──▶ version v + 1

Of many ranks (learner/ranks.py) this is rank 0's day; the others do what it says.

What it waits for, and who ends the wait: `take` for enough usable groups (actors; a stop signal);
`_evaluate` for the answers to eval tickets (actors; a stop signal); `publish` for Redis (its
deadline: a step's version is then left to `ensure`). With no actor it waits for one.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

from common import channel, keys, models
from common.config import LOCAL, RunConfig
from common.errors import ConfigError
from common.failpoints import Failpoint
from common.journal import NO_SPACE, Journal, read, seal_of
from common.recipe import digest as run_digest
from common.records import ConfigChange, Finish, Open, Step
from common.runfolder import RunFolder
from common.versions import Registry, digest
from learner import checkpoint, interventions, model
from learner.blobs import open_blobs
from learner.comm import Comm
from learner.config import LearnerConfig
from learner.desk import Desk
from learner.history import Past, catch_up, checkpoints, this_machine
from learner.inbox import Selection
from learner.issuer import NOTHING
from learner.ledger import Ledger
from learner.prompts.episodes import Episodes
from learner.prompts.source import open_source
from learner.prompts.stream import Prompts
from learner.publish import Publisher, patiently
from learner.report import Report
from learner.step import TrainState, train_step

log = logging.getLogger("isentrope.learner")


@dataclass(slots=True)
class Learner:
    """The parts of one learner process, wired."""

    run: RunConfig
    config: LearnerConfig
    folder: RunFolder
    state: TrainState
    desk: Desk
    prompts: Prompts
    publisher: Publisher
    report: Report
    fail: Failpoint
    comm: Comm
    stop: threading.Event = field(default_factory=threading.Event)

    def idle(self) -> bool:
        """Twice a second while waiting: mend Redis if it lost its memory, ask whether all ranks are
        there, show that we live; True: stop.
        """
        self.comm.beat()
        self.publisher.ensure()
        self.report.live(self.desk, self.state.t)
        return self.stop.is_set()


def learn(run: RunConfig, config: LearnerConfig, folder: RunFolder, comm: Comm) -> str:
    """Train until the steps are done, the task is solved, nothing can be learned any more, or a
    signal says stop; returns which. Of many ranks rank 0 learns, the others follow.
    """
    with ExitStack() as stack:
        it = _wire(run, config, folder, comm, stack)
        it.desk.want(it.state.ask or NOTHING)
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
    report = train_step(it.state, batch.items, it.config)
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
        _checkpoint(it)
    it.publisher.offer(t, t, tensors, record.digest)
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
    it.publisher.publish(it.state.t, it.state.t, tensors, digest(tensors))
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


# ---- wiring --------------------------------------------------------------------------------------


def _wire(
    run: RunConfig, config: LearnerConfig, folder: RunFolder, comm: Comm, stack: ExitStack
) -> Learner:
    incarnation = folder.claim()
    stack.callback(folder.release)
    source = open_source(config.prompts, run.seed)
    network, tokenizer = model.load(run, config)
    context: zmq.Context[Any] = stack.enter_context(zmq.Context())
    socket, endpoint = channel.bind_router(
        context, run.learner, keys.read(run.keys), run.max_frame_mb << 20
    )
    stack.callback(socket.close, 0)
    sealed = seal_of(folder.journal)
    checkpoint.sweep(folder.checkpoints)
    past = catch_up(folder, run, config)
    if past.recomputed:
        log.info(
            "recomputed %d steps from the journal, %s",
            past.recomputed,
            "exact" if past.exact else "approximate",
        )
    journal = Journal(folder.journal, incarnation)
    stack.callback(journal.close)
    _open_journal(journal, past, run, config, folder, incarnation, sealed)
    fail = Failpoint.parse(run.failpoint)
    registry = Registry(run.redis, folder.run_id)
    patiently("take over the run", lambda: registry.fence(incarnation), meanwhile=comm.beat)
    store = open_blobs(run, registry, incarnation)
    stack.callback(store.close)
    publisher = Publisher(
        registry,
        store,
        incarnation,
        config.keep_versions,
        fail,
        snapshot_every=config.snapshot_every,
        meanwhile=comm.beat,
    )
    room = model.max_length(network) - config.max_tokens
    if room < 1:
        raise ConfigError(
            f"learner.max_tokens = {config.max_tokens}: the model's context is "
            f"{model.max_length(network)} tokens, prompt included; take less"
        )
    prompts = Prompts(
        source,
        config.prompts,
        tokenizer,
        model.stop_ids(network, tokenizer),
        run.seed,
        room,
        Episodes(config.feedback, config.intervene, config.prompts, tokenizer),
    )
    desk = Desk(
        socket,
        run_id=folder.run_id,
        incarnation=incarnation,
        digest=run_digest(run),
        vocab_size=network.config.vocab_size,
        config=config,
        journal=journal,
        ledger=past.ledger,
        prompts=prompts,
        failpoint=fail,
        max_bytes=run.max_frame_mb << 20,
        meanwhile=comm.beat,
    )
    stack.callback(desk.close)
    report = Report(folder, registry, config, past.ledger, past.state.t)
    stack.callback(report.close)
    it = Learner(run, config, folder, past.state, desk, prompts, publisher, report, fail, comm)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: it.stop.set())
    log.info(
        "learner of run %s, incarnation %d, at step %d, on %s",
        folder.run_id,
        incarnation,
        past.state.t,
        endpoint,
    )
    return it


def _open_journal(
    journal: Journal,
    past: Past,
    run: RunConfig,
    config: LearnerConfig,
    folder: RunFolder,
    incarnation: int,
    sealed: tuple[str, int] | None,
) -> None:
    torch_version, threads, world = this_machine()
    sections = (("run", run), ("learner", config))
    settings = {
        name: msgspec.msgpack.decode(msgspec.msgpack.encode(section)) for name, section in sections
    }
    for name in LOCAL:  # where Redis is, with what password: not the run's to remember
        del settings["run"][name]
    opened = Open(
        run=folder.run_id,
        incarnation=incarnation,
        config=settings,
        torch=torch_version,
        threads=threads,
        world_size=world,
        sealed=sealed,
        at=time.time(),
    )
    past.ledger.apply(opened, journal.append(opened))
    if past.ledger.learner_config != settings["learner"]:
        change = ConfigChange(t=past.state.t, overrides={"learner": settings["learner"]})
        past.ledger.apply(change, journal.append(change))
    journal.commit()


def check_same_run(folder: RunFolder, run: RunConfig) -> None:
    """Raises ConfigError when the journal was written under another [run] section."""
    first = next((record for _, record in read(folder.journal) if isinstance(record, Open)), None)
    if first is None:
        return
    before = run_digest(msgspec.convert(first.config["run"], RunConfig))
    if before != run_digest(run):
        raise ConfigError(
            f"{folder.path} was made with another [run] section (digest {before}, now "
            f"{run_digest(run)}); resume with the recipe it was started with, or start a new run"
        )
