"""`isentrope doctor`: what this machine has and lacks, one line each, with what to do."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click

from common import vllm_version
from common.errors import IsentropeError
from common.options import overrides_option

Verdict = Literal["ok", "warn", "fail"]
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
GIB = 1 << 30
LONGEST_S = 600.0  # to read a file of many millions of rows
MOST_LINES = 10  # of warnings about data


class Finding(NamedTuple):
    verdict: Verdict
    what: str
    said: str  # the fact, and what to do where something is wrong


@click.command()
@click.argument("recipe", required=False, default="tiny")
@overrides_option
def doctor(recipe: str, overrides: tuple[str, ...]) -> None:
    """Check this machine, and RECIPE (default: tiny), before a run."""
    worst = 0
    for finding in examine(recipe, overrides):
        mark = click.style(f"{finding.verdict:<4}", fg=COLOURS[finding.verdict])
        click.echo(f"{mark}  {finding.what:<10} {finding.said}")
        worst = max(worst, 1 if finding.verdict == "fail" else 0)
    sys.exit(worst)


def examine(recipe: str, overrides: tuple[str, ...] = ()) -> Iterator[Finding]:
    yield python()
    yield torch()
    yield transformers()
    yield vllm()
    yield cores()
    yield memory()
    yield redis_binary()
    yield loopback()
    yield disk()
    yield from of_recipe(recipe, overrides)


def python() -> Finding:
    return Finding("ok", "python", f"{sys.version.split()[0]} at {sys.executable}")


TORCH = """import torch
cuda = torch.cuda.is_available()
where = f"{torch.cuda.device_count()} CUDA device(s)" if cuda else "CPU"
print(f"{torch.__version__}, {where}, {torch.get_num_threads()} threads")"""


def torch() -> Finding:
    said, wrong = _ask_python(TORCH)
    if wrong:
        return Finding("fail", "torch", f"{wrong}: pip install torch (the scripts pin the build)")
    return Finding("ok", "torch", said)


def transformers() -> Finding:
    """Transformers, and what is known to break it."""
    said, wrong = _ask_python("import transformers; print(transformers.__version__)")
    if wrong:
        return Finding("fail", "models", f"{wrong}: pip install transformers")
    if importlib.util.find_spec("torchvision") is not None:
        _, wrong = _ask_python("import torchvision")
    if wrong:  # it then breaks the import of every model
        return Finding(
            "fail",
            "models",
            f"torchvision does not fit this torch ({wrong}): "
            "pip uninstall torchvision torchaudio torchcodec",
        )
    return Finding("ok", "models", f"transformers {said}")


def vllm() -> Finding:
    """Found without importing it: that takes longer than everything else here."""
    found, wrong = vllm_version.installed(), vllm_version.wrong()
    if found is None:
        return Finding("ok", "vllm", 'not installed; only actor.engine = "vllm" needs it')
    if wrong:
        return Finding("warn", "vllm", wrong)
    return Finding("ok", "vllm", f"{found} ({vllm_version.SUPPORTED} works)")


def _ask_python(code: str) -> tuple[str, str]:
    """(what it printed, the last line of what went wrong), in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    wrong = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return done.stdout.strip(), wrong if done.returncode else ""


def cores() -> Finding:
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    load = os.getloadavg()[0]
    if load > count:
        return Finding("warn", "cores", f"{count}, and busy (load {load:.1f}): runs will be slower")
    verdict: Verdict = "ok" if count >= 2 else "warn"
    return Finding(verdict, "cores", f"{count}" if count >= 2 else "1: learner and actors share it")


