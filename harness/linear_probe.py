"""A linear probe of features that are computed already: logistic regression, fitted to its minimum.

    top1 = probe_accuracy(train_features, train_labels, test_features, test_labels)

One convex problem with one solution: no learning rate, no epochs, no chance. Axes: n train images,
m test images, d features, c classes.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

WEIGHT_PENALTY = 1e-3  # times half of the weights' squares, added to the mean cross-entropy
MOST_ITERATIONS = 200


def num_classes_of(train_labels: Tensor, test_labels: Tensor) -> int:
    """Return how many classes labels from 0 on tell of; NumPy's arrays will do, too."""
    return int(max(train_labels.max(), test_labels.max())) + 1


class LogisticRegression:
    """A linear classifier of standardised features: weight (c, d + 1), its last column the bias.

    Deterministic, and no gradient goes back to the features.
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        """Fit features (n, d) to labels (n,) by L-BFGS, from weights of 0."""
        self.std, self.mean = torch.std_mean(features.detach().float(), dim=0, correction=0)
        self.std = self.std.clamp(min=1e-6)  # a feature that is always the same says nothing
        inputs = self._inputs(features)
        self.weight = torch.zeros(num_classes, inputs.shape[1], device=inputs.device)
        self.weight.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [self.weight],
            max_iter=MOST_ITERATIONS,
            tolerance_grad=1e-5,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = self.objective(inputs, labels)
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        self.weight.requires_grad_(False)

    def _inputs(self, features: Tensor) -> Tensor:
        """Return features standardised as those that were fitted, with a column of ones."""
        standardised = (features.detach().float() - self.mean) / self.std
        return F.pad(standardised, (0, 1), value=1.0)

    def objective(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return what is minimised: mean cross-entropy and penalty, none on the bias."""
        penalty = 0.5 * WEIGHT_PENALTY * self.weight[:, :-1].square().sum()
        return F.cross_entropy(inputs @ self.weight.T, labels) + penalty

    def predict(self, features: Tensor) -> Tensor:
        """Return the likeliest class (m,) of features (m, d)."""
        return (self._inputs(features) @ self.weight.T).argmax(dim=1)


def probe_accuracy(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> float:
    """Return top-1 in % on test features (m, d) of a probe fitted to train features (n, d).

    It is nan where train features are not finite, which have no probe.
    """
    if not train_features.isfinite().all():
        return math.nan
    num_classes = num_classes_of(train_labels, test_labels)
    probe = LogisticRegression(train_features, train_labels, num_classes)
    num_right = int((probe.predict(test_features) == test_labels).sum())
    return 100 * num_right / len(test_labels)
