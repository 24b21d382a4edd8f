"""A training step on a GPU that is not there: tensors of shapes and devices, without values.

Whatever would make the host wait for the device, such as `.item()`, has no value to give and
raises; so does an operation on tensors of two devices.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from data import CropConfig, MultiCrop, hash_keys
from dino_train import DinoSystem, StepMeans
from harness.fast_backbone import share_drop_path, skip_unread_tokens
from losses import DinoLoss, _all_pairs_fused, koleo_loss
from models import DinoModel, ModelConfig, update_teacher_EMA
from optimizers import build_optimizer, clip_gradients

GPU = torch.device("cuda", 0)
BATCH, K = 4, 64


def to_fake_gpu(module: nn.Module) -> nn.Module:
    for child in module.modules():
        for name, param in child._parameters.items():
            if param is not None:
                fake = torch.empty(param.shape, dtype=param.dtype, device=GPU)
                child._parameters[name] = nn.Parameter(fake, param.requires_grad)
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)
    return module


def fake_crops() -> list[Tensor]:
    images = torch.zeros(BATCH, 3, 64, 64, dtype=torch.uint8, device=GPU)
    sizes = torch.zeros(BATCH, 2, dtype=torch.int64, device=GPU)
    index = torch.zeros(BATCH, dtype=torch.int64, device=GPU)
    crops = MultiCrop(CropConfig(global_crop_size=64, local_crop_size=32))
    return to_fake_gpu(crops)(images, sizes, hash_keys(0, index, index))


@pytest.fixture(params=["dino_vits16", "resnet10_half", "convnext_atto"])
def system(request: pytest.FixtureRequest) -> Iterator[DinoSystem]:
    config = ModelConfig(arch=request.param, image_size=64, projection_output_dim=K)
    with torch.device("meta"):
        student, teacher = DinoModel.from_config(config), DinoModel.from_config(config)
    share_drop_path(student.backbone)
    for network in (student, teacher):
        skip_unread_tokens(network.backbone)
    with FakeTensorMode():
        yield to_fake_gpu(DinoSystem(student, teacher)).train()


@pytest.mark.slow
def test_crops_networks_and_loss_stay_on_the_gpu_and_wait_for_nothing(system: DinoSystem) -> None:
    crops = fake_crops()
    assert {crop.device for crop in crops} == {GPU}
    assert [crop.shape[-1] for crop in crops] == [64, 64] + [32] * 8
    student_features, student, features, teacher = system(crops)
    loss = to_fake_gpu(DinoLoss(K))
    means = StepMeans(loss, 0.04, is_logged=True)
    cross_entropy = loss(student, teacher, 0.04)
    means.add(cross_entropy + koleo_loss(student_features), cross_entropy, teacher, features)
    assert means.loss.device == GPU and means.loss.ndim == 0
    assert means.figures[0].device == GPU
    loss.update_center(torch.stack(means.mean_logits))
    assert loss.center.device == GPU


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_clipping_optimizer_and_ema_wait_for_nothing(system: DinoSystem, name: str) -> None:
    optimizer = build_optimizer(system.student, name)
    optimizer.param_groups[0]["weight_decay"] = 0.04
    params = list(system.student.parameters())
    for param in params:
        param.grad = torch.empty_like(param)
    params[-1].grad = None  # as of a last layer that is frozen
    clip_gradients(params, 3.0)
    optimizer.step()
    optimizer.zero_grad()
    update_teacher_EMA(system.student, system.teacher, 0.99)
    assert {param.device for param in system.parameters()} == {GPU}


def test_waiting_would_be_noticed() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.zeros(3, device=GPU).sum().item()
    with FakeTensorMode(), pytest.raises(RuntimeError, match="device"):
        torch.zeros(3, device=GPU) + torch.zeros(3)


@pytest.mark.slow
def test_what_is_compiled_on_a_gpu_is_whole_graphs_and_few() -> None:
    """For two sizes of crops: colours, then a ViT's blocks, all but the last alike; the loss."""
    config = ModelConfig(arch="dino_vits16", image_size=64, projection_output_dim=K)
    with torch.device("meta"):
        student = DinoModel.from_config(config)
    share_drop_path(student.backbone)
    skip_unread_tokens(student.backbone)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    options = {"dynamic": False, "fullgraph": True, "backend": count}
    with FakeTensorMode():
        multi_crop = MultiCrop(CropConfig(global_crop_size=64, local_crop_size=32))
        multi_crop = to_fake_gpu(multi_crop)
        multi_crop._augment = torch.compile(multi_crop._augment, **options)
        images = torch.zeros(BATCH, 3, 64, 64, dtype=torch.uint8, device=GPU)
        crops = multi_crop(images, None, torch.zeros(BATCH, dtype=torch.int64, device=GPU))
        assert len(graphs) == 2
        for block in student.backbone.blocks:
            block.compile(**options)
        to_fake_gpu(student).train()(crops)
        assert len(graphs) == 2 + 4
        logits = torch.zeros(10, BATCH, K, device=GPU)
        temp, center = torch.zeros((), device=GPU), torch.zeros(1, K, device=GPU)
        torch.compile(_all_pairs_fused, **options)(logits, logits[:2], center, 0.1, temp)
        assert len(graphs) == 2 + 4 + 1
