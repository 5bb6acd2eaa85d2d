"""`[actor.vllm]`: arguments of vLLM's engine by vLLM's own names, checked before vLLM is imported.

What makes an actor an actor (token ids in and out, log-probs after temperature, weights that are
swapped, the size that `[actor]` names) is ours: setting it here is refused with the field to use.
Everything else goes through as it is.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from actor.config import ActorConfig
from common import vllm_version
from common.errors import ConfigError

TRANSFERS = ("spool", "nccl")  # ways of new weights into vLLM's workers
OWN = ("weight_transfer", "weight_transfer_device", "verbose")  # in [actor.vllm], and not vLLM's
KV_CACHE_BYTES_ON_CPU = 1 << 30  # at most, unless asked for
_PARALLEL = ("tensor", "pipeline", "prefill_context", "data")  # sizes whose product is the workers
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}

_TOKENS = "the learner renders and tokenises; the engine sees token ids only"
_ONE_MACHINE = "an actor lives on one machine: start an actor on each"
PROTECTED = {
    "model": "set run.model",
    "tokenizer": _TOKENS,
    "tokenizer_mode": _TOKENS,
    "tokenizer_revision": _TOKENS,
    "skip_tokenizer_init": _TOKENS,
    "enable_prompt_embeds": _TOKENS,
    "generation_config": "sampling is the ticket's: set learner.temperature and learner.max_tokens",
    "override_generation_config": "sampling is the ticket's: set learner.temperature",
    "dtype": "set actor.dtype",
    "max_model_len": "set actor.max_length",
    "max_num_seqs": "set actor.slots",
    "seed": "every rollout has a seed of its own: set run.seed",
    "logprobs_mode": "training needs the log-probability of what was sampled, after temperature",
    "max_logprobs": "training needs the log-probability of what was sampled, and no other",
    "worker_cls": "new weights come in through it",
    "worker_extension_cls": "new weights come in through it",
    "weight_transfer_config": 'set actor.vllm.weight_transfer to "spool" or "nccl"',
    "runner": "an actor generates",
    "convert": "an actor generates",
    "disable_log_stats": "the actor's status is made from vLLM's statistics",
    "enable_log_requests": "set actor.vllm.verbose",
    "log_config_file": "set actor.vllm.verbose",
    "logging_config": "set actor.vllm.verbose",
    "scheduler_cls": "pausing and version spans are vLLM's own scheduler's",
    "stream_interval": "only finished rollouts are looked at",
    "nnodes": _ONE_MACHINE,
    "node_rank": _ONE_MACHINE,
    "master_addr": _ONE_MACHINE,
    "master_port": _ONE_MACHINE,
    "data_parallel_address": _ONE_MACHINE,
    "data_parallel_backend": _ONE_MACHINE,
    "data_parallel_rank": _ONE_MACHINE,
    "data_parallel_external_lb": _ONE_MACHINE,
    "data_parallel_hybrid_lb": _ONE_MACHINE,
    "data_parallel_size_local": _ONE_MACHINE,
}


class VllmArgs(NamedTuple):
    """What `[actor]` and `[actor.vllm]` come to."""

    engine: dict[str, Any]  # of AsyncEngineArgs, but for what depends on the device
    transfer: str
    verbose: bool  # leave vLLM's own log as it is
    gpu: int | None = None  # that sends by NCCL


def vet(actor: ActorConfig, names: Collection[str] | None = None) -> VllmArgs:
    """Raises ConfigError: vLLM is missing or unknown, or a setting of `[actor.vllm]` is not to be
    had. `names`: what vLLM's engine takes; None asks the installed one."""
    if names is None:
        if (wrong := vllm_version.wrong()) is not None:
            raise ConfigError(f'actor.engine = "vllm": {wrong}')
        names = _installed_names()
    given = dict(actor.vllm)
    transfer, verbose = given.pop("weight_transfer", "spool"), given.pop("verbose", False)
    if transfer not in TRANSFERS:
        raise ConfigError(f"actor.vllm.weight_transfer: {transfer!r} is none of {TRANSFERS}")
    if not isinstance(verbose, bool):
        raise ConfigError(f"actor.vllm.verbose: {verbose!r} must be true or false")
    device = given.pop("weight_transfer_device", None)
    for name, value in given.items():
        _check(name, value, names)
    return VllmArgs(_ours(actor) | given, transfer, verbose, _sender(transfer, device, given))


