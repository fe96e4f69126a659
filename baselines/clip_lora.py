"""CLIP-LoRA: low-rank updates of the queries, keys and values in every block of both towers.

Paper: "Low-Rank Few-Shot Adaptation of Vision-Language Models", CVPR Workshops 2024, arXiv 2405.18541.
Protocol: rank 2, alpha 1, scaling alpha / sqrt(rank) as in the published code, dropout 0.25 on the input of each update; logits
are 100 times the cosine; the first template of the task; AdamW (betas 0.9, 0.999) 2e-4, weight decay 0.01, batch 32; 500 steps
per shot, half a cosine by step down to 1e-6; no validation, the last step is kept. With all training images, which the paper does
not have, as many steps as with its largest number of shots, 16.
Command: `python harness/run.py CONFIG.yaml method=clip_lora data.shots=16`
Expected figure: none is quoted here.

What is drawn for dropout is keyed: for the image tower by the step and the sample, for the text tower by the step and the prompt.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vipbench.harness.config.schema import MethodConfig, Rate
from vipbench.harness.methods.base import Output, Task, TextClassifier
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.lora import add_lora
from vipbench.harness.models.phrases import spoken
from vipbench.harness.models.prompts import PromptBatch
from vipbench.harness.models.stateless_dropout import split_keys
from vipbench.harness.models.tower_view import TowerViews

LOGIT_SCALE = 100.0
STEPS_PER_SHOT, MOST_SHOTS = 500, 16


class CLIPLoRAConfig(MethodConfig):
    """Options of CLIP-LoRA."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 2
    alpha: Rate = 1.0
    dropout: Annotated[float, Field(ge=0, le=0.9)] = 0.25


@register("clip_lora")
class CLIPLoRA(TextClassifier):
    """A class is the text feature of its name in the first template; images and texts go through the updated towers."""

    Config = CLIPLoRAConfig
    needs = "images"
    uses_templates = True

    def __init__(self, config: CLIPLoRAConfig, task: Task, backbone: Backbone) -> None:
        super().__init__(config, task, backbone)
        self.towers = towers = TowerViews(backbone.image, backbone.text)
        settings = (config.rank, config.alpha, config.dropout)
        image, text = add_lora(towers.image, *settings), add_lora(towers.text, *settings)
        self.lora = nn.ModuleDict({"image": image, "text": text})
        texts = [task.templates[0].replace("{}", spoken(name)) for name in task.classes]
        tokens = [backbone.text.tokenize(text) for text in texts]
        self.prompts = PromptBatch(backbone.text, tokens, [f"class {name!r}" for name in task.classes])

    @classmethod
    def recipe(cls, config: Any, shots: int | str, backbone: str) -> Mapping[str, Any]:
        return {
            "optimizer": "adamw",
            "lr": 2e-4,
            "betas": (0.9, 0.999),
            "weight_decay": 0.01,
            "batch_size": 32,
            "epochs": None,
            "steps": STEPS_PER_SHOT * (MOST_SHOTS if shots == "all" else int(shots)),
            "warmup_epochs": 0,
            "schedule": "step",
            "final_lr": 1e-6,
            "select": "last",
        }

    @property
    def logit_scale(self) -> Tensor:
        return torch.full_like(self.backbone.logit_scale, LOGIT_SCALE)

    def forward(self, inputs: Tensor) -> Output:
        features = self.towers.image(inputs, keys=self.drawing.samples if self.drawing else None)
        return super().forward(F.normalize(features.float(), dim=-1))

    def class_features(self) -> Tensor:
        keys = split_keys(self.drawing.step, len(self.task.classes)) if self.drawing and self.config.dropout else None
        return F.normalize(self.towers.text(self.prompts.fixed(keys)).float(), dim=-1)
