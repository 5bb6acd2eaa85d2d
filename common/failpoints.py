"""Places at which a process can be told to die by SIGKILL: `[run] failpoint = "after_append:3"`.

The names ship with the product, so that whoever doubts a promise about crashes can try it on the
real processes: `isentrope run tiny -s run.failpoint=after_append:3` kills the learner between its
third journal append and the acknowledgement. An object, handed to whoever passes such a place.
"""

from __future__ import annotations

import difflib
import os
import signal

from common.errors import ConfigError

NAMES = {
    # the learner, in the order of the story
    "after_issue": "tickets are durable in the journal, none is sent",
    "after_send": "a ticket is handed to the socket",
    "after_receive": "a group is received, nothing is journaled",
    "after_append": "groups are durable in the journal, none is acknowledged",
    "after_ack": "groups are acknowledged, none is trained on",
    "after_step": "the optimiser has moved, no record says so",
    "after_step_record": "the step record is durable, no checkpoint or version is",
    "after_checkpoint": "a checkpoint is renamed into place",
    "after_blobs": "the bytes of a version are stored, no manifest names them",
    "after_manifest": "a version is published",
    # an actor
    "mid_generation": "some rollouts of a ticket are sampled, others are not",
    "before_ack": "a result is sent and not yet answered",
}


class Failpoint:
    """Kills this very process at the `count`-th pass of `name`; an empty name never fires."""

    def __init__(self, name: str = "", count: int = 1) -> None:
        self.name = name
        self.count = count
        self.passes = 0

    @classmethod
    def parse(cls, text: str, life: int = 0) -> Failpoint:
        """From "name" or "name:count"; of several, "a:3,b:1", life k of a process has the k-th.

        Raises ConfigError.
        """
        points = [cls._of(point.strip()) for point in text.split(",")] if text else []
        return points[life] if life < len(points) else cls()

    def __str__(self) -> str:
        return f"{self.name}:{self.count}" if self.name else ""

    @classmethod
    def _of(cls, text: str) -> Failpoint:
        name, _, count = text.partition(":")
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)
            raise ConfigError(f"run.failpoint: no failpoint {name!r}; the nearest is {near[0]!r}")
        if count and not (count.isdecimal() and int(count) > 0):
            raise ConfigError(
                f"run.failpoint: {text!r} must be NAME:COUNT with a count from 1, as in {name}:3"
            )
        return cls(name, int(count or 1))

    def __call__(self, name: str) -> None:
        assert name in NAMES, f"{name!r} is missing in failpoints.NAMES"
        if name != self.name:
            return
        self.passes += 1
        if self.passes == self.count:
            os.kill(os.getpid(), signal.SIGKILL)
