"""CLIP-Adapter: a bottleneck on the image feature whose output is mixed with what went in.

Paper: "CLIP-Adapter: Better Vision-Language Models with Feature Adapters", IJCV 2024, arXiv 2110.04544.
Protocol: d -> d / 4 -> d without biases, a ReLU after both layers, as the published code has it.

- `variant: original`, of the authors' repository: on the *un-normalised* image feature, mixed in at ratio 0.2, then normalised.
  It comes without a recipe and refers to CoOp's, which is followed: SGD 0.002, batch 32, 50, 100 or 200 epochs by shots, the
  last one kept.
- `variant: normalised`, of the repositories of LP++ and BiomedCoOp, whose figures medical tables show: on the normalised feature,
  at ratio 0.5, *not* normalised again. SGD 0.01 without momentum and weight decay, batch 32, 20 epochs, crop scale 0.5 to 1.
  Their code steps a schedule of 20 epochs after every batch, so that the rate rises again where an epoch has several; here it
  goes by epochs, warm-up included. The one loads a best epoch that it never saved, the other saves it and never loads it: here
  the last epoch is kept, or with train.select=best the best on validation.

Command: `python harness/run.py CONFIG.yaml method=clip_adapter data.shots=16`
Expected figure: accuracy 46.69 at 16 shots, 44.66 at 1, of the normalised variant (BiomedCLIP, mean of 11 medical datasets and 3
seeds, as reported by the BiomedCoOp repository). Not reproduced here: neither those weights nor the data could be had.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from vipbench.baselines.coop import epochs_for
from vipbench.harness.config.schema import MethodConfig
from vipbench.harness.methods.base import Method, Output, Task, class_name_features, cosine_logits
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone

REDUCTION = 4
RATIOS = {"original": 0.2, "normalised": 0.5}


class CLIPAdapterConfig(MethodConfig):
    """Options of CLIP-Adapter."""

    variant: Literal["original", "normalised"] = "original"  # the authors', or LP++'s and BiomedCoOp's
    ratio: Annotated[float, Field(gt=0, le=1)] | None = None  # of the adapter's output; that of the variant by default

    @model_validator(mode="after")
    def _settle_options(self) -> Self:
        self.settle("ratio", True, RATIOS[self.variant], "")
        return self


@register("clip_adapter")
class CLIPAdapter(Method):
    """Zero-shot classification of adapted image features."""

    Config = CLIPAdapterConfig
    uses_templates = True
    needs = "unnormalised"
    text: Tensor  # [C, d], text features of the class names in the task's templates

    def __init__(self, config: CLIPAdapterConfig, task: Task, backbone: Backbone) -> None:
        super().__init__(config, task, backbone)
        hidden = max(1, backbone.dim // REDUCTION)
        down, up = nn.Linear(backbone.dim, hidden, bias=False), nn.Linear(hidden, backbone.dim, bias=False)
        self.adapter = nn.Sequential(down, nn.ReLU(), up, nn.ReLU())
        self.register_buffer("text", class_name_features(task, backbone), persistent=False)

    @classmethod
    def recipe(cls, config: Any, shots: int | str, backbone: str) -> Mapping[str, Any]:
        if config.variant == "original":
            return {"lr": 0.002, "batch_size": 32, "epochs": epochs_for(shots), "select": "last"}
        plain = {"optimizer": "sgd", "lr": 0.01, "momentum": 0.0, "weight_decay": 0.0}
        return {**plain, "batch_size": 32, "epochs": 20, "select": "last", "crop_scale": (0.5, 1.0)}

    def forward(self, inputs: Tensor) -> Output:
        original, ratio = self.config.variant == "original", self.config.ratio
        with torch.autocast(inputs.device.type, enabled=False):
            features = inputs.float() if original else F.normalize(inputs.float(), dim=-1)
            mixed = ratio * self.adapter(features) + (1 - ratio) * features
            adapted = F.normalize(mixed, dim=-1) if original else mixed
        return Output(cosine_logits(self.backbone.logit_scale, adapted, self.text))
