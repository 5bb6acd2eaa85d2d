"""The policy's body on a CPU: the same float32 sums, by quicker operations.

torch multiplies float32 matrices with MKL, which on processors that are not Intel's runs at less
than half of what they can do; oneDNN's kernels, which torch carries too, do not ask whose they are.
And transformers' blocks are made of many small operations, each of which leaves a tensor for the
backward pass. So products go through oneDNN in all three directions, the gated MLP and RMSNorm are
one operation each with a backward pass by hand, and attention over short sequences is
learner.short.

`quicken` changes the class of a model's modules, nothing else: parameters, names and the hooks of
blocks (those of sharding too) stay. What is not float32 on a CPU without autocast takes the
modules' own way. The choice is by type and shape, not by a measurement: that would change the bits
of a run from one start to the next.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm

from learner import short
from learner.attention import Packing

_ROWS = 1024  # of the MLP at once: its inner values are then still in the cache when they are used


def quicken(net: nn.Module) -> None:
    """Give the modules of `net` that are known their quick forms."""
    if not available():
        return
    for module in net.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
        elif type(module) in _MLPS and _is_plain(module):
            module.__class__ = _MLPS[type(module)]
        elif type(module) in _NORMS:
            module.__class__ = _NORMS[type(module)]
        elif type(module) in _HEADS:
            module.__class__ = _HEADS[type(module)]


def available() -> bool:
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_plain(mlp: Any) -> bool:
    parts = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return isinstance(mlp.act_fn, SiLUActivation | nn.SiLU) and all(
        part.bias is None for part in parts
    )


def _fits(x: Tensor, weight: Tensor) -> bool:
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return plain and x.numel() > 0 and not torch.is_autocast_enabled("cpu")


# ---- products: T tokens, I inputs, O outputs ----------------------------------------------------


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, I] · weightᵀ [I, O] + bias [O]; views of other layouts are fine."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _added(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x · weightᵀ"""
    z: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, None, "add")
    return z


def _weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """gᵀ [O, T] · x [T, I]; oneDNN is quicker with few rows and many columns."""
    if g.shape[1] <= x.shape[1]:
        return _product(g.t(), x.t())
    return _product(x.t(), g.t()).t().contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        g = g.contiguous()
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _product(g, weight.t()) if for_x else None,
            _weight_gradient(g, x) if for_weight else None,
            g.sum(0) if for_bias else None,
        )


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if not _fits(x, self.weight):
            return super().forward(x)
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = _Linear.apply(flat, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1)


# ---- down(silu(gate(x)) · up(x)) ----------------------------------------------------------------


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        out, a, b = torch.empty_like(x), [], []
        for part, into in zip(torch.split(x, _ROWS), torch.split(out, _ROWS), strict=True):
            a.append(_product(part, gate))
            b.append(_product(part, up))
            into.copy_(_product(F.silu(a[-1]).mul_(b[-1]), down))
        ctx.save_for_backward(x, gate, up, down, *a, *b)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, down, *inner = ctx.saved_tensors
        half = len(inner) // 2
        to_x = torch.empty_like(x)
        sums: list[Tensor] | None = None
        rows = zip(
            torch.split(g, _ROWS), torch.split(x, _ROWS), torch.split(to_x, _ROWS), strict=True
        )
        for (g_part, part, into), a, b in zip(rows, inner[:half], inner[half:], strict=True):
            g_part = g_part.contiguous()
            silu = F.silu(a)
            g_inner = _product(g_part, down.t())
            g_down = _weight_gradient(g_part, silu * b)
            g_up = silu.mul_(g_inner)
            g_gate = torch.ops.aten.silu_backward(g_inner.mul_(b), a)
            into.copy_(_added(_product(g_gate, gate.t()), g_up, up.t()))
            made = [_weight_gradient(g_gate, part), _weight_gradient(g_up, part), g_down]
            sums = made if sums is None else [s.add_(m) for s, m in zip(sums, made, strict=True)]
        assert sums is not None, "an empty pass goes the modules' own way"
        return to_x, *sums


class _MLP(nn.Module):
    def forward(self: Any, x: Tensor) -> Any:
        weights = [part.weight for part in (self.gate_proj, self.up_proj, self.down_proj)]
        if not all(_fits(x, weight) for weight in weights):
            return super().forward(x)
        flat = x.reshape(-1, x.shape[-1])
        y = _Gated.apply(flat, *weights)  # type: ignore[no-untyped-call]
        return y.view(x.shape)


# ---- x / √(mean x² + ε) · weight ----------------------------------------------------------------


class _RMS(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x.mul(r)
        ctx.save_for_backward(unit, r, weight)
        return unit.mul(weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, r, weight = ctx.saved_tensors
        along = g * unit
        mean = (along @ weight).div_(-unit.shape[-1])
        to_x = (g * weight).addcmul_(unit, mean[:, None]).mul_(r)
        return to_x, along.sum(0), None


class _Norm(nn.Module):
    def forward(self: Any, x: Tensor) -> Any:
        if not _fits(x, self.weight):
            return super().forward(x)
        flat = x.reshape(-1, x.shape[-1])
        y = _RMS.apply(flat, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        return y.view(x.shape)


# ---- attention over short sequences -------------------------------------------------------------


class _Attention(nn.Module):
    def forward(
        self: Any,
        hidden_states: Tensor,  # [1, S, d]
        position_embeddings: tuple[Tensor, Tensor],  # cos, sin [1, S, D]
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        packing: Packing | None = None,
        **others: Any,
    ) -> Any:
        x, window = hidden_states, getattr(self, "sliding_window", None)
        cos, sin = position_embeddings
        fits = not window and past_key_values is None and _fits(x, cos)
        if packing is None or not 0 < packing.longest <= short.WIDEST or not fits:
            given = (x, position_embeddings, attention_mask, past_key_values)
            return super().forward(*given, packing=packing, **others)
        parts = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat([part.weight for part in parts])
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        qkv = _Linear.apply(x[0], weight, bias)  # type: ignore[no-untyped-call]
        heads = self.q_proj.out_features // self.head_dim
        y = short.attend(qkv, (cos[0], sin[0]), packing, heads, self.scaling)
        return self.o_proj(y[None]), None


class _LlamaMLP(_MLP, LlamaMLP): ...


class _Qwen2MLP(_MLP, Qwen2MLP): ...


class _LlamaNorm(_Norm, LlamaRMSNorm): ...


class _Qwen2Norm(_Norm, Qwen2RMSNorm): ...


class _LlamaHeads(_Attention, LlamaAttention): ...  # type: ignore[misc]  # fewer names


class _Qwen2Heads(_Attention, Qwen2Attention): ...


_HEADS = {LlamaAttention: _LlamaHeads, Qwen2Attention: _Qwen2Heads}
_MLPS = {LlamaMLP: _LlamaMLP, Qwen2MLP: _Qwen2MLP}
_NORMS = {LlamaRMSNorm: _LlamaNorm, Qwen2RMSNorm: _Qwen2Norm}
