"""CLAP: a linear probe that starts at the text features and is held near them, class by class; no validation data.

Paper: "A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models", CVPR 2024, arXiv 2312.12730.
Protocol: weights w start at the mean over templates of the *un-normalised* text features t. The penalty's weight of a class,
lambda_c, is the mean probability that zero-shot CLIP gives it on its own training images, over 20 augmented views (crop scale
0.08 to 1, flip); these 20 views are what is trained on. SGD 0.1, momentum 0.9, no weight decay, batch 256, 300 epochs of Dassl's
schedule (one warm-up epoch at 1e-5, then a cosine); the last epoch is kept.
The published code mixes the views, so that a batch holds up to 256 views of fewer images; here an epoch shows one view of each
image, the 20 in turn, and takes as many steps. The paper derives lambda_c from an augmented Lagrangian method, whose outer step
would go on updating it; the published command ("l2") never takes that step, and is what is followed. For a class without
images the published code has 0 / 0; here its lambda_c is the mean of the others, as in the authors' later code (jusiro/SS-Text).
Command: `python harness/run.py CONFIG.yaml method=clap data.shots=16`
Expected figure: none is quoted here; the paper's tables could not be had.

    logits = scale <f, w_c / |w_c|>         loss = cross-entropy + mean over classes of lambda_c |w_c - t_c|^2
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vipbench.harness.config.schema import MethodConfig
from vipbench.harness.methods.base import (
    Output,
    Support,
    SupportViews,
    Task,
    TextClassifier,
    cosine_logits,
    template_features,
)
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone

VIEWS = SupportViews(20)


@register("clap")
class CLAP(TextClassifier):
    """A linear probe on normalised weights, with a penalty per class."""

    Config = MethodConfig
    uses_templates = True
    text: Tensor  # t [C, d], un-normalised
    penalties: Tensor  # lambda [C]

    def __init__(self, config: MethodConfig, task: Task, backbone: Backbone) -> None:
        super().__init__(config, task, backbone)
        text = template_features(task, backbone, normalise=False).mean(dim=1)
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("penalties", torch.zeros(len(task.classes)), persistent=False)
        self.weight = nn.Parameter(text.clone())  # w [C, d]

    @classmethod
    def recipe(cls, config: Any, shots: int | str, backbone: str) -> Mapping[str, Any]:
        plain = {"lr": 0.1, "batch_size": 256, "epochs": 300, "weight_decay": 0.0, "select": "last"}
        return {**plain, "views": VIEWS.number}

    @classmethod
    def support(cls, config: Any) -> SupportViews:
        return VIEWS

    @property
    def per_class(self) -> bool:
        return True

    def prepare(self, support: Support, validation: Support | None) -> None:
        zero_shot = cosine_logits(self.logit_scale, support.features.flatten(0, 1), F.normalize(self.text, dim=-1))
        labels = support.labels.repeat(len(support.features))
        own = torch.eye(len(self.task.classes), device=labels.device)[labels]  # [V N, C]
        counts = own.sum(dim=0)
        found = (zero_shot.softmax(dim=1) * own).sum(dim=0) / counts
        self.penalties.copy_(torch.where(counts > 0, found, found[counts > 0].mean()))

    def class_features(self) -> Tensor:
        return F.normalize(self.weight, dim=-1)

    def losses(self, output: Output, labels: Tensor) -> dict[str, Tensor]:
        penalty = (self.penalties * (self.weight - self.text).square().sum(dim=-1)).mean()
        return {**super().losses(output, labels), "penalty": penalty}