def on_device(args: VllmArgs, device: str, wanted: str, kv_bytes: int = 0) -> dict[str, Any]:
    """The arguments for the device that the installed vLLM was built for ("cpu", "cuda", …).

    `kv_bytes`: all that `slots` full sequences could use; 0 when nobody knows. Raises ConfigError
    when `[actor]` asks for another device.
    """
    if wanted not in ("auto", device) and not wanted.startswith(f"{device}:"):
        raise ConfigError(
            f'actor.device = "{wanted}", but the installed vLLM computes on {device}: set "auto"'
        )
    if args.gpu is not None:
        _check_gpus(args.gpu, device)
    if device != "cpu":
        return args.engine
    cache = min(kv_bytes or KV_CACHE_BYTES_ON_CPU, KV_CACHE_BYTES_ON_CPU)
    defaults = {"enforce_eager": True, "kv_cache_memory_bytes": cache}
    return defaults | args.engine


def _ours(actor: ActorConfig) -> dict[str, Any]:
    return {
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": _DTYPES[actor.dtype],
        "max_model_len": actor.max_length or None,
        "max_num_seqs": actor.slots,
        "seed": 0,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": "actor.engine.vllm_worker.Extension",
        "disable_log_stats": True,  # its printed and exported ones; ours come by a logger
    }


def _check(name: str, value: object, names: Collection[str]) -> None:
    where = f"actor.vllm.{name}"
    if name in PROTECTED:
        raise ConfigError(f"{where} is not to be set: {PROTECTED[name]}")
    if name not in names:
        near = difflib.get_close_matches(name, [*(set(names) - set(PROTECTED)), *OWN], 1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{where} is no argument of vLLM's engine{hint}")
    if name == "distributed_executor_backend" and value not in ("mp", "uni"):
        raise ConfigError(f'{where}: {value!r} must be "mp" or "uni"; {_ONE_MACHINE}')


def _sender(transfer: str, device: object, given: dict[str, Any]) -> int | None:
    """The GPU that sends by NCCL: the first that no worker of vLLM's uses (NCCL has one rank a
    GPU), or the one that is asked for. Raises ConfigError."""
    where = "actor.vllm.weight_transfer_device"
    if transfer != "nccl":
        if device is not None:
            raise ConfigError(f'{where} is for actor.vllm.weight_transfer = "nccl"')
        return None
    sizes = (given.get(f"{part}_parallel_size", 1) for part in _PARALLEL)
    workers = math.prod(size for size in sizes if isinstance(size, int))
    taken = {str(gpu) for gpu in given.get("device_ids") or range(workers)}
    free = next(gpu for gpu in range(len(taken) + 1) if str(gpu) not in taken)
    if device is None:
        return free
    kind, _, number = str(device).partition(":")
    if kind != "cuda" or not number.isdecimal():
        raise ConfigError(f'{where}: {device!r} must be like "cuda:{free}"')
    if str(int(number)) in taken:
        raise ConfigError(f"{where}: vLLM's workers use {device}; cuda:{free} is free of them")
    return int(number)


def _check_gpus(gpu: int, device: str) -> None:
    """Raises ConfigError where nothing can be sent by NCCL from GPU number `gpu`."""
    if device != "cuda":
        raise ConfigError(
            'actor.vllm.weight_transfer = "nccl" needs GPUs, and vLLM computes on the '
            f'{device.upper()} here: set "spool"'
        )
    from torch import cuda

    if (there := cuda.device_count()) <= gpu:
        raise ConfigError(
            f'actor.vllm.weight_transfer = "nccl" sends from cuda:{gpu}, a GPU beside those of '
            f'vLLM\'s workers, and {there} are visible: set "spool"'
        )


def _installed_names() -> frozenset[str]:
    """Fields of the installed vLLM's AsyncEngineArgs, read without importing it: that takes many
    seconds. Raises ConfigError when they are not where this version of vLLM has them."""
    spec = importlib.util.find_spec("vllm")
    source = Path(spec.origin or "").with_name("engine") / "arg_utils.py" if spec else None
    if source is None or not source.is_file():
        raise ConfigError(f"the installed vLLM has no engine/arg_utils.py: {vllm_version.INSTALL}")
    wanted = {"EngineArgs", "AsyncEngineArgs"}
    return frozenset(
        field.target.id
        for part in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(part, ast.ClassDef) and part.name in wanted
        for field in part.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )
