"""The parts of one learner process, and how they are opened; each closes with the process."""

from __future__ import annotations

import logging
import signal
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

from common import channel, keys
from common.config import LOCAL, RunConfig
from common.errors import ConfigError
from common.failpoints import Failpoint
from common.journal import Journal, read, seal_of
from common.recipe import digest as run_digest
from common.records import ConfigChange, Open
from common.runfolder import RunFolder
from common.versions import Registry
from learner import checkpoint, model
from learner.blobs import open_blobs
from learner.comm import Comm
from learner.config import LearnerConfig
from learner.desk import Desk
from learner.history import Past, catch_up, this_machine
from learner.prompts.episodes import Episodes
from learner.prompts.source import open_source
from learner.prompts.stream import Prompts, room_for_prompts
from learner.publish import Publisher
from learner.report import Report
from learner.step import TrainState

log = logging.getLogger("isentrope.learner")

LOOK_S = 3.0  # that training is held up by one look at a Redis that says nothing


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
        self.report.trouble = self.publisher.trouble
        self.report.live(self.desk, self.state.t)
        return self.stop.is_set()


def wire(
    run: RunConfig, config: LearnerConfig, folder: RunFolder, comm: Comm, stack: ExitStack
) -> Learner:
    """All parts, at the point where the run stands. A signal to end sets `stop` from then on.

    Raises ConfigError when the model leaves no room for a prompt.
    """
    incarnation = folder.claim()
    stack.callback(folder.release)
    prompts, vocab_size = _prompts(run, config)
    socket, endpoint = _socket(run, stack)
    past, journal = _take_up(run, config, folder, incarnation, stack)
    fail = Failpoint.parse(run.failpoint)
    registry = Registry(run.redis, folder.run_id, LOOK_S)
    if registry.unguarded:
        log.warning("%s", registry.unguarded)
    publisher = _publisher(run, config, registry, incarnation, fail, comm, stack)
    desk = Desk(
        socket,
        run_id=folder.run_id,
        incarnation=incarnation,
        digest=run_digest(run),
        vocab_size=vocab_size,
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
    say = "learner of run %s, incarnation %d, at step %d, on %s"
    log.info(say, folder.run_id, incarnation, past.state.t, endpoint)
    return it


def _prompts(run: RunConfig, config: LearnerConfig) -> tuple[Prompts, int]:
    """The prompt stream, and the size of the model's vocabulary."""
    source = open_source(config.prompts, run.seed)
    network, tokenizer = model.load(run, config)
    room = room_for_prompts(model.max_length(network), config.max_tokens)
    prompts = Prompts(
        source,
        config.prompts,
        tokenizer,
        model.stop_ids(network, tokenizer),
        run.seed,
        room,
        Episodes(config.feedback, config.intervene, config.prompts, tokenizer),
    )
    return prompts, network.config.vocab_size


def _socket(run: RunConfig, stack: ExitStack) -> tuple[zmq.Socket[bytes], str]:
    context: zmq.Context[Any] = stack.enter_context(zmq.Context())
    socket, endpoint = channel.bind_router(
        context, run.learner, keys.read(run.keys), run.max_frame_mb << 20
    )
    stack.callback(socket.close, 0)
    return socket, endpoint


def _take_up(
    run: RunConfig, config: LearnerConfig, folder: RunFolder, incarnation: int, stack: ExitStack
) -> tuple[Past, Journal]:
    """What the run has been, and the journal that goes on behind it."""
    sealed = seal_of(folder.journal)
    checkpoint.sweep(folder.checkpoints)
    past = catch_up(folder, run, config)
    if past.recomputed:
        exact = "exact" if past.exact else "approximate"
        log.info("recomputed %d steps from the journal, %s", past.recomputed, exact)
    journal = Journal(folder.journal, incarnation)
    stack.callback(journal.close)
    _open_journal(journal, past, run, config, folder, incarnation, sealed)
    return past, journal


def _publisher(
    run: RunConfig,
    config: LearnerConfig,
    registry: Registry,
    incarnation: int,
    fail: Failpoint,
    comm: Comm,
    stack: ExitStack,
) -> Publisher:
    store = open_blobs(run, registry, incarnation)
    stack.callback(store.close)
    return Publisher(
        registry,
        store,
        incarnation,
        config.keep_versions,
        fail,
        snapshot_every=config.snapshot_every,
        meanwhile=comm.beat,
    )


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
