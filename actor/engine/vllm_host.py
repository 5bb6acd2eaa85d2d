"""vLLM's processes: started from a thread of their own, watched, and ended by id with all that they
started.

The thread lives as long as the engine: the kernel kills vLLM's processes when the thread that
started them is gone, which is how they end with an actor that was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from actor.engine import vllm_process
from actor.engine.vllm_args import VllmArgs, on_device
from common.errors import ConfigError, EngineError, IsentropeError

_GRACE_S = 5.0  # for the kernel to end a process that is killed
_LOOK_S = 0.1  # how often a start that is to end, or an end, is looked at
_LOOKS = 5  # at an end, for its reason
_SHARED_MEMORY = Path("/dev/shm")
_NAMES = ("EngineCore", "VLLM_DP_Coordinator")  # of the processes that vLLM starts here
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would take over the actor's threads' locks
}


class Host:
    """One vLLM engine; `llm` once it is up."""

    def __init__(
        self, model: Path, args: VllmArgs, *, device: str, threads: int, kv_bytes: int
    ) -> None:
        self.llm: Any = None
        self._model, self._args = model, args
        self._device, self._threads, self._kv_bytes = device, threads, kv_bytes
        self._folder = Path(tempfile.mkdtemp(prefix="isentrope-vllm-"))
        self._roots: list[BaseProcess] = []
        self._others: set[int | None] = set()
        self._error: Exception | None = None
        self._leave, self._settled, self._ended = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._live, name="vllm", daemon=True)

    def start(self, statistics: Callable[[Any, int], Any], within_s: float) -> None:
        """Until vLLM is up, half a minute or more. Raises EngineError and ConfigError, with the
        root cause in one line; then everything is closed."""
        self._statistics = statistics
        self._thread.start()
        if not self._settled.wait(within_s):
            self._error = EngineError(
                f"vLLM was not up within {within_s:g} s (actor.engine_start_s)"
            )
        if self._error is not None:
            error = self._told(self._error)
            self.close()
            raise error from None

    def _told(self, error: Exception) -> IsentropeError:
        if isinstance(error, IsentropeError):
            return error
        cause = self.cause() or vllm_process.said(error)
        return EngineError(f"vLLM did not start: {cause}{_advice(cause)}")

    def cause(self) -> str:
        """Why a process of the engine failed; empty when none said so."""
        return vllm_process.root_cause(self._folder)

    def pids(self) -> list[int]:
        """Of all processes that belong to the engine and live."""
        return [process.pid for process in self._tree()]

    async def died(self) -> str:
        """Until one of the engine's processes ends: says which, and how."""
        loop, gone = asyncio.get_running_loop(), asyncio.Event()
        fds = dict(_watchable(self._tree()))
        try:
            for fd in fds:
                loop.add_reader(fd, gone.set)
            await gone.wait()
        finally:
            for fd in fds:
                loop.remove_reader(fd)
                os.close(fd)
        for root in self._roots:
            for _ in range(_LOOKS):  # vLLM's own thread may be the one that learns how it ended
                await asyncio.to_thread(root.join, _LOOK_S)
                if root.exitcode is not None and root.exitcode < 0:
                    return f"{root.name} was killed by signal {-root.exitcode}"
                await asyncio.sleep(_LOOK_S)
        return "one of its processes ended"

    def close(self) -> None:
        """End every process at once: there is nothing to save, and what hangs would not hear.
        Blocks for a moment."""
        self._leave.set()
        if self._thread.ident is not None:
            while not self._settled.wait(_LOOK_S):  # it is about to start, or starting
                _kill(self._tree())
            tree, shared = self._tree(), self._shared()
            if self.llm is not None:
                context = self.llm.engine_core.resources.ctx
                with contextlib.suppress(Exception):  # whatever it complains of, they are killed
                    self.llm.shutdown(timeout=0)
                self.llm = None
                # vLLM never ends it; this waits for sockets that the event loop closes in a moment
                threading.Thread(target=context.term, daemon=True).start()
            _kill(tree)
            _unlink(shared)
            for root in self._roots:
                root.join()
            self._ended.set()
            self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _live(self) -> None:
        """The thread: start, then stay until the engine is closed."""
        try:
            self._others = {child.pid for child in multiprocessing.active_children()}
            self.llm = self._start()
        except Exception as error:  # noqa: BLE001  whatever vLLM raises is told in one line
            self._error = error
        self._roots = self._started()
        self._settled.set()
        self._ended.wait()

    def _start(self) -> Any:
        os.environ.update(_QUIET)
        if not self._args.verbose:
            path = self._folder / "logging.json"
            path.write_text(json.dumps(vllm_process.logging_config(self._folder)))
            os.environ |= {"VLLM_LOGGING_CONFIG_PATH": str(path), "VLLM_CONFIGURE_LOGGING": "1"}
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        from actor.engine.vllm_transfer import BACKENDS

        if self._leave.is_set():
            raise EngineError("the engine is closed")
        device = current_platform.device_type
        args = on_device(self._args, device, self._device, self._kv_bytes)
        transfer = WeightTransferConfig(backend=BACKENDS[self._args.transfer])
        with _environment(_on_cpu(self._threads) if current_platform.is_cpu() else {}):
            try:
                config = AsyncEngineArgs(
                    model=str(self._model), weight_transfer_config=transfer, **args
                ).create_engine_config()
            except (TypeError, ValueError, NotImplementedError, OSError) as error:
                why = vllm_process.said(error)
                raise ConfigError(f"vLLM cannot serve {self._model} like this: {why}") from None
            return AsyncLLM.from_vllm_config(
                config, stat_loggers=[self._statistics], disable_log_stats=True
            )

    def _started(self) -> list[BaseProcess]:
        """Processes that vLLM has started here since this engine began."""
        return [
            child
            for child in multiprocessing.active_children()
            if child.name.startswith(_NAMES) and child.pid not in self._others
        ]

    def _shared(self) -> set[str]:
        """Segments of Python's shared_memory that the processes have mapped (Linux)."""
        found: set[str] = set()
        for pid in self.pids():
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{pid}/maps").read_text()
                found |= set(re.findall(rf"{_SHARED_MEMORY}/(psm_\w+)", maps))
        return found

    def _tree(self) -> list[Any]:
        """The engine's processes and all that they started, as psutil sees them."""
        if self._thread.ident is None:
            return []
        import psutil  # comes with vLLM

        found = []
        for root in self._roots or self._started():
            with contextlib.suppress(psutil.NoSuchProcess):
                top = psutil.Process(root.pid)
                found += [*top.children(recursive=True), top]
        return found


