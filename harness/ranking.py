"""How good a ranking is: the average precision that retrieval and copy detection share."""

import numpy as np


def average_precision(places: np.ndarray, num_positives: int) -> float:
    """Return the area under the precision over the recall, by trapezoids.

    `places` (p,) are the ranks of the positives, ascending from 0. The plain loop:

        for found, place in enumerate(places):
            before = found / place if place else 1
            after = (found + 1) / (place + 1)
            area += (before + after) / num_positives / 2

    Source: the evaluation of revisited Oxford and Paris, which DINO takes over.
    """
    found = np.arange(len(places))
    before = np.where(places == 0, 1.0, found / np.maximum(places, 1))
    after = (found + 1) / (places + 1)
    # cumsum adds in order, as the loop does: np.sum would differ in the last digit
    areas = np.cumsum((before + after) * (1 / num_positives) / 2)
    return areas[-1].item() if len(areas) else 0.0
