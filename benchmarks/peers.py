"""Crops, loss and networks of lightly and lightly-train, where these packages are installed.

Tried with lightly 1.6.0 and with lightly-train 0.18.0, albumentations 2.0.8 and OpenCV 5.0.0.
"""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import timm
import torchvision
from torch import Tensor, nn
from torch.utils.data import Dataset

from data import CropConfig
from models import TIMM_NAMES


def with_version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def lightly_loss(num_prototypes: int) -> nn.Module:
    from lightly.loss import DINOLoss

    return DINOLoss(num_prototypes)


def lightly_network(arch: str, num_prototypes: int) -> nn.Sequential:
    """Build lightly's head on a ViT of timm's or a ResNet of torchvision's, as its examples do.

    `arch` is a name of models.py; forward maps (b, 3, h, w) to (b, num_prototypes).
    """
    from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM

    if arch in TIMM_NAMES:
        vit = timm.create_model(TIMM_NAMES[arch], dynamic_img_size=True)
        backbone, dim = MaskedVisionTransformerTIMM(vit=vit), vit.embed_dim
    else:
        resnet = torchvision.models.get_model(arch)
        backbone, dim = nn.Sequential(*list(resnet.children())[:-1]), resnet.fc.in_features
    return nn.Sequential(backbone, nn.Flatten(), DINOProjectionHead(dim, output_dim=num_prototypes))


def lightly_augmentation(config: CropConfig) -> Callable:
    """Build lightly's multi-crop of Pillow images."""
    from lightly.transforms import DINOTransform

    return DINOTransform(
        global_crop_size=config.global_crop_size,
        global_crop_scale=config.global_crop_scale,
        local_crop_size=config.local_crop_size,
        local_crop_scale=config.local_crop_scale,
        n_local_views=config.num_local_crops,
        hf_prob=config.flip_probability,
        cj_prob=config.jitter_probability,
        cj_strength=1.0,
        cj_bright=config.brightness,
        cj_contrast=config.contrast,
        cj_sat=config.saturation,
        cj_hue=config.hue,
        random_gray_scale=config.grayscale_probability,
        gaussian_blur=config.blur_probability,
        sigmas=config.blur_sigma,
        solarization_prob=config.solarize_probability[1],
    )


def _lightly_train_transform(config: CropConfig) -> Callable:
    from lightly_train._methods.dino import dino_transform as theirs

    def scales(scale: tuple[float, float]) -> dict[str, float]:
        return {"min_scale": scale[0], "max_scale": scale[1]}

    first, second, local = config.blur_probability
    blur = {"sigmas": config.blur_sigma}
    local_view = theirs.DINOLocalViewTransformArgs(
        num_views=config.num_local_crops,
        view_size=(config.local_crop_size, config.local_crop_size),
        random_resize=theirs.DINOLocalViewRandomResizedCropArgs(**scales(config.local_crop_scale)),
        gaussian_blur=theirs.DINOLocalViewGaussianBlurArgs(prob=local, **blur),
    )
    second_view = theirs.DINOGlobalView1TransformArgs(
        gaussian_blur=theirs.DINOGlobalView1GaussianBlurArgs(prob=second, **blur),
        solarize=theirs.DINOGlobalView1SolarizeArgs(prob=config.solarize_probability[1]),
    )
    jitter = theirs.DINOColorJitterArgs(
        prob=config.jitter_probability,
        strength=1.0,
        brightness=config.brightness,
        contrast=config.contrast,
        saturation=config.saturation,
        hue=config.hue,
    )
    settings = theirs.DINOTransformArgs(
        image_size=(config.global_crop_size, config.global_crop_size),
        num_channels=3,
        random_resize=theirs.DINORandomResizedCropArgs(**scales(config.global_crop_scale)),
        color_jitter=jitter,
        random_gray_scale=config.grayscale_probability,
        gaussian_blur=theirs.DINOGaussianBlurArgs(prob=first, **blur),
        global_view_1=second_view,
        local_view=local_view,
    )
    return theirs.DINOTransform(settings)


class LightlyTrainDataset(Dataset):
    """Paths, each read and cut into crops as lightly-train does."""

    def __init__(self, paths: list[str], config: CropConfig) -> None:
        from lightly_train._data.file_helpers import open_image_numpy

        self.paths, self.read = paths, open_image_numpy
        self.transform = _lightly_train_transform(config)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[Tensor]:
        views = self.transform({"image": self.read(Path(self.paths[index]))})
        return [view["image"] for view in views]
