"""Zero-shot classification with fixed texts of each class: nothing is trained, only the texts differ from method to method."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vipbench.harness.methods.base import Task, TextClassifier
from vipbench.harness.models.backbone import Backbone

Texts = Sequence[Sequence[str]]  # of each class


def unit_features(backbone: Backbone, classes: Sequence[str], texts: Texts) -> tuple[Tensor, ...]:
    """L2-normalised features [S, d] of each class's texts. Raises UserError for a text that is too long (names it)."""
    every = [text for own in texts for text in own]
    names = [f"class {name!r}, text {text!r}" for name, own in zip(classes, texts, strict=True) for text in own]
    return F.normalize(backbone.text.encode_texts(every, names), dim=-1).split([len(own) for own in texts])


class FixedTexts(TextClassifier):
    """Classification by the texts of each class. The score of a class is the mean of the cosines with its texts.

    Args:
        mean_feature: the score is the cosine with the mean of the texts' normalised features instead.
    """

    trains = False
    fixed_features: Tensor  # [C, d]

    def __init__(self, config: Any, task: Task, backbone: Backbone, texts: Texts, mean_feature: bool = False) -> None:
        super().__init__(config, task, backbone)
        self.mean_feature = mean_feature
        self.register_buffer("fixed_features", None, persistent=False)
        self.set_texts(texts)

    def set_texts(self, texts: Texts) -> None:
        """Classify by these texts from now on."""
        means = torch.stack([own.mean(dim=0) for own in unit_features(self.backbone, self.task.classes, texts)])
        self.fixed_features = F.normalize(means, dim=-1) if self.mean_feature else means

    def class_features(self) -> Tensor:
        """Features [C, d], of which the product with an image feature is the score."""
        return self.fixed_features
