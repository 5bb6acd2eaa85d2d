"""What the processes that vLLM starts do first: die with their parent, and keep to one line.

vLLM is told to log through `Voice` (`logging_config`), which every one of its processes makes while
it imports vLLM, before it allocates anything. A failure's traceback goes into a file of the
engine's folder; its root cause alone goes on to the actor. This module must not import vLLM.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any, TextIO

from common import process

LOGGER = "actor.engine.vllm"  # under which the actor logs what vLLM has to say
_FAILURES, _OUTPUT = "failures", "output"  # files of the engine's folder
_LONGEST = 400  # characters of one line
_RAISED = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt)\b.*")
_KNOWN = (  # warnings of what is meant
    "Enforce eager set",
    "Inductor compilation was disabled",
    "Triton is not installed",
    "Model Runner V2 requires Triton",
    "Reset SSM cache type",
    "Using None for EOS token id",
    "[shutdown]",
)
_EMPTY_PHRASES = ("root cause", "stack trace", "EngineDeadError", "See error")


class Voice(logging.Handler):
    """vLLM's warnings in the actor's process and its errors in all of them, in one line each; a
    failure's cause is also written down."""

    def __init__(self, folder: str) -> None:
        super().__init__(logging.WARNING)
        self._folder = Path(folder)
        self._child = multiprocessing.parent_process() is not None
        if self._child:
            die_with_parent()
            _keep_output(self._folder / _OUTPUT)

    def emit(self, record: logging.LogRecord) -> None:
        text = _first_line(record.getMessage())
        if record.levelno < logging.ERROR and (self._child or text.startswith(_KNOWN)):
            return
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            text += f" ({said(error)})"
        if not self._child:
            logging.getLogger(LOGGER).log(record.levelno, "%s", text)
            return
        print(f"vllm {record.process} {record.levelname[0]} {text}", file=_stderr(), flush=True)
        if error is not None:
            _append(self._folder / _FAILURES, said(error))
            _append(self._folder / _OUTPUT, logging.Formatter().formatException(record.exc_info))  # type: ignore[arg-type]


def logging_config(folder: Path) -> dict[str, Any]:
    """For VLLM_LOGGING_CONFIG_PATH."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"voice": {"class": f"{__name__}.Voice", "folder": str(folder)}},
        "loggers": {
            "vllm": {"handlers": ["voice"], "level": "WARNING", "propagate": False},
            # it warns of every layer that a partial version leaves as it is
            "vllm.model_executor.model_loader.reload": {"level": "ERROR"},
        },
    }


def root_cause(folder: Path) -> str:
    """Why a process of the engine in `folder` failed, in one line; empty when none said so."""
    for name in (_FAILURES, _OUTPUT):
        try:
            lines = (folder / name).read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            if _RAISED.match(line) and not any(phrase in line for phrase in _EMPTY_PHRASES):
                return line[:_LONGEST]
    return ""


def said(error: BaseException) -> str:
    """An exception as one line: that of its explicit root, without pydantic's decoration."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and re.match(r"\d+ validation errors? for", lines[0]) and len(lines) > 1:
        lines = [re.sub(r"\s*\[type=.*", "", line) for line in lines[1:]]
        field = f"{lines[0]}: " if " " not in lines[0] else ""
        lines = [field + line.removeprefix("Value error, ") for line in lines if " " in line]
    return f"{type(error).__name__}: {_first_line(lines[0] if lines else '')}"


def die_with_parent() -> None:
    """The kernel kills this process when the thread that started it is gone (Linux)."""
    parent = multiprocessing.parent_process()
    if sys.platform != "linux" or parent is None:
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(process.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it was gone before we could ask
        os._exit(1)


def _keep_output(path: Path) -> None:
    """What Python prints in this process, tracebacks included, goes into the file."""
    if getattr(sys.stderr, "name", "") != str(path):
        sys.stderr = sys.stdout = path.open("a", buffering=1, errors="replace")


def _stderr() -> TextIO:
    return sys.__stderr__ or sys.stderr


def _append(path: Path, text: str) -> None:
    with path.open("a", errors="replace") as file:
        file.write(text + "\n")


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:_LONGEST] if lines else ""
