"""A weight version becomes tensors of the model: checked, converted and staged first, copied under
the pause."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from common.errors import WeightsError
from common.versions import Tensor, Weights

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Staged:
    """Tensors of one version on the model's device and in its dtype, each beside the parameter it
    replaces."""

    def __init__(
        self, weights: Weights, parameters: Mapping[str, torch.Tensor], trained: frozenset[str]
    ) -> None:
        """Raises WeightsError when `weights` does not fit, or lacks a tensor of `trained`.

        `trained` are the names that an earlier version brought: without them the model would be a
        mixture of two versions.
        """
        self.version = weights.version
        self.names = frozenset(tensor.name for tensor in weights.tensors)
        if lost := sorted(trained - self.names):
            raise WeightsError(
                f"version {weights.version} lacks {lost[0]!r}, which the version served now has"
            )
        for tensor in weights.tensors:
            _check(tensor, weights.version, parameters)
        self._pairs = [
            (parameters[t.name], _tensor(t, parameters[t.name])) for t in weights.tensors
        ]

    def apply(self) -> None:
        for parameter, value in self._pairs:
            parameter.copy_(value)


def _check(tensor: Tensor, version: int, parameters: Mapping[str, torch.Tensor]) -> None:
    where = f"version {version}: tensor {tensor.name!r}"
    parameter = parameters.get(tensor.name)
    if parameter is None:
        raise WeightsError(f"{where} is no parameter of the model")
    if tuple(tensor.shape) != tuple(parameter.shape):
        raise WeightsError(
            f"{where} has shape {tuple(tensor.shape)}, the model's is {tuple(parameter.shape)}"
        )
    if tensor.dtype not in _DTYPES:
        raise WeightsError(f"{where} has dtype {tensor.dtype}; known are {', '.join(_DTYPES)}")
    needed = math.prod(tensor.shape) * _DTYPES[tensor.dtype].itemsize
    if tensor.data.nbytes != needed:
        raise WeightsError(
            f"{where} has {tensor.data.nbytes} bytes, its shape and dtype say {needed}"
        )


def _tensor(tensor: Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A copy of the bytes as a tensor like `parameter`: the sender's buffer may go away before the
    swap."""
    raw = torch.empty(tensor.data.nbytes, dtype=torch.uint8)
    raw.numpy()[:] = np.frombuffer(
        tensor.data, np.uint8
    )  # without the GIL, so decoding goes on beside it
    return raw.view(_DTYPES[tensor.dtype]).view(tensor.shape).to(parameter.device, parameter.dtype)
