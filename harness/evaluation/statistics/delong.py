"""DeLong's variance and covariance of binary AUROCs (DeLong et al. 1988), with clusters that of Obuchowski (1997)."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata


def delong(
    scores: Sequence[np.ndarray], positive: np.ndarray, clusters: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """AUROCs [S] of several scores of the same samples, and their covariance [S, S]; NaN with under two positives or negatives.

    The placements of positives among negatives and of negatives among positives come from midranks (Sun and Xu 2014).

    Args:
        scores: [N] each. positive: [N] bool. clusters: [N] int, whose samples may depend on each other; None: none do.
    """
    above = np.stack([_placements(score[positive], score[~positive]) for score in scores])  # [S, positives]
    below = np.stack([1 - _placements(score[~positive], score[positive]) for score in scores])  # [S, negatives]
    areas = above.mean(axis=1)
    codes = np.arange(len(positive)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    sums_of_positives, with_positives = _cluster_sums(above - areas[:, None], codes[positive], codes)
    sums_of_negatives, with_negatives = _cluster_sums(below - areas[:, None], codes[~positive], codes)
    if min(with_positives, with_negatives) < 2:
        return areas, np.full((len(scores), len(scores)), np.nan)
    sums_of_positives, sums_of_negatives = sums_of_positives / above.shape[1], sums_of_negatives / below.shape[1]
    number = int(codes.max()) + 1
    crossed = sums_of_positives @ sums_of_negatives.T * number / (number - 1)
    return areas, (
        sums_of_positives @ sums_of_positives.T * with_positives / (with_positives - 1)
        + sums_of_negatives @ sums_of_negatives.T * with_negatives / (with_negatives - 1)
        + crossed
        + crossed.T
    )


def _placements(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The share of other scores below each own score, ties counted half."""
    together = rankdata(np.concatenate([own, others]))[: len(own)]
    return np.asarray((together - rankdata(own)) / len(others))


def _cluster_sums(values: np.ndarray, codes: np.ndarray, all_codes: np.ndarray) -> tuple[np.ndarray, int]:
    """Sums [S, M] of values [S, n] by cluster, and the number of clusters that hold any."""
    number = int(all_codes.max()) + 1
    return np.stack([np.bincount(codes, row, number) for row in values]), len(np.unique(codes))
