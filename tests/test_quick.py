"""The quick forms of a model's modules compute what the modules compute."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from learner import model as models
from learner import quick, short
from learner.batch import flatten, pack
from learner.config import LearnerConfig
from learner.model import Policy
from tests.builders import tiny_model
from tests.test_model import LENGTHS, items


def slow(net: nn.Module) -> Any:
    """A copy of the model, whose modules are what transformers made them."""
    plain = copy.deepcopy(net)
    for module in plain.modules():
        own = type(module)
        if own.__module__ == quick.__name__:
            module.__class__ = own.__mro__[1 if own is quick.Linear else 2]
    return plain


@pytest.mark.parametrize("shape", [(1, 3, 5), (700, 32, 96), (2500, 96, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_quick_product_and_its_gradients_are_those_of_torch(
    shape: tuple[int, int, int], bias: bool
) -> None:
    rows, width, out = shape
    torch.manual_seed(0)
    plain, own = (nn.Linear(width, out, bias) for _ in range(2))
    own.load_state_dict(plain.state_dict())
    quick.quicken(nn.Sequential(own))
    xs = [torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    ys: list[Any] = [layer(x.requires_grad_()) for layer, x in zip((plain, own), xs, strict=True)]
    for y in ys:
        y.backward(torch.ones_like(y).cumsum(0) / rows)
    assert torch.allclose(ys[0], ys[1], atol=1e-5)
    mine, theirs = ([x, *layer.parameters()] for x, layer in zip(xs, (plain, own), strict=True))
    for a, b in zip(mine, theirs, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not quick.available(), reason="torch without oneDNN")
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_every_known_module_is_replaced_and_the_parameters_stay(family: str) -> None:
    net = tiny_model(family)
    before = dict(net.named_parameters())
    quick.quicken(net)
    kinds = {type(m).__name__ for m in net.modules() if type(m).__module__ == quick.__name__}
    prefix = {"qwen2": "_Qwen2", "llama": "_Llama"}[family]
    assert kinds == {"Linear", f"{prefix}MLP", f"{prefix}Norm", f"{prefix}Heads"}
    after = dict(net.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is p for name, p in before.items())


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_a_quick_body_and_its_gradients_are_those_of_transformers(
    family: str, key_heads: int
) -> None:
    net = tiny_model(family, num_key_value_heads=key_heads, attention_bias=True)
    with torch.no_grad():
        for p in net.parameters():  # norms and biases that matter
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    policy = Policy(net, LearnerConfig())
    plain = slow(policy)
    assert type(plain.net.lm_head) is nn.Linear
    batch = flatten(items(LENGTHS), 0)
    micro = pack(batch, np.arange(batch.rows))
    assert micro.packing.longest <= short.WIDEST
    found = []
    for model in (policy, plain):
        _, columns = model(micro)
        (columns.logp + 0.3 * columns.H).sum().backward()
        found.append((columns, models.trainable(model)))
    (a, ours), (b, theirs) = found
    assert torch.allclose(a.logp, b.logp, atol=1e-5)
    assert torch.allclose(a.H, b.H, atol=1e-5)
    for name, p in ours.items():
        wanted = theirs[name].grad
        assert p.grad is not None, name
        assert wanted is not None, name
        assert torch.allclose(p.grad, wanted, rtol=1e-3, atol=1e-4), name


def test_the_same_pass_gives_the_same_bits() -> None:
    batch = flatten(items(LENGTHS), 0)
    micro = pack(batch, np.arange(batch.rows))
    ends = []
    for _ in range(2):
        policy = Policy(tiny_model(), LearnerConfig())
        _, columns = policy(micro)
        columns.logp.sum().backward()
        ends.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))


def test_sequences_too_long_for_the_short_way_take_the_other() -> None:
    rows = [[short.WIDEST + 10, 5], [4, 4]]
    batch = flatten(items(rows), 0)
    micro = pack(batch, np.arange(batch.rows))
    policy = Policy(tiny_model(max_position_embeddings=256), LearnerConfig())
    ours, theirs = (m(micro)[1].logp for m in (policy, slow(policy)))
    assert torch.allclose(ours, theirs, atol=1e-5)
