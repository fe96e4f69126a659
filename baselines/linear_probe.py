"""Linear probe: logistic regression on the frozen image features.

Paper: "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), arXiv 2103.00020, appendix A.3.
Protocol: scikit-learn's L-BFGS (at most 1000 iterations, L2 penalty, an intercept) on the L2-normalised features of the
images as evaluated. C, the inverse of the penalty's strength, is chosen by validation accuracy, as CoOp's repository does it
for few shots: the best of 1e6, 1e4 .. 1e-6 (of equal ones the largest), then 8 steps between a tenth and ten times that. Each
step compares the two ends of the interval, goes on with the half (of log C) at the better end, the lower one of equal ones,
and the better end of the last step is kept. Without a validation split C is 1, scikit-learn's default.
Command: `python harness/run.py CONFIG.yaml method=linear_probe data.shots=16`
Expected figure: accuracy 69.40 at 16 shots, 47.25 at 1 (BiomedCLIP, mean of 11 medical datasets and 3 seeds, as reported by
the BiomedCoOp repository). Not reproduced here: neither those weights nor the data could be had.
"""

import logging
import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from vipbench.harness.config.schema import MethodConfig, Rate
from vipbench.harness.methods.base import Method, Output, Support, SupportViews, Task, check_every_class
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.system.devices import to_host

log = logging.getLogger(__name__)

ITERATIONS = 1000
CANDIDATES = (1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6)
STEPS = 8


class LinearProbeConfig(MethodConfig):
    """Options of the linear probe."""

    c: Rate | None = None  # inverse of the penalty's strength; None: chosen on validation


@register("linear_probe")
class LinearProbe(Method):
    """logits = W f + b, fitted in `prepare`."""

    Config = LinearProbeConfig
    trains = False
    weight: Tensor  # [C, d]
    bias: Tensor  # [C]

    def __init__(self, config: LinearProbeConfig, task: Task, backbone: Backbone) -> None:
        super().__init__(config, task, backbone)
        self.register_buffer("weight", torch.zeros(len(task.classes), backbone.dim))
        self.register_buffer("bias", torch.zeros(len(task.classes)))

    @classmethod
    def support(cls, config: Any) -> SupportViews:
        return SupportViews(0)

    @property
    def per_class(self) -> bool:
        return True

    def prepare(self, support: Support, validation: Support | None) -> None:
        check_every_class(self.config.name, self.task, support)
        features, labels = _arrays(support)

        @cache
        def fit(c: float) -> LogisticRegression:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol bounds the iterations
                return LogisticRegression(C=c, max_iter=ITERATIONS).fit(features, labels)

        c = self.config.c or 1.0
        if validation is not None and self.config.c is None:
            held_out, expected = _arrays(validation)
            c = choose_c(lambda candidate: float(np.mean(fit(candidate).predict(held_out) == expected)))
        model = fit(c)
        log.info("linear_probe: C = %.3g, %d iterations of L-BFGS (at most %d)", c, model.n_iter_.max(), ITERATIONS)
        weight, bias = (torch.from_numpy(found) for found in (model.coef_, model.intercept_))
        if len(self.task.classes) == 2:  # scikit-learn fits one vector w there: the classes' logits differ by w f + b
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        self.weight.copy_(weight)
        self.bias.copy_(bias)

    def forward(self, inputs: Tensor) -> Output:
        with torch.autocast(inputs.device.type, enabled=False):
            return Output(inputs.float() @ self.weight.T + self.bias)


def choose_c(accuracy: Callable[[float], float]) -> float:
    """C of high validation accuracy, by the search that the module's docstring describes."""
    peak = math.log10(max(CANDIDATES, key=accuracy))
    low, high, best = peak - 1, peak + 1, peak
    for _ in range(STEPS):
        middle = (low + high) / 2
        if accuracy(10**low) < accuracy(10**high):
            best, low = high, middle
        else:
            best, high = low, middle
    return float(10**best)


def _arrays(samples: Support) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, d] float64 and labels [N] int64 of the first view, on the CPU."""
    return to_host(samples.features[0]).double().numpy(), to_host(samples.labels).long().numpy()
