"""VPT: visual prompt tuning of CLIP's image tower, shallow or deep; the classes are texts as they are.

Paper: "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119, which trains a linear head beside the prompts. Followed is what tables
of CLIP mean by VPT: the trainer of that name in MaPLe's repository (arXiv 2210.03117), where a class is the text feature of its
name, and the prompts N(0, 0.02) have neither dropout nor a projection.
Protocol: 8 vectors before each of blocks 1 to 12 (`depth: 12`, deep; `depth: 1` is shallow: they enter once, and what the blocks
make of them stays); "a photo of a <class name>."; SGD 0.0025, batch 4, 5 epochs, of which the last is kept.
Command: `python harness/run.py CONFIG.yaml method=vpt data.shots=16`, shallow with `method.depth=1`
Expected figure: none is known for medical images. MaPLe's repository reports 80.24 % on base and 73.43 % on novel classes (deep,
CLIP ViT-B/16, 16 shots, mean of 11 datasets of natural images); not reproduced here.

    [CLS] <patches> P_0    before block 0: without positions, through the norm before the blocks (ln_pre)
    [CLS] <patches> P_i    before blocks i = 1 .. depth - 1, in the place of what was there, without that norm
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vipbench.harness.config.schema import MethodConfig
from vipbench.harness.methods.base import Output, Task, TextClassifier, template_features
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.deep_prompts import random_prompts
from vipbench.harness.models.tower_view import TowerViews, check_depth


class VPTConfig(MethodConfig):
    """Options of VPT."""

    depth: Annotated[int, Field(ge=1, le=1000)] = 12  # blocks that have prompts of their own; 1: VPT-shallow
    prompts: Annotated[int, Field(ge=1, le=1000)] = 8  # vectors before a block


@register("vpt")
class VPT(TextClassifier):
    """Prompts in the image tower; a class is the text feature of its name in the first template."""

    Config = VPTConfig
    needs = "images"
    uses_templates = True
    anchors: Tensor  # [C, d]

    def __init__(self, config: VPTConfig, task: Task, backbone: Backbone) -> None:
        super().__init__(config, task, backbone)
        self.towers = TowerViews(backbone.image, backbone.text)
        check_depth(config.depth, self.towers.image)
        self.prompts = random_prompts(config.depth, config.prompts, self.towers.image.width)
        self.register_buffer("anchors", template_features(task, backbone, task.templates[:1])[:, 0], persistent=False)

    @classmethod
    def recipe(cls, config: Any, shots: int | str, backbone: str) -> Mapping[str, Any]:
        return {"lr": 0.0025, "batch_size": 4, "epochs": 5, "select": "last"}

    def forward(self, inputs: Tensor) -> Output:
        features = self.towers.image(inputs, list(self.prompts))
        return super().forward(F.normalize(features.float(), dim=-1))

    def class_features(self) -> Tensor:
        return self.anchors
