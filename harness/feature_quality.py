"""Judge features without labels: RankMe, and how few components hold their variance.

Source: RankMe, arXiv 2210.02885. Axes: n images, d features.
"""

import math

import torch
from torch import Tensor

RANKME_IMAGES = 25_600  # as many as its authors took


def evenly(num: int, most: int = RANKME_IMAGES) -> Tensor:
    """Return at most `most` of the rows 0 to num - 1, evenly spaced."""
    return torch.linspace(0, num - 1, min(num, most), dtype=torch.float64).long()


def _some_in_float64(features: Tensor) -> Tensor:
    """Return at most RANKME_IMAGES of features (n, d), evenly spaced."""
    features = features[evenly(len(features)).to(features.device)]
    # Apple's GPUs know no float64
    return features.cpu().double() if features.device.type == "mps" else features.double()


def _rank_me(features: Tensor) -> float:
    """Return RankMe of finite features (n, d) float64: the number of dimensions in use.

    It is exp of the entropy of the singular values' shares, 1 for a collapsed network.
    """
    values = torch.linalg.svdvals(features)
    shares = values / values.sum().clamp(min=1e-300) + 1e-7
    return (-(shares * shares.log()).sum()).exp().item()


@torch.no_grad()
def feature_quality(features: Tensor) -> dict[str, object]:
    """Return RankMe of features (n, d), and the leading components' shares of their variance.

    Of at most RANKME_IMAGES, which are copied to float64 once. Features that are not finite have a
    RankMe of nan, and no shares.
    """
    features = _some_in_float64(features)
    if not features.isfinite().all():  # of which there are no singular values
        return {"rankme": math.nan, "variance_share": {}}
    rankme = _rank_me(features)
    centred = features - features.mean(dim=0)
    # of the covariance, times n: a quarter of the time that singular values would take
    variances = torch.linalg.eigvalsh(centred.T @ centred).flip(0).clamp(min=0)
    shares = variances.cumsum(dim=0) / variances.sum().clamp(min=1e-300)
    ks = [k for k in (1, 10, 100) if k <= min(features.shape)]
    return {"rankme": rankme, "variance_share": {k: shares[k - 1].item() for k in ks}}
