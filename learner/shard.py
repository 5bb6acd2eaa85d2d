"""A policy over many ranks (FSDP2): each holds a slice of every parameter, along its first
dimension, with the gradient and the optimiser's moments that belong to it.

A decoder layer is gathered when it is computed and let go afterwards; what stands around the
layers (embedding, last norm, head) when the policy is. `Policy.forward` holds body and head, so the
head is there for learner.head's chunks. Gradients are *sums* over ranks: each rank's share of the
loss is scaled by global counts. The quick CPU forms of modules (learner.quick) work on gathered
parameters as on any.

In half precision layers are gathered in bf16 and their gradients are summed in float32; what stands
around them stays in float32, as without sharding.

With one rank nothing here does anything.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as recomputed

from learner.comm import Comm


def shard(policy: nn.Module, net: Any, where: torch.device, half: bool) -> None:
    """Give this rank its slices, on its device; every rank calls it on the same weights."""
    comm = Comm.current()
    if comm.world_size == 1:
        return
    mesh = init_device_mesh(where.type, (comm.world_size,))
    mixed = MixedPrecisionPolicy()
    if half:
        mixed = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for layer in layers(net):
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    fully_shard(policy, mesh=mesh)
    for module in _units(policy):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def layers(net: Any) -> list[nn.Module]:
    """The model's decoder layers, by what it says must stay together."""
    names = set(getattr(net, "_no_split_modules", None) or ())
    return [module for module in net.modules() if type(module).__name__ in names]


def recompute(net: Any) -> None:
    """Keep only the inputs of decoder layers for the backward pass, which computes them again."""
    for layer in layers(net):
        layer.forward = functools.partial(
            recomputed, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


def accumulate(policy: nn.Module, last: bool) -> None:
    """Before a backward pass: ranks add their gradients after the `last` one of an update only."""
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(last)
        policy.set_is_last_backward(last)


def rest(policy: nn.Module) -> None:
    """After a forward pass without a backward one: let go of what it gathered."""
    if isinstance(policy, FSDPModule):
        policy.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's slice; shares memory with `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it; every rank calls it for the same tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def beside(slice_: Tensor, tensor: Tensor) -> Tensor:
    """`slice_` as the same part of a whole as this rank's slice of `tensor`."""
    if not isinstance(tensor, DTensor) or slice_.dim() == 0:
        return slice_
    return DTensor.from_local(
        slice_,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _units(policy: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in policy.modules() if isinstance(module, FSDPModule))
