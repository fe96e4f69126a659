"""Selective prediction: the risk of answering only where the model is confident (Geifman and El-Yaniv, arXiv 1705.08500)."""

from dataclasses import dataclass

import numpy as np

from vipbench.harness.evaluation.metrics import Predicted


@dataclass(frozen=True)
class RiskCoverage:
    """The share of errors among the most confident samples: risk [N] at coverage [N] = 1/N, 2/N, ..., 1."""

    coverage: np.ndarray
    risk: np.ndarray

    @property
    def aurc(self) -> float:
        """The area under the curve: the mean risk over all coverages (Geifman et al., arXiv 1805.08206)."""
        return float(self.risk.mean())

    def coverage_at(self, risk: float) -> float:
        """The greatest coverage with at most this risk; 0 where there is none."""
        fits = np.flatnonzero(self.risk <= risk)
        return float(self.coverage[fits[-1]]) if len(fits) else 0.0


def risk_coverage(of: Predicted) -> RiskCoverage:
    """The curve by top probability, compared as log-odds; samples of equal confidence share their errors evenly."""
    confidence = of.log_odds.max(axis=1)
    levels, level = np.unique(-confidence, return_inverse=True)
    counts = np.bincount(level)
    errors = np.bincount(level, of.predicted != of.labels)
    ends = np.cumsum(counts)
    taken = np.arange(1, len(confidence) + 1)
    wrong = np.interp(taken, np.concatenate([[0], ends]), np.concatenate([[0.0], np.cumsum(errors)]))
    assert len(levels) == len(ends)
    return RiskCoverage(taken / len(taken), wrong / taken)
