"""Linear layers at oneDNN's speed on a CPU.

torch multiplies float32 matrices with MKL, which on processors that are not Intel's runs at about
half of what they can do; oneDNN's kernels, which torch carries too (its compiler calls them), reach
twice as much from 8 rows on. They want the weight in a layout of their own, so it is packed once a
weight version. Elsewhere (GPU, bf16, torch without oneDNN, large models) it is torch's own product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_ROWS = 64  # the layout is chosen for about so many rows; others are right too, a little slower
MAX_PACKED_BYTES = 1 << 30  # the packed copy comes on top of the parameters


def packable(weight: torch.Tensor) -> bool:
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


class Linear:
    """x ↦ x · weightᵀ + bias, over a weight that `refresh` reads again after it has changed."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, packed: bool) -> None:
        self._weight, self._bias = weight, bias
        self._packed: torch.Tensor | None = None
        if packed:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)

    def refresh(self) -> None:
        if self._packed is not None:
            weight = self._weight.detach()
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is None:
            return F.linear(x, self._weight, self._bias)
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, "none", [], ""
        )
        return y

    def added_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual + self(x), in one operation where that is possible."""
        if self._packed is not None:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
                x, residual, self._packed, self._bias, "add"
            )
            return y
        if self._bias is not None:
            return residual + F.linear(x, self._weight, self._bias)
        return torch.addmm(residual, x, self._weight.t())
