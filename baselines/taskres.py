"""TaskRes: class features are those of the class names plus a learned residual; no tower takes part in the training.

Paper: "Task Residual for Tuning Vision-Language Models", CVPR 2023, arXiv 2211.10277.
Protocol: the base is the mean over templates of the *un-normalised* text features, the residual begins at 0, and their sum is
normalised. Scaling factor alpha 0.5; Adam 2e-3, batch 256; 100 epochs up to 4 shots, 200 above; the last epoch is kept. The
published scripts set alpha 1 for Flowers102, and the rate 2e-4 for ImageNet. They also offer an "enhanced base", a text
projection that was trained before on the same dataset; the base here is their regular one.
Command: `python harness/run.py CONFIG.yaml method=taskres data.shots=16`
Expected figure: none is quoted here; the paper's tables are of natural images.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vipbench.harness.config.schema import MethodConfig, Rate
from vipbench.harness.methods.base import Task, TextClassifier, template_features
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone


class TaskResConfig(MethodConfig):
    """Options of TaskRes."""

    alpha: Rate = 0.5  # that the residual is multiplied with


@register("taskres")
class TaskRes(TextClassifier):
    """Class features base + alpha x, L2-normalised."""

    Config = TaskResConfig
    uses_templates = True
    base: Tensor  # [C, d]

    def __init__(self, config: TaskResConfig, task: Task, backbone: Backbone) -> None:
        super().__init__(config, task, backbone)
        base = template_features(task, backbone, normalise=False).mean(dim=1)
        self.register_buffer("base", base, persistent=False)
        self.residual = nn.Parameter(torch.zeros_like(base))  # x [C, d]

    @classmethod
    def recipe(cls, config: Any, shots: int | str, backbone: str) -> Mapping[str, Any]:
        epochs = 200 if shots == "all" or int(shots) > 4 else 100
        return {"optimizer": "adam", "lr": 0.002, "batch_size": 256, "epochs": epochs, "select": "last"}

    @property
    def per_class(self) -> bool:
        return True

    def class_features(self) -> Tensor:
        return F.normalize(self.base + self.config.alpha * self.residual, dim=-1)