def memory() -> Finding:
    """Free memory, the smaller of the machine's and the container's."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    info = Path("/proc/meminfo")
    if info.exists():
        rows = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        free = int(rows["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and limit.read_text().strip().isdecimal():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    if free < 2 * GIB:
        return Finding("warn", "memory", f"{free / GIB:.1f} GiB free; the demo takes about 2")
    return Finding("ok", "memory", f"{free / GIB:.1f} GiB free")


def redis_binary() -> Finding:
    from common.redis_server import binary

    try:
        return Finding("ok", "redis", f"{binary()}")
    except IsentropeError as error:
        return Finding("fail", "redis", str(error))


def loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=2):
                return Finding("ok", "ports", "loopback takes connections")
    except OSError as error:
        return Finding("fail", "ports", f"no connection over 127.0.0.1: {error}")


def disk() -> Finding:
    folder = Path("runs") if Path("runs").is_dir() else Path()
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return Finding("fail", "disk", f"cannot write to {folder.resolve()}; give --out DIR")
    if free < GIB:
        return Finding("warn", "disk", f"{free / GIB:.1f} GiB free; a full disk pauses a run")
    return Finding("ok", "disk", f"{free / GIB:.0f} GiB free under {folder.resolve()}")


def of_recipe(recipe: str, overrides: tuple[str, ...]) -> Iterator[Finding]:
    """The recipe itself, its model, its engine and, where they are named, its addresses."""
    from common.config import RunConfig
    from common.recipe import load_all, read

    try:
        sections = load_all(recipe, overrides)
    except IsentropeError as error:
        yield Finding("fail", "recipe", str(error))
        return
    run = sections["run"]
    assert isinstance(run, RunConfig)
    yield Finding("ok", "recipe", recipe)
    yield _attempt("model", lambda: _model(run.model))
    yield from _problems(recipe, overrides)
    yield from _graders(sections["learner"])
    if getattr(sections["actor"], "engine", "") == "vllm" and (wrong := vllm_version.wrong()):
        yield Finding("fail", "engine", wrong)
    given = read(recipe, overrides).get("run", {})
    if "learner" in given:
        yield _attempt("learner", lambda: _bindable(run.learner))
    if "redis" in given:
        yield _attempt("registry", lambda: _ping(run.redis))
        if open_ := _unguarded(run.redis):
            yield Finding("warn", "registry", open_)


def _problems(recipe: str, overrides: tuple[str, ...]) -> Iterator[Finding]:
    """Its sources, and what is left out of them: a file is read once, as a run reads it."""
    theirs = ("learner.", "run.seed", "run.model")  # no addresses with passwords
    ours = [override for override in overrides if override.startswith(theirs)]
    asked = [word for override in ours for word in ("-s", override)]
    done, said, told = _ask("-m", "learner.prompts.look", recipe, *asked)
    for line in told[: -1 if done else None][:MOST_LINES]:
        yield Finding("warn", "data", line)
    if done:
        yield Finding("fail", "data", told[-1].removeprefix("prompts: "))
    for line in said:
        yield Finding("ok", "data", line)


def _graders(learner: Any) -> Iterator[Finding]:
    """Whether each can be loaded, as an actor would."""
    names: dict[str, None] = {}
    for prompts in learner.prompts.each():
        names |= dict.fromkeys([part.grader for part in prompts.parts] or [prompts.grader])
    for name in names:
        code = (
            "from actor.grade.graders import resolve\n"
            "from common.process import import_from_here\n"
            f"import_from_here()\nresolve({name!r})"
        )
        done, _, told = _ask("-c", code)
        if done:
            yield Finding("fail", "grader", told[-1].partition("Error: ")[2] or told[-1])
        else:
            yield Finding("ok", "grader", name)


def _ask(*arguments: str) -> tuple[bool, list[str], list[str]]:
    """Of a Python process: whether it failed, what it said, what it said of errors, in lines."""
    command = [sys.executable, "-P", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=LONGEST_S
        )
    except subprocess.TimeoutExpired:
        return True, [], [f"no answer within {LONGEST_S:g} s"]
    told = [line for line in done.stderr.splitlines() if line.strip()]
    failed = done.returncode != 0
    return failed, done.stdout.splitlines(), told or [f"exit code {done.returncode}"] * failed


def _attempt(what: str, attempt: Callable[[], str]) -> Finding:
    try:
        return Finding("ok", what, attempt())
    except (IsentropeError, OSError) as error:
        return Finding("fail", what, str(error))


def _model(name: str) -> str:
    from common import models

    folder = models.find(name)
    missing = [part for part in ("tokenizer.json",) if not (folder / part).is_file()]
    if not list(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return f"{folder} ({size / 1e6:,.0f} MB)"


def _bindable(endpoint: str) -> str:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or host == "*":
        return endpoint
    with socket.create_server((host, int(port))):
        return f"{endpoint} is free"


def _unguarded(url: str) -> str:
    from common.softstate import SoftState

    try:
        return SoftState(url, "doctor").unguarded
    except IsentropeError:
        return ""  # said already


def _ping(url: str) -> str:
    from common.config import without_password
    from common.versions import Registry

    registry = Registry(url, "doctor", timeout_s=3.0)
    try:
        with registry.asking("answer"):
            registry.client.ping()
    finally:
        registry.close()
    return f"{without_password(url)} answers"
