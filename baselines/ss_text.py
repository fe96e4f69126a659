"""SS-Text and SS-Text+: a linear probe in closed form, held near the text features; no training, no validation data.

Papers: SS-Text is of "Full Conformal Adaptation of Medical Vision-Language Models", IPMI 2025; SS-Text+ of "Few-Shot, Now for
Real: Medical VLMs Adaptation without Balanced Sets or Validation", MICCAI 2025, arXiv 2506.17500.
Protocol: the image features as evaluated, no augmentation; tau = 1 / the model's logit scale. SS-Text pulls all classes to
their text features with the same lambda_c = 1 / N. SS-Text+ has lambda_c = 1 / N_c (N_c of N images are of class c), which pulls
classes of many images less, and then moves each class away from the mean of all. A class without images keeps its text feature.
The published code takes the features as an encoder gives them: normalised with FLAIR and ConVIRT, not so with CONCH. Here all are
normalised, and the text feature is the mean over templates of normalised ones. That code also keeps lambda_c at 1e-3 or above,
which changes it beyond 1000 images; here it is as defined.
Command: `python harness/run.py CONFIG.yaml method=ss_text_plus data.shots=16`
Expected figure: none is quoted here; the paper's tables could not be had.

    w_c = t_c + 1 / (N lambda_c tau) sum over the images of class c of f         logits = <f, w_c / |w_c|> / tau
    "+": w_c - u_c         u_c is 2 w_c - mean over classes of w, normalised
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vipbench.harness.config.schema import MethodConfig
from vipbench.harness.methods.base import Support, SupportViews, Task, TextClassifier, template_features
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone


@register("ss_text")
class SSText(TextClassifier):
    """Text features plus the sum of each class's image features, fitted in `prepare`."""

    Config = MethodConfig
    trains = False
    uses_templates = True
    plus: ClassVar[bool] = False
    weight: Tensor  # w [C, d]

    def __init__(self, config: MethodConfig, task: Task, backbone: Backbone) -> None:
        super().__init__(config, task, backbone)
        self.register_buffer("weight", template_features(task, backbone).mean(dim=1))  # t until `prepare`

    @classmethod
    def support(cls, config: Any) -> SupportViews:
        return SupportViews(0)

    @property
    def per_class(self) -> bool:
        return True

    def prepare(self, support: Support, validation: Support | None) -> None:
        labels = torch.eye(len(self.task.classes), device=support.labels.device)[support.labels]  # [N, C]
        pulls = labels.mean(dim=0)[:, None] if self.plus else 1.0  # 1 / (N lambda_c)
        self.weight += pulls * self.logit_scale * (labels.T @ support.features[0])
        if self.plus:
            self.weight -= F.normalize(2 * self.weight - self.weight.mean(dim=0), dim=-1)

    def class_features(self) -> Tensor:
        return F.normalize(self.weight, dim=-1)


@register("ss_text_plus")
class SSTextPlus(SSText):
    """SS-Text for classes of unequal numbers of images."""

    plus = True
