"""Optimizers and clipping, against numbers recorded from the original and against torch's own."""

import json

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from torch import Tensor, nn

from models import DinoProjectionHead
from optimizers import build_optimizer, clip_gradients, tensor_norms


def test_norms_are_each_tensors_own() -> None:
    tensors = [torch.randn(3, 4), torch.zeros(2), torch.randn(5)]
    expected = torch.stack([tensor.norm() for tensor in tensors])
    torch.testing.assert_close(tensor_norms(tensors), expected)


def test_weight_decay_groups_equal_the_originals() -> None:
    with safe_open(ROOT / "tests" / "parity.safetensors", "pt") as file:
        groups = json.loads(file.metadata()["param_groups"])
    head = DinoProjectionHead(24, 16, 8, 40, norm_last_layer=False)
    names = {param: name for name, param in head.named_parameters()}
    renamed = {"last_layer.weight_v": "last_layer.weight", "last_layer.weight_g": "last_layer.gain"}
    optimizer = build_optimizer(head, "adamw")
    for group, key in zip(optimizer.param_groups, ("regularized", "not_regularized"), strict=True):
        expected = {renamed.get(name, name) for name in groups[key]}
        assert {names[param] for param in group["params"]} == expected
    assert optimizer.param_groups[1]["weight_decay"] == 0


@pytest.mark.parametrize("case", ["resnet_recipe", "large_decay"])
def test_lars_equals_the_original_over_steps(case: str, parity: dict) -> None:
    lr, weight_decay = parity[f"lars.{case}.args"].tolist()
    holder = nn.ParameterList(parity[f"lars.{case}.initial.{i}"].clone() for i in range(3))
    optimizer = build_optimizer(holder, "lars")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay
    for step in range(len(parity[f"lars.{case}.grads.0"])):
        for i, param in enumerate(holder):
            param.grad = parity[f"lars.{case}.grads.{i}"][step].clone()
        optimizer.step()
    for i, param in enumerate(holder):
        final = parity[f"lars.{case}.final.{i}"]
        torch.testing.assert_close(param.detach(), final, rtol=1e-6, atol=1e-7)


def test_lars_leaves_a_gradient_alone_where_a_norm_is_zero() -> None:
    holder = nn.ParameterList([torch.zeros(2, 2), torch.ones(2, 2)])
    optimizer = build_optimizer(holder, "lars")
    optimizer.param_groups[0] |= {"lr": 1.0, "weight_decay": 0.0}
    holder[0].grad, holder[1].grad = torch.full((2, 2), 3.0), torch.zeros(2, 2)
    optimizer.step()
    assert (holder[0] == -3).all()
    assert (holder[1] == 1).all()


def test_clipping_equals_the_original_for_each_parameter(parity: dict) -> None:
    grads = [parity[f"clip.grads.{i}"] for i in range(3)]
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads] + [
        nn.Parameter(torch.ones(2))
    ]
    for param, grad in zip(params, grads, strict=False):
        param.grad = grad.clone()
    clip_gradients(params, 0.5)
    for i in range(3):
        torch.testing.assert_close(params[i].grad, parity[f"clip.clipped.{i}"])
    assert params[3].grad is None


def test_nothing_is_clipped_where_there_are_no_gradients() -> None:
    clip_gradients([nn.Parameter(torch.ones(2))], 0.5)


def test_lars_computes_the_gradients_of_a_closure_first() -> None:
    """A step with a closure equals one whose gradients were computed before it."""
    finals = []
    for has_closure in (False, True):
        holder = nn.ParameterList([torch.full((2, 3), 2.0)])
        optimizer = build_optimizer(holder, "lars")
        optimizer.param_groups[0] |= {"lr": 0.5, "weight_decay": 0.1}

        def loss(holder: nn.ParameterList = holder, optimizer: object = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = holder[0].pow(3).sum()
            value.backward()
            return value

        if has_closure:
            assert optimizer.step(loss) == 48
        else:
            loss()
            optimizer.step()
        finals.append(holder[0].detach())
    assert torch.equal(finals[0], finals[1]) and not torch.equal(finals[0], torch.full((2, 3), 2.0))
