"""Our exceptions, by who is at fault.

    IsentropeError
    ├── ConfigError       the user's recipe or command line
    ├── DataError         a dataset, a model folder, a tokenizer
    ├── WireError         a message that is malformed or lies; never fatal for who receives it
    ├── JournalError      the run folder: corruption, a second learner, a failed fsync
    ├── WeightsError      a weight version that is missing, cut or not what its digest says
    │   └── ReplacedError another learner has taken over this run
    ├── EngineError       the generation engine failed (infrastructure: the ticket goes back)
    │   └── EngineAway    there is none just now, another is being made: the ticket is as it was
    ├── RankError         another process of the same learner is gone
    └── DeadlineError     something waited for did not happen in time; the message says what

Every message is one line: what is wrong, where, and what to do.
"""


class IsentropeError(Exception):
    """Root of the tree. Commands print its message on one line and exit with `exit_code`."""

    exit_code = 1


class ConfigError(IsentropeError, ValueError):
    exit_code = 2


class DataError(IsentropeError, ValueError):
    exit_code = 2


class WireError(IsentropeError, ValueError):
    """`reason` is the short word that the counters and the refused peer see."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.reason, self.detail)


class JournalError(IsentropeError):
    exit_code = 3


class WeightsError(IsentropeError):
    pass


class ReplacedError(WeightsError):
    pass


class EngineError(IsentropeError):
    pass


class EngineAway(EngineError):
    pass


class RankError(IsentropeError):
    pass


class DeadlineError(IsentropeError, TimeoutError):
    pass
