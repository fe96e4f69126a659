"""Selective prediction: the risk of answering only where the model is confident (Geifman and El-Yaniv, arXiv 1705.08500).

The area under the curve is the metric `aurc`.
"""

from dataclasses import dataclass

import numpy as np

from vipbench.harness.evaluation.metrics import Predicted, selective_risks


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
    """The curve of predictions, the most confident ones first."""
    risk = selective_risks(of)
    return RiskCoverage(np.arange(1, len(risk) + 1) / len(risk), risk)
