import math

import pytest
import torch

from harness.feature_quality import evenly, feature_quality


def test_rank_is_the_number_of_directions_in_use() -> None:
    axes = torch.linalg.qr(torch.randn(16, 16)).Q
    for rank in (1, 3, 16):  # as many orthogonal directions, of the same size
        features = axes[:rank].repeat(16, 1)
        quality = feature_quality(features)
        assert quality["rankme"] == pytest.approx(rank, rel=1e-3)
    assert feature_quality(torch.ones(50, 8))["rankme"] == pytest.approx(1, rel=1e-3)


def test_rank_and_shares_against_their_formulas() -> None:
    features = torch.randn(60, 12) * torch.arange(1, 13)
    quality = feature_quality(features)
    values = torch.linalg.svdvals(features.double()).tolist()
    shares = [value / sum(values) + 1e-7 for value in values]
    entropy = -sum(share * math.log(share) for share in shares)
    assert quality["rankme"] == pytest.approx(math.exp(entropy))
    variances = torch.linalg.eigvalsh(torch.cov(features.double().T)).flip(0)
    for k, share in quality["variance_share"].items():
        assert share == pytest.approx((variances[:k].sum() / variances.sum()).item())
    assert list(quality["variance_share"]) == [1, 10]


def test_quality_of_many_images_is_that_of_some() -> None:
    features = torch.randn(60_000, 4)
    rows = evenly(60_000)
    assert len(rows) == 25_600 and rows[0] == 0 and rows[-1] == 59_999
    assert set(rows.diff().tolist()) == {2, 3}
    assert feature_quality(features) == feature_quality(features[rows])
    assert torch.equal(evenly(9), torch.arange(9))


def test_rank_of_what_is_not_finite_is_nan() -> None:
    features = torch.randn(60, 8)
    features[3, 4] = math.inf
    quality = feature_quality(features)
    assert math.isnan(quality["rankme"]) and quality["variance_share"] == {}
