"""What a run has been: the newest good checkpoint, then the journal folded on top of it, step by
step.

Resume and replay are the same walk. A step found in the journal is trained again on the very groups
the batch rule picks, and must come out as recorded: the same tickets always, the same bits on the
same threads and torch build.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import msgspec

from common import journal
from common.config import RunConfig
from common.errors import JournalError
from common.journal import Position
from common.records import AnyRecord, ConfigChange, Open, Step
from common.runfolder import RunFolder
from common.versions import digest
from learner import checkpoint, model
from learner.config import LearnerConfig
from learner.follow import followers
from learner.inbox import Selection, select
from learner.ledger import Ledger
from learner.step import StepReport, TrainState, make_state, train_step
from learner.tally import correct, seen

log = logging.getLogger("isentrope.history")
OnStep = Callable[[Selection, StepReport, bool], bool]  # (batch, report, bits agree) → go on?
OnBatch = Callable[[TrainState, Selection, LearnerConfig], None]  # before it is trained on again


@dataclass(slots=True)
class Past:
    """Where a run stands: the parameters after `state.t` steps, and the ledger at the journal's
    end.
    """

    state: TrainState
    ledger: Ledger
    config: LearnerConfig
    recomputed: int = 0
    exact: bool = True  # every recomputed step came out bit for bit


def catch_up(
    folder: RunFolder,
    run: RunConfig,
    config: LearnerConfig,
    *,
    from_start: bool = False,
    override: bool = False,
    on_step: OnStep | None = None,
    on_batch: OnBatch | None = None,
) -> Past:
    """Fold the whole journal; train again every step that no checkpoint holds.

    `from_start` ignores checkpoints. `override` trains with `config` instead of what the journal
    says, and compares nothing. Raises JournalError when a step does not come out as it was
    recorded, DataError when a checkpoint is of something else. `on_batch` may do with the state
    what it likes if it leaves it as it was.
    """
    found = None if from_start else _from_checkpoint(folder, run, config)
    past, start = found or (Past(make_state(run, config), _ledger(run, config), config), None)
    machine: tuple[str, int, int] | None = _machine(folder.journal)
    for at, record in journal.read(folder.journal, start):
        if isinstance(record, Step):
            batch = _batch_of(past, record)
            if on_batch is not None:
                on_batch(past.state, batch, past.config)
            if not _redo(past, batch, record, run, machine, override, on_step):
                return past
        past.ledger.apply(record, at)
        if isinstance(record, Open):
            machine = (record.torch, record.threads, record.world_size)
        if isinstance(record, Open | ConfigChange) and not override:
            past.config = msgspec.convert(past.ledger.learner_config, LearnerConfig)
    return past


def checkpoints(folder: RunFolder) -> list[Path]:
    """Newest first."""
    return sorted((p for p in folder.checkpoints.glob("step-*") if p.is_dir()), reverse=True)


def this_machine() -> tuple[str, int, int]:
    """What bit equality depends on: torch build, threads, world size."""
    import torch

    from learner.comm import Comm

    return str(torch.__version__), torch.get_num_threads(), Comm.current().world_size


def _from_checkpoint(
    folder: RunFolder, run: RunConfig, config: LearnerConfig
) -> tuple[Past, Position] | None:
    for path in checkpoints(folder):
        state = make_state(run, config)
        try:
            data = checkpoint.load(path, state)
        except JournalError as error:
            log.warning("checkpoint %s is not usable (%s); taking the one before", path.name, error)
            continue
        fold = Ledger.peek(data)
        end = Position(*fold.end)
        records = journal.read(folder.journal, Position(*fold.oldest))
        ledger = Ledger.restore(fold, _before(end, records), followers(config, run.seed))
        kept = (
            msgspec.convert(ledger.learner_config, LearnerConfig)
            if ledger.learner_config
            else config
        )
        return Past(state, ledger, kept), end
    return None


def _ledger(run: RunConfig, config: LearnerConfig) -> Ledger:
    return Ledger(followers=followers(config, run.seed))


def _before(
    end: Position, records: Iterator[tuple[Position, AnyRecord]]
) -> Iterator[tuple[Position, AnyRecord]]:
    return takewhile(lambda pair: pair[0] < end, records)


def _batch_of(past: Past, record: Step) -> Selection:
    batch = select(past.ledger, past.config)
    if batch is None or (batch.consumed, batch.dropped) != (record.consumed, record.dropped):
        raise JournalError(
            f"step {record.t}: the journal says it trained on tickets {record.consumed[:4]}…, "
            f"the batch rule gives {batch.consumed[:4] if batch else 'none'}…; "
            "the journal was edited or is incomplete"
        )
    return batch


def _redo(
    past: Past,
    batch: Selection,
    record: Step,
    run: RunConfig,
    machine: tuple[str, int, int] | None,
    override: bool,
    on_step: OnStep | None,
) -> bool:
    log.info("catching up: step %d again, from the journal", record.t + 1)
    report = train_step(past.state, batch.items, past.config, correct=correct(seen(batch)))
    same = override or digest(model.snapshot(past.state.model, run.weights_dtype)) == record.digest
    past.recomputed += 1
    past.exact &= same
    if not same:
        _explain(record, past.state, machine)
    return on_step is None or on_step(batch, report, same)


def _explain(record: Step, state: TrainState, machine: tuple[str, int, int] | None) -> None:
    """A step came out with other bits: an error on the same CPU set-up, otherwise a word."""
    here = this_machine()
    if machine == here and next(state.model.parameters()).device.type == "cpu":
        raise JournalError(
            f"step {record.t} recomputed to other parameters than recorded "
            f"(same torch {here[0]}, {here[1]} threads): the model folder changed, or the journal "
            "is another run's"
        )
    log.warning(
        "step %d: approximate, not bit-equal (recorded on %s, now %s)", record.t, machine, here
    )


def _machine(folder: Path) -> tuple[str, int, int] | None:
    opens: Iterator[AnyRecord] = (r for _, r in journal.read(folder) if isinstance(r, Open))
    first = next(opens, None)
    return (first.torch, first.threads, first.world_size) if isinstance(first, Open) else None
