"""`[actor.vllm]` is vLLM's own, but for what makes an actor an actor. None of this needs vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actor.config import ActorConfig
from actor.engine import vllm_process
from actor.engine.vllm_args import KV_CACHE_BYTES_ON_CPU, PROTECTED, VllmArgs, on_device, vet
from actor.engine.vllm_model import kv_bytes, limits
from common import models, vllm_version
from common.errors import ConfigError, DataError

NAMES = {
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "quantization",
    "speculative_config",
    "enforce_eager",
    "device_ids",
    "distributed_executor_backend",
    "max_num_seqs",
    "max_num_batched_tokens",
}


def args(given: dict[str, Any] | None = None, **actor: Any) -> VllmArgs:
    return vet(ActorConfig(engine="vllm", vllm=given or {}, **actor), NAMES)


def test_vllms_own_arguments_go_through_as_they_are() -> None:
    given = {
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.8,
        "quantization": "fp8",
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
    }
    assert given.items() <= args(given).engine.items()


def test_size_dtype_and_length_are_those_of_the_actor() -> None:
    engine = args(slots=7, max_length=99, dtype="bf16").engine
    assert (engine["max_num_seqs"], engine["max_model_len"]) == (7, 99)
    assert engine["dtype"] == "bfloat16"
    assert args().engine["max_model_len"] is None


@pytest.mark.parametrize("name", sorted(PROTECTED))
def test_what_is_ours_is_refused_with_what_to_set_instead(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"actor\.vllm\.{name} is not to be set: \w+"):
        args({name: 1})


def test_the_size_is_refused_with_the_field_of_the_actor() -> None:
    with pytest.raises(ConfigError, match=r"set actor\.slots$"):
        args({"max_num_seqs": 4})


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean tensor_parallel_size\?"):
        args({"tensor_paralel_size": 2})
    with pytest.raises(ConfigError, match=r"is no argument of vLLM's engine$"):
        args({"qqq": 2})
    with pytest.raises(ConfigError, match=r"did you mean weight_transfer\?"):
        args({"weight_transfe": "spool"})


def test_an_actor_keeps_to_its_machine() -> None:
    with pytest.raises(ConfigError, match="one machine"):
        args({"distributed_executor_backend": "ray"})
    assert args({"distributed_executor_backend": "mp"})


def test_our_own_settings_are_checked_and_not_passed_on() -> None:
    found = args({"weight_transfer": "nccl", "verbose": True})
    assert (found.transfer, found.verbose) == ("nccl", True)
    assert not {"weight_transfer", "verbose"} & set(found.engine)
    with pytest.raises(ConfigError, match=r"weight_transfer: 'carrier pigeon' is none of"):
        args({"weight_transfer": "carrier pigeon"})
    with pytest.raises(ConfigError, match=r"verbose: 3 must be true or false"):
        args({"verbose": 3})


def test_on_a_cpu_it_runs_eagerly_with_a_small_cache_unless_told_otherwise() -> None:
    assert on_device(args(), "cpu", "auto")["kv_cache_memory_bytes"] == KV_CACHE_BYTES_ON_CPU
    assert on_device(args(), "cpu", "auto", 1 << 40)["kv_cache_memory_bytes"] == (1 << 30)
    assert on_device(args(), "cpu", "auto", 4096)["kv_cache_memory_bytes"] == 4096
    assert on_device(args(), "cpu", "cpu")["enforce_eager"] is True
    given = {"kv_cache_memory_bytes": 1 << 20, "enforce_eager": False}
    assert given.items() <= on_device(args(given), "cpu", "auto").items()
    assert "enforce_eager" not in on_device(args(), "cuda", "cuda:1")


def test_a_device_that_the_installed_vllm_has_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'device = "cuda", but the installed vLLM .* cpu'):
        on_device(args(), "cpu", "cuda")
    with pytest.raises(ConfigError, match='"nccl" needs GPUs'):
        on_device(args({"weight_transfer": "nccl"}), "cpu", "auto")
    with pytest.raises(ConfigError, match='"nccl" needs GPUs, and vLLM computes on the XPU here'):
        on_device(args({"weight_transfer": "nccl"}), "xpu", "auto")


def test_nccl_sends_from_a_gpu_that_no_worker_of_vllms_uses() -> None:
    nccl = {"weight_transfer": "nccl"}
    assert args().gpu is None
    assert args(nccl).gpu == 1
    assert args({**nccl, "tensor_parallel_size": 2}).gpu == 2
    assert args({**nccl, "weight_transfer_device": "cuda:5"}).gpu == 5
    assert args({**nccl, "device_ids": [0, 2]}).gpu == 1
    assert "weight_transfer_device" not in args({**nccl, "weight_transfer_device": "cuda:5"}).engine
    with pytest.raises(ConfigError, match=r"workers use cuda:1; cuda:2 is free"):
        args({**nccl, "weight_transfer_device": "cuda:1", "tensor_parallel_size": 2})
    with pytest.raises(ConfigError, match=r"device: 3 must be like \"cuda:1\""):
        args({**nccl, "weight_transfer_device": 3})
    with pytest.raises(ConfigError, match=r'is for actor\.vllm\.weight_transfer = "nccl"'):
        args({"weight_transfer_device": "cuda:1"})


def test_nccl_without_a_gpu_of_its_own_is_refused() -> None:
    there = torch.cuda.device_count()
    asked = {"weight_transfer": "nccl", "weight_transfer_device": f"cuda:{there + 1}"}
    with pytest.raises(
        ConfigError, match=rf'cuda:{there + 1}, .* {there} are visible: set "spool"'
    ):
        on_device(args(asked), "cuda", "auto")


@pytest.mark.skipif(vllm_version.wrong() is None, reason="vLLM is installed here")
def test_without_vllm_the_engine_says_how_to_get_it() -> None:
    with pytest.raises(ConfigError, match=r'actor\.engine = "vllm": .*pip install'):
        vet(ActorConfig(engine="vllm"))


@pytest.mark.skipif(vllm_version.wrong() is not None, reason="vLLM is not installed here")
def test_the_installed_vllms_names_are_known_without_importing_it() -> None:
    assert vet(ActorConfig(engine="vllm", vllm={"max_num_batched_tokens": 512}))
    with pytest.raises(ConfigError, match=r"did you mean gpu_memory_utilization\?"):
        vet(ActorConfig(engine="vllm", vllm={"gpu_memory_utilisation": 0.5}))


def test_the_model_says_how_many_words_and_positions_it_has() -> None:
    folder = models.find("tiny")
    assert limits(folder, 0) == (32, 128)
    assert limits(folder, 60) == (32, 60)
    with pytest.raises(DataError, match=r"actor\.max_length = 129, but the model has 128"):
        limits(folder, 129)


def test_the_cache_that_full_slots_need_is_known() -> None:
    per_token = 2 * 4 * 4 * 32 * 4  # keys and values, layers, heads, width, bytes
    assert kv_bytes(models.find("tiny"), 10, 128, 4) == (10 + 8) * 128 * per_token


def test_a_folder_without_a_usable_config_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"no usable config\.json: [^\n]+$"):
        limits(tmp_path, 0)


def test_a_failure_is_told_by_its_root_in_one_line() -> None:
    error = RuntimeError("engine core initialisation failed")
    error.__cause__ = ValueError("too little memory\nand a page of advice")
    assert vllm_process.said(error) == "ValueError: too little memory"


def test_a_validation_error_is_told_without_its_decoration() -> None:
    error = ValueError(
        "1 validation error for ModelConfig\n  Value error, no such architecture "
        "[type=value_error, input_value=…]\n    For further information visit https://…"
    )
    assert vllm_process.said(error) == "ValueError: no such architecture"


def test_of_a_pile_of_tracebacks_the_first_cause_is_told(tmp_path: Path) -> None:
    assert vllm_process.root_cause(tmp_path) == ""
    (tmp_path / "output").write_text(
        'Traceback (most recent call last):\n  File "x", line 1\n    f()\n'
        "torch.OutOfMemoryError: no memory for 3 GiB\n\nThe above exception …\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    found = vllm_process.root_cause(tmp_path)
    assert found == "torch.OutOfMemoryError: no memory for 3 GiB"
    (tmp_path / "failures").write_text("ValueError: this one came first\n")
    assert vllm_process.root_cause(tmp_path) == "ValueError: this one came first"
