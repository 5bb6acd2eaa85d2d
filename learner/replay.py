"""Train again from the journal, with no actors: to the same bits, or with other methods on the same
data.

With the recorded configuration every step must come out bit for bit (CPU, same threads and torch).
With another one, the recorded data is off-policy from the first differing step on: the effective
sample size of the ratio between the replayed policy and the behaviour policy says how far the
answer can be trusted, and replay stops below a threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from common.config import RunConfig
from common.runfolder import RunFolder
from common.versions import digest
from learner import model
from learner.config import LearnerConfig
from learner.history import catch_up
from learner.inbox import Selection
from learner.step import StepReport


class Replayed(NamedTuple):
    steps: int
    equal: int  # steps whose parameters are the recorded ones, bit for bit
    digest: str  # of the parameters at the end
    stopped: str  # why it ended before the journal did


def replay(
    folder: RunFolder,
    run: RunConfig,
    config: LearnerConfig,
    *,
    override: bool,
    least_ess: float,
    show: Callable[[int, StepReport, bool], None],
) -> Replayed:
    """From step 0 to the journal's end. Raises JournalError where a recorded step does not come out
    again.
    """
    equal, stopped = 0, ""

    def on_step(batch: Selection, report: StepReport, same: bool) -> bool:
        nonlocal equal, stopped
        equal += same and not override
        show(batch.t, report, same)
        share = report.metrics["ess_share"]
        assert isinstance(share, float)
        if override and share < least_ess:
            stopped = f"the effective sample size fell to {share:.2f}: the policy is too far away"
        return not stopped

    past = catch_up(folder, run, config, from_start=True, override=override, on_step=on_step)
    return Replayed(
        past.recomputed, equal, digest(model.snapshot(past.state.model, run.weights_dtype)), stopped
    )