def _kill(tree: list[Any]) -> None:
    import psutil

    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(tree, timeout=_GRACE_S)


def _unlink(shared: set[str]) -> None:
    """Clear away shared memory whose owners were killed; Python's tracker forgets it."""
    for name in shared:
        with contextlib.suppress(FileNotFoundError):
            (_SHARED_MEMORY / name).unlink()
            resource_tracker.unregister(f"/{name}", "shared_memory")


def _watchable(tree: list[Any]) -> Iterator[tuple[int, int]]:
    """(a descriptor that becomes readable when it ends, process id)."""
    for process in tree:
        with contextlib.suppress(OSError):
            yield os.pidfd_open(process.pid), process.pid


def _on_cpu(threads: int) -> dict[str, str]:
    """Actors and a learner share the cores: no pinning, which would put all on the same ones. And
    memory that was freed is kept (glibc): a swap of weights takes and frees all of their size, and
    fresh pages from the kernel are a quarter of its pause."""
    count = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    kept = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", **kept, **count}


@contextlib.contextmanager
def _environment(extra: Mapping[str, str]) -> Iterator[None]:
    """What only vLLM's processes are to inherit; the actor's graders keep the environment."""
    names = {*extra, "LD_PRELOAD"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(extra)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _advice(cause: str) -> str:
    """What to do about the failures that a recipe causes."""
    if re.search(r"kv cache|cache blocks", cause, re.IGNORECASE):
        return "; lower actor.max_length or raise actor.vllm.kv_cache_memory_bytes"
    return ""
