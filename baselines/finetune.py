"""Fine-tuning: a linear head on the image tower, whose last block or all of whose weights are trained with it.

Paper: none. It is the supervised reference of a table, and all that follows is this project's own choice, tuned on no dataset.
Protocol: the head stands on the tower's un-normalised features and starts at zero, so that all classes are equally likely at
first and no seed decides; AdamW 1e-3 for the head and a hundredth of that for the tower (`tower_rate`), eps 1e-6, weight decay
0.01, batch 32, half a cosine by step to 0; 50 epochs on all training images, the best by validation accuracy is kept; with a
number of shots 100 epochs, of which the last is kept.
Command: `python harness/run.py CONFIG.yaml method=finetune method.blocks=all`
Expected figure: none; none was published for this protocol.

From ImageNet: `method.tower=resnet50.a1_in1k` takes timm's model and weights in the place of the backbone's image tower (from
timm's hub, or `method.weights=FILE`), at the backbone's image size, with pixels normalised as that model expects. The hub was not
tried here; files were, with random weights.

The tower stays in evaluation mode: no dropout, and batch norms keep their statistics, so that a run is the same on any number of
processes. eps keeps still what has gradients of rounding errors only, such as a bias of keys.

What is learned is large, 4 bytes for each trained weight (ViT-B/16: 32 MB or 345 MB), and three times that in a checkpoint.
With `blocks: all` activations of the whole tower are kept; `run.micro_batch` bounds them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from vipbench.harness.config.schema import MethodConfig, Rate, expand_home
from vipbench.harness.methods.base import Method, Output, Task
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.timm_tower import TimmTower
from vipbench.harness.models.trained_tower import Part, trained_view

FULL: dict[str, Any] = {"epochs": 50, "select": "best"}
FEW_SHOT: dict[str, Any] = {"epochs": 100, "select": "last"}


class FinetuneConfig(MethodConfig):
    """Options of fine-tuning."""

    blocks: Part = "last"
    tower: Annotated[str, Field(min_length=1, max_length=200)] | None = None  # of timm; None: the backbone's
    weights: Annotated[Path | None, BeforeValidator(expand_home)] = None  # of that tower; None: those of timm's hub
    tower_rate: Rate = 0.01  # the tower's learning rate over the head's

    @model_validator(mode="after")
    def _settle_options(self) -> "FinetuneConfig":
        if self.weights and not self.tower:
            raise ValueError("weights has no effect without a tower of timm; leave it out, or give method.tower")
        return self

    def files(self) -> dict[str, Path]:
        return {"weights": self.weights} if self.weights else {}


@register("finetune")
class Finetune(Method):
    """Logits are a linear map of the trained tower's features."""

    Config = FinetuneConfig
    needs = "images"

    def __init__(self, config: FinetuneConfig, task: Task, backbone: Backbone) -> None:
        super().__init__(config, task, backbone)
        timm_tower = TimmTower(config.tower, config.weights, backbone) if config.tower else None
        self.tower = trained_view(timm_tower or backbone.image, config.blocks).eval()
        self.head = nn.Linear(timm_tower.dim if timm_tower else backbone.dim, len(task.classes), device="cpu")
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def recipe(cls, config: Any, shots: int | str, backbone: str) -> Mapping[str, Any]:
        return {
            "optimizer": "adamw",
            "lr": 1e-3,
            "eps": 1e-6,
            "weight_decay": 0.01,
            "batch_size": 32,
            "warmup_epochs": 0,
            "schedule": "step",
            **(FULL if shots == "all" else FEW_SHOT),
        }

    @property
    def per_class(self) -> bool:
        return True

    def train(self, mode: bool = True) -> "Finetune":
        self.training = mode  # not the tower's, whose hundreds of modules no step should visit; a head has no modes
        return self

    def parameter_groups(self) -> list[dict[str, Any]]:
        tower = [parameter for parameter in self.tower.parameters() if parameter.requires_grad]
        return [{"params": tower, "lr_factor": self.config.tower_rate}, {"params": list(self.head.parameters())}]

    def forward(self, inputs: Tensor) -> Output:
        features = self.tower(inputs).float()
        with torch.autocast(features.device.type, enabled=False):
            return Output(self.head(features))
