"""Code inside vLLM's worker processes: new weights out of the spool into the model.

vLLM imports this module by name (`worker_extension_cls`). `stage` maps and verifies a spool in a
thread while the worker goes on decoding; under the pause only the loading remains. Names are the
checkpoint's and go through the model's own `load_weights`, which knows tensor parallelism, merged
projections and tied embeddings; vLLM's layerwise reload packs them for its kernels again.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from actor.engine import vllm_spool
from common.errors import WeightsError

BACKEND = "isentrope-spool"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Staged:
    """A verified spool, mapped: (name, tensor) pairs that need no copy."""

    def __init__(self, path: Path, checkpoint: Path) -> None:
        """Raises WeightsError."""
        self.header, self._mapped = vllm_spool.read(path)
        self.frozen = dict(_from_checkpoint(checkpoint, self.header.frozen))
        if lost := set(self.header.frozen) - set(self.frozen):
            raise WeightsError(f"{checkpoint} lacks {min(lost)!r}")

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """In name order: the tensors of a layer come one after the other."""
        ours = {entry.name: entry for entry in self.header.tensors}
        for name in sorted([*ours, *self.frozen]):
            yield name, self._view(ours[name]) if name in ours else self.frozen[name]

    def _view(self, entry: Any) -> torch.Tensor:
        dtype = _DTYPES[entry.dtype]
        count = entry.nbytes // dtype.itemsize
        if count == 0:
            return torch.empty(entry.shape, dtype=dtype)
        flat = torch.frombuffer(self._mapped, dtype=dtype, count=count, offset=entry.offset)
        return flat.view(entry.shape)


@dataclass
class Nothing(WeightTransferInitInfo):  # type: ignore[misc]
    """There is nobody to connect to."""


@dataclass
class Version(WeightTransferUpdateInfo):  # type: ignore[misc]
    digest: str


class SpoolTransfer(WeightTransferEngine[Nothing, Version]):  # type: ignore[misc]
    """vLLM's weight-transfer back-end: one staged version at a time."""

    init_info_cls = Nothing
    update_info_cls = Version

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._thread = ThreadPoolExecutor(1, "stage")
        self._staged: Future[Staged] | None = None

    def stage(self, path: str) -> None:
        """Begin to map and verify; returns at once."""
        checkpoint = Path(self.model_config.model)
        self._staged = self._thread.submit(Staged, Path(path), checkpoint)

    def staged(self) -> str | None:
        """None while it is under way; then what is wrong with the version, or an empty string."""
        if self._staged is None:
            return "no version is staged"
        if not self._staged.done():
            return None
        error = self._staged.exception()
        return "" if error is None else f"{error}" or type(error).__name__

    def init_transfer_engine(self, init_info: Nothing) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Version) -> None:
        assert self._staged is not None, "update_weights before stage"
        staged = self._staged.result(timeout=0)
        assert staged.header.digest == update_info.digest, "another version is staged"
        self.model.load_weights(staged.tensors())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _pack_tied(self.model)
        self._staged = None

    def shutdown(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class Extension:
    """Methods of vLLM's worker that the actor calls by `collective_rpc`."""

    weight_transfer_engine: Any
    model_runner: Any
    device: torch.device

    def keep_noise(self) -> None:
        """Once, before the first request."""
        if self.device.type == "cpu":
            self.model_runner.input_batch.generators = Generators()

    def stage_weights(self, path: str) -> None:
        self.weight_transfer_engine.stage(path)

    def weights_staged(self) -> str | None:
        said: str | None = self.weight_transfer_engine.staged()
        return said


class Generators(dict[int, torch.Generator]):
    """vLLM's random generators by row, for a CPU.

    A prompt that is computed in parts has a token drawn, and thrown away, after each of them; vLLM
    then takes the generator's offset back, which generators on a CPU do not have. Here they get
    back the state that they had before the draw: the noise of a rollout depends on nothing else.
    """

    _before: dict[int, torch.Tensor] = {}

    def items(self) -> Any:
        """What vLLM draws from, once a step."""
        self._before = {row: generator.get_state() for row, generator in super().items()}
        return super().items()

    def get(self, row: int, default: Any = None) -> Any:
        """What vLLM takes the offset back of."""
        if row not in self:
            return default
        generator = self[row]
        return Undo(generator, self._before.get(row, generator.get_state()))


class Undo(NamedTuple):
    """Looks like a generator that knows its offset."""

    generator: torch.Generator
    before: torch.Tensor

    def get_offset(self) -> int:
        return 0

    def set_offset(self, _offset: int) -> None:
        self.generator.set_state(self.before)


def _from_checkpoint(folder: Path, names: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    wanted = set(names)
    for path in sorted(folder.glob("*.safetensors")) if wanted else ():
        with safe_open(path, framework="pt") as file:
            for name in wanted & set(file.keys()):
                yield name, file.get_tensor(name)


def _pack_tied(model: torch.nn.Module) -> None:
    """Pack again what shares its weight with a module before it.

    On a CPU vLLM multiplies with a packed copy of each module's weight, and packs when the module
    itself is loaded. A head tied to the embedding never is: it would go on with the old copy.
    """
    seen: set[int] = set()
    module: Any
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedEmbeddingMethod) and hasattr(module, "cpu_linear"):
            if module.weight.data_ptr() in seen:
                method.process_weights_after_loading(module)
            seen.add(module.weight.data_ptr())


def _register() -> None:
    """Each worker imports this module once before it makes its transfer engine."""
    WeightTransferEngineFactory.register_engine(BACKEND, SpoolTransfer)


_register()
